"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): federated averaging whose clients do not drift apart.

Those drawn in a round, S, start from the common model x and step along corrected gradients; c_i and c are estimates of
peer i's gradient and of all peers':

    y_i  <- y_i - lr adam(g_i(y_i) - c_i + c)           K times
    c_i+  = mean of g_i over the K steps                option II, with SGD the same as c_i - c + (x - y_i) / (K lr)
    x    <- sum_S (n_i / n_S) y_i                       n_S = sum_S n_i
    c    <- c + sum_S (n_i / n) (c_i+ - c_i)            so c = sum_i (n_i / n) c_i

Sent up are y_i and c_i+ - c_i, down x and c: twice FedAvg's bytes. The server's step size is 1. AdamW in place of SGD,
and n_i / n in place of 1 / N, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.config import AlgorithmConfig
from peertune.exchange import Hop, Inbox, Payload
from peertune.optim import gradient_of
from peertune.peer import Peer
from peertune.topology import Topology

CONTROL = "control/"


class ScaffoldConfig(FedavgConfig):
    server_optimizer: Literal["average"] = "average"
    """What the server does with the mean."""


class Scaffold(Fedavg):
    Config = ScaffoldConfig
    config: ScaffoldConfig
    kept_per_weight = 2

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        self.own = {name: self.masters.snapshot(name).zero_() for name in self.common}
        """c_i, float32; a server has none, and its stays zero."""
        self.control = {name: c.clone() for name, c in self.own.items()}
        """c, float32."""
        self.change = {name: c.clone() for name, c in self.own.items()}
        """c_i+ - c_i of the round at hand, float32."""
        self.count = 0
        """Steps of the round at hand."""

    def begin(self, round: int) -> int:
        self.count = super().begin(round)
        self.change = {name: -c if self.count else torch.zeros_like(c) for name, c in self.own.items()}
        return self.count

    def adjust_gradients(self) -> None:
        """g_i -> g_i - c_i + c."""
        for name, change in self.change.items():
            held = gradient_of(self.active[name])
            gradient = held.float()
            change.add_(gradient, alpha=1 / self.count)
            held.copy_(gradient - self.own[name] + self.control[name])
        super().adjust_gradients()

    def outgoing(self, hop: Hop) -> Payload:
        second = self.control if hop.name == "down" else self.change
        return {**super().outgoing(hop), **{CONTROL + name: c.clone() for name, c in second.items()}}

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        super().mix(hop, inbox)
        if hop.name == "down":
            self.control = {name: inbox.mean(CONTROL + name) for name in self.common}
        else:
            share = float(sum(self.topology.stationary[i] for i in inbox.weights))  # n_S / n
            for name, c in self.control.items():
                c.add_(inbox.mean(CONTROL + name), alpha=share)
        for name, c in self.own.items():
            c.add_(self.change[name])

    def can_join(self, round: int) -> bool:
        """Never: c is the mean of all c_i, and one who left took his along."""
        return False

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return {f"{kind}/{n}": c for kind in ("own", "control") for n, c in getattr(self, kind).items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.own = {name: tensors[f"own/{name}"] for name in self.common}
        self.control = {name: tensors[f"control/{name}"] for name in self.common}
