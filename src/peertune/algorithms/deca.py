"""DECA: decentralised full-parameter fine-tuning, block by block with Adam (arXiv 2606.03209).

Peer i, block k, inner step r of its turn, with w_ij the mixing matrix:

    g_r           = grad_k F_i(theta_r; zeta),  zeta ~ D_i
    m_{r+1/2}     = a1 m_r + (1 - a1) g_r                v_{r+1/2} = a2 v_r + (1 - a2) g_r g_r
    theta_{r+1/2} = theta_r - lr mhat / (sqrt(vhat) + eps)
    theta_{r+1}   = sum_j w_ij theta_{j,r+1/2}
    m_{r+1}, v_{r+1} = correction of m_{r+1/2}, v_{r+1/2} by h_r, the discrepancy of the mix   (BMA, see `correct`)

With a gossip interval H > 1 (ours; the paper mixes after every step) H local steps go before each mix, and
d = theta_at_last_mix - theta_after_this_one spans all of them. Moments start at zero at each turn.
The formulas are second-hand, from a public transcription; the paper's text was not available to us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.algorithms.turns import BlockwiseConfig, Calendar
from peertune.config import AlgorithmConfig, Decays
from peertune.exchange import Hop, Inbox, Payload
from peertune.optim import Moments, adam_denominators, adam_step, clip_gradients, learning_rate
from peertune.peer import Peer
from peertune.topology import Topology

Discrepancy = Literal["paper", "descent", "descent_scaled", "none", "trivial"]


class DecaConfig(BlockwiseConfig):
    correction_betas: Decays = (0.9, 0.999)
    """b1, b2 of the moment correction. Not in the paper as we have it: ours, measured (docs/discrepancy.md)."""
    discrepancy: Discrepancy = "descent_scaled"
    """What corrects the moments; "none" is the ablation. Default: the best measured: docs/discrepancy.md."""
    bias_correction: Literal["count", "weight"] = "count"
    """What undoes the moments' start at zero: 1 - a^(r+1) as transcribed, or the total weight of all that entered them,
    which a correction changes ("weight", ours; always so with discrepancy = "trivial")."""


class Deca(Algorithm):
    Config: ClassVar[type[AlgorithmConfig]] = DecaConfig

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        assert isinstance(config, BlockwiseConfig)
        self.config = config
        self.calendar = self.make_calendar(config)
        mixing = config if isinstance(config, DecaConfig) else DecaConfig(discrepancy="none")
        self.discrepancy, self.correction_betas = mixing.discrepancy, mixing.correction_betas
        # The moments of "trivial" are fed once a mix, not once a step.
        self.divides_by_weights = mixing.bias_correction == "weight" or self.discrepancy == "trivial"
        self.active: dict[str, torch.nn.Parameter] = {}
        self.moments: dict[str, Moments] = {}
        self.anchor: dict[str, Tensor] = {}
        """theta at the last mix, float32."""
        self.moment_weights = self.corrections = (0.0, 0.0)
        """The total weights of what entered m and v since they were zero; and what last divided the two."""
        self.first_step = 0
        """Of the turn, the step at which its moments were zero: a later one where the peer joined within the turn."""
        self.interval_lr = 0.0
        """Sum of the rates since the last mix."""
        self.ends_turn = False
        """Whether the block's turn ends with the round at hand."""

    def make_calendar(self, config: BlockwiseConfig) -> Calendar:
        return Calendar(config, len(self.blocks), self.peer.seed)

    @property
    def num_rounds(self) -> int:
        return self.calendar.num_rounds

    def local(self, round: int) -> LocalReport:
        """H Adam steps on the active block."""
        turn = self.calendar.at(round)
        if turn.is_first:
            self.begin_turn(turn.block)
        if self.discrepancy != "none" and not self.anchor:
            self.anchor = {name: self.masters.snapshot(name) for name in self.shared_names(round)}
        self.interval_lr, self.ends_turn = 0.0, turn.is_last
        losses, norms, num_steps = [], [], self.config.num_steps(len(self.peer.blocks))
        for n in range(turn.num_steps):
            losses.append(self.peer.backward(turn.global_step + n, self.config.grad_accumulation))
            lr = learning_rate(self.config, turn.global_step + n, num_steps)
            norms.append(self.step(turn.first_step + n - self.first_step, lr))
            self.interval_lr += lr
        return LocalReport(torch.stack(losses).mean(), torch.stack(norms).mean(), lr)

    def begin_turn(self, block: int, first_step: int = 0) -> None:
        """Hand the active place to a block: its parameters alone get gradients, its remainders are at hand.

        Its moments are zero, from that step of the turn on.
        """
        self.moments, self.anchor = {}, {}
        for name in self.active:
            self.masters.release(name)
        self.active = self.peer.model.activate(self.blocks[block])
        for name in self.active:
            self.masters.activate(name)
        self.moments = {name: Moments.zeros(p) for name, p in self.active.items()}
        self.moment_weights, self.first_step = (0.0, 0.0), first_step

    def step(self, r: int, lr: float) -> Tensor:
        """theta_r -> theta_{r+1/2} from the gradients at hand, r counted from where the moments were zero.

        Returns the gradient's L2 norm before clipping.
        """
        norm = clip_gradients(self.active, self.config.max_grad_norm)
        (a1, a2), (c1, c2) = self.config.betas, self.moment_weights
        half = (a1 * c1 + 1 - a1, a2 * c2 + 1 - a2)
        own = 1 - a1 ** (r + 1), 1 - a2 ** (r + 1)
        corrections = half if self.divides_by_weights else own
        common = {name: moments for name, moments in self.moments.items() if name in self.common}
        personal = {name: moments for name, moments in self.moments.items() if name not in common}
        for moments, divisors, keeps in (
            (common, corrections, self.discrepancy != "trivial"),
            (personal, own, True),  # nothing mixes them, so nothing corrects them: Adam's own steps
        ):
            adam_step(
                self.masters,
                moments,
                lr=lr,
                betas=self.config.betas,
                corrections=divisors,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay,
                keep_moments=keeps,
            )
        for parameter in self.active.values():
            parameter.grad = None
        self.corrections = corrections
        if self.discrepancy != "trivial":
            self.moment_weights = half
        return norm

    def hops(self, round: int) -> Sequence[Hop]:
        """None in the turn of a block that is personal as a whole."""
        return super().hops(round) if self.shared_names(round) else ()

    def outgoing(self, hop: Hop) -> Payload:
        return {name: self.masters.snapshot(name) for name in self.active if name in self.common}

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        """theta_{r+1/2} -> theta_{r+1}, and the moments; tensor by tensor, to hold one discrepancy at a time.

        "trivial" alone holds them all, as each is divided by the norm of all.
        """
        corrects, d = self.discrepancy != "none" and not self.ends_turn, dict[str, Tensor]()
        for name in self.active:
            if name not in self.common:
                continue
            mixed = inbox.mean(name)
            self.masters.write(name, mixed)
            if corrects:
                d[name] = self.anchor[name].sub_(mixed)
                self.anchor[name] = mixed
                if self.discrepancy != "trivial":
                    self.correct({name: d.pop(name)})
        if d:
            self.correct(d)
        if corrects:
            self.weigh_correction()
        elif self.ends_turn:  # nobody needs them any more, and agreement, checkpoint and evaluation need room
            self.moments, self.anchor = {}, {}

    def correct(self, d: Mapping[str, Tensor]) -> None:
        """m_{r+1} = b1 m_{r+1/2} + (1 - b1) h, v_{r+1} = b2 v_{r+1/2} + (1 - b2) h h, by `discrepancy`:

            paper            h = -d, as transcribed: the step itself, so it points against the gradient
            descent          h = d
            descent_scaled   h = d / (sum of lr over the interval) (sqrt(vhat) + eps), a gradient's units; m only; d
                             without what weight decay took, which is no gradient and would be taken once more
            trivial          h = d / ||d||, into the moments of the last mix, in place of the local gradient
                             (QG-DAdam, arXiv 2102.04761)
            none             m and v stay

        Args:
            d: theta_at_last_mix - theta_after_this_one, by parameter.
        """
        b1, b2 = self.correction_betas
        scale = 1.0
        if self.discrepancy == "paper":
            scale = -1.0
        elif self.discrepancy == "descent_scaled":
            scale = 1 / self.interval_lr
        elif self.discrepancy == "trivial":
            norm = torch.nn.utils.get_total_norm(list(d.values())).item()
            scale = 1 / norm if norm else 0.0
        for name, h in d.items():
            moments = self.moments[name]
            decay = self.interval_lr * self.config.weight_decay if h.ndim > 1 else 0.0
            if decay and self.discrepancy == "descent_scaled":  # it was of the weights before: those now, and d
                h.mul_(1 - decay).sub_(self.anchor[name], alpha=decay)
            h.mul_(scale)
            if self.discrepancy == "descent_scaled":
                (denominator,) = adam_denominators([moments.exp_avg_sq], self.corrections[1], self.config.eps)
                h.mul_(denominator)
            else:
                moments.exp_avg_sq.mul_(b2).addcmul_(h, h, value=1 - b2)
            moments.exp_avg.lerp_(h, 1 - b1)

    def weigh_correction(self) -> None:
        """What a mix's correction makes of the total weights of what entered m and v."""
        b1, b2 = self.correction_betas
        c1, c2 = self.moment_weights
        self.moment_weights = (b1 * c1 + 1 - b1, c2 if self.discrepancy == "descent_scaled" else b2 * c2 + 1 - b2)

    def position(self, round: int) -> Mapping[str, int]:
        turn = self.calendar.at(round)
        return {"outer_round": turn.outer_round, "block": turn.block, "inner_step": turn.first_step}

    def can_join(self, round: int) -> bool:
        """At a turn's begin, where all peers' moments are zero."""
        return self.calendar.at(round).is_first

    def join(self, round: int, common: Payload) -> None:
        super().join(round, common)
        turn = self.calendar.at(round)
        if not turn.is_first:
            self.begin_turn(turn.block, turn.first_step)

    def is_boundary(self, round: int) -> bool:
        return self.calendar.at(round).is_last

    def shared_names(self, round: int | None = None) -> Sequence[str]:
        if round is None:
            return super().shared_names()
        return [name for name in self.blocks[self.calendar.at(round).block].parameters if name in self.common]

    def state_dict(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().state_dict(round)
        if self.moments and not self.calendar.at(round - 1).is_last:
            for name, moments in self.moments.items():
                tensors |= {f"exp_avg/{name}": moments.exp_avg, f"exp_avg_sq/{name}": moments.exp_avg_sq}
            plain |= {"weights": list(self.moment_weights), "first_step": self.first_step}
        return tensors, plain

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], round: int) -> None:
        super().load_state_dict(tensors, plain, round)
        if round > 0 and not self.calendar.at(round - 1).is_last:
            self.begin_turn(self.calendar.at(round).block, plain["first_step"])
            for name, moments in self.moments.items():
                moments.exp_avg.copy_(tensors[f"exp_avg/{name}"])
                moments.exp_avg_sq.copy_(tensors[f"exp_avg_sq/{name}"])
            self.moment_weights = (plain["weights"][0], plain["weights"][1])
