"""One participant: its model, its data and its random state. It trains nothing by itself; algorithms do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peertune.data.batches import Batch, Batches, UnionBatches
from peertune.model.blocks import Block
from peertune.model.language_model import LanguageModel
from peertune.seeds import derive_seed


@dataclass
class Peer:
    """What an algorithm is given to work with."""

    index: int
    """Place in the recipe's order, from 0."""
    model: LanguageModel
    blocks: list[Block]
    """The partition of what is trained; the same on every peer."""
    batches: Batches | UnionBatches | None
    """Its own data; None for a hub, which has none."""
    seed: int
    """The run's seed; draws are derived from (seed, index, purpose)."""

    def backward(self, step: int, num_batches: int) -> Tensor:
        """Add to `.grad` the gradient of the mean loss over the target tokens of the next `num_batches` batches.

        Args:
            step: number of the local step since the run began; seeds dropout, where the model has any.
        Returns:
            The mean loss in nats a target token, a float32 scalar on the model's device.
        """
        batches = [self.next_batch() for _ in range(num_batches)]
        num_targets = sum(batch.num_targets for batch in batches)
        total = torch.zeros((), device=self.model.device)
        with self.drawing(step):
            for batch in batches:
                total += self.model.backward(batch, num_targets)
        return total

    @contextmanager
    def drawing(self, step: int) -> Iterator[None]:
        """What a model draws inside, such as dropout, follows from the peer and the step alone."""
        device = self.model.device
        # torch.manual_seed seeds every kind of device, which takes most of a millisecond
        set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            set_seed(derive_seed(self.seed, self.index, "dropout", step))
            yield

    def next_batch(self) -> Batch:
        """The next batch of its own data."""
        assert self.batches is not None
        return self.batches.next()

    def num_steps(self, epochs: int, num_batches: int) -> int:
        """Steps of `num_batches` batches in so many passes over the peer's own samples, the last one filled up."""
        assert self.batches is not None
        return -(-epochs * self.batches.num_samples // (self.batches.batch_size * num_batches))
