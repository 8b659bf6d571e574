"""A training step with LoRA on all linear layers: its layers computed by us against computed by peft.

    python benchmarks/lora.py [--threads 1] [--repeats 25] [--model FOLDER]

"full" is a step of the same model without an adapter; "in 4 bits" is the base. Forward and backward of one batch, every
token a target.
"""

from __future__ import annotations

import argparse
import operator
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import finish, interleaved

from peertune.config import AlgorithmConfig, ModelSection
from peertune.data.batches import Batch
from peertune.model import lora
from peertune.model.adapters import add_adapter
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_model

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
BATCHES = {"8 x 96 tokens": (8, 96), "4 x 64 tokens": (4, 64)}
CPU = torch.device("cpu")
IN_4_BITS = ("ours, in 4 bits", "peft, in 4 bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {**vars(options), "model": options.model.name}
    for dtype in ("bfloat16", "float32"):
        models = {name: make(options, dtype, name) for name in ("full", "peft", "ours", *IN_4_BITS)}
        for label, shape in BATCHES.items():
            ids = torch.randint(5, 1000, shape, generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            batch = Batch(ids, mask, mask.bool(), tuple(range(len(ids))))
            work = {name: partial(model.backward, batch, 1) for name, model in models.items()}
            for run in work.values():
                run()
            times = interleaved(work, options.repeats, CPU)
            figures[f"{dtype}, {label}"] = {
                **times,
                "ours_over_peft_cpu": times["ours"]["cpu_s"] / times["peft"]["cpu_s"],
                "ours_over_full_cpu": times["ours"]["cpu_s"] / times["full"]["cpu_s"],
                "ours_over_peft_in_4_bits_cpu": operator.truediv(*(times[name]["cpu_s"] for name in IN_4_BITS)),
            }
    finish("lora", figures)


def make(options: argparse.Namespace, dtype: Any, name: str) -> LanguageModel:
    section = ModelSection(path=str(options.model), dtype=dtype, quantization="4bit" if name in IN_4_BITS else "none")
    module: Any = load_model(section, CPU)
    if name == "full":
        module.requires_grad_(True)
    else:
        module = add_adapter(module, AlgorithmConfig(adapter="lora", rank=options.rank), 0)
    taking_over = lora.take_over
    if name.startswith("peft"):
        lora.take_over = lambda module: None
    try:
        return LanguageModel(module, section)
    finally:
        lora.take_over = taking_over


if __name__ == "__main__":
    main()
