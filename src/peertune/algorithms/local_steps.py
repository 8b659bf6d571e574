"""Rounds of K local AdamW steps on everything that is trained, then an exchange: what most methods have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.config import AlgorithmConfig, Decays, Epsilon, Positive
from peertune.exchange import Hop, Inbox, Payload
from peertune.flat import FlatParameters
from peertune.model.blocks import Block, as_one
from peertune.optim import Moments, adam_step, clip_gradients, learning_rate
from peertune.peer import Peer
from peertune.topology import Topology


class LocalStepsConfig(AlgorithmConfig):
    """Keys of every method that takes K local steps a round."""

    rounds: Positive = 100
    """T: rounds of local steps and exchange. Default: Dec-LoRA's longest."""
    local_steps: Positive = 5
    """K: local steps of a round. Default: Dec-LoRA's."""
    betas: Decays = (0.9, 0.999)
    """Adam's decay rates a1, a2. Default: Adam's own."""
    eps: Epsilon = 1e-8
    """Adam's epsilon. Default: Adam's own."""
    reset_moments: bool = False
    """Set Adam's moments, but those that the exchange feeds (qg), back to zero at the start of each round."""

    def num_steps(self, num_blocks: int) -> int:
        return self.rounds * self.local_steps

    def with_steps(self, steps: int, num_blocks: int) -> Self:
        """Changes T; K stays."""
        return self.model_copy(update={"rounds": max(1, steps // self.local_steps)})


def report_of(taken: Sequence[tuple[Tensor, Tensor, float]]) -> LocalReport | None:
    """What a round's steps tell together, of each step's loss, gradient norm and rate; None for no steps."""
    if not taken:
        return None
    losses, norms, rates = zip(*taken, strict=True)
    return LocalReport(torch.stack(losses).mean(), torch.stack(norms).mean(), rates[-1])


class LocalSteps(Algorithm):
    """x_{i,t+1} = sum_j w_ij (x_j after K AdamW steps on F_j). Subclasses say what is sent and how it is mixed."""

    Config: ClassVar[type[AlgorithmConfig]] = LocalStepsConfig
    takes_whole_gradients = False
    """Whether a gradient that does not stay in m enters its step whole: a1 m + g in place of a1 m + (1 - a1) g."""

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        assert isinstance(config, LocalStepsConfig)
        self.config = config
        self.active: dict[str, torch.nn.Parameter] = {}
        self.flat = self._side_by_side(self.masters.parameters)
        """What is trained, side by side in memory, where that is an adapter: many small tensors."""
        self.moments: dict[str, Moments] = {}
        self.num_taken = 0
        """Local steps this peer has taken."""

    def arrange(self, blocks: list[Block]) -> list[Block]:
        return [as_one(blocks)]

    @property
    def num_rounds(self) -> int:
        return self.config.rounds

    def num_local_steps(self, round: int) -> int:
        """Local steps this peer takes in a round; 0: it has no part in it."""
        return self.config.local_steps

    def trains(self, name: str, round: int) -> bool:
        """Whether a parameter is trained in a round."""
        return True

    def local(self, round: int) -> LocalReport | None:
        """K AdamW steps."""
        count, taken = self.begin(round), []
        if count and self.flat is not None:
            self.flat.begin_gradients(torch.empty_like(self.flat.data))
        for n in range(count):
            loss = self.peer.backward(self.num_taken, self.config.grad_accumulation)
            taken.append((loss, *self.take_step(round, n, count)))
        self.end()
        return report_of(taken)

    def feeds_moments(self, name: str) -> bool:
        """Whether a parameter's local gradients enter its moments for good, or only the step they make."""
        return True

    def begin(self, round: int) -> int:
        """Make ready for the steps of a round. Returns how many there are; 0: this peer has no part in it."""
        count = self.num_local_steps(round)
        if count:
            self.activate(round)
        return count

    def end(self) -> None:
        """Let go of what a round's steps alone needed."""
        if self.flat is not None:
            self.flat.end_gradients()
        if self.config.reset_moments:
            # Those that the exchange feeds are the method's own; the others begin anew, and would stand there idle.
            self.moments = {name: m for name, m in self.moments.items() if not self.feeds_moments(name)}

    def take_step(self, round: int, n: int, count: int) -> tuple[Tensor, float]:
        """Step `n` of a round's `count`, by the gradients at hand; their L2 norm before clipping, and the rate."""
        self.adjust_gradients()
        norm = clip_gradients(self.active, self.config.max_grad_norm)
        lr = learning_rate(self.config, round * count + n, self.num_rounds * count)
        self.step(lr)
        self.num_taken += 1
        if self.flat is None:
            for parameter in self.active.values():
                parameter.grad = None
        else:
            self.flat.zero_gradients()
        return norm, lr

    def activate(self, round: int) -> None:
        """Let gradients reach what the round trains, and have moments for it."""
        names = tuple(name for name in self.blocks[0].parameters if self.trains(name, round))
        if tuple(self.active) != names:
            active = self.peer.model.activate(replace(self.blocks[0], parameters=names))
            self.active = {name: active[name] for name in names}
            for name in self.active:
                self.masters.activate(name)
            if self.flat is None or tuple(self.flat.parameters) != names:
                self.flat = self._side_by_side(self.active)
        new = {name: parameter for name, parameter in self.active.items() if name not in self.moments}
        self.moments |= Moments.side_by_side(new)

    def _side_by_side(self, parameters: Mapping[str, torch.nn.Parameter]) -> FlatParameters | None:
        is_whole = not any(hasattr(parameter, "ranks") for parameter in parameters.values())
        return FlatParameters(parameters) if self.config.adapter != "none" and is_whole else None

    def adjust_gradients(self) -> None:
        """Change the gradients at hand before they are clipped and used."""

    def step(self, lr: float) -> None:
        """AdamW on the gradients at hand."""
        a1, a2 = self.config.betas
        alike: dict[tuple[int, bool], dict[str, Moments]] = {}
        for name in self.active:
            kind = self.moments[name].num_steps + 1, self.feeds_moments(name)
            alike.setdefault(kind, {})[name] = self.moments[name]
        for (count, feeds), moments in alike.items():
            adam_step(
                self.masters,
                moments,
                lr=lr,
                betas=self.config.betas,
                corrections=(1 - a1**count, 1 - a2**count),
                eps=self.config.eps,
                weight_decay=self.config.weight_decay,
                keep_moments=feeds,
                whole=self.takes_whole_gradients and not feeds,
            )
            if feeds:
                for state in moments.values():
                    state.num_steps = count

    def outgoing(self, hop: Hop) -> Payload:
        return self.masters.snapshots(self.common)

    def mix(self, hop: Hop, inbox: Inbox) -> None:
        for values in inbox.means(self.common):
            self.masters.write_all(values)

    def join(self, round: int, common: Payload) -> None:
        super().join(round, common)
        self.moments = {name: moments for name, moments in self.moments.items() if name not in self.common}

    def position(self, round: int) -> Mapping[str, int]:
        return {"outer_round": round, "block": 0, "inner_step": 0}

    def is_boundary(self, round: int) -> bool:
        """At most ten times a run."""
        return (round + 1) % math.ceil(self.num_rounds / 10) == 0

    def shared_names(self, round: int | None = None) -> Sequence[str]:
        return [name for name in self.common if round is None or self.trains(name, round)]

    def state_dict(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().state_dict(round)
        for name, moments in self.moments.items():
            tensors |= {f"exp_avg/{name}": moments.exp_avg, f"exp_avg_sq/{name}": moments.exp_avg_sq}
        tensors |= {f"state/{name}": t for name, t in self.extra_tensors().items()}
        return tensors, plain | {
            "num_taken": self.num_taken,
            "num_steps": {name: m.num_steps for name, m in self.moments.items()},
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], round: int) -> None:
        super().load_state_dict(tensors, plain, round)
        device = self.peer.model.device
        self.num_taken = int(plain["num_taken"])
        kept = [name for name in plain["num_steps"] if f"exp_avg/{name}" in tensors]
        self.moments = Moments.side_by_side({name: self.masters.parameters[name] for name in kept})
        for name, moments in self.moments.items():
            moments.exp_avg.copy_(tensors[f"exp_avg/{name}"])
            moments.exp_avg_sq.copy_(tensors[f"exp_avg_sq/{name}"])
            moments.num_steps = int(plain["num_steps"][name])
        prefix = "state/"
        extra = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.load_extra_tensors({name: t.to(device) for name, t in extra.items()})

    def extra_tensors(self) -> Mapping[str, Tensor]:
        """A subclass's tensors that outlive a round."""
        return {}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `extra_tensors` gave."""
