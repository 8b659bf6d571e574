"""A step of a bfloat16 model against one in float32, with PyTorch's products of matrices and then with ours, which are
for CPUs without instructions for bfloat16; forward and backward, all parameters.

python benchmarks/products.py --model MODEL [--threads 1] [--repeats 5]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import finish, ratio

from peertune.config import ModelSection
from peertune.model import norm, products
from peertune.model.load import load_model

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model, such as english-4m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 96], help="sequences, and tokens of each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = products.are_native()
    products.are_native = lambda: True  # loading leaves PyTorch's own in place
    work = {dtype: step_of(options.model, dtype, *options.batch) for dtype in ("bfloat16", "float32")}
    compare = partial(ratio, work, options.repeats, CPU, "bfloat16", "float32")
    figures: dict[str, Any] = {**vars(options), "model": options.model.name, "bfloat16_is_native": native}
    figures["pytorch"] = compare()
    products.widen()
    figures["widened"] = compare()
    finish("products", figures)


def step_of(path: Path, dtype: Any, batch: int, length: int) -> partial[None]:
    model = load_model(ModelSection(path=str(path), dtype=dtype, max_length=length), CPU)
    norm.take_over(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = torch.randint(3, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    return partial(step, model, tokens)


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


if __name__ == "__main__":
    main()
