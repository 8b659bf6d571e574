"""DECA against a NumPy reference written from the formulas alone, on quadratic losses over a graph."""

from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import pytest

from peertune.algorithms.deca import Deca, DecaConfig, Discrepancy
from peertune.algorithms.dpsgd import Dpsgd
from peertune.algorithms.local import Local
from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.algorithms.turns import BlockwiseConfig, Calendar
from peertune.config import TopologySection
from peertune.exchange import Inbox
from peertune.runtimes import Member, agree, play_round
from peertune.runtimes.simulation import Mailbox
from peertune.topology import Topology, build_topology
from tests.quadratic import NUM_PEERS, SIZE, QuadraticPeer, gradient, simulate, start, weights_of


def reference(w: np.ndarray, c: DecaConfig) -> np.ndarray:
    """The formulas of arXiv 2606.03209 for all peers at once, in float64. Returns [N, 2 SIZE]."""
    n = len(w)
    theta = np.tile(start(), (n, 1))
    (a1, a2), (b1, b2), lr, h_steps = c.betas, c.correction_betas, c.lr, c.gossip_every
    step = 0
    for _t in range(c.outer_rounds):
        for k in range(2):
            block = slice(k * SIZE, (k + 1) * SIZE)
            m, v = np.zeros((n, SIZE)), np.zeros((n, SIZE))
            weight_m = weight_v = 0.0
            anchor, since = theta[:, block].copy(), 0
            for r in range(c.inner_steps):
                g = np.array([gradient(i, step, theta[i]) for i in range(n)])[:, block]
                m_half, v_half = a1 * m + (1 - a1) * g, a2 * v + (1 - a2) * g * g
                half_m, half_v = a1 * weight_m + 1 - a1, a2 * weight_v + 1 - a2
                by_count = c.bias_correction == "count" and c.discrepancy != "trivial"
                c1, c2 = (1 - a1 ** (r + 1), 1 - a2 ** (r + 1)) if by_count else (half_m, half_v)
                denom = np.sqrt(v_half / c2) + c.eps
                theta[:, block] -= lr * (m_half / c1) / denom
                step, since = step + 1, since + 1
                if c.discrepancy != "trivial":
                    m, v, weight_m, weight_v = m_half, v_half, half_m, half_v
                if since < h_steps and r + 1 < c.inner_steps:
                    continue
                theta[:, block] = w @ theta[:, block]
                d = anchor - theta[:, block]
                if c.discrepancy == "paper":
                    m, v = b1 * m - (1 - b1) * d, b2 * v + (1 - b2) * d * d
                elif c.discrepancy == "descent":
                    m, v = b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d * d
                elif c.discrepancy == "descent_scaled":
                    m = b1 * m + (1 - b1) * d / (lr * since) * denom
                elif c.discrepancy == "trivial":
                    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
                    m, v = b1 * m + (1 - b1) * unit, b2 * v + (1 - b2) * unit * unit
                if c.discrepancy != "none":
                    weight_m = b1 * weight_m + 1 - b1
                if c.discrepancy not in ("none", "descent_scaled"):
                    weight_v = b2 * weight_v + 1 - b2
                anchor, since = theta[:, block].copy(), 0
    return theta


@pytest.mark.parametrize("bias_correction", ["count", "weight"])
@pytest.mark.parametrize("gossip_every", [1, 3])
@pytest.mark.parametrize("discrepancy", get_args(Discrepancy))
def test_equals_the_numpy_reference(discrepancy: Any, gossip_every: int, bias_correction: Any) -> None:
    config = DecaConfig(
        lr=0.02,
        outer_rounds=2,
        inner_steps=7,
        gossip_every=gossip_every,
        discrepancy=discrepancy,
        bias_correction=bias_correction,
        correction_betas=(0.8, 0.95),
    )
    topology = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    members = simulate(Deca, config, topology)
    expected = reference(np.array(topology.weights), config)
    np.testing.assert_allclose(weights_of(members), expected, rtol=0, atol=2e-5)


def test_the_discrepancies_differ() -> None:
    topology = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    ends = [
        weights_of(simulate(Deca, DecaConfig(lr=0.02, outer_rounds=1, inner_steps=6, discrepancy=d), topology))
        for d in get_args(Discrepancy)
    ]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("gossip_every", [1, 4])
