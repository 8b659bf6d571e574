"""What a run is put together from beside its model: the graph, each peer's batches, and threads for the peers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import torch

from peertune.algorithms import Algorithm
from peertune.config import RunConfig
from peertune.data.batches import Batches, UnionBatches
from peertune.errors import ConfigError
from peertune.model.layers import has_dropout
from peertune.prepare import Prepared
from peertune.runtimes import thread_pool
from peertune.seeds import derive_seed
from peertune.topology import Topology, build_topology


def make_topology(config: RunConfig, method: type[Algorithm], counts: Sequence[int]) -> Topology:
    """The graph that the method runs on.

    Args:
        counts: samples by peer.
    Raises:
        TopologyError: it cannot be built, or would not keep the mean.
    """
    if method.pools_data:
        return Topology("alone", 1, np.ones((1, 1)))
    section = method.graph(config.topology)
    seed = config.run.seed if section.seed is None else section.seed
    topology = build_topology(section, config.run.num_peers, seed, counts)
    return replace(topology, has_hub=method.has_hub(section))


def make_batches(config: RunConfig, data: Prepared, pools: bool) -> dict[int, Batches | UnionBatches]:
    """Each model's batches: a peer's own; for a method that pools the data, the union of all peers'."""
    fixed = config.model.prefix_cache or config.model.compile
    every = {
        i: Batches(
            rendered.samples,
            config.data.batch_size,
            seed=derive_seed(config.run.seed, i, "batches"),
            pad_id=data.tokenizer.pad_token_id,
            pad_to=config.model.max_length if fixed else 0,
        )
        for i, rendered in data.train.items()
    }
    return {0: UnionBatches(list(every.values()))} if pools else {**every}


def make_pool(config: RunConfig, module: torch.nn.Module, device: torch.device) -> Executor | None:
    """Threads for the peers' local phases, where the recipe asks for them. Raises ConfigError."""
    section = config.run
    if section.parallel_peers == 1:
        return None
    for reason, applies in (
        (f"run.threads = {section.threads}, expected 1", section.threads > 1),
        (f"device {device}, expected a CPU", device.type != "cpu"),
        ("a model with dropout, whose draws come from one generator", has_dropout(module)),
    ):
        if applies:
            raise ConfigError(
                f"run.parallel_peers: got {section.parallel_peers} with {reason}; set run.parallel_peers = 1"
            )
    return thread_pool(section.parallel_peers)
