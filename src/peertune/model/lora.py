"""How peft's LoRA layers are computed: both factors' products in the base's type, added in place to the base's.

The layers, their parameters and their files are peft's; only the arithmetic of a plain one is taken over. peft's own
forward pass goes to float32 and back around the factors, which in bfloat16 on a CPU takes longer than what LoRA saves.
A base in 4 bits is restored for each product, forward and backward, and not kept between them.

A layer may compute with the factors of several models with one base (`stacked`): the rows of a batch are then theirs
in turn, the base's product is one for all, and each model's factors see its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.errors import ModelError
from peertune.model import packing
from peertune.model.adapters import is_peft
from peertune.model.quantization import is_quantized, restored, weight_dtype

STACKED = "stacked_factors"
"""Attribute of a layer: A [G, rank, inputs] and B [G, outputs, rank] of the G models for which it computes."""


def take_over(module: nn.Module) -> None:
    """Let the LoRA layers of a model, if it has any, compute as `forward` does."""
    for layer in plain_layers(module):
        layer.forward = partial(forward, layer)


def plain_layers(module: nn.Module) -> list[Any]:
    """peft's LoRA layers around plain linear layers, in full precision or 4 bits, in the order of the model."""
    if not is_peft(module):  # else every run would wait for peft to be imported
        return []
    from peft.tuners.lora import Linear, LoraLayer

    def is_linear(layer: LoraLayer) -> bool:
        weight = getattr(layer.base_layer, "weight", None)  # none: several experts' tensors in one module
        if weight is not None and is_quantized(weight):
            return isinstance(layer.base_layer, nn.Linear)  # bitsandbytes' own, which peft's layer of 4 bits is around
        return type(layer) is Linear and type(layer.base_layer) is nn.Linear

    return [m for m in module.modules() if isinstance(m, LoraLayer) and is_linear(m)]


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + b + s B A x of a layer with one adapter; whatever is not that plain goes to peft.

    Args:
        layer: peft's, around a linear layer.
        x: [..., inputs].
    Returns:
        [..., outputs], in the type of x.
    """
    base, factors = layer.base_layer, getattr(layer, STACKED, None)
    is_ours = is_plain(layer) and not args and not kwargs and x.dtype == weight_dtype(base.weight)
    tokens = packing.current()
    if factors is not None and not (is_ours and tokens is not None and x.shape[:-1] == tokens.input_ids.shape):
        raise ModelError(
            "run.batched_peers: got a LoRA layer that is not called with all tokens of a batch, as an expert's are not;"
            " leave it out of algorithm.target_modules, or set run.batched_peers = 1"
        )
    if not is_ours:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    down, up = factors or factors_of(layer)
    scale = layer.scaling[layer.active_adapters[0]]
    out: Tensor = _LowRank.apply(x, base.weight, base.bias, down, up, scale)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])  # here: what a model changes in place must be no view made inside


def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank] of a plain layer."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def is_plain(layer: Any) -> bool:
    """Whether a layer's one adapter is at work and is nothing but two factors."""
    active = layer.active_adapters
    return (
        len(active) == 1
        and active[0] in layer.lora_A
        and active[0] not in layer.lora_variant
        and not layer.disable_adapters
        and not layer.merged
        and type(layer.lora_dropout[active[0]]) is nn.Identity
        and layer.lora_B[active[0]].bias is None
    )


@contextmanager
def stacked(layers: Sequence[Any], factors: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let a model's layers compute for several.

    Args:
        layers: the model's `plain_layers`.
        factors: by layer, A [G, rank, inputs] and B [G, outputs, rank] of the models.
    """
    for layer, both in zip(layers, factors, strict=True):
        setattr(layer, STACKED, both)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, STACKED)


class _LowRank(torch.autograd.Function):
    """x [..., inputs], a frozen weight [outputs, inputs] and bias, A [rank, inputs], B [outputs, rank], s.

    The weight may be in 4 bits. Or A [G, rank, inputs] and B [G, outputs, rank] of G models; then the first of G equal
    parts of x is the first's. The result is [rows, outputs], or [G, rows, outputs].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = _rows(x, down)
        down, up = down.to(x.dtype), up.to(x.dtype) * scale
        low = rows @ down.mT
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scale, ctx.shape = scale, x.shape
        return _add_product(F.linear(rows, restored(weight), bias), low, up.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        need_x, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad = _rows(grads[0], down)
        grad_low = grad @ up if need_x or need_down else None
        grad_x = grad_down = grad_up = None
        if need_x and grad_low is not None:
            grad_x = _add_product(grad @ restored(weight), grad_low, down).view(ctx.shape)
        if need_down and grad_low is not None:
            grad_down = (grad_low.mT @ rows).float()
        if need_up:
            grad_up = (grad.mT @ low).float().mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None


def _rows(x: Tensor, down: Tensor) -> Tensor:
    """x [..., size] as [rows, size], or with G models' factors as [G, rows, size]."""
    num_rows = x.shape[:-1].numel() // down.shape[:-2].numel()  # an expert may get none
    return x.reshape(*down.shape[:-2], num_rows, x.shape[-1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in place; all of one model, or all of G."""
    return total.addmm_(a, b) if total.ndim == 2 else total.baddbmm_(a, b)
