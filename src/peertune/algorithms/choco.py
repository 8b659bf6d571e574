"""CHOCO-SGD with Adam (Koloskova et al., arXiv 1902.00340, 1907.09356): gossip of top-k differences, error feedback.

Every peer keeps x^_i, what its neighbors believe it holds, and s_i = sum_j w_ij x^_j, what it believes of them:

    q_i = top_k(x_i - x^_i)                 sent: of each tensor k values and their places
    x^_i <- x^_i + q_i                      s_i <- s_i + sum_j w_ij q_j
    x_i <- x_i + gamma (s_i - x^_i)

What is cut off stays in x_i - x^_i and comes later. x^_i begins at the common first value, so nothing is lost there.
Two tensors are kept beside the weights, whatever the number of neighbors. AdamW in place of SGD is ours.

A message that is lost, between sites, would be missing in s_i for ever: every `refresh_every` rounds (ours) peers send
x_i itself, x^_i <- x_i and s_i <- sum_j w_ij x_j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import AlgorithmConfig, NonNegative
from peertune.exchange import Hop, Inbox, Payload, gossip
from peertune.peer import Peer
from peertune.topology import Topology

VALUES, PLACES = "values/", "places/"
REFRESH = "refresh"


class ChocoConfig(LocalStepsConfig):
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Entries of each tensor that are sent, as a share of all; at least one."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Consensus step size; the fewer entries are sent, the smaller it has to be. Not the papers', who tune it."""
    refresh_every: NonNegative = 0
    """Rounds after which whole weights are sent, so that what was lost between sites is made good; 0: never."""


class Choco(LocalSteps):
    Config = ChocoConfig
    config: ChocoConfig
    averages = False
    elementwise = False
    kept_per_weight = 2

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        self.public: dict[str, Tensor] = {name: self.masters.snapshot(name) for name in self.common}
        """x^_i, float32."""
        self.heard = {name: x.clone() for name, x in self.public.items()}
        """s_i, float32."""
        self.refresh = Hop(REFRESH, gossip(topology).weights)

    def is_refresh(self, round: int) -> bool:
        every = self.config.refresh_every
        return bool(every) and (round + 1) % every == 0

    def hops(self, round: int) -> Sequence[Hop]:
        """One of gossip; a late difference belongs to its round's x^_i, and is of no use."""
        return (self.refresh,) if self.is_refresh(round) else (gossip(self.topology, takes_late=False),)

    def outgoing(self, hop: Hop) -> Payload:
        if hop.name == REFRESH:
            return super().outgoing(hop)
        out: dict[str, Tensor] = {}
        for name, public in self.public.items():
            rest = (self.masters.snapshot(name) - public).view(-1)
            places = rest.abs().topk(max(1, int(self.config.ratio * len(rest)))).indices.sort().values
            # A payload is float32, which holds whole numbers up to 2^24 only: so these are the bits of an int32.
            out[VALUES + name], out[PLACES + name] = rest[places], places.int().view(torch.float32)
        return out

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        if hop.name == REFRESH:
            self.public = self.masters.snapshots(self.common)
            self.heard = {name: inbox.mean(name) for name in self.common}
        else:
            self._take_in(self.public, inbox.payloads.get(self.peer.index) or self.outgoing(hop), 1.0)
            for source in sorted(inbox.weights):
                self._take_in(self.heard, inbox.payloads[source], inbox.weights[source])
        for name, public in self.public.items():
            own = self.masters.snapshot(name)
            self.masters.write(name, own.add_(self.heard[name] - public, alpha=self.config.gamma))

    @staticmethod
    def _take_in(to: Mapping[str, Tensor], message: Payload, weight: float) -> None:
        """Add a peer's differences, by weight; none at places that there are not, whatever a neighbor says."""
        for name, tensor in to.items():
            places, flat = message[PLACES + name].view(torch.int32), tensor.view(-1)
            there = (places >= 0) & (places < len(flat))
            flat.index_add_(0, places[there], message[VALUES + name][there], alpha=weight)

    def can_join(self, round: int) -> bool:
        """Before a round whose messages are whole weights; else s_i is the sum of all that was ever heard."""
        return self.is_refresh(round)

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return {f"{kind}/{n}": x for kind in ("public", "heard") for n, x in getattr(self, kind).items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.public = {name: tensors[f"public/{name}"] for name in self.common}
        self.heard = {name: tensors[f"heard/{name}"] for name in self.common}
