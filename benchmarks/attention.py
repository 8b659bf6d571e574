"""Causal attention in bfloat16 on a CPU: ours for short sequences against PyTorch's fused kernel, forward and backward.

python benchmarks/attention.py [--threads 2] [--repeats 15]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import finish, interleaved
from torch import Tensor, nn

from peertune.model.attention import attention_forward

SHAPES = {  # batch, heads, length, head size
    "english-4m, 96 tokens": (8, 6, 96, 32),
    "english-4m, 256 tokens": (8, 6, 256, 32),
    "block_step's, 256 tokens": (4, 8, 256, 64),
    "512 tokens": (4, 8, 512, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = dict(vars(options))
    for name, shape in SHAPES.items():
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=rng).bfloat16().requires_grad_() for _ in range(3))
        work = {"ours": partial(step, ours, q, k, v), "sdpa": partial(step, fused, q, k, v)}
        for run in work.values():
            run()
        times = interleaved(work, options.repeats, torch.device("cpu"))
        figures[name] = {**times, "ours_over_sdpa_cpu": times["ours"]["cpu_s"] / times["sdpa"]["cpu_s"]}
    finish("attention", figures)


def step(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_forward(nn.Identity(), q, k, v, None)[0]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


if __name__ == "__main__":
    main()
