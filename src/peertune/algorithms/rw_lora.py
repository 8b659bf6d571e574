"""RW-LoRA (arXiv 2609.00078): one adapter walks the graph; whoever holds it trains it for K steps and passes it on.

The walk goes from i to j with probability W_ij. With topology.weights = "metropolis", the default, that is
Metropolis-Hastings, which in the long run is everywhere equally often. It is drawn from the run's seed, so every peer
knows who holds the adapter in every round.
A round costs one message, or none where the walk stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from peertune.algorithms.dec_lora import DecLora, DecLoraConfig
from peertune.exchange import Hop
from peertune.seeds import numpy_rng


class RwLoraConfig(DecLoraConfig):
    def share_at_work(self, num_peers: int) -> float:
        return 1 / num_peers


class RwLora(DecLora):
    Config = RwLoraConfig
    averages = False
    mixes = False

    @cached_property
    def walk(self) -> list[int]:
        """The adapter's holder in each round, and after the last."""
        rng, n = numpy_rng(self.peer.seed, "walk"), self.topology.num_peers
        path = [int(rng.integers(n))]
        for _ in range(self.num_rounds):
            path.append(int(rng.choice(n, p=self.topology.weights[path[-1]])))
        return path

    def num_local_steps(self, round: int) -> int:
        return self.config.local_steps if self.walk[round] == self.peer.index else 0

    def hops(self, round: int) -> Sequence[Hop]:
        source, target = self.walk[round], self.walk[round + 1]
        return (Hop("walk", {(source, target): 1.0}),) if source != target else ()

    def can_join(self, round: int) -> bool:
        """Not as the holder: what a neighbor hands on is an older copy, and what was trained since would be lost."""
        return self.walk[round] != self.peer.index

    def consensus(self, round: int) -> Sequence[float]:
        return [float(self.walk[round] == peer) for peer in range(self.topology.num_peers)]
