"""Who listens to whom, and how much: graphs over the peers and the mixing matrix W each of them gets.

One round of gossip is x_i <- sum_j W[i, j] x_j. What W promises decides what a run converges to:

    doubly stochastic    the mean over peers is kept              metropolis, laplacian, uniform, exponential
    row-stochastic       the mean weighted by `stationary` is     samples; a matrix of the recipe's own may be either
    lambda_2 < 1         the peers agree; each round shrinks their distance by at least this factor (W normal)

Everything here is a pure function of (section, number of peers, seed, sample counts), so that sites which hold the same
recipe build the same W without asking each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from peertune.config import TopologySection
from peertune.errors import TopologyError
from peertune.seeds import numpy_rng

Matrix: TypeAlias = NDArray[np.float64]

ROW_TOLERANCE = 1e-12
"""How far a row or column sum of W may be from 1: rounding of float64, far below the float32 that mixing is done in."""

MAX_DRAWS = 1000
"""Random graphs drawn in search of a connected one."""


@dataclass(frozen=True, eq=False)
class Topology:
    """A mixing matrix over the peers, and what follows from it.

    Args:
        kind: name of the graph, for people.
        num_peers: N.
        weights: W, float64 [N, N]; W[i, j] is the weight peer i gives to peer j's message. Copied, and read-only after.
        has_hub: messages go over a server, peer N, that is none of the N.
    Raises:
        TopologyError: W has another shape, a negative or non-finite entry, or a row that does not sum to 1.
    """

    kind: str
    num_peers: int
    weights: Matrix
    has_hub: bool = False

    def __post_init__(self) -> None:
        weights = np.array(self.weights, dtype=np.float64)
        if self.num_peers < 1 or weights.shape != (self.num_peers, self.num_peers):
            raise TopologyError(
                f"mixing matrix: got shape {list(weights.shape)} for {self.num_peers} peers, expected one row and one "
                "column for each of at least 1 peer; give an N x N matrix"
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise TopologyError(
                "mixing matrix: got a negative or non-finite weight, expected weights between 0 and 1; correct them"
            )
        sums = weights.sum(axis=1)
        worst = int(np.abs(sums - 1).argmax())
        if abs(sums[worst] - 1) > ROW_TOLERANCE:
            raise TopologyError(
                f"mixing matrix: got row {worst} with sum {sums[worst]:.15g}, expected every row to sum to 1; "
                "divide each row by its sum"
            )
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)

    @property
    def num_members(self) -> int:
        """N, and the server where there is one."""
        return self.num_peers + self.has_hub

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """Pairs (i, j), i < j, of which at least one listens to the other; ascending."""
        if self.has_hub:
            return [(i, self.num_peers) for i in range(self.num_peers)]
        either = np.triu((self.weights > 0) | (self.weights.T > 0), k=1)
        return [(int(i), int(j)) for i, j in np.argwhere(either)]

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """Whether the columns sum to 1 as the rows do, so that mixing keeps the mean over peers."""
        return bool((np.abs(self.weights.sum(axis=0) - 1) <= ROW_TOLERANCE).all())

    @cached_property
    def stationary(self) -> Matrix:
        """Left Perron vector pi, float64 [N]: pi' W = pi', sum(pi) = 1; gossip alone ends at sum_i pi_i x_i.

        Exactly 1/N where W is doubly stochastic. If W splits into groups that never listen to each other, pi is one
        of many: the shortest.
        """
        n = self.num_peers
        if self.is_doubly_stochastic:
            pi = np.full(n, 1.0 / n)
        else:
            system = np.vstack([self.weights.T - np.eye(n), np.ones((1, n))])
            pi = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]
        pi.setflags(write=False)
        return pi

    @cached_property
    def second_eigenvalue(self) -> float:
        """lambda_2: second largest modulus of an eigenvalue of W; 0 for one peer, 1 if W does not connect the peers."""
        # As W 1 = 1, W - 11'/N has W's eigenvalues with one 1 replaced by 0; the largest left is the one wanted.
        rest = self.weights - 1.0 / self.num_peers
        symmetric = np.array_equal(self.weights, self.weights.T)
        values = np.linalg.eigvalsh(rest) if symmetric else np.linalg.eigvals(rest)
        return float(np.abs(values).max())

    @property
    def spectral_gap(self) -> float:
        """1 - lambda_2: the larger, the sooner the peers agree."""
        return 1.0 - self.second_eigenvalue

    def tree(self, pairs: Collection[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
        """Breadth-first spanning tree of the graph, directions ignored, from a peer in its centre.

        The root has the least eccentricity (the lowest index among equals), so no breadth-first tree is shallower.

        Args:
            pairs: use these edges alone, and make a tree for each part that they hold together; None: all edges.
        Returns:
            Pairs (parent, child), N - 1 where there is one tree: tree after tree in the order of their lowest peers,
            each breadth-first, children of one parent ascending.
        Raises:
            TopologyError: without `pairs`, some peers cannot be reached from peer 0.
        """
        # networkx visits neighbors in the order their edges were added: `edges` is sorted, so ties fall the same way
        # for every peer and every version.
        graph = _graph(self.num_peers, self.edges if pairs is None else sorted(pairs))
        if pairs is None:
            _check_connected(graph, f"topology.kind = {self.kind!r}")
        found = []
        for peers in sorted(nx.connected_components(graph), key=min):
            part = graph.subgraph(peers)
            eccentricity: dict[int, int] = nx.eccentricity(part)
            root = min(eccentricity, key=lambda peer: (eccentricity[peer], peer))
            found += [(int(parent), int(child)) for parent, child in nx.bfs_edges(part, root)]
        return found

    def cut_off_from(self, peer: int, pairs: Collection[tuple[int, int]]) -> list[int]:
        """The peers, ascending, whom no word from `peer` reaches over the edges given."""
        return sorted(set(range(self.num_peers)) - nx.node_connected_component(_graph(self.num_peers, pairs), peer))


def build_topology(
    config: TopologySection, num_peers: int, seed: int, sample_counts: Sequence[int] | None = None
) -> Topology:
    """Make the graph a recipe asks for, and its mixing matrix.

    Args:
        config: the recipe's [topology].
        num_peers: N; a single peer gets W = [[1]] whatever the kind.
        seed: resolved seed of the graph (topology.seed, or else run.seed).
        sample_counts: [N] training rows each peer holds; only weights = "samples" reads them.
    Raises:
        TopologyError: the graph is disconnected or does not exist for N, or the weights do not fit the graph.
    """
    _check_pairing(config)
    if config.kind == "edges":
        _check_edges(config.edges, num_peers)
    if num_peers <= 1:  # 0 is refused by Topology
        weights = np.ones((1, 1))
    elif config.kind == "exponential":
        weights = _exponential(num_peers)
    elif config.kind == "matrix":
        weights = _given(config.matrix, num_peers)
    else:
        graph = GRAPHS[config.kind](config, num_peers, seed)
        _check_connected(graph, "topology.edges" if config.kind == "edges" else f"topology.kind = {config.kind!r}")
        if config.weights == "samples":
            weights = _samples(num_peers, sample_counts)
        else:
            weights = WEIGHTS[config.weights](nx.to_numpy_array(graph, nodelist=range(num_peers)))
    return Topology(config.kind, num_peers, weights)


# Graphs. Two peers can be joined in one way only, so every kind of undirected graph accepts N = 2.


def _graph(num_peers: int, edges: Collection[Sequence[int]]) -> Any:
    graph = nx.Graph()
    graph.add_nodes_from(range(num_peers))
    graph.add_edges_from(edges)
    return graph


def _erdos_renyi(config: TopologySection, num_peers: int, seed: int) -> Any:
    """G(N, p), drawn again until it is connected: uniform among the connected draws."""
    # Drawn here, not by networkx: its generator of G(N, p) may change between versions, and peers must agree.
    pairs = np.argwhere(np.triu(np.ones((num_peers, num_peers)), k=1))
    for draw in range(MAX_DRAWS):
        present = numpy_rng(seed, "topology", draw).random(len(pairs)) < config.p
        graph = _graph(num_peers, pairs[present].tolist())
        if nx.is_connected(graph):
            return graph
    raise TopologyError(
        f"topology.p: got {config.p:g}, with which {MAX_DRAWS} random graphs of {num_peers} peers were all "
        f"disconnected; expected at least about ln(N)/N = {np.log(num_peers) / num_peers:.2g}; raise topology.p"
    )


def _torus(config: TopologySection, num_peers: int, seed: int) -> Any:
    """The most nearly square a x b grid whose rows and columns are rings; a ring of 2 is one edge."""
    if num_peers == 2:
        return nx.path_graph(2)
    rows = max((a for a in range(2, int(num_peers**0.5) + 1) if num_peers % a == 0), default=0)
    if not rows:
        raise TopologyError(
            f"topology.kind = 'torus': got {num_peers} peers, expected a product of two sides of at least 2; "
            f"set run.num_peers = {num_peers + 1} or topology.kind = 'ring'"
        )
    grid = nx.grid_2d_graph(rows, num_peers // rows, periodic=True)
    return nx.convert_node_labels_to_integers(grid, ordering="sorted")


def _bipartite(config: TopologySection, num_peers: int, seed: int) -> Any:
    """Every even peer with every odd one."""
    return _graph(num_peers, [(i, j) for i in range(0, num_peers, 2) for j in range(1, num_peers, 2)])


GRAPHS: dict[str, Callable[[TopologySection, int, int], Any]] = {
    "ring": lambda config, num_peers, seed: nx.cycle_graph(num_peers),
    "complete": lambda config, num_peers, seed: nx.complete_graph(num_peers),
    "erdos_renyi": _erdos_renyi,
    "star": lambda config, num_peers, seed: nx.star_graph(num_peers - 1),
    "torus": _torus,
    "bipartite": _bipartite,
    "edges": lambda config, num_peers, seed: _graph(num_peers, config.edges),
}


# Mixing matrices.


def _exponential(num_peers: int) -> Matrix:
    """Static exponential graph: peer i listens to i - 2^k mod N, k < ceil(log2 N), equal weights (Ying et al. 2021)."""
    num_offsets = (num_peers - 1).bit_length()
    weights = np.eye(num_peers)
    for k in range(num_offsets):
        weights += np.roll(np.eye(num_peers), -(2**k), axis=1)
    return weights / (1 + num_offsets)


def _given(rows: Sequence[Sequence[float]], num_peers: int) -> Matrix:
    """W as the recipe has it, which need not be symmetric."""
    if len(rows) != num_peers or any(len(row) != num_peers for row in rows):
        lengths = ", ".join(str(length) for length in sorted({len(row) for row in rows}))
        raise TopologyError(
            f"topology.matrix: got {len(rows)} rows of {lengths or 'no'} weights, expected {num_peers} rows of"
            f" {num_peers}, one row and one column for each peer; correct it or set run.num_peers (now {num_peers})"
        )
    weights = np.array(rows, dtype=np.float64)
    if (np.diag(weights) <= 0).any():
        raise TopologyError(
            f"topology.matrix: got no weight of peer {int(np.diag(weights).argmin())} on itself, expected one above 0,"
            " without which peers may never agree; move some of its row there"
        )
    if not nx.is_strongly_connected(nx.from_numpy_array(weights, create_using=nx.DiGraph)):
        raise TopologyError(
            "topology.matrix: got peers that no word from some others reaches, expected a way from each to each; give"
            " weights to more of them"
        )
    return weights


def _metropolis(adjacency: Matrix) -> Matrix:
    """w_ij = 1 / (1 + max(d_i, d_j)) on the edges, the rest on self (Xiao & Boyd 2004)."""
    degree = adjacency.sum(axis=1)
    return _rest_on_self(adjacency / (1 + np.maximum.outer(degree, degree)))


def _laplacian(adjacency: Matrix) -> Matrix:
    """Q = I - 2 L / (3 lambda_max(L)) with L the graph's Laplacian (Dec-LoRA, arXiv 2501.15361)."""
    largest = np.linalg.eigvalsh(np.diag(adjacency.sum(axis=1)) - adjacency)[-1]
    # Rounded, as sites with different linear algebra libraries differ in its last bits and must build the same W.
    return _rest_on_self(adjacency * (2 / (3 * round(float(largest), 10))))


