"""The final agreement when some are gone: played in one process, over a mailbox that loses what a dead line would."""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from peertune.algorithms.base import Algorithm
from peertune.algorithms.deca import Deca, DecaConfig
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.config import TopologySection
from peertune.errors import PeerLostError
from peertune.exchange import Hop, Inbox, Payload
from peertune.runtimes import Member, agree, rounds
from peertune.runtimes.rounds import PLAN, Agreement
from peertune.runtimes.simulation import Mailbox, SimulatedExchange
from peertune.topology import build_topology
from tests.quadratic import NUM_PEERS, simulate, weights_of


class LossyExchange(SimulatedExchange):
    """Leaves out what would come over lost edges, as a site does; `wave` is when they are lost."""

    def __init__(self, mailbox: Mailbox, peer: int, lost: set[tuple[int, int]], wave: int = 0) -> None:
        super().__init__(mailbox, peer)
        self.lost, self.wave, self.left_out = lost, wave, []

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        inbox = super().finish(round, hop, like)
        self.wave -= 1
        if inbox is None or self.wave >= 0:
            return inbox
        gone = {s for s in inbox.weights if (min(s, self._peer), max(s, self._peer)) in self.lost}
        self.left_out = sorted({*self.left_out, *gone})
        if gone and hop.name == "agree":
            raise PeerLostError("the final agreement went without some")
        kept = {source: weight for source, weight in inbox.weights.items() if source not in gone}
        return Inbox(kept, {source: inbox.payloads[source] for source in kept})


def ring(make: Callable[[Mailbox, int], SimulatedExchange]) -> list[Member]:
    """Peers on a ring after a run, as far apart as its last round left them."""
    topology = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    members = simulate(Deca, DecaConfig(lr=0.02, outer_rounds=1, inner_steps=2), topology)
    mailbox = Mailbox()
    for _ in members:
        mailbox.endpoint(0)
    return [replace(member, exchange=make(mailbox, member.index)) for member in members]


@pytest.mark.parametrize("wave", [0, NUM_PEERS - 2])
def test_those_who_hear_each_other_agree_without_the_lost(wave: int) -> None:
    """Also where the loss is noticed as late as all can still learn of it."""
    members = ring(lambda mailbox, peer: LossyExchange(mailbox, peer, {(0, 1), (1, 2)}, wave))
    before = weights_of(members)
    found = agree(0, members, may_lose=True)
    after = weights_of(members)
    others = [0, 2, 3, 4]
    assert found.hops and found.absent == [1] and found.is_one
    assert (after[others] == after[0]).all() and (after[1] == before[1]).all()
    np.testing.assert_allclose(after[0], before[others].mean(0), rtol=0, atol=1e-6)


def test_with_nobody_lost_it_is_bitwise_the_agreement_of_all() -> None:
    asked, not_asked = ring(SimulatedExchange), ring(SimulatedExchange)
    assert agree(0, asked, may_lose=True) == agree(0, not_asked) == Agreement(4, (), True)
    assert (weights_of(asked) == weights_of(not_asked)).all()


def test_what_came_late_is_in_the_agreement() -> None:
    """One who was behind plays its last rounds while the others ask who is there."""
    members = ring(SimulatedExchange)
    before = weights_of(members)

    def take_late(algorithm: Algorithm) -> None:
        for name in algorithm.shared_names():
            algorithm.set_shared(name, algorithm.shared(name) + 1.0)

    agree(0, members, may_lose=True, take_late=take_late)
    np.testing.assert_allclose(weights_of(members), np.tile(before.mean(0) + 1.0, (NUM_PEERS, 1)), rtol=0, atol=1e-6)


def test_messages_of_another_plan_are_mixed_into_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One neighbour believes that nobody is lost: no agreement, and all hold what they held."""

    class Misled(LossyExchange):
        def start(self, round: int, hop: Hop, out: Payload | None) -> None:
            if hop.name == "agree" and out is not None and self._peer == 3:
                out = {**out, PLAN: torch.zeros_like(out[PLAN])}
            super().start(round, hop, out)

    monkeypatch.setattr("peertune.runtimes.rounds.ATTEMPTS", 1)  # a mailbox begins no new hop within another
    members = ring(lambda mailbox, peer: Misled(mailbox, peer, {(0, 1), (1, 2)}))
    before = weights_of(members)
    with pytest.raises(PeerLostError, match="agrees with others than this site does"):
        agree(0, members, may_lose=True)
    assert (weights_of(members) == before).all()


@pytest.mark.parametrize("place", [0, -1], ids=["root", "between"])
def test_who_passes_on_another_model_than_it_holds_is_found_out(place: int) -> None:
    """Nobody can keep it from that; but all who hear of each other by another way learn that they do not hold one."""
    tree = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0).tree()
    liar = tree[place][0]

    class Lying(SimulatedExchange):
        def start(self, round: int, hop: Hop, out: Payload | None) -> None:
            goes_down = any((liar, child) in hop.weights for parent, child in tree if parent == liar)
            if hop.name == "agree" and out is not None and self._peer == liar and goes_down:
                out = {name: tensor + (name != PLAN) for name, tensor in out.items()}
            super().start(round, hop, out)

    members = ring(Lying)
    assert not agree(0, members, may_lose=True).is_one
    assert len(np.unique(weights_of(members), axis=0)) == 2


def test_nobody_is_suspected_for_an_attempt_that_failed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who failed has no model to tell of, and after the last attempt nobody is asked."""

    def failed_elsewhere(
        round: int, members: Sequence[Member], pairs: Sequence[tuple[int, int]], *_: object, **__: object
    ) -> torch.Tensor:
        told = torch.zeros(len(pairs) + 4)
        if round:
            told[-3:] = torch.tensor([1.0, 5.0, 0.0])
        return told

    monkeypatch.setattr(rounds, "roll_call", failed_elsewhere)
    members = ring(SimulatedExchange)
    assert agree(0, members, may_lose=True).is_one
    assert len(np.unique(weights_of(members), axis=0)) == 1


