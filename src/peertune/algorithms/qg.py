"""QG-DAdam: quasi-global momentum with Adam (Lin et al. 2021, arXiv 2102.04761), with K local steps.

The buffers m and v are not fed by local gradients but by how the model moved over the whole round, mixing included,
which at a consensus is the same for all peers:

    d = x_t - x_{t+1},  u = d / ||d||          m <- a1 m + (1 - a1) u        v <- a2 v + (1 - a2) u u

A local step uses them with its fresh gradient g, but leaves them as they are:

    x <- x - lr (a1 m + (1 - a1) g) / (sqrt(a2 v + (1 - a2) g g) + eps)

The authors' code (epfml/quasi-global-momentum, decentralized_qg_adam.py) has a1 m + g there, as their SGD has, in which
a gradient weighs 1 / (1 - a1) times as much beside the momentum: `whole_gradient`.

The norm is over all that is shared. Personal parts, which do not mix, take Adam's own steps. Dividing by the weights
1 - a^(t+1) that have entered is Adam's own correction.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import AlgorithmConfig
from peertune.exchange import Hop, Inbox
from peertune.optim import adam_moments
from peertune.peer import Peer
from peertune.topology import Topology


class QgConfig(LocalStepsConfig):
    whole_gradient: bool = False
    """A step goes along a1 m + g, as in the authors' code, whose rates are then smaller; else a1 m + (1 - a1) g."""


class Qg(LocalSteps):
    Config: ClassVar[type[AlgorithmConfig]] = QgConfig
    elementwise = False

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        assert isinstance(config, QgConfig)
        self.whole = config.whole_gradient

    def feeds_moments(self, name: str) -> bool:
        return name not in self.common

    def begin(self, round: int) -> int:
        self.anchor = {name: self.masters.snapshot(name) for name in self.common}
        return super().begin(round)

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        super().mix(hop, inbox)
        moved = {name: self.anchor[name] - self.masters.snapshot(name) for name in self.common}
        norm = torch.nn.utils.get_total_norm(list(moved.values()))
        for name, d in moved.items():
            moments = self.moments[name]
            unit = d / norm if norm > 0 else d
            adam_moments([moments.exp_avg], [moments.exp_avg_sq], [unit], self.config.betas)
            moments.num_steps += 1
