"""How peft's LoRA layers are computed: both factors' products in the base's type, added in place to the base's.

The layers, their parameters and their files are peft's; only the arithmetic of a plain one is taken over. peft's own
forward pass goes to float32 and back around the factors, which in bfloat16 on a CPU takes longer than what LoRA saves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.model.adapters import is_peft


def take_over(module: nn.Module) -> None:
    """Let the LoRA layers of a model, if it has any, compute as `forward` does."""
    if not is_peft(module):  # else every run would wait for peft to be imported
        return
    from peft.tuners.lora import Linear

    for layer in module.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.forward = partial(forward, layer)


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + b + s B A x of a layer with one adapter; whatever is not that plain goes to peft.

    Args:
        layer: peft's, around a linear layer.
        x: [..., inputs].
    Returns:
        [..., outputs], in the type of x.
    """
    active = layer.active_adapters
    plain = len(active) == 1 and active[0] in layer.lora_A and active[0] not in layer.lora_variant
    if (
        not plain
        or args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or type(layer.lora_dropout[active[0]]) is not nn.Identity
        or layer.lora_B[active[0]].bias is not None
        or x.dtype != layer.base_layer.weight.dtype
    ):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, (name,) = layer.base_layer, active
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LowRank.apply(x, base.weight, base.bias, down, up, layer.scaling[name])  # type: ignore[no-any-return, no-untyped-call]


class _LowRank(torch.autograd.Function):
    """x [..., inputs], a frozen weight [outputs, inputs] and bias, A [rank, inputs], B [outputs, rank], s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), up.to(x.dtype) * scale
        low = rows @ down.t()
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(rows, weight, bias).addmm_(low, up.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        need_x, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_low = grad @ up if need_x or need_down else None
        grad_x = grad_down = grad_up = None
        if need_x and grad_low is not None:
            grad_x = (grad @ weight).addmm_(grad_low, down).view(ctx.shape)
        if need_down and grad_low is not None:
            grad_down = (grad_low.t() @ rows).float()
        if need_up:
            grad_up = (grad.t() @ low).float().mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None
