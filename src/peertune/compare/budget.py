"""How many local steps each method gets, so that all spend the same: samples, bytes a peer, or CPU seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import ALGORITHMS, Algorithm
from peertune.algorithms.turns import BlockwiseConfig
from peertune.assemble import check_exchange, make_algorithm, make_topology
from peertune.compare.contestants import Contestant, Lineup
from peertune.compare.options import Options
from peertune.config import AlgorithmConfig
from peertune.errors import ConfigError, ModelError, TopologyError
from peertune.prepare import prepare_model
from peertune.report.events import RunRecord
from peertune.report.series import mean

Summary = Mapping[str, Any]
PROBE_SHARE = 8
"""A probe takes one part in so many of the steps that the samples would allow."""


class Budget:
    """What all contestants may spend, in local steps of each.

    Raises:
        ConfigError: a contestant's samples cannot be counted, or a value to tune is the budget's to set.
    """

    def __init__(self, lineup: Lineup, options: Options, base: Path, note: Callable[[str], None]) -> None:
        self._contestants, self._pace, self._options, self._base = lineup.contestants, lineup.pace, options, base
        if options.budget == "samples":
            self._check_epochs()
        self.num_blocks = {each.name: self._count_blocks(each) for each in lineup.contestants}
        """Blocks of the model, by contestant: schedules are counted in them, also where all are trained at once."""
        is_first = lineup.pace is lineup.contestants[0]
        self._pace_blocks = self.num_blocks[lineup.pace.name] if is_first else self._count_blocks(lineup.pace)
        for contestant in lineup.contestants:
            self._check_what_it_sets(contestant, note)

    def steps(self, algorithm: AlgorithmConfig) -> int:
        """Local steps that draw as many samples as those of `Lineup.pace`."""
        pace = self._pace.config
        return steps_for_samples(pace.algorithm, self._pace_blocks, algorithm, pace.run.num_peers)

    def fit(self, algorithm: AlgorithmConfig, steps: int, num_blocks: int) -> AlgorithmConfig:
        """A method's settings for so many steps, or the next fewer that its schedule can have."""
        if self._options.budget == "bytes":
            return with_whole_rounds(algorithm, steps, num_blocks)
        return algorithm.with_steps(steps, num_blocks)

    def _check_epochs(self) -> None:
        """Refuse passes over a peer's own data, whose steps nobody has counted, unless all take the same."""
        paces = set()
        for contestant in [*self._contestants, self._pace]:
            algorithm = contestant.config.algorithm
            keys = ("local_epochs", "rounds", "local_steps", "grad_accumulation", "participation")
            paces.add(tuple(getattr(algorithm, key, None) for key in keys))
        tune = self._options.tune
        for contestant in [*self._contestants, self._pace]:
            epochs = getattr(contestant.config.algorithm, "local_epochs", 0)
            is_tuned = tune is not None and tune.key == "local_epochs"
            if (epochs and len(paces) > 1) or is_tuned:
                raise ConfigError(
                    f"--budget samples: {contestant.name} has algorithm.local_epochs"
                    f" {'tuned' if is_tuned else f'= {epochs}'}, whose samples depend on how much each peer holds,"
                    " expected 0; set algorithm.local_steps instead"
                )

    def _count_blocks(self, contestant: Contestant) -> int:
        """Of the method on a model of its own, as an adapter changes it: so what cannot be run is refused here."""
        config = contestant.config
        try:
            topology = make_topology(config, ALGORITHMS[config.algorithm.name], [1] * config.run.num_peers)
            module = prepare_model(config, torch.device("cpu"), self._base)
            algorithm = make_algorithm(config, module, topology)
            check_exchange(config, algorithm)
            if self._options.budget == "bytes" and contestant is self._contestants[0] and not _sends(algorithm):
                raise ConfigError("--budget bytes: the first contestant sends nothing; name one first that does")
            return len(algorithm.peer.blocks)
        except (ConfigError, ModelError, TopologyError) as error:
            raise type(error)(f"{contestant.name}: {error}") from error

    def _check_what_it_sets(self, contestant: Contestant, note: Callable[[str], None]) -> None:
        """Refuse values to tune, and remark on a name, that say how long to train otherwise than the budget does."""
        tune = self._options.tune
        algorithm, blocks = contestant.config.algorithm, self.num_blocks[contestant.name]
        steps = self.steps(algorithm)
        for key, value in () if tune is None else [(tune.key, value) for value in tune.values]:
            set_to = getattr(self.fit(algorithm.model_copy(update={key: value}), steps, blocks), key)
            if set_to != value:
                raise ConfigError(
                    f"--tune {key}: got {value:g}, but the budget sets how long {contestant.name} trains, and this"
                    f" with it, to {set_to:g}; tune another key"
                )
        fitted = self.fit(algorithm, steps, blocks)
        for key in type(algorithm).model_fields:
            if contestant.sets(key) and getattr(fitted, key) != getattr(algorithm, key):
                note(f"{contestant.name}: the budget sets {key} to {getattr(fitted, key)}, so that all spend alike")


def _sends(algorithm: Algorithm) -> bool:
    """Whether anybody sends anything, the final agreement included."""
    hops = chain(algorithm.agreement(), chain.from_iterable(map(algorithm.hops, range(algorithm.num_rounds))))
    return any(source != target for hop in hops for source, target in hop.weights)


def steps_for_samples(first: AlgorithmConfig, first_blocks: int, other: AlgorithmConfig, num_peers: int) -> int:
    """Local steps with which `other` draws as many samples a peer as `first` does by its recipe, on average over peers.

    Batches are of one size, so samples are steps x grad_accumulation, of those peers who train in a round.
    """
    batches = first.num_steps(first_blocks) * first.grad_accumulation * first.share_at_work(num_peers)
    return max(1, int(batches / (other.grad_accumulation * other.share_at_work(num_peers)) + 1e-9))


def with_whole_rounds(algorithm: AlgorithmConfig, steps: int, num_blocks: int) -> AlgorithmConfig:
    """As `with_steps`, but without a shorter last round of a turn, which would send as much as a full one."""
    if not isinstance(algorithm, BlockwiseConfig):
        return algorithm.with_steps(steps, num_blocks)
    unit = num_blocks * algorithm.gossip_every
    sweeps = max(1, min(algorithm.outer_rounds, steps // unit))
    inner = max(1, steps // (sweeps * unit)) * algorithm.gossip_every
    return algorithm.model_copy(update={"outer_rounds": sweeps, "inner_steps": inner})


def bytes_a_peer(summary: Summary) -> float:
    """Bytes sent in the whole run, agreement included, mean over peers."""
    sent = summary["bytes_sent_per_peer"]
    return float(sum(sent) / len(sent))


def steps_for_bytes(allowed: float, probe: Summary, events: RunRecord, probe_steps: int, at_most: int) -> int:
    """Local steps whose bytes fit into `allowed`.

    Args:
        allowed: bytes a peer, agreement included.
        probe, events: a short run of the method, in whole rounds.
        probe_steps: local steps of that run.
        at_most: steps of a method that sends nothing while it trains.
    """
    while_training = mean(events.rounds[-1].bytes_sent) or 0.0
    if while_training == 0:
        return at_most
    in_the_end = bytes_a_peer(probe) - while_training
    return max(1, int((allowed - in_the_end) * probe_steps / while_training))


def steps_for_seconds(allowed: float, probe: Summary, probe_steps: int) -> int:
    """Local steps whose CPU time, summed over peers, fits into `allowed` seconds, at the probe's rate."""
    return max(1, int(allowed * probe_steps / max(probe["cpu_s"], 1e-9)))
