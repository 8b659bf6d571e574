"""QG-DAdam: quasi-global momentum with Adam (Lin et al. 2021, arXiv 2102.04761), with K local steps.

The buffers m and v are not fed by local gradients but by how the model moved over the whole round, mixing included,
which at a consensus is the same for all peers:

    d = x_t - x_{t+1},  u = d / ||d||          m <- a1 m + (1 - a1) u        v <- a2 v + (1 - a2) u u

A local step uses them with its fresh gradient g, but leaves them as they are:

    x <- x - lr (a1 m + g) / (sqrt(a2 v + (1 - a2) g g) + eps)

The gradient enters whole, as in the authors' code (epfml/quasi-global-momentum, decentralized_qg_adam.py): weighed by
1 - a1, it hardly counts beside a momentum of unit vectors, and a short run moves by inertia alone.

The norm is over all that is shared. Personal parts, which do not mix, take Adam's own steps. Dividing by the weights
1 - a^(t+1) that have entered is Adam's own correction.
"""

from __future__ import annotations

import torch

from peertune.algorithms.local_steps import LocalSteps
from peertune.exchange import Hop, Inbox
from peertune.optim import adam_moments


class Qg(LocalSteps):
    elementwise = False
    takes_whole_gradients = True

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
