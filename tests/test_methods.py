"""The methods beside DECA: against NumPy references on quadratic losses, and against each other where they coincide."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peertune.algorithms import ALGORITHMS, METHODS
from peertune.algorithms.alternating_lora import AlternatingLora, AlternatingLoraConfig
from peertune.algorithms.choco import Choco, ChocoConfig
from peertune.algorithms.dec_lora import DecLora, DecLoraConfig
from peertune.algorithms.decaf import Decaf, average_product, turn_towards
from peertune.algorithms.diloco import Diloco, DilocoConfig
from peertune.algorithms.ditto import Ditto, DittoConfig
from peertune.algorithms.dpsgd import Dpsgd
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.algorithms.gt import TRACKED, Gt
from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig, report_of
from peertune.algorithms.noloco import Noloco, NolocoConfig
from peertune.algorithms.qg import Qg
from peertune.algorithms.rw_lora import RwLora
from peertune.algorithms.scaffold import Scaffold, ScaffoldConfig
from peertune.algorithms.turns import BlockwiseConfig
from peertune.assemble import make_topology
from peertune.config import TopologySection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox
from peertune.optim import learning_rate
from peertune.peer import Peer
from peertune.recipe import from_dict
from peertune.runtimes import play_round
from peertune.runtimes.message import LARGEST
from peertune.runtimes.network import without
from peertune.topology import Topology, build_topology
from tests.quadratic import NUM_PEERS, SIZE, QuadraticPeer, gradient, simulate, start, weights_of

LR, K, ROUNDS = 0.02, 3, 4
SHORT: dict[str, Any] = {"lr": LR, "local_steps": K, "rounds": ROUNDS}
COUNTS = [3, 1, 4, 2, 5]


def graph(kind: Any = "ring", weights: Any = "metropolis", hub: bool = False, num_peers: int = NUM_PEERS) -> Topology:
    built = build_topology(TopologySection(kind=kind, weights=weights), num_peers, 0, COUNTS[:num_peers])
    return replace(built, has_hub=hub)


def server(num_peers: int = NUM_PEERS) -> Topology:
    return graph("star", "samples", hub=True, num_peers=num_peers)


class Adam:
    """Adam's moments of one peer, float64."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def step(self, g: np.ndarray) -> np.ndarray:
        """What is taken from theta, over lr."""
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        moved: np.ndarray = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return moved


def descend(peer: int, theta: np.ndarray, adam: Adam, first_step: int) -> np.ndarray:
    """K Adam steps of one peer."""
    for n in range(K):
        theta = theta - LR * adam.step(gradient(peer, first_step + n, theta))
    return theta


def test_local_steps_and_gossip_are_the_numpy_reference() -> None:
    topology = graph()
    theta, adams = np.tile(start(), (NUM_PEERS, 1)), [Adam() for _ in range(NUM_PEERS)]
    for t in range(ROUNDS):
        theta = np.array([descend(i, theta[i], adams[i], t * K) for i in range(NUM_PEERS)])
        theta = topology.weights @ theta
    np.testing.assert_allclose(weights_of(simulate(DecLora, DecLoraConfig(**SHORT), topology)), theta, atol=2e-5)


@pytest.mark.parametrize("steps", [1, K])
def test_gt_is_the_numpy_reference_and_tracks_the_mean_gradient(steps: int) -> None:
    topology = graph()
    config = LocalStepsConfig(lr=LR, local_steps=steps, rounds=ROUNDS)
    theta, adams = np.tile(start(), (NUM_PEERS, 1)), [Adam() for _ in range(NUM_PEERS)]
    c = np.zeros_like(theta)
    for t in range(ROUNDS):
        z, own = np.zeros_like(theta), np.zeros_like(theta)
        for n in range(steps):
            g = np.array([gradient(i, t * steps + n, theta[i]) for i in range(NUM_PEERS)])
            z, own = z + (g + c) / steps, own + g / steps
            theta = theta - LR * np.array([adams[i].step(g[i] + c[i]) for i in range(NUM_PEERS)])
        members = simulate(Gt, config, topology, t + 1)
        tracked = np.array([np.concatenate([m.algorithm.tracked[n].numpy() for n in "ab"]) for m in members])  # type: ignore[attr-defined]
        np.testing.assert_allclose(tracked, z, atol=1e-4)
        np.testing.assert_allclose(tracked.mean(0), own.mean(0), atol=1e-5)
        theta, c = topology.weights @ theta, c - z + topology.weights @ z
        np.testing.assert_allclose(weights_of(members), theta, atol=2e-5)
    assert np.abs(c).max() > 0.1, "the correction must be worth something"
    assert any(name.startswith(TRACKED) for name in members[0].algorithm.outgoing(members[0].algorithm.hops(0)[0]))


def test_qg_is_the_numpy_reference() -> None:
    topology = graph()
    theta = np.tile(start(), (NUM_PEERS, 1))
    m = v = np.zeros_like(theta)
    for t in range(ROUNDS):
        before = theta
        for n in range(K):
            g = np.array([gradient(i, t * K + n, theta[i]) for i in range(NUM_PEERS)])
            half_m, half_v = 0.9 * m + g, 0.999 * v + 0.001 * g * g
            theta = theta - LR * half_m / (1 - 0.9 ** (t + 1)) / (np.sqrt(half_v / (1 - 0.999 ** (t + 1))) + 1e-8)
        theta = topology.weights @ theta
        u = before - theta
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        m, v = 0.9 * m + 0.1 * u, 0.999 * v + 0.001 * u * u
    np.testing.assert_allclose(weights_of(simulate(Qg, LocalStepsConfig(**SHORT), topology)), theta, atol=5e-5)


def test_quasi_global_momentum_is_not_set_back_with_the_moments_that_gradients_feed() -> None:
    kept, reset = (simulate(Qg, LocalStepsConfig(**SHORT, reset_moments=each), graph()) for each in (False, True))
    np.testing.assert_array_equal(weights_of(reset), weights_of(kept))
    members = simulate(Qg, LocalStepsConfig(**SHORT, reset_moments=True, local_modules=["b"]), graph())
    tensors, _ = members[0].algorithm.state_dict(ROUNDS)
    assert {name for name in tensors if name.startswith("exp_avg/")} == {"exp_avg/a"}, "what a resumed run needs"


