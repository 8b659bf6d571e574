"""What the peers have in common while they differ: their weighted average, and how far they are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peertune.model.language_model import LanguageModel
from peertune.runtimes import Group, Member


class Average:
    """A model that takes the peers' weighted average when asked.

    Args:
        model: holds the base at first; it shares what is frozen with the peers.
        members: those this process hosts.
    """

    def __init__(self, model: LanguageModel, members: Sequence[Member], group: Group) -> None:
        self.model, self.members, self.group = model, members, group
        self.method = members[0].algorithm

    @torch.no_grad()
    def load(self, round: int, agreed: bool = False) -> bool:
        """Take the average after some rounds into `model`; where all agreed, what each holds.

        Returns:
            Whether it is to be had.
        """
        own = self.model.parameters()
        weights = self.method.consensus(round)
        for name in self.method.shared_names():
            if agreed:
                own[name].copy_(self.method.shared(name))
                continue
            mean = self.group.mean((member.algorithm.shared(name) for member in self.members), weights)
            if mean is None:
                return False
            own[name].copy_(mean)
        return True

    def consensus_distance(self, round: int) -> float | None:
        """sqrt(mean_i ||theta_i - mean||^2) over the tensors that the round trained.

        Returns:
            None for a lone model, and where the others' are not to be had.
        """
        num_peers = self.method.topology.num_peers
        if num_peers == 1:
            return None
        squares, weights = [0.0] * len(self.members), self.method.consensus(round + 1)
        for name in self.method.shared_names(round):
            held = [member.algorithm.shared(name) for member in self.members]
            mean = self.group.mean(held, weights)
            if mean is None:
                return None
            for i, tensor in enumerate(held):
                squares[i] += float(torch.linalg.vector_norm(tensor.sub_(mean))) ** 2
        told = [square for square in self.group.gather(squares, sum)[:num_peers] if square is not None]
        return math.sqrt(sum(told) / num_peers)
