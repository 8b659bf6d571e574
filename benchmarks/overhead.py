"""What a training step does beside its matrix products: RMSNorm, and the optimiser's step and the mean over an adapter.

    python benchmarks/overhead.py [--threads 1] [--repeats 25] [--model FOLDER]

"norm": forward and backward over 2048 tokens of the model's width, by transformers' autograd and by ours; "kept" is
what each holds for the backward pass. "adapter": LoRA of rank 8 on all linear layers: gradients clipped, a step of
AdamW, a copy to send, the mean of eight and its taking over, with tensors that lie loose and side by side.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import finish, ratio
from torch import Tensor, nn

from peertune.config import AlgorithmConfig, ModelSection
from peertune.exchange import Inbox
from peertune.flat import FlatParameters
from peertune.model import norm
from peertune.model.adapters import add_adapter
from peertune.model.load import load_model
from peertune.optim import MasterWeights, Moments, adam_step, clip_gradients

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
CPU = torch.device("cpu")
TOKENS, PEERS = 2048, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {**vars(options), "model": options.model.name}
    dtypes: list[Any] = ["bfloat16", "float32"]
    for dtype in dtypes:
        section = ModelSection(path=str(options.model), dtype=dtype)
        figures[f"norm, {dtype}"] = norms(load_model(section, CPU), options.repeats)
    figures["adapter"] = adapters(load_model(section, CPU), options.repeats)
    finish("overhead", figures)


def norms(model: Any, repeats: int) -> dict[str, Any]:
    theirs = next(m for m in model.modules() if hasattr(m, "variance_epsilon")).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    norm.take_over(ours)
    assert "forward" in vars(ours), "this model's norm is not taken over"
    x = torch.randn(TOKENS, len(ours.weight), dtype=ours.weight.dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    both = {"theirs": theirs, "ours": ours}
    kept = {name: bytes_kept(module, x) for name, module in both.items()}
    work = {name: partial(ten_times, module, x, gradient) for name, module in both.items()}
    return {**ratio(work, repeats, CPU, "ours", "theirs"), "kept_bytes": kept}


def ten_times(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    for _ in range(10):
        torch.autograd.grad(module(x), x, gradient)


def bytes_kept(module: nn.Module, x: Tensor) -> int:
    """Of what is saved for the backward pass, each memory once and the weights left out."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    del result
    return sum(size for place, size in saved.items() if place not in weights)


def adapters(model: Any, repeats: int) -> dict[str, Any]:
    module = add_adapter(model, AlgorithmConfig(adapter="lora", rank=8), 0)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    work: dict[str, Callable[[], object]] = {}
    for kind in ("loose", "side by side"):
        parameters = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items()}
        if kind == "loose":
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            moments = {name: Moments.zeros(p) for name, p in parameters.items()}
        else:
            flat = FlatParameters(parameters)
            flat.begin_gradients(torch.empty_like(flat.data))
            moments = Moments.side_by_side(parameters)
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.normal_()
        work[kind] = partial(step_and_mix, parameters, moments, kind == "loose")
    sizes = {"tensors": len(trained), "elements": sum(p.numel() for p in trained.values())}
    return {**sizes, **ratio(work, repeats, CPU, "side by side", "loose")}


def step_and_mix(parameters: dict[str, nn.Parameter], moments: dict[str, Moments], is_loose: bool) -> None:
    masters = MasterWeights(parameters)
    clip_gradients(parameters, 1.0)
    adam_step(masters, moments, lr=1e-3, betas=(0.9, 0.999), corrections=(0.1, 0.001), eps=1e-8, weight_decay=0.0)
    names = list(parameters)
    payload = {name: masters.snapshot(name) for name in names} if is_loose else masters.snapshots(names)
    inbox = Inbox(dict.fromkeys(range(PEERS), 1 / PEERS), dict.fromkeys(range(PEERS), payload))
    if is_loose:
        for name in names:
            masters.write(name, inbox.mean(name))
    else:
        for values in inbox.means(names):
            masters.write_all(values)


if __name__ == "__main__":
    main()
