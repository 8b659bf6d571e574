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
        if window and tokens.length > window:
            raise ValueError(f"a window of {window} tokens that no key of its config tells of")
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
        if (repeats := _repeats(query.shape[1] // key.shape[1], length)) > 1:
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        short: Tensor = _ShortAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return short, None
    # By name: that the module stands in the package is not for type checkers to know.
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    found: tuple[Tensor, None] = sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found


def _repeats(sharing: int, length: int) -> int:
    """How often to repeat a key that heads share, so that the scores of those that share one still fit the cache."""
    fitting = max(1, SCORES_BYTES // (2 * length * length))
    return next(n for n in range(1, sharing + 1) if sharing % n == 0 and sharing // n <= fitting)


class _ShortAttention(torch.autograd.Function):
    """softmax(s q k' + causal mask) v.

    q is [batch, heads, length, size]; k and v are [batch, key heads, length, size], each for as many heads in a row,
    whose queries are taken as one longer sequence. The result is [batch, length, heads, size].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, length, _ = q.shape
        rows = _by_key_head(q, k.shape[1])
        places = length + -length % COLUMNS
        keys, values = _filled_up(k, places), _filled_up(v, places)
        ctx.save_for_backward(rows, keys, values)
        ctx.scale, ctx.shape = scale, q.shape
        mask = _causal_mask(length, rows, keys)
        out = rows.new_empty(*rows.shape[:2], v.shape[-1])
        for q_, k_, v_, out_ in _chunks(places, rows, keys, values, out):
            torch.bmm(_probabilities(q_, k_, mask, scale), v_, out=out_)
        return out.view(batch, heads, length, -1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values = ctx.saved_tensors
        batch, _, length, _ = ctx.shape
        mask = _causal_mask(length, rows, keys)
        grad_rows = _by_key_head(grads[0].transpose(1, 2), len(keys) // batch)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (rows, keys, values))
        every = (rows, keys, values, grad_rows, grad_q, grad_k, grad_v)
        for q_, k_, v_, grad, gq, gk, gv in _chunks(keys.shape[1], *every):
            p = _probabilities(q_, k_, mask, ctx.scale)
            torch.bmm(p.mT, grad, out=gv)
            grad_s = torch._softmax_backward_data(torch.bmm(grad, v_.mT), p, -1, p.dtype)
            torch.baddbmm(gq, grad_s, k_, beta=0, alpha=ctx.scale, out=gq)
            torch.baddbmm(gk, grad_s.mT, q_, beta=0, alpha=ctx.scale, out=gk)
        grad_k, grad_v = (x.view(batch, -1, *x.shape[1:])[:, :, :length] for x in (grad_k, grad_v))
        return grad_q.view(ctx.shape), grad_k, grad_v, None


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[batch, heads, length, size] -> [batch x key heads, heads of each x length, size]."""
    return x.reshape(len(x) * key_heads, -1, x.shape[-1])


def _filled_up(x: Tensor, places: int) -> Tensor:
    """[batch, key heads, length, size] -> [batch x key heads, places, size], zeros behind."""
    missing = places - x.shape[2]
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(-1, places, x.shape[-1])


def _chunks(places: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some of [batch x key heads, ...] at a time: as many as their scores for so many places allow."""
    size = max(1, SCORES_BYTES // (2 * tensors[0].shape[1] * places))
    return zip(*(torch.split(x, size) for x in tensors), strict=True)


def _causal_mask(length: int, rows: Tensor, keys: Tensor) -> Tensor:
    """[rows, places], for queries of sequences one after the other and keys of one; those behind are seen by none."""
    mask = torch.full((length, keys.shape[1]), float("-inf"), dtype=rows.dtype).triu_(1)
    return mask.repeat(rows.shape[1] // length, 1)


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[n, rows, places] of queries [n, rows, size] and keys [n, places, size]."""
    return torch.baddbmm(mask, rows, keys.mT, alpha=scale).softmax(-1)