def test_a_round_in_which_nothing_moved_leaves_quasi_global_momentum_finite() -> None:
    """It has no direction."""
    method = Qg(QuadraticPeer(0), LocalStepsConfig(**SHORT), graph(num_peers=1))  # type: ignore[arg-type]
    method.begin(0)
    method.mix(method.hops(0)[0], Inbox({0: 1.0}, {0: method.outgoing(method.hops(0)[0])}))
    assert not any(moments.exp_avg.any() or moments.exp_avg_sq.any() for moments in method.moments.values())


@pytest.mark.parametrize("method", [Gt, Scaffold])
def test_none_comes_back_where_corrections_of_all_make_one_sum(method: type[LocalSteps]) -> None:
    config = method.Config(**SHORT)
    algorithm = method(QuadraticPeer(0), config, server() if method is Scaffold else graph())  # type: ignore[arg-type]
    assert not any(algorithm.can_join(round) for round in range(ROUNDS))


def test_what_is_handed_on_has_its_names_from_the_start() -> None:
    """Who asks for it tells them before it has any outer moments, and another's have to be the same."""
    config = FedavgConfig(**SHORT, server_optimizer="nesterov")
    method = Fedavg(QuadraticPeer(0), config, graph("complete", "samples"))  # type: ignore[arg-type]
    assert method.handed_on().keys() == {"a", "b", "momentum/a", "momentum/b"}


@pytest.mark.parametrize("method", [Gt, Scaffold, Fedavg])
def test_a_parameter_without_a_gradient_is_corrected_all_the_same(method: type[LocalSteps]) -> None:
    """As an expert that no token was routed to."""
    config = method.Config(**SHORT, **({"proximal": 0.5} if method is Fedavg else {}))
    algorithm = method(QuadraticPeer(0), config, graph() if method is Gt else server())  # type: ignore[arg-type]
    algorithm.begin(0)
    held = {name: algorithm.shared(name) for name in algorithm.common}
    ones = {name: torch.ones_like(x) for name, x in held.items()}
    algorithm.correction = algorithm.control = ones  # type: ignore[attr-defined]
    algorithm.anchor = {name: x - 2 for name, x in held.items()}  # type: ignore[attr-defined]
    algorithm.adjust_gradients()
    for name, parameter in algorithm.active.items():
        torch.testing.assert_close(parameter.grad, ones[name])


@pytest.mark.parametrize("optimizer", ["average", "adam", "nesterov"])
def test_fedavg_is_the_numpy_reference(optimizer: Any) -> None:
    config = FedavgConfig(**SHORT, server_optimizer=optimizer, server_lr={"adam": 0.05, "nesterov": 0.7}.get(optimizer))
    share = np.array(COUNTS) / sum(COUNTS)
    x = start()
    m = buffer = np.zeros_like(x)
    v = np.full_like(x, 1e-3**2)
    for t in range(ROUNDS):
        mean = share @ np.array([descend(i, x, Adam(), t * K) for i in range(NUM_PEERS)])
        d = x - mean
        m, v, buffer = 0.9 * m - 0.1 * d, 0.99 * v + 0.01 * d * d, 0.9 * buffer + d
        if optimizer == "average":
            x = mean
        elif optimizer == "adam":
            x = x + 0.05 * m / (np.sqrt(v) + 1e-3)
        else:
            x = x - 0.7 * (d + 0.9 * buffer)
    members = simulate(Fedavg, config, server())
    np.testing.assert_allclose(weights_of(members), np.tile(x, (NUM_PEERS + 1, 1)), atol=5e-5)
    assert not any(member.algorithm.moments for member in members), "between rounds nobody needs them"  # type: ignore[attr-defined]


def test_fedadam_moves_no_weight_far_by_default() -> None:
    """With a rate of 1 each round would move each weight by about 1."""
    members = simulate(Fedavg, FedavgConfig(**SHORT, server_optimizer="adam"), server())
    assert 0 < np.abs(weights_of(members)[0] - start()).max() <= 0.02 * ROUNDS
    assert [FedavgConfig(server_optimizer=kind).outer_lr for kind in ("average", "nesterov")] == [1.0, 1.0]
    assert (FedavgConfig(server_optimizer="adam", server_lr=0.3).outer_lr, DilocoConfig().outer_lr) == (0.3, 0.7)


@pytest.mark.parametrize(
    "options", [{}, {"server_optimizer": "adam"}, {"participation": 0.5}, {"proximal": 0.5, "local_steps": 4}]
)
def test_fedavg_over_a_server_is_fedavg_on_a_complete_graph_bitwise(options: dict[str, Any]) -> None:
    config = FedavgConfig(**{**SHORT, **options})
    star = simulate(Fedavg, config, server())
    complete = simulate(Fedavg, config, graph("complete", "samples"))
    np.testing.assert_array_equal(weights_of(star)[:NUM_PEERS], weights_of(complete))
    np.testing.assert_array_equal(weights_of(star), np.tile(weights_of(star)[0], (NUM_PEERS + 1, 1)))


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
def test_one_who_joins_without_a_server_takes_over_the_outer_moments(optimizer: Any) -> None:
    """With none of his own he would never again step as the others do, who all start from one model."""
    config = FedavgConfig(**SHORT, server_optimizer=optimizer)
    members = simulate(Fedavg, config, graph("complete"), ROUNDS - 1)
    others, back = members[0].algorithm, simulate(Fedavg, config, graph("complete"), 1)[4].algorithm
    common = back.handed_on()
    assert {name: value.shape for name, value in common.items()} == {
        name: value.shape for name, value in others.handed_on().items()
    }
    back.join(ROUNDS - 1, others.handed_on())
    members[4] = replace(members[4], algorithm=back)
    play_round(ROUNDS - 1, members)
    np.testing.assert_array_equal(weights_of(members), np.tile(weights_of(members)[0], (NUM_PEERS, 1)))


