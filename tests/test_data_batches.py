"""Batches: every epoch visits each sample once, and any state goes on at the exact sample."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peertune.data.batches import Batches, UnionBatches, collate
from peertune.data.render import Sample

sizes = st.integers(1, 20)


def samples(count: int, first: int = 0) -> list[Sample]:
    """Sample i is i + 1 times the token `first + i`, its last token a target."""
    made = []
    for i in range(count):
        length = i % 5 + 1
        mask = np.arange(length) == length - 1
        made.append(Sample(np.full(length, first + i, dtype=np.int32), mask))
    return made


def batches(count: int, batch_size: int, seed: int = 0, pad_to: int = 0) -> Batches:
    return Batches(samples(count), batch_size, seed=seed, pad_id=99, pad_to=pad_to)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_collate_pads_on_the_right() -> None:
    batch = collate(samples(3), pad_id=99)
    assert same(batch.input_ids, torch.tensor([[0, 99, 99], [1, 1, 99], [2, 2, 2]]))
    assert same(batch.attention_mask, torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]))
    assert same(batch.loss_mask, torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool())
    assert batch.sample_ids == (0, 1, 2)
    assert collate(samples(3), pad_id=99, pad_to=7).input_ids.shape == (3, 7)
    with pytest.raises(AssertionError, match="3 tokens"):
        collate(samples(3), pad_id=99, pad_to=2)


@given(sizes, sizes, st.integers(1, 4))
def test_each_epoch_visits_every_sample_once(count: int, batch_size: int, epochs: int) -> None:
    drawn: list[int] = []
    source = batches(count, batch_size)
    while len(drawn) < count * epochs:
        batch = source.next()
        assert len(batch.sample_ids) == batch_size
        assert [int(row[0]) for row in batch.input_ids] == list(batch.sample_ids)
        drawn += batch.sample_ids
    assert source.epochs == len(drawn) / count
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_in_order_and_seeds_too() -> None:
    source = batches(20, 20)
    first, second = source.next().sample_ids, source.next().sample_ids
    assert first != second
    assert batches(20, 20).next().sample_ids == first
    assert batches(20, 20, seed=1).next().sample_ids != first


@given(sizes, sizes, st.integers(0, 30))
def test_resumes_at_the_exact_sample(count: int, batch_size: int, before: int) -> None:
    whole = batches(count, batch_size)
    for _ in range(before):
        whole.next()
    resumed = batches(count, batch_size)
    for _ in range(3):  # had gone elsewhere meanwhile
        resumed.next()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(4):
        a, b = whole.next(), resumed.next()
        assert a.sample_ids == b.sample_ids
        assert same(a.input_ids, b.input_ids)
    assert whole.state_dict() == resumed.state_dict() == {"drawn": (before + 4) * batch_size}


def test_pads_to_one_length_when_told() -> None:
    source = batches(10, 2, pad_to=8)
    assert {source.next().input_ids.shape for _ in range(6)} == {(2, 8)}


def test_union_is_the_members_batches_of_the_same_step() -> None:
    alone = [batches(7, 3, seed=0), batches(4, 3, seed=1)]
    union = UnionBatches([batches(7, 3, seed=0), batches(4, 3, seed=1)])
    for _ in range(5):
        both = union.next()
        parts = [member.next() for member in alone]
        assert both.sample_ids == (*parts[0].sample_ids, *(7 + i for i in parts[1].sample_ids))
        assert int(both.attention_mask.sum()) == sum(int(part.attention_mask.sum()) for part in parts)
        longest = max(part.input_ids.shape[1] for part in parts)
        assert both.input_ids.shape == (6, longest)
    assert union.epochs == 30 / 11
    again = UnionBatches([batches(7, 3, seed=0), batches(4, 3, seed=1)])
    again.load_state_dict(union.state_dict())
    assert again.next().sample_ids == union.next().sample_ids


@given(st.lists(sizes, min_size=1, max_size=4), sizes)
def test_union_names_every_sample_once(counts: list[int], batch_size: int) -> None:
    union = UnionBatches([batches(count, batch_size, seed=i) for i, count in enumerate(counts)])
    ids: Counter[int] = Counter()
    for _ in range(-(-max(counts) // batch_size)):
        ids.update(union.next().sample_ids)
    assert set(ids) == set(range(sum(counts)))
