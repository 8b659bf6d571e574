"""A training step on real texts without their padding, and several peers' LoRA steps as one call.

    python benchmarks/packing.py [--threads 1] [--repeats 9] [--model FOLDER]

"padded" and "packed": forward and backward of batches of 8 rows, cut at 96 tokens, the label's tokens being the
targets; "tokens" is their share of a padded batch's places. As in a run, no batch comes twice. "in turn" and
"together": one step of each of 8 peers with LoRA of rank 8 on one base, 4 x 64 tokens each, all of them targets.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _harness import finish, ratio

from peertune.algorithms import METHODS
from peertune.config import AlgorithmConfig, ModelSection
from peertune.data.batches import Batch, Batches
from peertune.model.adapters import adapter_names, add_adapter
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_model
from peertune.model.stacked import StackedModels
from peertune.prepare import prepare_data
from peertune.recipe import load_recipe

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
CPU = torch.device("cpu")
NUM_BATCHES, PEERS = 8, 8
"""Of a measurement."""
DTYPES: list[Any] = ["bfloat16", "float32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    parser.add_argument("--data", nargs="+", default=["agnews", "fpb", "sst2", "20news"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_batches = NUM_BATCHES * (options.repeats + 1)
    batches = {name: batches_of(name, options.model, num_batches) for name in options.data}
    figures: dict[str, Any] = {**vars(options), "model": options.model.name}
    for dtype in DTYPES:
        section = ModelSection(path=str(options.model), dtype=dtype, max_length=96)
        for kind in ("full", "lora"):
            model = LanguageModel(trained(section, kind), section)
            assert not model.no_packing, model.no_packing
            for name, several in batches.items():
                figures[f"{dtype}, {kind}, {name}"] = packed_over_padded(model, several, options.repeats)
        figures[f"{dtype}, {PEERS} peers"] = together_over_in_turn(section, options.repeats)
    finish("packing", figures)


def trained(section: ModelSection, kind: str, rank: int = 16) -> Any:
    """The model, all of which is trained, or an adapter on it."""
    module: Any = load_model(section, CPU)
    if kind == "full":
        return module.requires_grad_(True)
    return add_adapter(module, AlgorithmConfig(adapter="lora", rank=rank), 0)


def batches_of(name: str, model: Path, num_batches: int) -> list[Batch]:
    """Batches of 8 rows as a run draws them."""
    data = SHARED / "data" / f"{name}.jsonl.gz"
    settings = [f"model.path={str(model)!r}", "model.max_length=96", f"data.train={str(data)!r}"]
    settings += ["data.task=classification", "data.partition.kind=iid", "run.num_peers=2", "data.max_samples=500"]
    prepared = prepare_data(load_recipe(None, settings, METHODS)[0], None)
    drawn = Batches(prepared.train[0].samples, 8, seed=0, pad_id=0)
    return [drawn.next() for _ in range(num_batches)]


def packed_over_padded(model: LanguageModel, batches: list[Batch], repeats: int) -> dict[str, Any]:
    work = {
        "padded": partial(steps, model, iter(batches), False),
        "packed": partial(steps, model, iter(batches), True),
    }
    share = sum(int(b.attention_mask.sum()) for b in batches) / sum(b.attention_mask.numel() for b in batches)
    return {"tokens": share, **ratio(work, repeats, CPU, "packed", "padded")}


def steps(model: LanguageModel, batches: Iterator[Batch], packs: bool) -> None:
    """Of the next `NUM_BATCHES`."""
    model.no_packing = "" if packs else "to compare"
    for batch in islice(batches, NUM_BATCHES):
        model.module.zero_grad()
        model.backward(batch, batch.num_targets)


def together_over_in_turn(section: ModelSection, repeats: int) -> dict[str, Any]:
    module = trained(section, "lora", rank=8)
    own = adapter_names(module)
    models: list[LanguageModel] = []
    for _ in range(PEERS):
        models.append(LanguageModel(clone_model(module, own), section, like=models[0] if models else None))
    ids = torch.randint(5, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), tuple(range(4)))
    stack = StackedModels(models)

    def in_turn() -> None:
        for model in models:
            model.backward(batch, batch.num_targets)

    together = partial(stack.backward, range(PEERS), [batch] * PEERS, [batch.num_targets] * PEERS)
    return ratio({"in turn": in_turn, "together": together}, repeats, CPU, "together", "in turn")


if __name__ == "__main__":
    main()
