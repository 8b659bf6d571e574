"""Federated averaging over a server, its proximal and adaptive forms; with an adapter it is FedIT.

Each round the server draws a share of the peers; those train from the common model for K steps or E epochs, send what
they have, and get back

    average    x <- sum_i (n_i / n) x_i                          FedAvg (McMahan et al. 2017, arXiv 1602.05629, alg. 1)
    adam       x <- x + lr m / (sqrt(v) + tau)                   FedAdam (Reddi et al. 2021, arXiv 2003.00295, alg. 2)
    nesterov   x <- x - lr (d + mu b),  b <- mu b + d            DiLoCo (Douillard et al. 2023, arXiv 2311.08105)

with d = x - sum_i (n_i / n) x_i the pseudo-gradient, m and v its moments; v begins at tau^2. FedProx (Li et al. 2020,
arXiv 1812.06127, eq. 2) adds mu / 2 ||x_i - x||^2 to a peer's loss. FedIT (arXiv 2305.05644) is FedAvg of LoRA's
factors.

The server is a peer of its own beside the N, without data: two hops a round, up and down. On a complete graph there is
none: everybody sends to everybody and does the server's part for itself, with the bitwise same result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import AlgorithmConfig, Decays, Epsilon, LearningRate, NonNegative, TopologySection
from peertune.exchange import Hop, Inbox, Payload
from peertune.optim import adam_moments, gradient_of
from peertune.peer import Peer
from peertune.seeds import numpy_rng
from peertune.topology import Topology

USERS = {
    "server_lr": ("adam", "nesterov"),
    "server_betas": ("adam",),
    "server_tau": ("adam",),
    "server_momentum": ("nesterov",),
}
"""The server's optimisers that use a key."""


class FedavgConfig(LocalStepsConfig):
    reset_moments: bool = True
    """Each round starts with a new optimiser, as a client that keeps no state does."""
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    """C: share of the peers drawn for a round."""
    local_epochs: NonNegative = 0
    """E: passes over a peer's own data a round; 0: local_steps steps, the same for all."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu."""
    server_optimizer: Literal["average", "adam", "nesterov"] = "average"
    """What the server does with the mean."""
    server_lr: LearningRate | None = None
    """The server's learning rate (adam, nesterov); none: 1 for nesterov, 0.01 for adam, which moves each weight by
    about that. Ours: FedAdam's authors tune it."""
    server_betas: Decays = (0.9, 0.99)
    """Decay rates of the server's moments (adam). Default: FedAdam's."""
    server_tau: Epsilon = 1e-3
    """What is added to sqrt(v) (adam). Default: FedAdam's."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """mu of the server's Nesterov momentum. Default: DiLoCo's."""

    @field_validator(*USERS)
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a key that the server's optimiser does not have: nothing would come of it."""
        key, optimizer = str(info.field_name), info.data.get("server_optimizer")  # none where that is wrong itself
        if optimizer is not None and optimizer not in USERS[key] and value != cls.model_fields[key].default:
            raise PydanticCustomError("unused", f'it left out, as server_optimizer = "{optimizer}" does not use it')
        return value

    @property
    def outer_lr(self) -> float:
        """The server's learning rate, as set or by its optimiser."""
        return self.server_lr or (1e-2 if self.server_optimizer == "adam" else 1.0)

    def num_sampled(self, num_peers: int) -> int:
        """Peers that train in a round."""
        return max(1, int(self.participation * num_peers + 0.5))

    def share_at_work(self, num_peers: int) -> float:
        return self.num_sampled(num_peers) / num_peers