@pytest.mark.parametrize("is_apart", [False, True])
def test_peers_who_went_on_without_another_agree_though_all_are_back(is_apart: bool) -> None:
    """Federated averaging without a server needs no agreement, unless some round had losses."""
    topology = build_topology(TopologySection(kind="complete", weights="samples"), NUM_PEERS, 0, [1] * NUM_PEERS)
    members = simulate(Fedavg, FedavgConfig(lr=0.02, rounds=1, local_steps=1), topology)
    if is_apart:
        members[3].exchange.rounds_without = {1: 1}  # type: ignore[misc]
        members[3].algorithm.set_shared("a", members[3].algorithm.shared("a") + 1)
    before = weights_of(members)
    found = agree(0, members, may_lose=True)
    assert (found.hops > 0) == is_apart and not found.absent and found.is_one
    np.testing.assert_allclose(weights_of(members), np.tile(before.mean(0), (NUM_PEERS, 1)), atol=1e-6)


class Dies(Exception):
    """A site is killed."""


class Wires:
    """What sites in threads of their own have posted, and who is gone."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.posted: dict[tuple[int, int, tuple[int, int]], Payload] = {}
        self.newest: dict[int, tuple[float, int]] = {}
        """Sender -> key of its newest message; the end of all where it is gone."""


class Wire(SimulatedExchange):
    """As a site's exchange: of one who is gone, or sends messages of later keys, nothing more is waited for.

    Args:
        dies_at: the hop that this site begins and does not live to see the end of, counted over all.
    """

    def __init__(self, wires: Wires, peer: int, dies_at: float = math.inf) -> None:
        super().__init__(Mailbox(), peer)
        self.wires, self.left_out, self.key, self.lives = wires, [], (-1, 0), dies_at

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        if self.key[0] != round:
            self.key, self.left_out = (round, -1), []
        self.key = (round, self.key[1] + 1)
        self.lives -= 1
        with self.wires.changed:
            for target in hop.targets(self._peer) if out is not None else ():
                self.wires.posted[self._peer, target, self.key] = out  # type: ignore[assignment]
            self.wires.newest[self._peer] = (math.inf, 0) if self.lives < 0 else self.key
            self.wires.changed.notify_all()
        if self.lives < 0:
            raise Dies
        self.out = out

    def is_told(self, place: tuple[int, int, tuple[int, int]]) -> bool:
        return place in self.wires.posted or self.wires.newest.get(place[0], (-1, 0)) > self.key

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        weights = dict(hop.sources(self._peer))
        if not weights:
            return None
        payloads = {self._peer: self.out or like()} if self._peer in weights else {}
        for source in [source for source in weights if source != self._peer]:
            place = (source, self._peer, self.key)
            with self.wires.changed:
                there = self.wires.changed.wait_for(partial(self.is_told, place), timeout=300)
                assert there, "nobody is waited for without end"
                if place in self.wires.posted:
                    payloads[source] = self.wires.posted[place]
                    continue
            self.left_out = sorted({*self.left_out, source})
            if hop.name == "agree":
                raise PeerLostError(f"the final agreement went without {source}")
            del weights[source]
        return Inbox(weights, payloads)


@pytest.mark.parametrize("who", [0, 1, 3])
@pytest.mark.parametrize("hop", range(4 + 2 * 4))
def test_one_who_is_lost_in_the_agreement_is_agreed_without(who: int, hop: int) -> None:
    """In whichever of its hops: two blocks up and down a tree of depth 2, and the first of the waves that follow."""
    waves, wires = 2 * (NUM_PEERS - 1), Wires()
    members = ring(lambda mailbox, peer: Wire(wires, peer, waves + hop if peer == who else math.inf))
    told: dict[int, Agreement] = {}

    def play(member: Member) -> None:
        with suppress(Dies):
            told[member.index] = agree(0, [member], may_lose=True)
            with wires.changed:  # it has ended
                wires.newest[member.index] = (math.inf, 0)
                wires.changed.notify_all()

    threads = [threading.Thread(target=play, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = [peer for peer in range(NUM_PEERS) if peer != who]
    assert sorted(told) == others, "nobody else has failed"
    after, absent = weights_of(members), {tuple(told[peer].absent) for peer in others}
    assert (after[others] == after[others[0]]).all()
    assert absent in ({()}, {(who,)}), "all say the same of it"


def test_what_was_handed_over_is_never_written_to() -> None:
    """A site sends it again, as it was, to one who lost it."""
    handed: list[tuple[Payload, Payload]] = []

    class Noting(LossyExchange):
        def start(self, round: int, hop: Hop, out: Payload | None) -> None:
            if out is not None:
                handed.append((out, {name: tensor.clone() for name, tensor in out.items()}))
            super().start(round, hop, out)

    agree(0, ring(lambda mailbox, peer: Noting(mailbox, peer, {(0, 1), (1, 2)}, 1)), may_lose=True)
    assert handed and all(torch.equal(out[name], copy[name]) for out, copy in handed for name in copy)
