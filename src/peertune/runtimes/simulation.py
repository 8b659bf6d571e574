"""N virtual peers in one process on one device, in lock-step: the exchange is a mailbox in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from peertune.config import LinkSection
from peertune.exchange import Hop, Inbox, Payload
from peertune.link import Clock
from peertune.runtimes.group import Group, Lockstep, weighted_mean
from peertune.wire import header

T = TypeVar("T")


class SimulatedGroup(Group):
    """One process plays all members.

    Args:
        num_members: N, or N + 1 with a hub.
        link: what to assume of the links.
    """

    is_recorder = True

    def __init__(self, num_members: int, link: LinkSection) -> None:
        self.hosted: Sequence[int] = range(num_members)
        self.clock = Clock(link)
        self._mailbox = Mailbox(self.clock)

    def exchange(self, member: int) -> SimulatedExchange:
        return self._mailbox.endpoint(member)

    def gather(self, values: Sequence[T], combine: Callable[[Sequence[T]], T] | None = None) -> list[T | None]:
        return list(values)

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
        return weighted_mean(tensors, weights)


class Mailbox:
    """Where one hop's payloads lie until everyone has read them.

    Args:
        clock: told what each hop carried, where given.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.payloads: dict[int, Payload] = {}
        self.sizes: dict[int, int] = {}
        """Peer -> bytes it sends in this hop, headers included."""
        self._layout: tuple[int, bytes] | None = None
        """The first peer that sends in this hop, and the header of its payload."""
        self._asked: set[tuple[int, str]] = set()
        """Peers that were asked what they would send along hops of a name, where they only receive."""
        self._clock = clock
        self._num_endpoints = 0
        self._num_finished = 0

    def endpoint(self, peer: int) -> SimulatedExchange:
        """The exchange of one peer."""
        self._num_endpoints += 1
        return SimulatedExchange(self, peer)

    def put(self, peer: int, hop: Hop, payload: Payload, size: int) -> None:
        """Take in what a peer sends.

        Raises:
            ValueError: to one who is not there, or of other names or shapes than another peer's; peers apart could
                not carry it.
        """
        targets = hop.targets(peer)
        if targets and targets[-1] >= self._num_endpoints:
            raise ValueError(
                f"hop {hop.name!r}: peer {peer} sends to {targets[-1]}, expected one of {self._num_endpoints}"
            )
        self._check_layout(peer, hop, payload)
        self.payloads[peer], self.sizes[peer] = payload, size

    def ask(self, peer: int, hop: Hop, like: Callable[[], Payload]) -> None:
        """Ask one who only receives what it would send, as peers apart do in each round; once for a name of hops.

        Raises:
            ValueError: as `put`.
        """
        if peer not in self.payloads and (peer, hop.name) not in self._asked:
            self._asked.add((peer, hop.name))
            self._check_layout(peer, hop, like())

    def _check_layout(self, peer: int, hop: Hop, payload: Payload) -> None:
        here = header(payload)
        first, layout = self._layout = self._layout or (peer, here)
        if layout != here:
            raise ValueError(
                f"hop {hop.name!r}: peer {peer} sends tensors of other names or shapes than peer {first}; what"
                " `outgoing` gives has to be laid out alike on all peers, also on one that only receives"
            )

    def collect(self, weights: Mapping[int, float]) -> Inbox:
        """The payloads of some peers; when the last endpoint has its own, the mailbox lets go of them all."""
        inbox = Inbox(weights, {source: self.payloads[source] for source in weights})
        self._num_finished += 1
        if self._num_finished == self._num_endpoints:
            if self._clock is not None:
                self._clock.hop(list(self.sizes.values()))
            self._num_finished, self.payloads, self.sizes, self._layout = 0, {}, {}, None
        return inbox


class SimulatedExchange(Lockstep):
    """Implements `peertune.exchange.Exchange` for one peer."""

    def __init__(self, mailbox: Mailbox, peer: int) -> None:
        super().__init__(peer)
        self._mailbox = mailbox

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        if out is None:
            return
        self._mailbox.put(self._peer, hop, out, self.sent.count(hop.targets(self._peer), out))

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        if hop.sources(self._peer):
            self._mailbox.ask(self._peer, hop, like)
        inbox = self._mailbox.collect(hop.sources(self._peer))
        return inbox if inbox.weights else None
