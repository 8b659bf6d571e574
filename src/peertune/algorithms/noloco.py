"""NoLoCo (arXiv 2506.10911): DiLoCo without the all-reduce; outer steps within small random groups.

phi_i are the slow weights, theta_i what H inner steps made of them, Delta_i = theta_i - phi_i; bars are means over i's
group:

    g_i   =  Delta_bar + gamma / lr (phi_bar - phi_i)
    b_i   <- mu b_i + g_i
    phi_i <- phi_i + lr (g_i + mu b_i)          Nesterov; heavy ball (nesterov = false): phi_i + lr b_i

The second term of g pulls a group's slow weights together; where all are equal (one group of all peers) it vanishes,
and this is DiLoCo. The authors' code (jkolehm/noloco, sparse_optimizer_c.py) is the heavy ball with gamma = lr, and
sends both Delta_i and phi_i. Both enter g by one weighted sum, so a peer sends that alone here, half of the bytes:
theta_i + (gamma / lr - 1) phi_i, which with gamma = lr is theta_i itself.

A group of two is an edge: a random matching of the graph, so that a firewall's graph is respected; on a complete graph
these are the paper's random pairs. Larger groups need a complete graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import AlgorithmConfig, LearningRate, Positive
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox, Payload
from peertune.peer import Peer
from peertune.seeds import numpy_rng
from peertune.topology import Topology


class NolocoConfig(LocalStepsConfig):
    local_steps: Positive = 50
    """H: inner steps of a round."""
    lr: LearningRate = 4e-4
    """Peak inner learning rate. Default: DiLoCo's."""
    group_size: Annotated[int, Field(ge=2)] = 2
    """Peers that average with each other in a round. Default: NoLoCo's."""
    outer_lr: LearningRate = 0.7
    """Outer learning rate. Default: NoLoCo's."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """mu of the outer momentum. Default: NoLoCo's."""
    nesterov: bool = True
    """Nesterov's form of the outer momentum, as DiLoCo; false: heavy ball."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Pull of slow weights towards their group's mean. Default: that of outer_lr, as in the authors' code."""


class Noloco(LocalSteps):
    Config = NolocoConfig
    config: NolocoConfig
    mixes = False
    kept_per_weight = 1

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        self.momentum: dict[str, Tensor] = {}
        n = topology.num_peers
        if min(self.config.group_size, n) > 2 and len(topology.edges) < n * (n - 1) // 2:
            raise ConfigError(
                f"algorithm.group_size: got {self.config.group_size} on a graph that is not complete, where groups are"
                " edges; expected 2, or set topology.kind = 'complete'"
            )

    def groups(self, round: int) -> list[list[int]]:
        """Disjoint groups of peers that average in a round; a peer in none of them is on its own."""
        rng, size, n = numpy_rng(self.peer.seed, "groups", round), self.config.group_size, self.topology.num_peers
        if size > 2:
            order = [int(i) for i in rng.permutation(n)]
            count = max(1, n // size)
            return [sorted(order[i::count]) for i in range(count)]
        groups: list[list[int]] = []
        taken: set[int] = set()
        for e in rng.permutation(len(self.topology.edges)):
            edge = self.topology.edges[e]
            if taken.isdisjoint(edge):
                taken.update(edge)
                groups.append(list(edge))
        return groups

    def hops(self, round: int) -> Sequence[Hop]:
        groups = self.groups(round)
        alone = [[i] for i in set(range(self.topology.num_peers)).difference(*groups)]
        return (Hop("outer", {(i, j): 1 / len(g) for g in groups + alone for i in g for j in g}),)

    def begin(self, round: int) -> int:
        self.slow = {name: self.masters.snapshot(name) for name in self.common}
        return super().begin(round)

    @property
    def pull(self) -> float:
        """gamma / lr: weight of the slow weights beside their changes."""
        return self.config.gamma / self.config.outer_lr

    @torch.no_grad()
    def outgoing(self, hop: Hop) -> Payload:
        return {name: self.masters.snapshot(name).add_(slow, alpha=self.pull - 1) for name, slow in self.slow.items()}

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        mu, lr = self.config.outer_momentum, self.config.outer_lr
        for name, slow in self.slow.items():
            gradient = inbox.mean(name).sub_(slow, alpha=self.pull)
            if name not in self.momentum:
                self.momentum[name] = torch.zeros_like(slow)
            buffer = self.momentum[name].mul_(mu).add_(gradient)
            step = gradient.add_(buffer, alpha=mu) if self.config.nesterov else buffer
            self.masters.write(name, slow + step * lr)

    def join(self, round: int, common: Payload) -> None:
        super().join(round, common)
        self.momentum = {}

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return self.momentum

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.momentum = dict(tensors)
