"""The peers' local phases: each alone, or the steps of several as one batched call each, for K local steps on LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.algorithms.local_steps import LocalSteps, Taken, report_of
from peertune.errors import ConfigError
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
        ConfigError: their steps cannot be batched.
    """

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self.algorithms: list[LocalSteps] = [a for a in algorithms if isinstance(a, LocalSteps)]
        if len(self.algorithms) < len(algorithms):
            raise ConfigError(
                f"run.batched_peers: got {len(algorithms)} with a method that trains block by block, expected one that"
                " takes local steps on a LoRA adapter, such as dec_lora; set run.batched_peers = 1"
            )
        self._stack = StackedModels([algorithm.peer.model for algorithm in algorithms])

    def local(self, round: int) -> list[LocalReport | None]:
        """The local phase of a round; by peer, as `Algorithm.local`."""
        counts = [algorithm.begin(round) for algorithm in self.algorithms]
        taken: list[list[Taken]] = [[] for _ in counts]
        for n in range(max(counts)):
            members = [i for i, count in enumerate(counts) if n < count]
            for i, loss in zip(members, self._backward(members), strict=True):
                taken[i].append(self.algorithms[i].take_step(round, n, counts[i], loss))
        return [report_of(steps) for steps in taken]

    def _backward(self, members: Sequence[int]) -> torch.Tensor:
        """Gradients of the members' steps to come; their losses, float32 [members]."""
        accumulation = self.algorithms[0].config.grad_accumulation
        total = torch.zeros(len(members), device=self._stack.models[0].device)
        for _ in range(accumulation):
            batches = [self.algorithms[i].peer.next_batch() for i in members]
            total += torch.stack(self._stack.backward(members, batches, accumulation))
        return total