def test_what_weight_decay_took_does_not_come_back_as_a_correction(
    gossip_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gradient, weights shrink by 1 - lr wd a step, and by no more."""
    monkeypatch.setattr("tests.quadratic.gradient", lambda peer, step, theta: np.zeros_like(theta))
    config = DecaConfig(lr=0.02, outer_rounds=1, inner_steps=12, gossip_every=gossip_every, weight_decay=0.5)
    ring = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    for end in weights_of(simulate(Deca, config, ring, shape=(2, SIZE // 2))):
        np.testing.assert_allclose(end / start(), (1 - 0.02 * 0.5) ** 12, atol=1e-3)


def topology_of(weights: np.ndarray) -> Topology:
    return Topology("edges", len(weights), weights)


def test_local_is_deca_with_the_identity() -> None:
    alone = simulate(
        Local, BlockwiseConfig(lr=0.02, outer_rounds=2, inner_steps=5), build_topology(TopologySection(), NUM_PEERS, 0)
    )
    identity = simulate(
        Deca, DecaConfig(lr=0.02, outer_rounds=2, inner_steps=5, discrepancy="none"), topology_of(np.eye(NUM_PEERS))
    )
    np.testing.assert_array_equal(weights_of(alone), weights_of(identity))
    assert [m.exchange.sent.payload_bytes for m in alone] == [0] * NUM_PEERS


def test_dpsgd_is_gossip_of_all_blocks_with_lasting_moments() -> None:
    config = BlockwiseConfig(lr=0.02, outer_rounds=2, inner_steps=3, gossip_every=2)
    topology = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    members = simulate(Dpsgd, config, topology)
    theta = np.tile(start(), (NUM_PEERS, 1))
    m = v = np.zeros_like(theta)
    for step in range(12):  # T x B x R
        g = np.array([gradient(i, step, theta[i]) for i in range(NUM_PEERS)])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - 0.02 * m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        if step % 2 == 1:
            theta = np.array(topology.weights) @ theta
    np.testing.assert_allclose(weights_of(members), theta, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "depth"), [("ring", 2), ("star", 1), ("complete", 1), ("exponential", 1), ("bipartite", 2)]
)
def test_agreement_is_exact_and_its_traffic_is_counted(kind: Any, depth: int) -> None:
    topology = build_topology(TopologySection(kind=kind), NUM_PEERS, 0)

    class Apart(Local):
        agrees = True

    members = simulate(Apart, BlockwiseConfig(lr=0.02, outer_rounds=1, inner_steps=5), topology)
    before = weights_of(members)
    hops = agree(0, members).hops
    after = weights_of(members)
    assert (after == after[0]).all(), "every peer must hold the very same bits"
    np.testing.assert_allclose(after[0], topology.stationary @ before, rtol=0, atol=1e-6)
    assert hops == 2 * depth
    # A tree has N - 1 edges; each carries the whole model (2 SIZE float32) once up and once down.
    assert sum(m.exchange.sent.payload_bytes for m in members) == 2 * (NUM_PEERS - 1) * 2 * SIZE * 4


def test_gossip_traffic_is_the_block_to_every_neighbor() -> None:
    topology = build_topology(TopologySection(kind="star"), NUM_PEERS, 0)
    members = simulate(Deca, DecaConfig(lr=0.02, outer_rounds=1, inner_steps=5, gossip_every=2), topology)
    rounds = 2 * 3  # two blocks, ceil(5 / 2) rounds each
    sent = [m.exchange.sent.payload_bytes for m in members]
    assert sent == [rounds * SIZE * 4 * degree for degree in (4, 1, 1, 1, 1)]


def mean_distance(theta: np.ndarray) -> float:
    return float(np.linalg.norm(theta - theta.mean(0)))


def test_mixing_keeps_the_mean_and_contracts_by_lambda_2() -> None:
    topology = build_topology(TopologySection(kind="erdos_renyi"), NUM_PEERS, 3)
    config = DecaConfig(lr=0.05, outer_rounds=1, inner_steps=1, discrepancy="none")
    alone = weights_of(simulate(Local, BlockwiseConfig(lr=0.05, outer_rounds=1, inner_steps=1), topology, 1))
    mixed = weights_of(simulate(Deca, config, topology, 1))
    np.testing.assert_allclose(mixed.mean(0), alone.mean(0), atol=1e-6)
    assert mean_distance(mixed) <= topology.second_eigenvalue * mean_distance(alone) + 1e-6
    assert mean_distance(alone) > 1e-3


@pytest.mark.parametrize("bias_correction", ["count", "weight"])
@pytest.mark.parametrize("round", [1, 2, 3, 4])
def test_a_resumed_peer_goes_on_bitwise(round: int, bias_correction: Any) -> None:
    """Rounds 2 and 4 end a turn, 1 and 3 lie inside one."""
    topology = build_topology(TopologySection(kind="ring"), NUM_PEERS, 0)
    config = DecaConfig(lr=0.02, outer_rounds=1, inner_steps=4, gossip_every=2, bias_correction=bias_correction)
    whole = simulate(Deca, config, topology)
    half = simulate(Deca, config, topology, round)
    states = [m.algorithm.state_dict(round) for m in half]
    mailbox = Mailbox()
    fresh: list[Member] = []
    for index, (tensors, plain) in enumerate(states):
        peer: Any = QuadraticPeer(index)
        algorithm = Deca(peer, config, topology)
        algorithm.load_state_dict({n: t.clone() for n, t in tensors.items()}, plain, round)
        fresh.append(Member(algorithm, mailbox.endpoint(index)))
    for r in range(round, whole[0].algorithm.num_rounds):
        play_round(r, fresh)
    np.testing.assert_array_equal(weights_of(fresh), weights_of(whole))
    ends_turn = round % 2 == 0
    assert any("exp_avg" in name for name in states[0][0]) != ends_turn
    for method in (cast(Deca, member.algorithm) for member in half):
        assert bool(method.moments or method.anchor) != ends_turn, "after a turn others need the room"


def test_a_mix_that_moved_nothing_leaves_the_trivial_correction_finite() -> None:
    """It has no direction."""
    config = DecaConfig(lr=0.02, outer_rounds=1, inner_steps=2, discrepancy="trivial")
    method = Deca(cast(Any, QuadraticPeer(0)), config, topology_of(np.ones((1, 1))))
    method.begin_turn(0)
    (hop,) = method.hops(0)
    method.anchor = dict(own := method.outgoing(hop))
    method.mix(hop, Inbox({0: 1.0}, {0: own}))
    assert not any(moments.exp_avg.any() or moments.exp_avg_sq.any() for moments in method.moments.values())


def test_peers_join_where_a_turn_begins_and_save_where_it_ends() -> None:
    """Within a turn moments differ from peer to peer, and a checkpoint would hold them; D-PSGD has one long turn."""
    lengths: dict[str, Any] = {"lr": 0.02, "outer_rounds": 1, "inner_steps": 5, "gossip_every": 2}
    topology, peer = topology_of(np.ones((1, 1))), QuadraticPeer(0)
    deca = Deca(peer, DecaConfig(**lengths), topology)  # type: ignore[arg-type]
    assert [deca.can_join(round) for round in range(6)] == [True, False, False] * 2
    assert [deca.is_boundary(round) for round in range(6)] == [False, False, True] * 2
    dpsgd = Dpsgd(peer, BlockwiseConfig(**lengths), topology)  # type: ignore[arg-type]
    assert dpsgd.num_rounds == 5 and all(map(dpsgd.can_join, range(5)))
    assert [dpsgd.is_boundary(round) for round in range(5)] == [False, False, True, False, True]
    others = LocalSteps(peer, LocalStepsConfig(rounds=25), topology)  # type: ignore[arg-type]
    assert [round for round in range(25) if others.is_boundary(round)] == [2, 5, 8, 11, 14, 17, 20, 23]


def test_a_block_whose_turn_is_over_leaves_the_device() -> None:
    method = Deca(cast(Any, QuadraticPeer(0)), DecaConfig(), topology_of(np.ones((1, 1))))
    method.masters.release = (released := []).append  # type: ignore[method-assign]
    method.begin_turn(0)
    assert not released
    method.begin_turn(1)
    assert released == ["a"]


def test_a_random_order_is_of_all_blocks_and_another_one_each_sweep() -> None:
    calendar = Calendar(BlockwiseConfig(outer_rounds=9, inner_steps=1, block_order="random"), num_blocks=6, seed=0)
    sweeps = [[calendar.at(6 * outer + place).block for place in range(6)] for outer in range(9)]
    assert all(sorted(sweep) == list(range(6)) for sweep in sweeps)
    assert len({tuple(sweep) for sweep in sweeps}) == 9
    other = replace(calendar, seed=1)
    assert sweeps[0] != [other.at(place).block for place in range(6)]
