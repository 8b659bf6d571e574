"""Attention on a CPU: our own for short sequences in bfloat16, else transformers'; of packed tokens, by sequence.

Ours is causal, by batched matrix products, a few sequences at a time. Their scores [heads, length, length] stay in the
processor's cache, the products run on its matrix units, and the backward pass makes the probabilities anew from q and
k, so nothing of size length^2 is kept. PyTorch's fused kernel for CPUs takes several times as long at 100 tokens, and
somewhat longer at 256. Numerics are those of transformers' "eager" attention: scores and probabilities in bfloat16, the
softmax's sums in float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.config import ModelSection
from peertune.model import packing

NAME = "peertune_cpu"
"""What transformers knows it by, as `attn_implementation`."""
SCORES_BYTES = 1 << 20
"""Scores made at a time: more would leave the cache, fewer make the threads wait for each other."""
MAX_LENGTH = 512
"""Longer sequences outgrow the cache; the fused kernel takes them."""
COLUMNS = 32
"""Keys are filled up to a multiple of this: over rows that are no whole number of bfloat16 vectors a softmax takes
three times as long."""


def register() -> str:
    """Make it known to transformers. Returns `NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        tokens = packing.current()
        if tokens is None:
            found: Tensor | None = sdpa_mask(*args, **kwargs)
            return found
        window = kwargs.get("local_size")
        assert window is None or tokens.length <= window, "a window that no key of the model's config told of"
        return None  # each sequence is causal by itself

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def choose_attention(model: Any, config: ModelSection, device: torch.device) -> None:
    """Where the recipe leaves attention to us, take this one if the model is on a CPU and can have it.

    It stands in for "sdpa" only: a model that transformers gives another attention needs something that one lacks,
    such as sinks or capped scores. Models that choose which tokens to look at do so for attentions that they know by
    name, and torch.compile cannot look into ours.
    """
    wanted = config.attention == "auto" and device.type == "cpu" and not config.compile
    replaceable = getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa"
    chooses = any(key.startswith("index_topk") for key in vars(model.config.get_text_config()))
    if wanted and replaceable and not chooses:
        model.set_attn_implementation(register())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; whatever is not plain and short goes to its "sdpa".

    Args:
        query: [batch, heads, length, head size], or packed, [groups, heads, places, head size].
        key, value: [batch, key heads, length, head size], or packed likewise.
    Returns:
        [batch, length, heads, head size] or [groups, places, heads, head size], and None for the weights.
    """
    tokens = packing.current()
    if tokens is not None:
        query, key, value = (tokens.unpack(x) for x in (query, key, value))
        with packing.packed(None):
            out, _ = attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        return tokens.pack(out), None
    plain = all(kwargs.get(key) is None for key in ("softcap", "position_bias", "cache"))
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        attention_mask is None
        and causal
        and plain
        and not dropout
        and 1 < length == key.shape[2] <= MAX_LENGTH
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
    ):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        key, value = (F.pad(x, (0, 0, 0, -length % COLUMNS)) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        short: Tensor = _ShortAttention.apply(query * scale, key, value)  # type: ignore[no-untyped-call]
        return short.transpose(1, 2).contiguous(), None
    # By name: that the module stands in the package is not for type checkers to know.
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    found: tuple[Tensor, None] = sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found


class _ShortAttention(torch.autograd.Function):
    """softmax(q k' + causal mask) v, for q [batch, heads, length, head size], already scaled, and k, v of as many or
    more places; those behind are seen by none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        mask = _causal_mask(q, k)
        out = torch.empty(q.shape, dtype=q.dtype)
        for q_, k_, v_, out_ in _chunks(q, k, v, out):
            torch.bmm(_probabilities(q_, k_, mask), v_, out=out_)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        mask = _causal_mask(q, k)
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for q_, k_, v_, grad, gq, gk, gv in _chunks(q, k, v, *grads, grad_q, grad_k, grad_v):
            p = _probabilities(q_, k_, mask)
            torch.bmm(p.transpose(1, 2), grad, out=gv)
            grad_p = torch.bmm(grad, v_.transpose(1, 2))
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            torch.bmm(grad_s, k_, out=gq)
            torch.bmm(grad_s.transpose(1, 2), q_, out=gk)
        return grad_q, grad_k, grad_v


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """q, k and others [batch, heads, their length, head size] as [some sequences x heads, their length, head size]."""
    _, heads, length, _ = tensors[0].shape
    size = max(1, SCORES_BYTES // (2 * heads * length * tensors[1].shape[2]))
    for parts in zip(*(torch.split(x, size) for x in tensors), strict=True):
        yield tuple(x.flatten(0, 1) for x in parts)


def _causal_mask(q: Tensor, k: Tensor) -> Tensor:
    return torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype).triu_(1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[n, length, places] of q [n, length, head size] and k [n, places, head size]."""
    return torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(-1)
