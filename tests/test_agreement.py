"""The final agreement when some are gone: played in one process, over a mailbox that loses what a dead line would."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from peertune.algorithms.deca import Deca, DecaConfig
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.config import TopologySection
from peertune.errors import PeerLostError
from peertune.exchange import Hop, Inbox, Payload
from peertune.runtimes import Member, agree
from peertune.runtimes.rounds import PLAN
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
    hops, absent = agree(0, members, may_lose=True)
    after = weights_of(members)
    others = [0, 2, 3, 4]
    assert hops and absent == [1]
    assert (after[others] == after[0]).all() and (after[1] == before[1]).all()
    np.testing.assert_allclose(after[0], before[others].mean(0), rtol=0, atol=1e-6)


def test_with_nobody_lost_it_is_bitwise_the_agreement_of_all() -> None:
    asked, not_asked = ring(SimulatedExchange), ring(SimulatedExchange)
    assert agree(0, asked, may_lose=True)[1] == [] and agree(0, not_asked)[1] == []
    assert (weights_of(asked) == weights_of(not_asked)).all()


def test_messages_of_another_plan_are_mixed_into_nothing() -> None:
    """One neighbour believes that nobody is lost: no agreement, and all hold what they held."""

    class Misled(LossyExchange):
        def start(self, round: int, hop: Hop, out: Payload | None) -> None:
            if hop.name == "agree" and out is not None and self._peer == 3:
                out = {**out, PLAN: torch.zeros_like(out[PLAN])}
            super().start(round, hop, out)

    members = ring(lambda mailbox, peer: Misled(mailbox, peer, {(0, 1), (1, 2)}))
    before = weights_of(members)
    with pytest.raises(PeerLostError, match="agrees with others than this site does"):
        agree(0, members, may_lose=True)
    assert (weights_of(members) == before).all()


@pytest.mark.parametrize("is_apart", [False, True])
def test_peers_who_went_on_without_another_agree_though_all_are_back(is_apart: bool) -> None:
    """Federated averaging without a server needs no agreement, unless some round had losses."""
    topology = build_topology(TopologySection(kind="complete", weights="samples"), NUM_PEERS, 0, [1] * NUM_PEERS)
    members = simulate(Fedavg, FedavgConfig(lr=0.02, rounds=1, local_steps=1), topology)
    if is_apart:
        members[3].exchange.rounds_without = {1: 1}  # type: ignore[misc]
        members[3].algorithm.set_shared("a", members[3].algorithm.shared("a") + 1)
    before = weights_of(members)
    hops, absent = agree(0, members, may_lose=True)
    assert (hops > 0) == is_apart and absent == []
    np.testing.assert_allclose(weights_of(members), np.tile(before.mean(0), (NUM_PEERS, 1)), atol=1e-6)


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
