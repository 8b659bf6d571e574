"""GT-Adam: gradient tracking with adaptive momentum (Carnevale et al., arXiv 2009.01745), with K local steps.

Every peer steps along s_i, which tracks the mean gradient, in place of its own gradient g_i:

    x_i <- sum_j w_ij (x_j - lr adam(s_j))        s_i <- sum_j w_ij s_j + g_i(new) - g_i(old)

Written with the correction c_i = s_i - g_i, whose sum over peers is zero, it takes local steps as K-GT does
(Liu et al., arXiv 2301.01313, algorithm 1): c_i stays over the K steps, z_i is the mean of s_i = g_i + c_i over them,
and

    c_i <- c_i - z_i + sum_j w_ij z_j

At K = 1 that is the tracker above. The paper adds the step after mixing; here, as in every method, it comes before.

The update of c_i is linear in the messages: one that i went without, though j heard i, adds w_ij (z_j - z_i) when it
comes late, and the sum over peers is zero again. Without it all would step along a mean that is off by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peertune.algorithms.local_steps import LocalSteps
from peertune.exchange import Hop, Inbox, Payload
from peertune.optim import gradient_of

TRACKED = "tracked/"


class Gt(LocalSteps):
    kept_per_weight = 1
    correction: Mapping[str, Tensor]
    """c_i of each common parameter, float32."""
    tracked: dict[str, Tensor]
    """z_i of the round at hand, float32."""

    def begin(self, round: int) -> int:
        if round == 0:
            self.correction = {name: self.masters.snapshot(name).zero_() for name in self.common}
        self.tracked = {name: torch.zeros_like(c) for name, c in self.correction.items()}
        return super().begin(round)

    def adjust_gradients(self) -> None:
        """g_i -> s_i = g_i + c_i."""
        share = 1 / self.config.local_steps
        for name, correction in self.correction.items():
            gradient = gradient_of(self.active[name])
            tracked = gradient.float() + correction
            self.tracked[name].add_(tracked, alpha=share)
            gradient.copy_(tracked)

    def can_join(self, round: int) -> bool:
        """Never: the sum of all corrections is zero, and one who left took his along."""
        return False

    def take_late(self, change: Payload) -> bool:
        weights = {name: value for name, value in change.items() if not name.startswith(TRACKED)}
        if not super().take_late(weights):
            return False
        for name, correction in self.correction.items():
            correction.add_(change[TRACKED + name].to(correction.device))
        return True

    def outgoing(self, hop: Hop) -> Payload:
        return {**super().outgoing(hop), **{TRACKED + name: z for name, z in self.tracked.items()}}

    def mix(self, hop: Hop, inbox: Inbox) -> None:
        super().mix(hop, inbox)
        self.correction = {
            name: c - self.tracked[name] + inbox.mean(TRACKED + name) for name, c in self.correction.items()
        }

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return self.correction

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.correction = tensors
