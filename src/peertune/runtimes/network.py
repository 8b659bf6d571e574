"""One process a site, over the internet: what a run sees of the connections that `node` holds.

A neighbour out of reach is waited for `grace_s`, a server for as long as it takes; then the round goes on without him,
his weight on this site's own message, until he has caught up. One who is behind plays the rounds he missed, from
messages that were kept; where some are kept no more, or he is no faster than the others, he takes the state from a
neighbour.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm
from peertune.charter import check_members
from peertune.errors import Left, PeerLostError, TurnedAwayError
from peertune.exchange import ROLL, Hop, Inbox, Payload
from peertune.runtimes.catch_up import StateRequest
from peertune.runtimes.edge_frames import STATE, Key
from peertune.runtimes.group import Group
from peertune.runtimes.neighbor import Neighbor
from peertune.runtimes.node import Node
from peertune.runtimes.rounds import edges
from peertune.runtimes.site_requests import Requests
from peertune.wire import Traffic

T = TypeVar("T")
POLL_S = 0.05
"""Seconds between looks at whether a neighbour is still worth waiting for."""
LENIENT_GRACES = 10
"""At the end of a run one who is behind, but gets on, is waited for at most so many graces."""
WAITING_S = 5.0
"""Seconds after which one is told whom a round waits for."""


class NetworkGroup(Group):
    """One site; `gather` gives only what it knows, `mean` nothing.

    Args:
        is_robust: messages are mixed by a rule that a late one, added by itself, would go around.
    """

    def __init__(self, node: Node, requests: Requests | None = None, *, is_robust: bool = False) -> None:
        self.node, self._is_robust = node, is_robust
        self.hosted: Sequence[int] = [node.index]
        self.is_recorder = self.survives_loss = True
        self._exchange = NetworkExchange(node, requests)
        self._request = StateRequest(node, is_robust=is_robust)
        self._joined = 0
        """The round from whose beginning this site holds what another one made of those before."""

    @property
    def is_leaving(self) -> bool:
        return self._exchange.is_leaving

    def catch_up(self, round: int, algorithm: Algorithm) -> int:
        """Give neighbours who are behind the state, where the method lets them join; take it where this site is.

        Waits while fewer than the quorum are there.
        """
        then = self._caught_up(round, algorithm)
        self._exchange.begin(then)
        return then

    def _caught_up(self, round: int, algorithm: Algorithm) -> int:
        self._exchange.attend()
        self._await_quorum(round)
        self._give_state(round, algorithm)
        self._request.ask_where_behind(round, algorithm, is_left_out=bool(self._exchange.left_out))
        answer = self._request.answer()
        if answer is None:
            self.take_late(algorithm)
            return round
        then, state = answer
        if state is None or not self._request.is_sound(round, then, algorithm):
            return round
        self._join(then, state, algorithm)
        self.node.log("joined", round=then, missed=then - round)
        return then

    def _give_state(self, round: int, algorithm: Algorithm) -> None:
        state: Payload | None = None
        for index, neighbor in self.node.neighbors.items():
            if neighbor.edge.peer_asks and neighbor.edge.peer_round < round and algorithm.can_join(round):
                neighbor.welcome(round)
                state = state or algorithm.handed_on()
                self._exchange.post(index, (round, STATE), state, "state")

    def _join(self, round: int, state: Payload, algorithm: Algorithm) -> None:
        """Go on from the beginning of a round, as another site was there."""
        device = algorithm.peer.model.device
        algorithm.join(round, {name: value.to(device) for name, value in state.items()})
        algorithm.peer.model.forget()
        for neighbor in self.node.neighbors.values():
            self.node.soon(partial(neighbor.skip_to, round))
        self._joined = round

    def take_late(self, algorithm: Algorithm) -> None:
        """Put right what rounds without a neighbour's messages did to the mean, with those that came after all.

        x_i <- x_i + w_ij (x_j - x_i), both as they were sent: where W is symmetric, the peers' mean is then as if the
        message had come in time. In all at most a weight of 1 for one absence, so that old differences do not add up.
        """
        for index, neighbor in self.node.neighbors.items():
            while not neighbor.late.empty():
                (round, number), theirs, mine = neighbor.late.get()
                weight = algorithm.hops(round)[number].weights[index, self.node.index]
                change = {name: (theirs[name].float() - mine[name].float()).mul_(weight) for name in mine}
                total = self._exchange.late_weight[index] + weight
                used = total <= 1.0 and round >= self._joined and algorithm.take_late(change)
                if used:
                    self._exchange.late_weight[index] = total
                    algorithm.peer.model.forget()
                amount = torch.linalg.vector_norm(torch.stack([value.norm() for value in change.values()])).item()
                self.node.log("late", peer=neighbor.name, round=round, used=used, amount=amount)

    def _await_quorum(self, round: int) -> None:
        while not self.is_leaving and not self._exchange.log_quorum(round):
            time.sleep(POLL_S)
            self._exchange.attend()

    def exchange(self, member: int) -> NetworkExchange:
        return self._exchange

    def open(self, algorithm: Algorithm) -> None:
        pairs, topology = edges(algorithm), algorithm.topology
        check_members(self.node.charter.members, topology.num_members, pairs)
        self._exchange.corrects = algorithm.averages and not self._is_robust
        self._exchange.hub = topology.num_peers if topology.has_hub else None
        self.node.start(pairs)
        self.node.soon(self._log_start)  # in the thread that logs connections: they stand before it or after it

    def _log_start(self) -> None:
        members, neighbors = [member.name for member in self.node.charter.members], self.node.neighbors
        connected = [index for index, neighbor in neighbors.items() if neighbor.is_connected]
        self.node.log("started", site=self.node.index, members=members, neighbors=list(neighbors), connected=connected)

    def gather(self, values: Sequence[T], combine: Callable[[Sequence[T]], T] | None = None) -> list[T | None]:
        told: list[T | None] = [None] * len(self.node.charter.members)
        (told[self.node.index],) = values
        return told

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> None:
        return None


class NetworkExchange:
    """Implements `peertune.exchange.Exchange` for one site.

    Args:
        node: the site's connections.
        requests: what people ask of the site meanwhile; None: nobody does.
    """

    def __init__(self, node: Node, requests: Requests | None = None) -> None:
        self._node, self._peer, self._requests = node, node.index, requests
        self._key: Key = (-1, 0)
        self._out: Payload | None = None
        self.sent = Traffic()
        self.left_out: Sequence[int] = []
        self.rounds_without: Counter[int] = Counter()
        self.late_weight: defaultdict[int, float] = defaultdict(float)
        """By neighbour, the weights of its late messages that were used since one came in time."""
        self.corrects = False
        """Whether a late message is worth fetching: what the method makes of messages is their mean."""
        self._has_begun = self._is_paused = False
        self.hub: int | None = None
        """The server's index, where there is one: without it there are no rounds."""

    def begin(self, round: int) -> None:
        """A round, in which nobody was missed as yet; it may have no hop at all."""
        if self._key[0] != round:
            self._key, self.left_out = (round, -1), []

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        self.begin(round)
        if self._key[1] < 0:
            for neighbor in self._node.neighbors.values():
                self._node.soon(partial(neighbor.begin, round))
        self._key = (round, self._key[1] + 1)
        self._out = out
        if out is None:
            return
        for target in hop.targets(self._peer):
            self.post(target, self._key, out, hop.name)

    def post(self, target: int, key: Key, payload: Payload, what: str) -> None:
        """Make a message ready for a neighbour, and write it down."""
        if self._node.neighbors[target].is_ejected:
            return
        neighbor, size = self._node.neighbors[target], self.sent.count([target], payload, is_control=what == ROLL)
        self._node.soon(partial(neighbor.post, key, payload))
        self._node.log("sent", peer=neighbor.name, round=key[0], hop=what, tensors=len(payload), bytes=size)

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        out, self._out = self._out, None
        weights = hop.sources(self._peer)
        if not weights:
            return None
        remote = [source for source in weights if source != self._peer]
        shapes = like() if out is None else out
        arrivals = {source: self._expect(source, shapes) for source in remote}
        payloads: dict[int, Payload] = {} if self._peer not in weights else {self._peer: shapes}
        missing = []
        # Two who do not know of the same losses may each wait for the other: not for ever. Word that somebody gets on
        # comes over the graph, and of a part that is under way nothing is known for up to stall_s.
        charter, is_of_a_round = self._node.charter, hop.name not in (ROLL, "agree")
        patience = charter.grace_s * len(charter.members) + charter.stall_s if hop.name == "agree" else math.inf
        for source, arrival in arrivals.items():
            # At the end of a run, one who is still behind may come in time.
            lenient_s = charter.grace_s if hop.name == ROLL and source not in self.left_out else 0.0
            corrects = self.corrects and hop.takes_late
            payload = self._wait(source, arrival, patience, lenient_s, corrects=corrects)
            if payload is None:
                neighbor = self._node.neighbors[source]
                if source == self.hub and neighbor.edge.peer_is_finished:
                    raise PeerLostError(
                        f"the server, {neighbor.name}, has ended the run without this site, in its round {round}"
                    )
                missing.append(source)
            else:
                if is_of_a_round:  # before the others late ones come, from one who is behind
                    self.late_weight[source] = 0.0
                payloads[source] = {name: tensor.to(shapes[name].device) for name, tensor in payload.items()}
        self._has_begun |= bool(arrivals)
        if missing:
            lost = [self._node.neighbors[source] for source in missing]
            names, may_agree_later = ", ".join(other.name for other in lost), self.is_leaving and not is_of_a_round
            # Those who left too come back, and would find nobody to agree with.
            if may_agree_later and (left := [other.name for other in lost if other.edge.peer_has_left]):
                raise Left(f"left before the final agreement, as {left[0]} left too; the same command goes on with it")
            self._node.log("left_out", peers=names, round=round, hop=hop.name)
            if is_of_a_round:
                self.rounds_without.update(set(missing).difference(self.left_out))
            self.left_out = [*self.left_out, *missing]
            if hop.name == "agree":
                raise PeerLostError(f"the final agreement went without {names}, so it is none")
            weights = without(weights, missing, self._peer, spreads=hop.spreads)
        return Inbox(weights, payloads) if weights else None

    def _expect(self, source: int, like: Payload) -> Future[Payload | None]:
        arrival: Future[Payload | None] = Future()
        self._node.soon(partial(self._node.neighbors[source].expect, self._key, like, arrival.set_result))
        return arrival

    @property
    def is_leaving(self) -> bool:
        return self._requests is not None and self._requests.is_leaving

    def attend(self) -> None:
        """Do what was asked: eject members.

        Raises:
            TurnedAwayError: the others take nothing from this site, or it is the one who is ejected.
        """
        if reason := self._node.turned_away:
            raise TurnedAwayError(f"the other sites take nothing from this one: {reason}; this site stops")
        for index, ejection in ({} if self._requests is None else self._requests.ejections()).items():
            name, signed_by = ejection.member, ", ".join(ejection.signers(self._node.charter))
            self._node.log("ejected", peer=name, signed_by=signed_by)
            if index == self._peer:
                raise TurnedAwayError(f"{name}, which is this site, was ejected from this run by {signed_by}; it stops")
            self._node.soon(partial(self._node.eject, index, ejection))

    def _wait(
        self, source: int, arrival: Future[Payload | None], patience: float, lenient_s: float, *, corrects: bool
    ) -> Payload | None:
        """The payload; None where the neighbour has been out of reach for the grace, or `patience` is at its end.

        Args:
            patience: seconds in which no member, as far as is known here, has taken in more of a message.
            lenient_s: seconds without a new round after which a neighbour who is within reach, but behind, is waited
                for no more.
            corrects: a message that is gone on without is fetched later, should it still come.
        """
        neighbor, began, told = self._node.neighbors[source], time.monotonic(), False
        reached, got_on = neighbor.edge.peer_round, began
        while True:
            self.attend()
            if neighbor.edge.peer_round != reached:  # less: it was started again
                reached, got_on = neighbor.edge.peer_round, time.monotonic()
            if not told and not neighbor.is_connected and time.monotonic() - began > WAITING_S:
                told = True
                self._node.log("waiting", peer=neighbor.name, round=self._key[0], **self._hint(source))
            is_patient = time.monotonic() - began < LENIENT_GRACES * lenient_s
            may_come = neighbor.is_connected and is_patient and time.monotonic() - got_on < lenient_s
            if arrival.done():
                pass  # whatever has become of the neighbor, or of the others, since
            elif not may_come and self._may_go_on(neighbor) and neighbor.mark_away(self._key[0]):
                self._node.soon(partial(neighbor.miss, self._key, corrects))
            elif self.is_leaving and not (neighbor.is_connected and self._node.has_quorum):
                raise Left(
                    f"left while waiting for {neighbor.name} in round {self._key[0]}, so without a checkpoint of it;"
                    " the same command goes on from the last one"
                )
            if neighbor.index == self.hub and neighbor.is_ejected:
                raise PeerLostError(f"the server, {neighbor.name}, was ejected, so there are no more rounds")
            if time.monotonic() - max(began, self._node.presence.got_on_at) > patience:
                self._node.soon(partial(neighbor.edge.give_up, self._key))
            with suppress(TimeoutError):
                payload = arrival.result(timeout=POLL_S)
                if self._is_paused:  # one more message, from one of too few, ends no pause
                    self.log_quorum(self._key[0])
                return payload
            if self._has_begun:
                self.log_quorum(self._key[0])

    def _hint(self, source: int) -> dict[str, str]:
        """Where a neighbour dials this site: what is in the way is told at the end that dials only."""
        if self._node.dials(source):
            return {}
        return {"hint": f"it dials this site, at {self._node.charter.members[self._peer].address}"}

    def log_quorum(self, round: int) -> bool:
        """Say whether enough members are there, where that has changed while one waits. Returns whether they are."""
        found = self._node.has_quorum
        if found == self._is_paused:
            self._is_paused = not found
            present, needs = ", ".join(self._node.present), {} if found else {"quorum": self._node.quorum}
            self._node.log("resumed" if found else "paused", round=round, present=present, **needs)
        return found

    def _may_go_on(self, neighbor: Neighbor) -> bool:
        """Whether a neighbour may be left out: the run has begun, and enough members are there.

        A server is waited for, and itself waits while it hears nobody.
        """
        if self._begins(neighbor) or not self._node.has_quorum_without_the_lost:
            return False
        if self._peer == self.hub:
            return any(not other.is_out_of_reach for other in self._node.neighbors.values())
        return neighbor.index != self.hub

    def _begins(self, neighbor: Neighbor) -> bool:
        """Whether the run has not begun, for all this site knows, and waits until everyone is there."""
        others = self._node.neighbors.values()
        was_there = neighbor.was_seen or self._node.presence.is_gone(neighbor.index, time.monotonic())
        return not self._has_begun and not was_there and all(other.edge.peer_round <= 1 for other in others)

    def saved(self, round: int) -> None:
        for neighbor in self._node.neighbors.values():
            self._node.soon(partial(neighbor.checkpointed, round))

    def state_dict(self) -> dict[str, Any]:
        without = list(self.rounds_without.items())
        return {"sent": self.sent.state_dict(), "rounds_without": without, "left_out": list(self.left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sent.load_state_dict(state["sent"])
        self.rounds_without, self.left_out = Counter(dict(state["rounds_without"])), state["left_out"]
        self._has_begun = True


def without(
    weights: Mapping[int, float], missing: Sequence[int], peer: int, *, spreads: bool = False
) -> dict[int, float]:
    """A row of weights when some sources are missing: their share goes to the peer's own message.

    With `spreads`, or at a receiver who sends nothing himself, as a server, it is spread over all that are heard, by
    their weights; empty where nobody is left.
    """
    lost = sum(weights[source] for source in missing)
    left = {source: weight for source, weight in weights.items() if source not in missing}
    if peer in left and not spreads:
        return left | {peer: left[peer] + lost}
    total = sum(left.values())
    return {source: weight * (total + lost) / total for source, weight in left.items()}
