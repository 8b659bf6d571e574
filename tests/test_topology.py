"""Graphs and mixing matrices: each promise of `topology.py` as a property, each known spectrum, each error."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peertune.config import TopologySection
from peertune.errors import TopologyError
from peertune.exchange import agreement, gossip
from peertune.topology import GRAPHS, Topology, build_topology

UNDIRECTED = [kind for kind in GRAPHS if kind != "edges"]
REGULAR = ["ring", "complete", "torus"]
SIZES = st.integers(1, 33)
SEEDS = st.integers(0, 2**32)

# No deadline: a slow machine is no failure.
properties = settings(deadline=None, max_examples=150)


def build(kind: str, num_peers: int, weights: str = "metropolis", seed: int = 0, **keys: Any) -> Topology:
    counts = keys.pop("sample_counts", None)
    section = TopologySection.model_validate({"kind": kind, "weights": weights, **keys})
    return build_topology(section, num_peers, seed, counts)


def is_torus(num_peers: int) -> bool:
    return num_peers <= 2 or any(num_peers % a == 0 for a in range(2, num_peers))


@st.composite
def doubly_stochastic(draw: st.DrawFn) -> Topology:
    """Any undirected graph with weights that are to be symmetric and doubly stochastic."""
    kind, num_peers = draw(st.sampled_from(UNDIRECTED)), draw(SIZES)
    assume(kind != "torus" or is_torus(num_peers))
    weights = draw(st.sampled_from(["metropolis", "laplacian"] + ["uniform"] * (kind in REGULAR)))
    return build(kind, num_peers, weights, draw(SEEDS), p=draw(st.floats(0.3, 1)))


@st.composite
def random_edges(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A connected graph as a list of edges: a random tree and more, in any order and direction."""
    num_peers = draw(SIZES)
    pairs = {(draw(st.integers(0, j - 1)), j) for j in range(1, num_peers)}
    peer = st.integers(0, num_peers - 1)
    more = draw(st.lists(st.tuples(peer, peer), max_size=20))
    pairs |= {(min(pair), max(pair)) for pair in more if pair[0] != pair[1]}
    edges = draw(st.permutations(sorted(pairs)))
    return num_peers, [list(edge[:: draw(st.sampled_from([1, -1]))]) for edge in edges]


def distances(topology: Topology) -> np.ndarray:
    """Lengths of all shortest paths, [N, N], by Floyd and Warshall."""
    n = topology.num_peers
    steps = np.where(np.eye(n) > 0, 0.0, np.inf)
    for i, j in topology.edges:
        steps[i, j] = steps[j, i] = 1
    for k in range(n):
        steps = np.minimum(steps, steps[:, k : k + 1] + steps[k : k + 1, :])
    return steps


# What every W promises.


@properties
@given(doubly_stochastic())
def test_undirected_weights_are_symmetric_and_doubly_stochastic(topology: Topology) -> None:
    w, n = topology.weights, topology.num_peers
    assert w.shape == (n, n) and w.dtype == np.float64
    assert (w >= 0).all()
    assert np.array_equal(w, w.T)
    assert np.abs(w.sum(axis=1) - 1).max() <= 1e-12
    assert topology.is_doubly_stochastic
    assert np.array_equal(topology.stationary, np.full(n, 1 / n))
    assert np.isfinite(distances(topology)).all(), "disconnected"


@properties
@given(doubly_stochastic())
def test_second_eigenvalue_is_that_of_w(topology: Topology) -> None:
    moduli = sorted(np.abs(np.linalg.eigvals(topology.weights)), reverse=True)
    expected = moduli[1] if topology.num_peers > 1 else 0.0
    assert topology.second_eigenvalue == pytest.approx(expected, abs=1e-7)
    assert topology.second_eigenvalue < 1 - 1e-6
    assert topology.spectral_gap == 1 - topology.second_eigenvalue