def _uniform(adjacency: Matrix) -> Matrix:
    """w_ij = 1 / (degree + 1) for each neighbor and for self: doubly stochastic only where all degrees are equal."""
    degree = adjacency.sum(axis=1)
    if degree.min() != degree.max():
        raise TopologyError(
            f"topology.weights = 'uniform': got peers with {degree.min():.0f} to {degree.max():.0f} neighbors, "
            "expected the same number for each (else the mean is not kept); set topology.weights = 'metropolis'"
        )
    return _rest_on_self(adjacency / (1 + degree.max()))


WEIGHTS: dict[str, Callable[[Matrix], Matrix]] = {
    "metropolis": _metropolis,
    "laplacian": _laplacian,
    "uniform": _uniform,
}


def _samples(num_peers: int, sample_counts: Sequence[int] | None) -> Matrix:
    """W = 1 p', p_i = n_i / sum_j n_j: every peer takes the same weighted mean (FedAvg, McMahan et al. 2017).

    A star has the same W as the complete graph: what its hub hands back is that one mean. So `edges` shows all pairs,
    and only an algorithm that routes through a hub sends less.
    """
    counts = [] if sample_counts is None else list(sample_counts)
    if len(counts) != num_peers or min(counts) < 1:
        raise TopologyError(
            f"topology.weights = 'samples': got sample counts {counts}, expected {num_peers} counts of at least 1; "
            "give every peer data or set topology.weights = 'metropolis'"
        )
    return np.tile(np.array(counts, dtype=np.float64) / sum(counts), (num_peers, 1))


