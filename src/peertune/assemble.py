"""What a run is put together from: the graph, each peer's batches and model, the method, and threads for the peers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from peertune.algorithms import ALGORITHMS, Algorithm
from peertune.algorithms.local_steps import LocalSteps
from peertune.algorithms.together import Alone, Together
from peertune.codec import check_codec
from peertune.config import ModelSection, RunConfig
from peertune.data.batches import Batches, UnionBatches
from peertune.errors import ConfigError
from peertune.model.language_model import LanguageModel
from peertune.model.layers import draws_in_training
from peertune.model.sharding import ShardedModel
from peertune.peer import Peer
from peertune.prepare import Prepared, model_blocks, prepare_model
from peertune.robust import check_rule
from peertune.runtimes import Member, thread_pool
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


def make_algorithm(
    config: RunConfig,
    module: torch.nn.Module,
    topology: Topology,
    index: int = 0,
    batches: Batches | UnionBatches | None = None,
) -> Algorithm:
    """The method on one member's model, outside of any run.

    Args:
        module: as `prepare_model` gives it; its layers are taken over.
        index: whose it is.
        batches: its data; None: there is none, or none is at hand.
    Raises:
        ConfigError, ModelError: the method cannot train this model, or not with these keys.
    """
    method = ALGORITHMS[config.algorithm.name]
    blocks = model_blocks(config, module, method.frozen)
    peer = Peer(index, LanguageModel(module, config.model), blocks, batches, config.run.seed)
    return method(peer, config.algorithm, topology)


def check_exchange(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse what the recipe asks of messages where the method or its graph cannot have it. Raises ConfigError."""
    rule, name = config.exchange, config.algorithm.name
    # Not always the first round's: DECA has none in the turn of a block that is personal as a whole.
    hops = next((hops for round in range(algorithm.num_rounds) if (hops := algorithm.hops(round))), ())
    check_rule(rule, name, algorithm.averages, hops)
    check_codec(rule, name, algorithm.averages)


def make_pool(config: RunConfig, module: torch.nn.Module, device: torch.device) -> Executor | None:
    """Threads for the peers' local phases, where the recipe asks for them. Raises ConfigError."""
    section = config.run
    if section.parallel_peers == 1:
        return None
    for reason, applies in (
        (f"run.threads = {section.threads}, expected 1", section.threads > 1),
        (f"device {device}, expected a CPU", device.type != "cpu"),
        ("a model with dropout or jitter, whose draws come from one generator", draws_in_training(module)),
    ):
        if applies:
            raise ConfigError(
                f"run.parallel_peers: got {section.parallel_peers} with {reason}; set run.parallel_peers = 1"
            )
    return thread_pool(section.parallel_peers)


def make_parts(config: RunConfig, peers: Sequence[Member]) -> list[Alone | Together]:
    """The peers, in order, as they train: each alone, or in groups whose steps are one call. Raises ConfigError."""
    algorithms, size = [member.algorithm for member in peers], config.run.batched_peers
    if size == 1 or len(peers) <= 1:  # none where a process plays the hub alone
        return [Alone(algorithm) for algorithm in algorithms]
    local_steps = [algorithm for algorithm in algorithms if isinstance(algorithm, LocalSteps)]
    module, has_own = peers[0].algorithm.peer.model.module, type(algorithms[0]).local is not LocalSteps.local
    for reason, applies in (
        (f"{config.algorithm.name}, which has no rounds of local AdamW steps", len(local_steps) < len(algorithms)),
        (f"{config.algorithm.name}, which has a local phase of its own", has_own),
        ("a model with dropout or jitter, whose draws are each peer's own", draws_in_training(module)),
    ):
        if applies:
            raise ConfigError(f"run.batched_peers: got {size} with {reason}; set run.batched_peers = 1")
    return [Together(local_steps[start : start + size]) for start in range(0, len(local_steps), size)]


def wrap_model(
    module: torch.nn.Module,
    config: ModelSection,
    ranks: DeviceMesh | None,
    trained: set[str],
    like: LanguageModel | None,
) -> LanguageModel:
    """A model as this process holds it.

    Args:
        module: the whole model; changed in place.
        ranks: those that hold it together; None: this one alone.
        trained: names of the parameters that are trained.
        like: another instance of the same model, where there is one.
    """
    if ranks is None:
        return LanguageModel(module, config, like=like)
    assert like is None or isinstance(like, ShardedModel)
    return ShardedModel(module, config, ranks, trained, like=like)


@torch.no_grad()
def whole_module(model: LanguageModel, config: RunConfig, base: Path, trained: Iterable[str]) -> torch.nn.Module:
    """A model in one piece; on the host where several ranks hold it, all of which have to ask for it.

    Args:
        base: folder of the recipe file.
        trained: names of the parameters in which it differs from the base model.
    """
    if not isinstance(model, ShardedModel):
        return model.module  # type: ignore[no-any-return]
    module = prepare_model(config, torch.device("cpu"), base)
    own = dict(module.named_parameters())
    for name in trained:
        own[name].copy_(model.whole(name))
    return module
