"""The peers' local phases: each alone, or the steps of several as one batched call each, for K local steps on LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.algorithms.local_steps import LocalSteps, report_of
from peertune.model.stacked import StackedModels


@dataclass(frozen=True)
class Alone:
    """A peer that needs no other for its local phase, in the form of `Together`."""

    algorithm: Algorithm

    def local(self, round: int) -> list[LocalReport | None]:
        return [self.algorithm.local(round)]


class Together:
    """Peers of one method on one base. Between two gradients each does its own part, as `LocalSteps.local` does.

    Raises:
        ConfigError, ModelError: as `StackedModels`.
    """

    def __init__(self, algorithms: Sequence[LocalSteps]) -> None:
        self.algorithms = list(algorithms)
        self._stack = StackedModels([algorithm.peer.model for algorithm in algorithms])

    def local(self, round: int) -> list[LocalReport | None]:
        """The local phase of a round; by peer, as `Algorithm.local`."""
        counts = [algorithm.begin(round) for algorithm in self.algorithms]
        taken: list[list[tuple[Tensor, Tensor, float]]] = [[] for _ in counts]
        flats = enumerate(algorithm.flat for algorithm in self.algorithms)
        trained = {i: flat for i, flat in flats if counts[i] and flat is not None}
        if trained:
            self._stack.lay_out(trained)
        for n in range(max(counts)):
            members = [i for i, count in enumerate(counts) if n < count]
            for i, loss in zip(members, self._backward(members), strict=True):
                taken[i].append((loss, *self.algorithms[i].take_step(round, n, counts[i])))
        for algorithm in self.algorithms:
            algorithm.end()
        return [report_of(steps) for steps in taken]

    def _backward(self, members: Sequence[int]) -> Tensor:
        """Gradients of the members' steps to come; their losses, float32 [members]."""
        peers = [self.algorithms[i].peer for i in members]
        accumulation = self.algorithms[0].config.grad_accumulation
        total = torch.zeros(len(members), device=peers[0].model.device)
        batches = [[peer.next_batch() for _ in range(accumulation)] for peer in peers]
        num_targets = [sum(batch.num_targets for batch in own) for own in batches]
        with peers[0].drawing(self.algorithms[members[0]].num_taken):
            for each in zip(*batches, strict=True):
                total += torch.stack(self._stack.backward(members, each, num_targets))
        return total