def _rest_on_self(weights: Matrix) -> Matrix:
    return weights + np.diag(1 - weights.sum(axis=1))


def _check_pairing(config: TopologySection) -> None:
    if config.kind == "matrix" and config.weights != "metropolis":
        raise TopologyError(
            f"topology.weights: got {config.weights!r} with topology.kind = 'matrix', which holds W itself; leave"
            " topology.weights out"
        )
    if config.kind == "exponential" and config.weights not in ("metropolis", "uniform"):
        raise TopologyError(
            f"topology.weights: got {config.weights!r} with topology.kind = 'exponential', whose weights are all "
            "equal; expected 'uniform' or 'metropolis' (which here mean the same); set one of them"
        )
    if config.weights == "samples" and config.kind not in ("complete", "star"):
        raise TopologyError(
            f"topology.weights: got 'samples' with topology.kind = {config.kind!r}, expected 'complete' or 'star'; "
            "set topology.weights = 'metropolis' or change the kind"
        )


def _check_edges(edges: Sequence[Sequence[int]], num_peers: int) -> None:
    seen: dict[tuple[int, int], int] = {}
    for index, edge in enumerate(edges):
        name = f"topology.edges[{index}]: got {list(edge)}"
        if len(edge) != 2:
            raise TopologyError(f"{name}, expected two peers, such as [0, 1]; correct it")
        if not all(0 <= peer < num_peers for peer in edge):
            raise TopologyError(
                f"{name}, expected peers from 0 to {num_peers - 1}; correct it or raise run.num_peers (now {num_peers})"
            )
        low, high = sorted(edge)
        if low == high:
            raise TopologyError(f"{name}, expected two different peers; remove it: a peer always listens to itself")
        if (low, high) in seen:
            raise TopologyError(
                f"{name}, the same edge as topology.edges[{seen[low, high]}], expected each edge once; remove one"
            )
        seen[low, high] = index


def _check_connected(graph: Any, what: str) -> None:
    lost = sorted(set(graph) - nx.node_connected_component(graph, 0))
    if lost:
        names = ", ".join(str(peer) for peer in lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise TopologyError(
            f"{what}: got a disconnected graph, in which peer 0 cannot reach {'peer' if len(lost) == 1 else 'peers'} "
            f"{names}; expected a path between any two peers; add edges"
        )