@properties
@given(doubly_stochastic() | SIZES.map(lambda n: build("exponential", n)), SEEDS)
def test_mixing_keeps_the_mean_and_contracts_by_the_second_eigenvalue(topology: Topology, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=topology.num_peers)
    mixed = topology.weights @ x
    assert mixed.mean() == pytest.approx(x.mean(), abs=1e-12)
    before, after = np.linalg.norm(x - x.mean()), np.linalg.norm(mixed - x.mean())
    assert after <= topology.second_eigenvalue * before + 1e-12


@properties
@given(random_edges(), st.sampled_from(["metropolis", "laplacian"]))
def test_given_edges_become_the_graph(graph: tuple[int, list[list[int]]], weights: str) -> None:
    num_peers, edges = graph
    topology = build("edges", num_peers, weights, edges=edges)
    assert topology.edges == sorted((min(edge), max(edge)) for edge in edges)
    assert topology.is_doubly_stochastic and np.array_equal(topology.weights, topology.weights.T)
    assert topology.second_eigenvalue < 1


@properties
@given(random_edges())
def test_metropolis_as_written_in_the_paper(graph: tuple[int, list[list[int]]]) -> None:
    num_peers, edges = graph
    near: dict[int, set[int]] = {i: set() for i in range(num_peers)}
    for i, j in edges:
        near[i].add(j)
        near[j].add(i)
    w = build("edges", num_peers, edges=edges).weights
    for i in range(num_peers):
        given_away = 0.0
        for j in range(num_peers):
            if i != j:
                expected = 1 / (1 + max(len(near[i]), len(near[j]))) if j in near[i] else 0.0
                given_away += expected
                assert w[i, j] == pytest.approx(expected, abs=1e-15)
        assert w[i, i] == pytest.approx(1 - given_away, abs=1e-14)


@properties
@given(random_edges())
def test_laplacian_as_written_in_the_paper(graph: tuple[int, list[list[int]]]) -> None:
    num_peers, edges = graph
    laplacian = np.zeros((num_peers, num_peers))
    for i, j in edges:
        laplacian[i, i] += 1
        laplacian[j, j] += 1
        laplacian[i, j] = laplacian[j, i] = -1
    largest = max(np.linalg.eigvals(laplacian).real) if num_peers > 1 else 1.0
    expected = np.eye(num_peers) - 2 * laplacian / (3 * largest)
    np.testing.assert_allclose(build("edges", num_peers, "laplacian", edges=edges).weights, expected, atol=1e-9)


@properties
@given(st.sampled_from(["complete", "star"]), st.lists(st.integers(1, 10**6), min_size=1, max_size=33), SEEDS)
def test_samples_weigh_by_data(kind: str, counts: list[int], seed: int) -> None:
    topology = build(kind, len(counts), "samples", sample_counts=counts)
    share = np.array(counts) / sum(counts)
    np.testing.assert_allclose(topology.stationary, share, rtol=0, atol=1e-12)
    assert topology.second_eigenvalue == pytest.approx(0, abs=1e-7)
    assert np.abs(topology.weights.sum(axis=1) - 1).max() <= 1e-12
    x = np.random.default_rng(seed).normal(size=len(counts))
    np.testing.assert_allclose(topology.weights @ x, np.full(len(counts), share @ x), atol=1e-12)


def test_samples_is_the_same_on_star_and_complete_graph() -> None:
    star, complete = (build(kind, 4, "samples", sample_counts=[1, 2, 3, 4]) for kind in ("star", "complete"))
    assert np.array_equal(star.weights, complete.weights)
    np.testing.assert_allclose(star.weights[2], [0.1, 0.2, 0.3, 0.4], atol=1e-15)
    assert not star.is_doubly_stochastic
    assert build("complete", 4, "samples", sample_counts=[5, 5, 5, 5]).is_doubly_stochastic


# Graphs.


