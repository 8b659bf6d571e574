"""Ditto (Li et al. 2021, arXiv 2012.04221, alg. 1): FedAvg's common model x, and beside it a personal model v_i a peer.

Those drawn in a round train first their own, then the common one, from where each stood:

    v_i <- v_i - lr adam(g_i(v_i) + lambda (v_i - x))   K times, x as the round began with it
    y_i <- y_i - lr adam(g_i(y_i))                      K times from x, sent and averaged as by `fedavg`

v_i begins as x where peer i trains first, and never leaves it. The common model is FedAvg's, on other batches. AdamW in
place of SGD, new in each round for either model, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field
from torch import Tensor

from peertune.algorithms.base import LocalReport
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.optim import gradient_of


class DittoConfig(FedavgConfig):
    reset_moments: Literal[True] = True
    """Each round starts with a new optimiser for either model."""
    pull: Annotated[float, Field(ge=0)] = 0.1
    """lambda, the pull of the personal model towards the common one; 0: each peer for itself. Default: ours, of the
    authors' 0.05 to 2."""

    def num_steps(self, num_blocks: int) -> int:
        return 2 * super().num_steps(num_blocks)

    def with_steps(self, steps: int, num_blocks: int) -> Self:
        """Changes T; K stays."""
        return super().with_steps(steps // 2, num_blocks)


class Ditto(Fedavg):
    Config = DittoConfig
    config: DittoConfig
    keeps_own = True
    kept_per_weight = 1
    towards: Mapping[str, Tensor] = {}
    """x, float32, while the personal model is trained."""

    def local(self, round: int) -> LocalReport | None:
        """K steps of the personal model, then K of the common one, whose report it is."""
        if self.num_local_steps(round):
            names = list(self.masters)
            self.personal = self.personal or self.masters.snapshots(names)
            with self.in_person() as self.towards:
                super().local(round)
                self.personal = self.masters.snapshots(names)
            self.towards = {}
        return super().local(round)

    def adjust_gradients(self) -> None:
        """g_i(v_i) + lambda (v_i - x)."""
        if not self.towards:
            super().adjust_gradients()
        for name, common in self.towards.items():
            pull = (self.masters.snapshot(name) - common).mul_(self.config.pull)
            gradient_of(self.active[name]).add_(pull)