@pytest.mark.parametrize("method", [Fedavg, Scaffold])
def test_the_proximal_term_pulls_towards_the_common_model(method: type[Fedavg]) -> None:
    def moved(mu: float) -> float:
        config = method.Config(lr=LR, local_steps=20, rounds=1, proximal=mu)
        return float(np.linalg.norm(weights_of(simulate(method, config, server()))[0] - start()))

    assert moved(100.0) < moved(1.0) < moved(0.0)


def test_the_proximal_steps_are_the_numpy_reference() -> None:
    """The pull is mu (y - x), towards the model that this round began with."""
    share, mu, x = np.array(COUNTS) / sum(COUNTS), 2.0, start()
    for t in range(ROUNDS):
        trained = []
        for i in range(NUM_PEERS):
            adam, y = Adam(), x
            for n in range(K):
                y = y - LR * adam.step(gradient(i, t * K + n, y) + mu * (y - x))
            trained.append(y)
        x = share @ np.array(trained)
    members = simulate(Fedavg, FedavgConfig(**SHORT, proximal=mu), server())
    np.testing.assert_allclose(weights_of(members), np.tile(x, (NUM_PEERS + 1, 1)), atol=2e-5)


def test_each_round_draws_its_peers_anew() -> None:
    """All of them alike; a run with another seed draws others."""
    peer: Any = QuadraticPeer(0)
    method = Fedavg(peer, FedavgConfig(participation=0.4), server())
    drawn = [method.sampled(round) for round in range(500)]
    assert len({tuple(peers) for peers in drawn}) == 10, "all pairs of five"
    assert np.bincount(np.concatenate(drawn)).min() > 150
    peer.seed = 1
    assert [method.sampled(round) for round in range(500)] != drawn


def test_passes_over_a_peers_data_are_counted_in_whole_steps() -> None:
    """A step of several batches takes as many from a pass."""
    peer: Any = QuadraticPeer(0)
    peer.num_steps = partial(Peer.num_steps, peer)
    peer.batches = SimpleNamespace(num_samples=40, batch_size=8)
    for accumulation, steps in ((1, 15), (4, 4)):
        config = FedavgConfig(local_epochs=3, local_steps=99, grad_accumulation=accumulation)
        assert Fedavg(peer, config, server()).num_local_steps(0) == steps


@pytest.mark.parametrize(("kind", "has_hub"), [("ring", True), ("star", True), ("complete", False)])
def test_a_recipes_graph_becomes_a_server_that_weighs_by_samples(kind: str, has_hub: bool) -> None:
    """Whatever the recipe's W is; DiLoCo's mean is a plain one all the same."""
    config = from_dict({"run": {"num_peers": 5}, "topology": {"kind": kind}, "algorithm": {"name": "fedavg"}}, METHODS)
    topology = make_topology(config[0], Fedavg, COUNTS)
    assert topology.has_hub == has_hub
    for method, expected in ((Fedavg, np.array(COUNTS) / sum(COUNTS)), (Diloco, np.full(5, 0.2))):
        algorithm: Any = method(QuadraticPeer(0), method.Config(), topology)  # type: ignore[arg-type]
        assert algorithm.consensus(0) == pytest.approx(expected)