class Fedavg(LocalSteps):
    Config: ClassVar[type[AlgorithmConfig]] = FedavgConfig
    config: FedavgConfig

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        self.anchor: dict[str, Tensor] = {}
        """The common model at the start of the round, where it is needed."""
        self.server: dict[str, Tensor] = {}
        """The server's moments; kept by every peer where there is no hub."""

    @classmethod
    def graph(cls, section: TopologySection) -> TopologySection:
        kind = "complete" if section.kind == "complete" else "star"
        return section.model_copy(update={"kind": kind, "weights": "samples"})

    @classmethod
    def has_hub(cls, section: TopologySection) -> bool:
        return section.kind == "star"

    @property
    def serves_itself(self) -> bool:
        """Whether every peer runs the server's optimiser, as there is no server."""
        return self.config.server_optimizer != "average" and not self.topology.has_hub

    @property
    def hub(self) -> int:
        """The server's index."""
        return self.topology.num_peers

    def agreement(self, pairs: Collection[tuple[int, int]] | None = None) -> Sequence[Hop]:
        """None is needed, as each round ends with one model; but where there is no server, after losses."""
        return () if self.topology.has_hub or pairs is None else super().agreement(pairs)

    def sampled(self, round: int) -> list[int]:
        """The peers that train in a round, ascending."""
        n = self.topology.num_peers
        count = self.config.num_sampled(n)
        return sorted(int(i) for i in numpy_rng(self.peer.seed, "participation", round).choice(n, count, replace=False))

    def num_local_steps(self, round: int) -> int:
        if self.peer.index not in self.sampled(round):
            return 0
        if not self.config.local_epochs:
            return self.config.local_steps
        return self.peer.num_steps(self.config.local_epochs, self.config.grad_accumulation)

    def begin(self, round: int) -> int:
        if self.config.proximal or self.serves_itself:
            self.anchor = {name: self.masters.snapshot(name) for name in self.common}
        return super().begin(round)

    def adjust_gradients(self) -> None:
        """grad += mu (x_i - x)."""
        if self.config.proximal:
            for name, anchor in self.anchor.items():
                pull = (self.masters.snapshot(name) - anchor).mul_(self.config.proximal)
                gradient_of(self.active[name]).add_(pull)

    def hops(self, round: int) -> Sequence[Hop]:
        shares, chosen = self.consensus(round), self.sampled(round)
        total = sum(shares[i] for i in chosen)
        n = self.topology.num_peers
        if not self.topology.has_hub:
            return (Hop("average", {(i, j): shares[i] / total for i in chosen for j in range(n)}, spreads=True),)
        up = Hop("up", {(i, self.hub): shares[i] / total for i in chosen})
        return up, Hop("down", {(self.hub, j): 1.0 for j in range(n)})

    def mix(self, hop: Hop, inbox: Inbox) -> None:
        if hop.name == "down" or self.config.server_optimizer == "average":
            super().mix(hop, inbox)
            return
        for name in self.common:
            before = self.masters.snapshot(name) if self.peer.index == self.hub else self.anchor[name]
            self.masters.write(name, self.serve(name, before, inbox.mean(name)))

    def serve(self, name: str, before: Tensor, mean: Tensor) -> Tensor:
        """The server's optimiser on one parameter: the new common value, float32, of its shape."""
        c = self.config
        moments = self.server_moments(name, before)
        if c.server_optimizer == "adam":
            m, v = moments
            adam_moments([m], [v], [mean - before], c.server_betas)
            return before.addcdiv(m, v.sqrt().add_(c.server_tau), value=c.outer_lr)
        pseudo_gradient = before - mean
        buffer = moments[0].mul_(c.server_momentum).add_(pseudo_gradient)
        return before - c.outer_lr * pseudo_gradient.add_(buffer, alpha=c.server_momentum)

    def server_moments(self, name: str, like: Tensor) -> list[Tensor]:
        """What the server's optimiser keeps of a parameter, to be changed in place: m and v, or b; float32."""
        is_adam = self.config.server_optimizer == "adam"
        starts = {"exp_avg": 0.0, "exp_avg_sq": self.config.server_tau**2} if is_adam else {"momentum": 0.0}
        keys = {f"{kind}/{name}": start for kind, start in starts.items()}
        for key in keys.keys() - self.server.keys():
            self.server[key] = torch.full_like(like, keys[key])
        return [self.server[key] for key in keys]

    def handed_on(self) -> Payload:
        """The common model, and where each peer does the server's part, the server's moments too."""
        common = super().handed_on()
        if not self.serves_itself:
            return common
        for name in self.common:
            self.server_moments(name, common[name])
        return {**common, **{key: moment.clone() for key, moment in self.server.items()}}

    def join(self, round: int, common: Payload) -> None:
        super().join(round, common)
        self.server = {key: value for key, value in common.items() if key not in self.masters}

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return self.server

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.server.update(tensors)
