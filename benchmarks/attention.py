"""Causal attention in bfloat16 on a CPU: ours for short sequences against transformers' "sdpa", which is PyTorch's
fused kernel; forward and backward, of queries, keys and values as they lie behind a model's projections.

python benchmarks/attention.py [--threads 2] [--repeats 15]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from _harness import finish, interleaved
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peertune.model.attention import attention_forward

SHAPES = {  # batch, heads, key heads, length, head size
    "english-4m, 32 x 64 tokens": (32, 6, 3, 64, 32),
    "english-4m, 96 tokens": (8, 6, 3, 96, 32),
    "english-4m, 256 tokens": (8, 6, 3, 256, 32),
    "block_step's, 256 tokens": (4, 8, 8, 256, 64),
    "512 tokens": (4, 8, 8, 512, 64),
    "512 tokens, 4 heads a key": (4, 8, 2, 512, 64),
    "512 tokens, 8 heads a key": (4, 8, 1, 512, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = dict(vars(options))
    for name, shape in SHAPES.items():
        batch, heads, key_heads, length, size = shape
        rng = torch.Generator().manual_seed(0)
        drawn = (torch.randn(batch, length, n, size, generator=rng).bfloat16() for n in (heads, key_heads, key_heads))
        q, k, v = (x.transpose(1, 2).requires_grad_() for x in drawn)
        module = Module(heads // key_heads)
        work = {
            "ours": partial(step, attention_forward, module, q, k, v),
            "sdpa": partial(step, sdpa_attention_forward, module, q, k, v),
        }
        for run in work.values():
            run()
        times = interleaved(work, options.repeats, torch.device("cpu"))
        figures[name] = {**times, "ours_over_sdpa_cpu": times["ours"]["cpu_s"] / times["sdpa"]["cpu_s"]}
    finish("attention", figures)


class Module(nn.Module):
    """What attention functions look at of a model's."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def step(attend: Any, module: Module, q: Tensor, k: Tensor, v: Tensor) -> None:
    out, _ = attend(module, q, k, v, None)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


if __name__ == "__main__":
    main()