def test_part_of_the_peers_train_and_all_get_the_model() -> None:
    config = FedavgConfig(**SHORT, participation=0.4)
    members = simulate(Fedavg, config, server())
    taken = [m.algorithm.num_taken for m in members[:NUM_PEERS]]  # type: ignore[attr-defined]
    assert sum(taken) == 2 * K * ROUNDS and len(set(taken)) > 1
    sent = [m.exchange.sent.payload_bytes for m in members]
    model = 2 * SIZE * 4
    assert sent == [t // K * model for t in taken] + [ROUNDS * NUM_PEERS * model]


def test_dec_lora_on_a_complete_graph_is_fedit() -> None:
    """FedIT is FedAvg of an adapter; here both train the same parameters."""
    gossip = simulate(DecLora, DecLoraConfig(**SHORT, reset_moments=True), graph("complete", "samples"))
    fedit = simulate(Fedavg, FedavgConfig(**SHORT), server())
    np.testing.assert_array_equal(weights_of(gossip), weights_of(fedit)[:NUM_PEERS])


@pytest.mark.parametrize(("nesterov", "gamma"), [(True, 0.7), (False, 0.7), (True, 0.3)])
def test_noloco_is_the_numpy_reference(nesterov: bool, gamma: float) -> None:
    topology = graph("erdos_renyi")
    config = NolocoConfig(**SHORT, nesterov=nesterov, gamma=gamma)
    phi, buffer = np.tile(start(), (NUM_PEERS, 1)), np.zeros((NUM_PEERS, 2 * SIZE))
    adams = [Adam() for _ in range(NUM_PEERS)]
    for t in range(ROUNDS):
        members = simulate(Noloco, config, topology, t + 1)
        groups = members[0].algorithm.groups(t)  # type: ignore[attr-defined]
        assert all(tuple(g) in topology.edges for g in groups)
        mix = np.eye(NUM_PEERS)
        for i, j in groups:
            mix[np.ix_([i, j], [i, j])] = 0.5
        change = mix @ (np.array([descend(i, phi[i], adams[i], t * K) for i in range(NUM_PEERS)]) - phi)
        change += gamma / 0.7 * (mix @ phi - phi)
        buffer = 0.5 * buffer + change
        phi = phi + 0.7 * (change + 0.5 * buffer if nesterov else buffer)
        np.testing.assert_allclose(weights_of(members), phi, atol=5e-5)
    sent = [m.exchange.sent.payload_bytes for m in members]
    paired = [sum(i in g for t in range(ROUNDS) for g in m.algorithm.groups(t)) for i, m in enumerate(members)]  # type: ignore[attr-defined]
    assert sent == [count * 2 * SIZE * 4 for count in paired]  # one tensor of the model's size, not two


@pytest.mark.parametrize("kind", ["ring", "complete"])
def test_pairs_are_edges_with_no_peer_in_two_of_them_and_other_ones_each_round(kind: str) -> None:
    topology = graph(kind)
    method = Noloco(QuadraticPeer(0), NolocoConfig(), topology)  # type: ignore[arg-type]
    rounds = [method.groups(round) for round in range(100)]
    assert all(len({i for pair in pairs for i in pair}) == 4 == 2 * len(pairs) for pairs in rounds), "one is alone"
    assert {tuple(pair) for pairs in rounds for pair in pairs} == set(topology.edges)


def test_larger_groups_hold_all_peers_in_nearly_equal_parts() -> None:
    topology = build_topology(TopologySection(kind="complete"), 11, 0)
    method = Noloco(QuadraticPeer(0), NolocoConfig(group_size=3), topology)  # type: ignore[arg-type]
    rounds = [method.groups(round) for round in range(20)]
    assert all(sorted(map(len, groups)) == [3, 4, 4] for groups in rounds)
    assert all(sorted(i for group in groups for i in group) == list(range(11)) for groups in rounds)
    assert len({str(groups) for groups in rounds}) == 20


def test_noloco_with_one_group_is_diloco() -> None:
    outer: dict[str, Any] = {"local_steps": K, "rounds": ROUNDS, "lr": LR}
    noloco = NolocoConfig(**outer, group_size=NUM_PEERS, outer_momentum=0.9)
    diloco = simulate(Diloco, DilocoConfig(**outer), server())
    alike = simulate(Noloco, noloco, graph("complete"))
    np.testing.assert_allclose(weights_of(alike), weights_of(diloco)[:NUM_PEERS], atol=1e-6)
    with pytest.raises(ConfigError, match="group_size: got 5 on a graph that is not complete"):
        simulate(Noloco, noloco, graph("ring"))


@pytest.mark.parametrize("kind", ["star", "exponential"])
@pytest.mark.parametrize(("share", "gamma", "refresh"), [(1.0, 1.0, 0), (0.5, 0.7, 0), (0.1, 0.3, 0), (0.5, 0.6, 2)])
def test_choco_is_the_numpy_reference(kind: Any, share: float, gamma: float, refresh: int) -> None:
    topology, k = graph(kind), max(1, int(share * SIZE))
    config = ChocoConfig(**SHORT, ratio=share, gamma=gamma, refresh_every=refresh)
    theta, adams = np.tile(start(), (NUM_PEERS, 1)), [Adam() for _ in range(NUM_PEERS)]
    public, entries = theta, 0
    for t in range(ROUNDS):
        theta = np.array([descend(i, theta[i], adams[i], t * K) for i in range(NUM_PEERS)])
        q, is_whole = theta - public, bool(refresh) and (t + 1) % refresh == 0
        for tensor in () if is_whole else (q[:, :SIZE], q[:, SIZE:]):
            for row in tensor:
                row[np.argsort(-np.abs(row))[k:]] = 0
        entries += SIZE if is_whole else 2 * k  # values, and their places
        public = public + q
        theta = theta + gamma * (topology.weights @ public - public)
    members = simulate(Choco, config, topology)
    np.testing.assert_allclose(weights_of(members), theta, atol=5e-5)
    sent = [(np.count_nonzero(column) - 1) * 2 * 4 * entries for column in topology.weights.T]
    assert [member.exchange.sent.payload_bytes for member in members] == sent


def test_what_choco_is_told_of_places_that_there_are_not_is_left_out() -> None:
    places = torch.tensor([0, -1, SIZE, 2**30, SIZE - 1], dtype=torch.int32).view(torch.float32)
    held = {"a": torch.zeros(2, SIZE // 2)}
    Choco._take_in(held, {"places/a": places, "values/a": torch.arange(1.0, 6)}, 0.5)
    assert held["a"].view(-1).tolist() == [0.5, *[0.0] * (SIZE - 2), 2.5]


def test_choco_that_sends_everything_is_gossip() -> None:
    choco = simulate(Choco, ChocoConfig(**SHORT, ratio=1.0, gamma=1.0), graph())
    gossip = simulate(DecLora, DecLoraConfig(**SHORT), graph())
    np.testing.assert_allclose(weights_of(choco), weights_of(gossip), atol=2e-6)


@pytest.mark.parametrize("refresh", [0, 50])
def test_choco_comes_together_after_a_lost_message_once_whole_weights_are_sent(refresh: int) -> None:
    class Deaf(Choco):
        mixes_left = 3

        def mix(self, hop: Hop, inbox: Inbox) -> None:
            self.mixes_left -= 1
            if self.mixes_left == 0 and self.peer.index == 0:
                left = without(inbox.weights, [1], 0)
                inbox = Inbox(left, {j: inbox.payloads[j] for j in left})
            super().mix(hop, inbox)

    keys: dict[str, Any] = {"lr": LR, "local_steps": 1, "rounds": 200, "schedule": "linear"}
    config = ChocoConfig(**keys, ratio=0.5, gamma=0.5, refresh_every=refresh)
    members = simulate(Deaf, config, graph())
    assert (np.ptp(weights_of(members), axis=0).max() < 0.01) == bool(refresh)
    assert [members[0].algorithm.can_join(round) for round in (0, 49)] == [False, bool(refresh)]


def test_places_of_large_tensors_come_through_as_they_are() -> None:
    """A float32 of their bits: as a number it could not tell 2^24 from 2^24 + 1."""
    places = torch.tensor([0, 1, 2**24, 2**24 + 1, 2**30], dtype=torch.int64)
    bits = places.int().view(torch.float32)
    assert torch.equal(bits.view(torch.int32).long(), places)
    assert bits.isfinite().all() and bits.max() <= LARGEST, "sites take no larger numbers"


@pytest.mark.parametrize("participation", [1.0, 0.4])
@pytest.mark.parametrize("reset", [True, False])
def test_scaffold_is_the_numpy_reference(participation: float, reset: bool) -> None:
    config = ScaffoldConfig(**SHORT, participation=participation, reset_moments=reset)
    members, share = simulate(Scaffold, config, server()), np.array(COUNTS) / sum(COUNTS)
    x, adams, taken = start(), [Adam() for _ in range(NUM_PEERS)], [0] * NUM_PEERS
    c, own = np.zeros_like(x), np.zeros((NUM_PEERS, 2 * SIZE))
    for t in range(ROUNDS):
        drawn: list[int] = members[0].algorithm.sampled(t)  # type: ignore[attr-defined]
        mean, change = np.zeros_like(x), np.zeros_like(own)
        for i in drawn:
            adams[i] = Adam() if reset else adams[i]
            y, change[i] = x, -own[i]
            for _ in range(K):
                g = gradient(i, taken[i], y)
                change[i] += g / K
                y = y - LR * adams[i].step(g - own[i] + c)
                taken[i] += 1
            mean = mean + share[i] / share[drawn].sum() * y
        x, c, own = mean, c + share @ change, own + change
    np.testing.assert_allclose(weights_of(members), np.tile(x, (NUM_PEERS + 1, 1)), atol=5e-5)
    held = [np.concatenate([m.algorithm.control[n].numpy() for n in "ab"]) for m in members]  # type: ignore[attr-defined]
    np.testing.assert_allclose(held, np.tile(share @ own, (NUM_PEERS + 1, 1)), atol=1e-4)
    assert np.abs(c).max() > 0.1, "the correction must be worth something"
    complete = simulate(Scaffold, config, graph("complete", "samples"))
    np.testing.assert_array_equal(weights_of(members)[:NUM_PEERS], weights_of(complete))
    rounds = [t // K for t in taken]
    assert [m.exchange.sent.payload_bytes for m in members[:NUM_PEERS]] == [r * 2 * 2 * SIZE * 4 for r in rounds]


@pytest.mark.parametrize("keys", [{}, {"server_optimizer": "adam", "proximal": 0.5}, {"local_modules": ["b"]}])
def test_ditto_is_the_numpy_reference(keys: dict[str, Any]) -> None:
    """A common model that no personal one touches: FedAvg's, but for the batches; here without noise."""
    config, topology = DittoConfig(**SHORT, participation=0.2, pull=0.5, **keys), graph("complete", "samples")
    common = simulate(Fedavg, FedavgConfig(**SHORT, participation=0.2, **keys), topology, noise=False)
    members = simulate(Ditto, config, topology, noise=False)
    np.testing.assert_array_equal(weights_of(members), weights_of(common))
    own: dict[int, np.ndarray] = {}
    for t in range(ROUNDS):
        before = simulate(Ditto, config, topology, t, noise=False) if t else None
        for i in members[0].algorithm.sampled(t):  # type: ignore[attr-defined]
            x = weights_of(before)[i] if before else start()
            v, adam = own.get(i, x), Adam()
            for _ in range(K):
                v = v - LR * adam.step(gradient(i, None, v) + 0.5 * (v - x))
            own[i] = v
    held = {i: member.algorithm.personal for i, member in enumerate(members) if member.algorithm.personal}
    assert held.keys() == own.keys() and len(own) < NUM_PEERS, "who never took part has the common model"
    for i, personal in held.items():
        np.testing.assert_allclose(np.concatenate([personal[name].numpy() for name in "ab"]), own[i], atol=2e-5)


def test_scaffolds_control_variate_is_the_mean_of_as_many_gradients_as_there_were() -> None:
    """With passes over a peer's own data that is another number for each."""

    class Uneven(Scaffold):
        def num_local_steps(self, round: int) -> int:
            return self.peer.index + 1

    members = simulate(Uneven, ScaffoldConfig(lr=1e-9, rounds=1), server())
    for i, member in enumerate(members[:NUM_PEERS]):
        mean = np.mean([gradient(i, step, start()) for step in range(i + 1)], axis=0)
        own = [member.algorithm.own[name].numpy() for name in "ab"]  # type: ignore[attr-defined]
        np.testing.assert_allclose(np.concatenate(own), mean, rtol=1e-4, atol=1e-5)


STEPS = [name for name, method in ALGORITHMS.items() if issubclass(method, LocalSteps)]


@pytest.mark.parametrize("name", sorted(set(STEPS) - {"qg", "ditto", "diloco", "noloco", "decaf"}))
@pytest.mark.parametrize("shape", [(SIZE,), (2, SIZE // 2)])
def test_a_lone_peer_takes_adamw_steps(name: str, shape: tuple[int, ...]) -> None:
    """With nobody to mix with, a method is torch's AdamW; those with an outer optimiser have forms of their own.

    Matrices alone decay.
    """
    method = ALGORITHMS[name]
    config = method.Config(**{**SHORT, "weight_decay": 0.1, "reset_moments": False})
    topology = server(1) if issubclass(method, Fedavg) else graph(num_peers=1)
    [found, *_] = weights_of(simulate(method, config, topology, shape=shape))
    theta = torch.tensor(start(), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=LR, weight_decay=0.1 if len(shape) > 1 else 0.0)
    for step in range(K * ROUNDS):
        theta.grad = torch.tensor(gradient(0, step, theta.detach().double().numpy()), dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(found, theta.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["noloco", "diloco"])
def test_a_lone_peer_of_an_outer_optimiser_is_lookahead_with_nesterov(name: str) -> None:
    method = ALGORITHMS[name]
    options = {"outer_momentum": 0.9} if name == "noloco" else {}
    config = method.Config(**SHORT, **options)
    [found, *_] = weights_of(simulate(method, config, server(1) if name == "diloco" else graph(num_peers=1)))
    phi = torch.tensor(start(), requires_grad=True)
    outer, adam = torch.optim.SGD([phi], lr=0.7, momentum=0.9, nesterov=True), Adam()
    for t in range(ROUNDS):
        before = phi.detach().numpy()
        phi.grad = torch.tensor(before - descend(0, before, adam, t * K))
        outer.step()
    np.testing.assert_allclose(found, phi.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("round", [1, 3])
def test_a_resumed_peer_goes_on_bitwise(name: str, round: int) -> None:
    from peertune.runtimes import Member
    from peertune.runtimes.simulation import Mailbox

    method = ALGORITHMS[name]
    topology = server() if issubclass(method, Fedavg) else graph("complete")
    options = {"server_optimizer": "adam", "participation": 0.5} if name == "fedavg" else {}
    config = method.Config(**SHORT, **options)
    if name == "decaf":
        pytest.skip("its mix is of factors, which these peers have none of; tests/test_run.py kills and resumes it")
    whole, half = simulate(method, config, topology), simulate(method, config, topology, round)
    mailbox, fresh = Mailbox(), []
    for index, member in enumerate(half):
        tensors, plain = member.algorithm.state_dict(round)
        of_weights = sum(t.numel() for n, t in tensors.items() if n.startswith("state/") and not member.is_hub)
        few = 2 * (SIZE - 1)  # numbers that are not of each weight, such as push-sum's mass
        assert of_weights <= 2 * SIZE * method.kept_per_weight + few, "what a checkpoint holds is foreseen"
        peer: Any = QuadraticPeer(index)
        peer.batches = None if member.is_hub else ()
        algorithm = method(peer, config, topology)
        algorithm.load_state_dict({n: t.clone() for n, t in tensors.items()}, plain, round)
        fresh.append(Member(algorithm, mailbox.endpoint(index)))
    for r in range(round, ROUNDS):
        play_round(r, fresh)
    np.testing.assert_array_equal(weights_of(fresh), weights_of(whole))


def random_factors(shapes: list[int], out: int = 17, into: int = 11) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(out, r, generator=rng), torch.randn(r, into, generator=rng)) for r in shapes]


def test_decaf_finds_the_best_factors_of_the_average_product() -> None:
    factors, weights = random_factors([3, 3, 3]), [0.5, 0.2, 0.3]
    product = sum(w * b @ a for w, (b, a) in zip(weights, factors, strict=True))
    b, a = average_product(weights, factors)
    u, s, vt = torch.linalg.svd(product)
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ vt[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-4)


def test_decaf_of_rank_at_least_the_sum_of_ranks_is_the_exact_average() -> None:
    factors, weights = random_factors([2, 2, 2]), [0.5, 0.25, 0.25]
    product = sum(w * b @ a for w, (b, a) in zip(weights, factors, strict=True))
    padded = [(torch.nn.functional.pad(b, (0, 4)), torch.nn.functional.pad(a, (0, 0, 0, 4))) for b, a in factors]
    b, a = average_product(weights, padded)
    assert b.shape == (17, 6) and a.shape == (6, 11)
    torch.testing.assert_close(b @ a, product, rtol=1e-4, atol=1e-4)


def test_decaf_of_a_rank_beyond_the_layers_width_is_padded() -> None:
    factors = random_factors([8, 8], out=5, into=4)
    b, a = average_product([0.5, 0.5], factors)
    assert b.shape == (5, 8) and a.shape == (8, 4)
    torch.testing.assert_close(b @ a, (factors[0][0] @ factors[0][1] + factors[1][0] @ factors[1][1]) / 2)


def test_decafs_factors_can_be_averaged_apart_after_their_turn() -> None:
    """Peers whose products are near each other, each with the basis of its own SVD."""
    [common], rng = random_factors([3]), torch.Generator().manual_seed(1)
    near = [tuple(x + 0.05 * torch.randn(x.shape, generator=rng) for x in common) for _ in range(4)]
    own = [average_product([0.9, 0.1], list(both)) for both in zip(near, near[1:] + near[:1], strict=True)]
    turned = [turn_towards(b * sign, a * sign, *common) for (b, a), sign in zip(own, (1, -1, 1, -1), strict=True)]
    for (b, a), (b_turned, a_turned) in zip(own, turned, strict=True):
        torch.testing.assert_close(b_turned @ a_turned, b @ a, rtol=1e-4, atol=1e-4)
    mean = sum(b @ a for b, a in own) / 4

    def error(factors: Any) -> float:
        b, a = (sum(x) / 4 for x in zip(*factors, strict=True))
        return float((b @ a - mean).norm() / mean.norm())

    signed = [(b * sign, a * sign) for (b, a), sign in zip(own, (1, -1, 1, -1), strict=True)]
    assert error(turned) < 0.01 < 0.5 < error(signed)


def test_the_walk_keeps_to_the_graph_and_costs_a_message_a_move() -> None:
    topology = graph("ring")
    members = simulate(RwLora, DecLoraConfig(**{**SHORT, "rounds": 30}), topology)
    for round in range(30):
        at_work = [m.algorithm.num_local_steps(round) > 0 for m in members]
        assert at_work.count(True) == 1 and at_work == [not m.algorithm.can_join(round) for m in members]
    algorithm = members[0].algorithm
    assert isinstance(algorithm, RwLora)
    moves = [(i, j) for i, j in zip(algorithm.walk, algorithm.walk[1:], strict=False) if i != j]
    assert moves and all((min(m), max(m)) in topology.edges for m in moves)
    assert sum(m.exchange.sent.payload_bytes for m in members) == len(moves) * 2 * SIZE * 4
    steps = [m.algorithm.num_taken for m in members]  # type: ignore[attr-defined]
    assert steps == [K * algorithm.walk[:-1].count(i) for i in range(NUM_PEERS)]
    assert algorithm.consensus(30)[algorithm.walk[-1]] == 1 == sum(algorithm.consensus(30))
    theta, adams, taken = start(), [Adam() for _ in range(NUM_PEERS)], [0] * NUM_PEERS
    for holder in algorithm.walk[:-1]:
        theta, taken[holder] = descend(holder, theta, adams[holder], taken[holder]), taken[holder] + K
    np.testing.assert_allclose(weights_of(members)[algorithm.walk[-1]], theta, atol=1e-4)


def test_the_walk_goes_by_the_rows_of_w() -> None:
    """Where all rows are n_j / n, it is at peer j for that share of the rounds."""
    peer: Any = QuadraticPeer(0)
    method = RwLora(peer, DecLoraConfig(**{**SHORT, "rounds": 3000}), graph("complete", "samples"))
    found = np.bincount(method.walk) / len(method.walk)
    np.testing.assert_allclose(found, np.array(COUNTS) / sum(COUNTS), atol=0.04)


def test_one_factor_is_trained_at_a_time() -> None:
    def phases(kind: Any, **options: Any) -> list[bool]:
        config = AlternatingLoraConfig(rounds=6, **options)
        peer: Any = QuadraticPeer(0)
        method = AlternatingLora(peer, config, graph(kind))
        names = ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"]
        trained = [[method.trains(name, round) for name in names] for round in range(6)]
        assert all(a != b for a, b in trained)
        method.common = tuple(names)
        assert [*method.shared_names(0), *method.shared_names()] == [names[1], *names], "consensus is measured on B"
        return [b for _, b in trained]

    assert phases("complete") == [True, False] * 3
    assert phases("ring") == [True, True, False, False, True, True], "a slower graph needs longer phases"
    assert phases("complete", phase_rounds=3) == [True] * 3 + [False] * 3


def test_a_phases_length_does_not_hang_on_the_last_bit_of_an_eigenvalue() -> None:
    """On a complete graph of six lambda_2 comes out as 1e-16, not 0."""
    method = AlternatingLora(
        QuadraticPeer(0), AlternatingLoraConfig(), build_topology(TopologySection(kind="complete"), 6, 0)
    )  # type: ignore[arg-type]
    assert method.phase_rounds == 1


def test_epochs_count_all_batches_of_a_step() -> None:
    peer: Any = Peer(0, None, [], SimpleNamespace(num_samples=40, batch_size=8), 0)  # type: ignore[arg-type]
    assert [peer.num_steps(1, 1), peer.num_steps(1, 4), peer.num_steps(3, 4)] == [5, 2, 4]


def test_late_messages_of_what_belongs_to_its_round_are_not_fetched() -> None:
    """CHOCO's differences do; weights do not, nor does what is tracked, whose sum alone counts."""
    peer: Any = QuadraticPeer(0)
    hops = [method(peer, method.Config(**SHORT), graph()).hops(0)[0] for method in (Qg, Gt, Choco)]
    assert [hop.takes_late for hop in hops] == [True, True, False]
    assert hops[0].weights == hops[1].weights == hops[2].weights


@pytest.mark.parametrize("has_played", [True, False])
def test_a_peer_that_joins_within_a_turn_takes_adams_first_step(has_played: bool) -> None:
    """Its moments are zero again, so what undoes that begins anew too, and is as it was after a resumption."""
    config = BlockwiseConfig(lr=LR, outer_rounds=1, inner_steps=200)
    joined, resumed = (Dpsgd(QuadraticPeer(0), config, graph("complete", num_peers=1)) for _ in range(2))  # type: ignore[arg-type]
    if has_played:  # not where its disk was empty
        joined.local(0)
    joined.join(300, joined.handed_on())
    tensors, plain = joined.state_dict(300)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, plain, 300)
    for method in (joined, resumed):
        before = method.shared("a")
        method.local(300)
        assert (method.shared("a") - before).abs().numpy() == pytest.approx(LR, rel=1e-3)


def test_decaf_keeps_a_layer_in_which_nobody_learned_anything_or_that_diverged() -> None:
    """The product of such a layer is zero, and its best factors would be as well, for ever."""
    a, b = torch.randn(2, 5), torch.zeros(4, 2)
    method = SimpleNamespace(common=("x.lora_A", "x.lora_B"), peer=SimpleNamespace(index=0), masters={})
    method.masters = SimpleNamespace(write=lambda name, value: setattr(method, name, value))
    Decaf.mix(method, None, Inbox({0: 0.5, 1: 0.5}, {i: {"x.lora_A": a, "x.lora_B": b} for i in range(2)}))  # type: ignore[arg-type]
    assert torch.equal(getattr(method, "x.lora_A"), a) and not getattr(method, "x.lora_B").any()
    b = torch.full((3, 2), float("nan"))  # it diverged, which the loss tells of
    Decaf.mix(method, None, Inbox({0: 0.5, 1: 0.5}, {i: {"x.lora_A": a, "x.lora_B": b} for i in range(2)}))  # type: ignore[arg-type]
    assert torch.equal(getattr(method, "x.lora_A"), a) and getattr(method, "x.lora_B").isnan().all()


def test_decaf_that_hears_nobody_keeps_its_factors() -> None:
    """One peer is LoRA with AdamW: balanced factors of the same product would take other steps."""
    [(b, a)], found = random_factors([3]), dict[str, torch.Tensor]()
    method = SimpleNamespace(
        common=("x.lora_A", "x.lora_B"),
        peer=SimpleNamespace(index=2),
        masters=SimpleNamespace(write=found.__setitem__),
    )
    Decaf.mix(method, None, Inbox({2: 1.0}, {2: {"x.lora_B": b, "x.lora_A": a}}))  # type: ignore[arg-type]
    assert not found


def test_decafs_mix_is_the_weighted_product_in_a_basis_near_the_mean_factors() -> None:
    """Nearest is where B' B_ref + A A_ref' is symmetric and has no negative eigenvalue (Schoenemann 1966)."""
    [(b, a)], rng = random_factors([3]), torch.Generator().manual_seed(1)
    near = {j: tuple(x + 0.05 * torch.randn(x.shape, generator=rng) for x in (b, a)) for j in (0, 2, 3)}
    inbox = Inbox({0: 0.5, 2: 0.2, 3: 0.3}, {j: {"x.lora_B": b, "x.lora_A": a} for j, (b, a) in near.items()})
    found: dict[str, torch.Tensor] = {}
    method = SimpleNamespace(
        common=("x.lora_A", "x.lora_B"),
        peer=SimpleNamespace(index=0),
        masters=SimpleNamespace(write=found.__setitem__),
    )
    Decaf.mix(method, None, inbox)  # type: ignore[arg-type]
    mixed_b, mixed_a = found["x.lora_B"], found["x.lora_A"]
    u, s, vt = torch.linalg.svd(sum(inbox.weights[j] * b @ a for j, (b, a) in near.items()))
    torch.testing.assert_close(mixed_b @ mixed_a, u[:, :3] * s[:3] @ vt[:3], rtol=1e-4, atol=1e-4)
    cross = mixed_b.T @ inbox.mean("x.lora_B") + mixed_a @ inbox.mean("x.lora_A").T
    torch.testing.assert_close(cross, cross.T, rtol=1e-3, atol=1e-3)
    assert torch.linalg.eigvalsh(cross).min() > 0


def test_local_modules_never_leave_their_peer() -> None:
    config = DecLoraConfig(**SHORT, local_modules=["b"])
    members = simulate(DecLora, config, graph("complete"))
    found = weights_of(members)
    assert np.ptp(found[:, :SIZE], axis=0).max() < 1e-6 < np.ptp(found[:, SIZE:], axis=0).max()
    assert all(set(m.algorithm.outgoing(m.algorithm.hops(0)[0])) == {"a"} for m in members)
    with pytest.raises(ConfigError, match="leave something to share"):
        simulate(DecLora, DecLoraConfig(**SHORT, local_modules=["a", "b"]), graph())


@pytest.mark.parametrize("name", [name for name, method in ALGORITHMS.items() if method.agrees])
def test_what_is_personal_is_in_no_message(name: str) -> None:
    """Nor in what is handed on to one who was away; DECA's blocks are all at once in `dpsgd`."""
    method = ALGORITHMS[name]
    topology = server() if issubclass(method, Fedavg) else graph("complete")
    schedule = SHORT if name in STEPS else {"lr": LR, "outer_rounds": 1, "inner_steps": 1}
    for member in simulate(method, method.Config(**schedule, local_modules=["b"]), topology, 1):
        sent = [key for hop in member.algorithm.hops(0) for key in member.algorithm.outgoing(hop)]
        told = {key.rpartition("/")[2] for key in [*sent, *member.algorithm.handed_on()]}
        assert "a" in told and "b" not in told


def test_the_turn_of_a_block_that_is_personal_as_a_whole_has_no_messages() -> None:
    config = ALGORITHMS["deca"].Config(lr=LR, outer_rounds=1, inner_steps=1, local_modules=["b"])
    deca = ALGORITHMS["deca"](QuadraticPeer(0), config, graph())  # type: ignore[arg-type]
    assert [len(deca.hops(round)) for round in range(deca.num_rounds)] == [1, 0]


def test_a_share_of_the_peers_is_rounded_to_the_nearest_and_is_one_at_least() -> None:
    found = [FedavgConfig(participation=share).num_sampled(5) for share in (0.01, 0.29, 0.3, 0.5, 1.0)]
    assert found == [1, 1, 2, 3, 5]
    assert FedavgConfig(participation=0.29).share_at_work(5) == 1 / 5, "what samples are counted by"


@pytest.mark.parametrize("name", ["deca", "dpsgd", "dec_lora", "fedavg"])
def test_the_rate_follows_its_schedule_over_the_whole_run(name: str) -> None:
    """Not over a block's turn or a round, nor over those rounds alone that a peer takes part in."""
    method = ALGORITHMS[name]
    lengths = SHORT if name in STEPS else {"lr": LR, "outer_rounds": 2, "inner_steps": 3, "gossip_every": 3}
    share = {"participation": 0.5} if name == "fedavg" else {}
    config = method.Config(**lengths, **share, schedule="linear", warmup_steps=2)
    algorithm = method(QuadraticPeer(0), config, server(2) if name == "fedavg" else graph(num_peers=1))  # type: ignore[arg-type]
    found = {round: report.lr for round in range(ROUNDS) if (report := algorithm.local(round)) is not None}
    last = {round: K * (round + 1) - 1 for round in found}
    assert found == {round: learning_rate(config, step, K * ROUNDS) for round, step in last.items()}
    assert len(set(found.values())) == len(found) > 0 and (len(found) == ROUNDS) == (name != "fedavg")


@pytest.mark.parametrize("name", ["qg", "deca"])
def test_personal_parts_take_adams_own_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where quasi-global momentum feeds the moments of what is shared, those of the rest are fed by their gradients."""
    grads: list[torch.Tensor] = []
    backward = QuadraticPeer.backward

    def noting(self: QuadraticPeer, *args: int) -> torch.Tensor:
        loss = backward(self, *args)
        grads.extend(p.grad.clone() for n, p in self.module.items() if n == "b" and p.grad is not None)
        return loss

    monkeypatch.setattr(QuadraticPeer, "backward", noting)
    turn = {"discrepancy": "trivial", "outer_rounds": 1, "inner_steps": K * ROUNDS}
    options = {"lr": LR, **turn} if name == "deca" else SHORT
    config = ALGORITHMS[name].Config(**options, local_modules=["b"])
    [member] = simulate(ALGORITHMS[name], config, graph(num_peers=1))
    theta = torch.tensor(start()[SIZE:], dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=LR)
    for theta.grad in grads[-K * ROUNDS :]:  # of DECA's turns the last is b's
        optimizer.step()
    torch.testing.assert_close(member.algorithm.shared("b"), theta.detach(), rtol=1e-5, atol=1e-5)


def test_a_round_tells_the_mean_of_its_steps_and_the_last_rate() -> None:
    told = report_of(
        [(torch.tensor(loss), torch.tensor(norm), lr) for loss, norm, lr in ((4.0, 1.0, 0.2), (2.0, 5.0, 0.1))]
    )
    assert told is not None and (told.loss, told.grad_norm, told.lr) == (3.0, 3.0, 0.1)
    assert report_of([]) is None


def test_the_base_class_is_a_method_too() -> None:
    config = LocalStepsConfig(**SHORT)
    np.testing.assert_array_equal(
        weights_of(simulate(LocalSteps, config, graph())),
        weights_of(simulate(DecLora, DecLoraConfig(**SHORT), graph())),
    )


@pytest.mark.parametrize("name", ["dec_lora", "qg", "noloco"])
def test_who_takes_up_anothers_weights_forgets_what_belonged_to_its_own(name: str) -> None:
    """Adam's moments and the outer momentum; a personal part keeps its own."""
    method = ALGORITHMS[name]
    keys = {"adapter": "none"} if name == "dec_lora" else {}
    config = method.Config(**{**SHORT, "rounds": 9}, **keys, reset_moments=False, local_modules=["b"])  # type: ignore[arg-type]
    one, other, *_ = (member.algorithm for member in simulate(method, config, graph(), 3))
    assert set(one.moments) == {"a", "b"}  # type: ignore[attr-defined]
    one.join(3, other.handed_on())
    assert set(one.moments) == {"b"} and one.moments["b"].exp_avg.any()  # type: ignore[attr-defined]
    assert not getattr(one, "momentum", {})
    assert torch.equal(one.shared("a"), other.shared("a"))
    one.local(3)
    assert one.moments["a"].num_steps <= config.local_steps  # type: ignore[attr-defined]