@pytest.mark.parametrize("kind", [*UNDIRECTED, "exponential", "edges"])
def test_one_peer_and_two_peers(kind: str) -> None:
    alone = build(kind, 1)
    assert alone.weights.tolist() == [[1.0]]
    assert alone.edges == [] and alone.tree() == []
    assert alone.second_eigenvalue == 0
    pair = build(kind, 2, p=0.9, edges=[[1, 0]])
    assert pair.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert pair.edges == [(0, 1)] and pair.tree() == [(0, 1)]


def test_edges_of_each_kind() -> None:
    assert build("ring", 5).edges == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    assert build("star", 4).edges == [(0, 1), (0, 2), (0, 3)]
    assert build("complete", 4).edges == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert build("bipartite", 5).edges == [(0, 1), (0, 3), (1, 2), (1, 4), (2, 3), (3, 4)]
    assert build("torus", 6).edges == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 4), (2, 5), (3, 4), (3, 5), (4, 5)]


@pytest.mark.parametrize(("num_peers", "side"), [(4, 2), (8, 4), (12, 4), (16, 4), (30, 6)])
def test_torus_is_the_most_nearly_square_grid(num_peers: int, side: int) -> None:
    expected = set()
    for i in range(num_peers):
        for j in (i // side * side + (i + 1) % side, (i + side) % num_peers):
            expected.add((min(i, j), max(i, j)))
    assert set(build("torus", num_peers).edges) == expected


def test_a_matrix_of_the_recipes_own_is_w() -> None:
    rows = [[0.5, 0.5, 0.0], [0.0, 0.75, 0.25], [0.3, 0.0, 0.7]]
    topology = build("matrix", 3, matrix=rows)
    assert topology.weights.tolist() == rows
    assert topology.edges == [(0, 1), (0, 2), (1, 2)] and not topology.is_doubly_stochastic
    hop = gossip(topology)
    assert [hop.sources(peer) for peer in range(3)] == [{0: 0.5, 1: 0.5}, {1: 0.75, 2: 0.25}, {0: 0.3, 2: 0.7}]
    assert [hop.targets(peer) for peer in range(3)] == [[2], [0], [1]]
    np.testing.assert_allclose(np.linalg.matrix_power(topology.weights, 200)[0], topology.stationary)


def test_exponential_listens_to_powers_of_two_behind() -> None:
    topology = build("exponential", 6)
    assert np.flatnonzero(topology.weights[0]).tolist() == [0, 2, 4, 5]
    assert np.flatnonzero(topology.weights[5]).tolist() == [1, 3, 4, 5]
    assert not np.array_equal(topology.weights, topology.weights.T)
    assert set(topology.weights[topology.weights > 0]) == {1 / 4}


@properties
@given(SIZES)
def test_exponential_is_doubly_stochastic(num_peers: int) -> None:
    topology = build("exponential", num_peers, "uniform")
    assert np.array_equal(topology.weights, build("exponential", num_peers).weights)
    assert topology.is_doubly_stochastic
    assert np.abs(topology.weights.sum(axis=1) - 1).max() <= 1e-12
    for axis in (0, 1):
        assert set(np.count_nonzero(topology.weights, axis)) == {1 + math.ceil(math.log2(num_peers))}


def test_erdos_renyi_is_fixed_by_its_seed() -> None:
    drawn = [build("erdos_renyi", 12, seed=seed).edges for seed in range(20)]
    assert drawn == [build("erdos_renyi", 12, seed=seed).edges for seed in range(20)]
    assert len({tuple(edges) for edges in drawn}) == 20


def test_erdos_renyi_has_the_asked_density() -> None:
    for p in (0.3, 0.8):
        found = [len(build("erdos_renyi", 33, p=p, seed=seed).edges) / (33 * 16) for seed in range(20)]
        assert np.mean(found) == pytest.approx(p, abs=0.03)
    assert build("erdos_renyi", 9, p=1.0).edges == build("complete", 9).edges


def test_erdos_renyi_draws_again_until_connected() -> None:
    # At this density about one draw in thirty is connected.
    topologies = [build("erdos_renyi", 8, p=0.2, seed=seed) for seed in range(10)]
    assert all(np.isfinite(distances(topology)).all() for topology in topologies)


# Spectra known in closed form.


def test_laplacian_weights_do_not_hang_on_the_last_bits_of_an_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose linear algebra differs in them must build the same W."""
    section, original = TopologySection(kind="star", weights="laplacian"), np.linalg.eigvalsh
    here = build_topology(section, 7, 0)
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda matrix: original(matrix) * (1 + 4e-15))
    assert np.array_equal(build_topology(section, 7, 0).weights, here.weights)


@pytest.mark.parametrize("num_peers", range(3, 34))
def test_spectrum_of_ring_complete_and_star(num_peers: int) -> None:
    around = [1 / 3 + 2 / 3 * math.cos(2 * math.pi * k / num_peers) for k in range(1, num_peers)]
    for weights in ("metropolis", "uniform"):
        ring = build("ring", num_peers, weights).second_eigenvalue
        assert ring == pytest.approx(max(abs(value) for value in around), abs=1e-12)
        assert build("complete", num_peers, weights).second_eigenvalue == pytest.approx(0, abs=1e-12)
    # L of the complete graph has the eigenvalues 0 and N; of the star 0, 1 and N.
    assert build("complete", num_peers, "laplacian").second_eigenvalue == pytest.approx(1 / 3, abs=1e-9)
    assert build("star", num_peers, "laplacian").second_eigenvalue == pytest.approx(1 - 2 / (3 * num_peers), abs=1e-9)
    assert build("star", num_peers).second_eigenvalue == pytest.approx(1 - 1 / num_peers, abs=1e-12)


@pytest.mark.parametrize("num_peers", range(2, 34, 2))
def test_spectrum_of_exponential(num_peers: int) -> None:
    """Ying et al. 2021: 1 - lambda_2 = 2 / (1 + ceil(log2 N)) for even N."""
    expected = 2 / (1 + math.ceil(math.log2(num_peers)))
    assert build("exponential", num_peers).spectral_gap == pytest.approx(expected, abs=1e-12)


# A W of one's own.


def test_identity_is_a_topology_without_edges() -> None:
    alone = Topology("none", 3, np.eye(3))
    assert alone.edges == [] and alone.second_eigenvalue == 1 and alone.is_doubly_stochastic
    with pytest.raises(TopologyError, match="peer 0 cannot reach peers 1, 2"):
        alone.tree()


def test_one_way_edges_count_once() -> None:
    topology = Topology("mine", 3, np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0.25, 0.75]]))
    assert topology.edges == [(0, 1), (1, 2)]
    np.testing.assert_allclose(topology.stationary, [0, 1 / 3, 2 / 3], atol=1e-12)
    assert topology.second_eigenvalue == pytest.approx(0.5, abs=1e-12)
    assert Topology("mine", 2, np.array([[1, 0], [0.5, 0.5]])).edges == [(0, 1)]


def test_weights_are_a_read_only_copy() -> None:
    given_away = np.full((2, 2), 0.5)
    topology = Topology("mine", 2, given_away)
    given_away[0, 0] = 9
    assert topology.weights[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        topology.weights[0, 0] = 9


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.eye(3), r"got shape \[3, 3\] for 2 peers"),
        (np.ones(2), r"got shape \[2\] for 2 peers"),
        (np.array([[1.5, -0.5], [0, 1]]), "negative or non-finite"),
        (np.array([[np.nan, 1], [0, 1]]), "negative or non-finite"),
        (np.array([[0.5, 0.5], [0.5, 0.5 + 1e-9]]), "got row 1 with sum 1.000000001, expected every row to sum to 1"),
    ],
)
def test_a_matrix_that_cannot_mix_is_refused(weights: np.ndarray, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology("mine", 2, weights)


# The tree of the agreement.


@properties
@given(
    random_edges().map(lambda graph: build("edges", graph[0], edges=graph[1])) | SIZES.map(lambda n: build("ring", n))
)
def test_tree_spans_all_peers_at_the_least_depth(topology: Topology) -> None:
    tree, n, steps = topology.tree(), topology.num_peers, distances(topology)
    assert len(tree) == n - 1
    assert all((min(edge), max(edge)) in topology.edges for edge in tree)
    eccentricity = steps.max(axis=1)
    root = int(eccentricity.argmin())
    depth = {root: 0}
    for parent, child in tree:
        assert parent in depth and child not in depth, "not in breadth-first order, or a cycle"
        depth[child] = depth[parent] + 1
    assert depth == {peer: steps[root, peer] for peer in range(n)}
    assert list(depth.values()) == sorted(depth.values())
    assert max(depth.values()) == eccentricity.min()


def test_tree_root_and_order_are_fixed() -> None:
    path = build("edges", 5, edges=[[3, 4], [1, 0], [2, 1], [3, 2]])
    assert path.tree() == [(2, 1), (2, 3), (1, 0), (3, 4)]
    assert build("ring", 6).tree() == [(0, 1), (0, 5), (1, 2), (5, 4), (2, 3)]
    assert build("star", 4, "samples", sample_counts=[1, 1, 1, 2]).tree() == [(0, 1), (0, 2), (0, 3)]
    wide = build("exponential", 33)
    assert len(agreement(wide, wide.stationary.tolist())) <= 2 * 4


# Errors: got, expected, what to do.


@pytest.mark.parametrize(
    ("kind", "num_peers", "keys", "message"),
    [
        ("torus", 7, {}, r"got 7 peers, .*set run.num_peers = 8 or topology.kind = 'ring'"),
        ("torus", 3, {}, r"got 3 peers, .*set run.num_peers = 4"),
        ("erdos_renyi", 33, {"p": 0.001}, r"topology.p: got 0.001, .*1000 .*raise topology.p"),
        ("ring", 0, {}, "for 0 peers, expected"),
        ("exponential", 4, {"weights": "laplacian"}, r"got 'laplacian' with topology.kind = 'exponential'.*'uniform'"),
        ("exponential", 4, {"weights": "samples", "sample_counts": [1] * 4}, "got 'samples' with .*'exponential'"),
        ("ring", 4, {"weights": "samples", "sample_counts": [1] * 4}, "got 'samples' .*expected 'complete' or 'star'"),
        ("complete", 3, {"weights": "samples"}, "got sample counts .*expected 3 counts"),
        ("complete", 3, {"weights": "samples", "sample_counts": [1, 2]}, r"got sample counts \[1, 2\], expected 3"),
        (
            "star",
            3,
            {"weights": "samples", "sample_counts": [1, 0, 2]},
            r"\[1, 0, 2\], expected 3 counts of at least 1",
        ),
        ("star", 4, {"weights": "uniform"}, "got peers with 1 to 3 neighbors, .*'metropolis'"),
        ("bipartite", 5, {"weights": "uniform"}, "got peers with 2 to 3 neighbors"),
        ("edges", 4, {"edges": []}, "peer 0 cannot reach peers 1, 2, 3; .*add edges"),
        ("edges", 4, {"edges": [[0, 1], [2, 3]]}, "topology.edges: got a disconnected graph.* peers 2, 3;"),
        ("edges", 3, {"edges": [[0, 2]]}, "peer 0 cannot reach peer 1;"),
        ("edges", 20, {"edges": [[0, 1]]}, "peers 2, 3, 4, 5, 6, 7, 8, 9 and 10 more;"),
        ("edges", 3, {"edges": [[0, 1], [1, 2, 0]]}, r"topology.edges\[1\]: got \[1, 2, 0\], expected two peers"),
        ("edges", 3, {"edges": [[0]]}, r"topology.edges\[0\]: got \[0\], expected two peers"),
        (
            "edges",
            3,
            {"edges": [[0, 1], [1, 3]]},
            r"got \[1, 3\], expected peers from 0 to 2; .*run.num_peers \(now 3\)",
        ),
        ("edges", 3, {"edges": [[0, -1]]}, r"got \[0, -1\], expected peers from 0 to 2"),
        ("edges", 3, {"edges": [[0, 1], [2, 2]]}, r"got \[2, 2\], expected two different peers; remove it"),
        ("edges", 3, {"edges": [[0, 1], [1, 2], [1, 0]]}, r"edges\[2\]: got \[1, 0\], the same edge as .*edges\[0\]"),
        ("edges", 1, {"edges": [[0, 1]]}, "expected peers from 0 to 0"),
        ("matrix", 3, {"matrix": [[0.5, 0.5], [0.5, 0.5]]}, "got 2 rows of 2 weights, expected 3 rows of 3"),
        ("matrix", 2, {"matrix": [[0.5, 0.5], [1.0]]}, "got 2 rows of 1, 2 weights, expected 2 rows of 2"),
        ("matrix", 2, {}, "got 0 rows of no weights"),
        ("matrix", 2, {"matrix": [[0.5, 0.5], [1.0, 0.0]]}, "no weight of peer 1 on itself"),
        ("matrix", 2, {"matrix": [[0.5, 0.5], [0.0, 1.0]]}, "a way from each to each"),
        ("matrix", 2, {"matrix": [[0.5, 0.6], [0.5, 0.5]]}, "row 0 with sum 1.1, expected every row to sum to 1"),
        ("matrix", 2, {"matrix": [[1.5, -0.5], [0.5, 0.5]]}, "a negative or non-finite weight"),
        ("matrix", 2, {"matrix": [[0.5, 0.5], [0.5, 0.5]], "weights": "laplacian"}, "'matrix', which holds W"),
    ],
)
def test_what_cannot_be_built_is_refused(kind: str, num_peers: int, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message) as caught:
        build(kind, num_peers, **keys)
    assert "\n" not in str(caught.value)


@properties
@given(SIZES)
def test_torus_exists_for_every_composite_number(num_peers: int) -> None:
    if is_torus(num_peers):
        assert np.isfinite(distances(build("torus", num_peers))).all()
    else:
        with pytest.raises(TopologyError, match="ring"):
            build("torus", num_peers)


def test_a_graph_that_falls_apart_has_a_tree_for_each_part() -> None:
    ring = build_topology(TopologySection(kind="ring"), 6, 0)
    assert ring.tree([(0, 1), (1, 2), (4, 5)]) == [(1, 0), (1, 2), (4, 5)]
    assert ring.cut_off_from(0, [(0, 1), (1, 2), (4, 5)]) == [3, 4, 5]
    assert ring.tree([]) == [] and ring.cut_off_from(2, []) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("shares", [[0.1, 0.2, 0.3, 0.1, 0.1, 0.2], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
def test_each_part_of_a_broken_graph_agrees_on_its_own_average(shares: list[float]) -> None:
    """Played out by hand; where a part has no share at all, its peers count alike."""
    ring, held = build_topology(TopologySection(kind="ring"), 6, 0), np.arange(6.0) ** 2
    for hop in agreement(ring, shares, [(0, 1), (1, 2), (4, 5)]):
        before = held.copy()
        for peer in range(6):
            if sources := hop.sources(peer):
                held[peer] = sum(weight * before[source] for source, weight in sources.items())

    def average(peers: list[int]) -> float:
        weights = np.array([shares[p] for p in peers])
        return float(np.average(np.array(peers) ** 2, weights=weights if weights.sum() else None))

    assert held == pytest.approx([average([0, 1, 2])] * 3 + [9.0] + [average([4, 5])] * 2)
