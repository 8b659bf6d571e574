"""Batches without padding: tokens of all sequences in one row for everything but attention, which sees sequences.

Texts differ in length, and a quarter to a half of a padded batch's places hold nothing. A model is given the tokens
alone, with their positions; our attention (`attention.py`) looks here where they belong, moves queries, keys and values
to [batch, heads, length, head size] and its output back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peertune.data.batches import Batch

WORTH = 0.95
"""Batches of whose places more than this share would be left are not packed."""
PLACES = 32
"""Rows are filled up to a multiple of so many. oneDNN, which multiplies bfloat16 on CPUs, makes and keeps code for each
shape it meets: of rows of any length that takes longer than the padding did, and memory without end."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch are: in rows [groups, places] for the model, in sequences for attention."""

    input_ids: Tensor
    """int64 [groups, places]; a group's tokens, and zeros behind them."""
    positions: Tensor
    """int64 [groups, places]; of each token within its sequence."""
    token_places: Tensor
    """int64 [tokens]: of each token among the flattened rows."""
    token_slots: Tensor
    """int64 [tokens]: of each token among the flattened sequences."""
    num_sequences: int
    """Sequences."""
    length: int
    """Of the longest sequence."""
    targets: Tensor
    """bool [groups, places]; the tokens to predict, each from the place before."""

    @property
    def is_full(self) -> bool:
        """Whether sequences are of one length and fill all places: a row is then its sequences, one after the other."""
        return len(self.token_places) == self.input_ids.numel() == self.num_sequences * self.length

    def unpack(self, x: Tensor) -> Tensor:
        """[groups, heads, places, size] -> [batch, heads, length, size], zeros where there is no token."""
        spread = x.transpose(1, 2).flatten(0, 1)
        if not self.is_full:
            spread = _Move.apply(spread, self.token_places, self.token_slots, self.num_sequences * self.length)  # type: ignore[no-untyped-call]
        return spread.view(self.num_sequences, self.length, *x.shape[1::2]).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """[batch, length, heads, size] -> [groups, places, heads, size]."""
        rows = x.flatten(0, 1)
        if not self.is_full:
            rows = _Move.apply(rows, self.token_slots, self.token_places, self.input_ids.numel())  # type: ignore[no-untyped-call]
        return rows.view(*self.input_ids.shape, *x.shape[2:])


class _Move(torch.autograd.Function):
    """out [size, ...] with out[to[i]] = x[source[i]] and zeros elsewhere; no index occurs twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, to: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, to)
        ctx.size = len(x)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, to, x.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, to = ctx.saved_tensors
        (grad,) = grads
        moved = grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, source, grad.index_select(0, to))
        return moved, None, None, None


def pack(batches: Sequence[Batch], device: torch.device) -> Packing:
    """The sequences of one batch, or of several, each of which is then a row of its own."""
    counts = [int(batch.attention_mask.sum()) for batch in batches]
    places, length = _filled_up(max(counts)), max(batch.input_ids.shape[1] for batch in batches)
    input_ids, positions = torch.zeros(2, len(batches), places, dtype=torch.int64)
    targets = torch.zeros(len(batches), places, dtype=torch.bool)
    slots, first = [], 0
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        is_token = batch.attention_mask.bool()
        input_ids[i, :count] = batch.input_ids[is_token]
        position = torch.arange(is_token.shape[1]).expand_as(is_token)
        positions[i, :count] = position[is_token]
        targets[i, :count] = (batch.loss_mask & (position > 0))[is_token]
        sequence = torch.arange(first, first + len(is_token))[:, None].expand_as(is_token)
        slots.append((sequence * length + position)[is_token])
        first += len(is_token)
    where = (torch.arange(places) < torch.tensor(counts)[:, None]).flatten().nonzero()[:, 0]
    input_ids, positions, where, slot, targets = (
        t.to(device) for t in (input_ids, positions, where, torch.cat(slots), targets)
    )
    return Packing(input_ids, positions, where, slot, first, length, targets)


def is_worth_packing(batch: Batch) -> bool:
    """Whether enough of a batch is padding."""
    return _filled_up(int(batch.attention_mask.sum())) < WORTH * batch.attention_mask.numel()


def _filled_up(num_tokens: int) -> int:
    return -(-num_tokens // PLACES) * PLACES


_at_work: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """The forward passes inside are of these tokens; None: of sequences as they are."""
    token = _at_work.set(packing)
    try:
        yield
    finally:
        _at_work.reset(token)


def current() -> Packing | None:
    """What the forward pass at work in this thread is of, if it is packed."""
    return _at_work.get()
