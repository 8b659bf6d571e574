"""What algorithms and runtimes agree on: hops, inboxes and the exchange. The heart, and deliberately small.

A round is a local phase and then hops. A hop says who sends to whom with which weight; the runtime carries payloads
along it and hands each receiver an inbox; the algorithm mixes. Algorithms know no runtime, runtimes no algorithm.

    for hop in algorithm.hops(round):
        exchange.start(round, hop, algorithm.outgoing(hop))       # for every peer that sends
        inbox = exchange.finish(round, hop, like)                 # for every peer that receives
        algorithm.mix(hop, inbox)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

from torch import Tensor

from peertune.flat import contiguous_runs, split_like
from peertune.topology import Topology
from peertune.wire import Traffic

ROLL = "roll"
"""Name of a hop that carries who is still there, and nothing of the method's."""
Payload = Mapping[str, Tensor]
"""Named float32 tensors; a snapshot: nobody writes to them after they were handed over. On their way they may all be
bfloat16 (`codec`); of a method that takes no mean of them, all may be uint8, bits of its own."""


@dataclass(frozen=True)
class Hop:
    """One wave of messages; the same on every peer, as it is a pure function of (recipe, round)."""

    name: str
    """What the wave is for, as events and logs call it."""
    weights: Mapping[tuple[int, int], float]
    """(source, target) -> weight of the source's payload at the target; no key, no message."""
    spreads: bool = False
    """Where a source is lost, its weight goes to all that are heard, so that all who hear the same have the same mean;
    else to the receiver's own payload, so that the mean over all peers stays where W is symmetric."""
    takes_late: bool = False
    """Whether a message that comes after its round is added to what the receiver holds by then: where payloads are
    weights of the model, whose mean takes their place."""

    @cached_property
    def _ways(self) -> tuple[dict[int, dict[int, float]], dict[int, list[int]]]:
        """By target its sources with weights, and by source its targets; ascending."""
        sources: dict[int, dict[int, float]] = {}
        targets: dict[int, list[int]] = {}
        for (source, target), weight in sorted(self.weights.items()):
            sources.setdefault(target, {})[source] = weight
            if source != target:
                targets.setdefault(source, []).append(target)
        return sources, targets

    def sources(self, peer: int) -> Mapping[int, float]:
        """Who `peer` hears, itself included, with weights, in ascending order of the peers."""
        return self._ways[0].get(peer, {})

    def targets(self, peer: int) -> Sequence[int]:
        """To whom `peer` sends, itself left out, in ascending order."""
        return self._ways[1].get(peer, ())


@dataclass(frozen=True)
class Inbox:
    """What one peer received in a hop, its own payload included."""

    weights: Mapping[int, float]
    """Source -> weight."""
    payloads: Mapping[int, Payload]
    """What others sent may be bfloat16, if the recipe's codec says so; means are float32."""

    def mean(self, name: str) -> Tensor:
        """sum_j w_j x_j in float32, added in ascending order of the peers, so that every runtime rounds alike.

        Args:
            name: a tensor that every source sent.
        Returns:
            A new tensor of that tensor's shape.
        """
        first, *rest = sorted(self.weights)
        total = self.payloads[first][name].float() * self.weights[first]
        for source in rest:
            total.add_(self.payloads[source][name], alpha=self.weights[source])
        return total

    def means(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """As `mean`, of several, by name: together what lies side by side in all payloads, else one after the other."""
        first, *rest = sorted(self.weights)
        columns = [[self.payloads[source][name] for name in names] for source in (first, *rest)]
        for run, (vector, *others) in contiguous_runs(*columns):
            total = vector.float() * self.weights[first]
            for source, other in zip(rest, others, strict=True):
                total.add_(other, alpha=self.weights[source])
            yield dict(zip(names[run], split_like(total, columns[0][run]), strict=True))


class Exchange(Protocol):
    """A runtime's one duty towards a peer: carry its payloads along a hop."""

    sent: Traffic
    """What this peer has sent since the run began."""
    left_out: Sequence[int]
    """Members without whose messages this peer had to go on in its last round."""

    @property
    def rounds_without(self) -> Mapping[int, int]:
        """Member -> rounds that this peer went on without it."""

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        """Send `out` to this peer's targets in the hop; None where it has nothing to send."""

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        """Wait for this peer's sources; None if the hop brings it nothing.

        Args:
            like: makes what this peer itself would send along the hop; every message of the hop has to have its names
                and shapes.
        """

    def saved(self, round: int) -> None:
        """This peer's state after `round` rounds is on disk: it will not ask for messages of earlier rounds again."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`."""


@lru_cache(maxsize=4)
def gossip(topology: Topology, *, takes_late: bool = True) -> Hop:
    """Everyone to all neighbours, weighted by the mixing matrix W (w_ij is what i gives to j's message)."""
    w = topology.weights
    pairs = ((j, i) for i in range(topology.num_peers) for j in range(topology.num_peers))
    return Hop("gossip", {(j, i): float(w[i, j]) for j, i in pairs if w[i, j] > 0}, takes_late=takes_late)


def agreement(
    topology: Topology, pi: Sequence[float], pairs: Collection[tuple[int, int]] | None = None
) -> Sequence[Hop]:
    """Hops that leave every peer with the bitwise same weighted average, sum_j pi_j x_j.

    A reduce up a breadth-first tree of the graph and a broadcast down it: 2 x depth hops, where gossip alone would
    only come near. On the way up a peer's shared tensors hold partial sums; the way down overwrites them all.

    Args:
        pi: by peer, its share in the average; they sum to 1.
        pairs: edges that still carry messages, where some do not; each part of the graph that they hold together then
            agrees by itself, on the average of its own peers.
    """
    tree = topology.tree(pairs)
    if not tree:
        return ()
    children: dict[int, list[int]] = {}
    depth: dict[int, int] = {}
    root: dict[int, int] = {}
    for parent, child in tree:
        children.setdefault(parent, []).append(child)
        depth[child] = depth.setdefault(parent, 0) + 1
        root[child] = root.setdefault(parent, parent)
    if pairs is not None:
        totals = {r: sum(pi[p] for p in root if root[p] == r) for r in set(root.values())}
        # A part without any share, as one that a lone adapter's holder is not in, averages its peers alike.
        alike = {r: 1.0 / sum(other == r for other in root.values()) for r in totals}
        shares = {p: pi[p] / totals[r] if totals[r] else alike[r] for p, r in root.items()}
        pi = [shares.get(p, 1.0) for p in range(len(pi))]

    def level(d: int) -> list[int]:
        return [p for p in depth if depth[p] == d and p in children]

    def share(p: int) -> float:
        """A peer with children already holds a sum; a leaf holds its bare value."""
        return 1.0 if p in children else pi[p]

    up = []
    for d in reversed(range(max(depth.values()))):
        sums = {(child, p): share(child) for p in level(d) for child in children[p]}
        up.append(Hop("agree", {**sums, **{(p, p): pi[p] for p in level(d)}}))
    down = [
        Hop("agree", {(p, child): 1.0 for p in level(d) for child in children[p]}) for d in range(max(depth.values()))
    ]
    return (*up, *down)
