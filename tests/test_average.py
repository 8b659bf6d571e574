"""What peers have in common: their average as the method weighs it, and how far they are from it, in NumPy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peertune.algorithms.dec_lora import DecLora, DecLoraConfig
from peertune.algorithms.deca import Deca, DecaConfig
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.algorithms.rw_lora import RwLora, RwLoraConfig
from peertune.average import Average
from peertune.config import LinkSection
from peertune.runtimes.simulation import SimulatedGroup
from peertune.topology import Topology
from tests.quadratic import NUM_PEERS, SIZE, simulate, weights_of
from tests.test_methods import COUNTS, SHORT, graph, server


def apart(method: type, config: Any, topology: Topology) -> tuple[Average, np.ndarray]:
    """Peers, and a server where there is one, that hold anything; their average, and what they hold by member."""
    members = simulate(method, config, topology, 1)
    rng = torch.Generator().manual_seed(0)
    for member in members:
        for name in "ab":
            member.algorithm.set_shared(name, torch.randn(SIZE, generator=rng))
    base = {name: torch.nn.Parameter(torch.zeros(SIZE)) for name in "ab"}
    model: Any = SimpleNamespace(parameters=lambda: base)
    return Average(model, members, SimulatedGroup(len(members), LinkSection())), weights_of(members)


def loaded(average: Average) -> np.ndarray:
    return np.concatenate([average.model.parameters()[name].detach().numpy() for name in "ab"])


def distance(held: np.ndarray, mean: np.ndarray) -> float:
    """sqrt(mean_i ||theta_i - mean||^2)"""
    return float(np.sqrt((np.linalg.norm(held - mean, axis=1) ** 2).mean()))


@pytest.mark.parametrize("method", [DecLora, Fedavg])
def test_the_average_is_of_the_peers_alone_and_weighs_them_as_the_method_does(method: type) -> None:
    is_fedavg = method is Fedavg
    config = (FedavgConfig if is_fedavg else DecLoraConfig)(**SHORT)
    average, held = apart(method, config, server() if is_fedavg else graph())
    share = np.array(COUNTS) / sum(COUNTS) if is_fedavg else np.full(NUM_PEERS, 0.2)
    peers = held[:NUM_PEERS]
    assert average.load(1)
    np.testing.assert_allclose(loaded(average), share @ peers, atol=1e-6)
    assert average.consensus_distance(0) == pytest.approx(distance(peers, share @ peers), rel=1e-5)
    assert average.load(1, agreed=True)
    np.testing.assert_array_equal(loaded(average), held[0].astype(np.float32))


def test_the_average_of_a_walk_is_what_its_holder_has_after_the_round() -> None:
    average, held = apart(RwLora, RwLoraConfig(**{**SHORT, "rounds": 30}), graph())
    walk: list[int] = average.method.walk  # type: ignore[attr-defined]
    round = next(r for r in range(1, 30) if len({0, walk[r - 1], walk[r], walk[r + 1]}) == 4)
    average.load(round)
    np.testing.assert_array_equal(loaded(average), held[walk[round]].astype(np.float32))
    assert average.consensus_distance(round) == pytest.approx(distance(held, held[walk[round + 1]]), rel=1e-5)


def test_a_rounds_distance_is_that_of_the_block_it_trained_and_the_average_is_of_all() -> None:
    average, held = apart(Deca, DecaConfig(lr=0.02, outer_rounds=1, inner_steps=1), graph())
    for round, block in enumerate((slice(SIZE), slice(SIZE, None))):
        own = held[:, block]
        assert average.consensus_distance(round) == pytest.approx(distance(own, own.mean(0)), rel=1e-5)
        average.load(round + 1)
        np.testing.assert_allclose(loaded(average), held.mean(0), atol=1e-6)


def test_a_lone_model_has_no_distance() -> None:
    average, _ = apart(DecLora, DecLoraConfig(**SHORT), graph(num_peers=1))
    assert average.consensus_distance(0) is None
