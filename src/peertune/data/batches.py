"""Endless batches of one peer, whose whole state is the number of samples drawn so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peertune.data.render import Sample
from peertune.seeds import numpy_rng


@dataclass(frozen=True)
class Batch:
    """b sequences, padded on the right to a common length s."""

    input_ids: Tensor
    """int64 [b, s]"""
    attention_mask: Tensor
    """int64 [b, s], 1 on tokens, 0 on padding"""
    loss_mask: Tensor
    """bool [b, s], True where the token is a target to predict"""
    sample_ids: tuple[int, ...]
    """Index of each sequence among the samples that batches are drawn from."""

    @property
    def num_targets(self) -> int:
        """Tokens to predict; a first one has nothing to its left, and counts as none."""
        return int(self.loss_mask[:, 1:].sum())

    def part(self, index: int, count: int) -> Batch:
        """Part `index` of `count`: sequences that follow each other, as many as in any other part or one more."""
        size, more = divmod(len(self.sample_ids), count)
        start = index * size + min(index, more)
        own = slice(start, start + size + (index < more))
        return Batch(self.input_ids[own], self.attention_mask[own], self.loss_mask[own], self.sample_ids[own])


def collate(samples: Sequence[Sample], pad_id: int, pad_to: int = 0, *, sample_ids: Sequence[int] = ()) -> Batch:
    """Stack samples.

    Args:
        samples: b of them.
        pad_id: token that fills the rest; no loss and no attention falls on it.
        pad_to: length to pad to, no shorter than any sample; 0: the longest sample's.
        sample_ids: names of the samples; empty: 0 to b - 1.
    Returns:
        The batch.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    length = pad_to or longest
    assert length >= longest, f"pad_to is {pad_to}, a sample has {longest} tokens"
    input_ids = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.int64)
    loss_mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for i, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[i, :n] = torch.from_numpy(sample.input_ids)
        attention_mask[i, :n] = 1
        loss_mask[i, :n] = torch.from_numpy(sample.loss_mask)
    return Batch(input_ids, attention_mask, loss_mask, tuple(sample_ids) or tuple(range(len(samples))))


class Batches:
    """Draws batches without end: epoch e visits every sample once, in the order of its own permutation.

    A batch may hold the end of one epoch and the start of the next, so a peer with fewer samples than the batch size
    cycles, and every peer takes the same number of steps.

    Args:
        samples: the peer's samples; at least one.
        batch_size: sequences in a batch.
        seed: the peer's own seed; epoch e is ordered by `numpy_rng(seed, "epoch", e)`.
        pad_id, pad_to: as for `collate`.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, *, seed: int, pad_id: int, pad_to: int = 0) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.pad_to = pad_to
        self._seed = seed
        self._drawn = 0
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def next(self) -> Batch:
        """The next batch."""
        ids = self.draw()
        return collate([self.samples[i] for i in ids], self.pad_id, self.pad_to, sample_ids=ids)

    def draw(self) -> list[int]:
        """Indices of the next batch's samples [batch_size]; counts them as drawn."""
        ids = []
        for position in range(self._drawn, self._drawn + self.batch_size):
            epoch, offset = divmod(position, len(self.samples))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = numpy_rng(self._seed, "epoch", epoch).permutation(len(self.samples))
            ids.append(int(self._order[offset]))
        self._drawn += self.batch_size
        return ids

    @property
    def num_samples(self) -> int:
        """Samples held."""
        return len(self.samples)

    @property
    def epochs(self) -> float:
        """Samples drawn over samples held."""
        return self._drawn / len(self.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = state["drawn"]


class UnionBatches:
    """The batches of several peers as one: each step's batch is the union of the members' batches of that step.

    Args:
        members: batches of the peers, one at least, in peer order. Sample ids count on from one member to the next.
    """

    def __init__(self, members: Sequence[Batches]) -> None:
        self.members = list(members)
        sizes = [member.num_samples for member in self.members]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]

    def next(self) -> Batch:
        """The members' next batches, padded together: [sum of batch sizes, s]."""
        samples: list[Sample] = []
        ids: list[int] = []
        for member, offset in zip(self.members, self._offsets, strict=True):
            drawn = member.draw()
            samples += [member.samples[i] for i in drawn]
            ids += [offset + i for i in drawn]
        first = self.members[0]
        return collate(samples, first.pad_id, first.pad_to, sample_ids=ids)

    @property
    def num_samples(self) -> int:
        """Samples held, by all members together."""
        return sum(member.num_samples for member in self.members)

    @property
    def batch_size(self) -> int:
        """Sequences in a batch."""
        return sum(member.batch_size for member in self.members)

    @property
    def epochs(self) -> float:
        """Samples drawn over samples held, by all members together."""
        return sum(member.epochs * member.num_samples for member in self.members) / self.num_samples

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for member, member_state in zip(self.members, state["members"], strict=True):
            member.load_state_dict(member_state)
