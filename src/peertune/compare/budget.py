"""How many local steps each method gets, so that all spend the same: samples, bytes a peer, or CPU seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peertune.algorithms.turns import BlockwiseConfig
from peertune.config import AlgorithmConfig
from peertune.report.events import Run
from peertune.report.series import mean

Summary = Mapping[str, Any]
PROBE_SHARE = 8
"""A probe takes one part in so many of the steps that the samples would allow."""


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


def steps_for_bytes(allowed: float, probe: Summary, events: Run, probe_steps: int, at_most: int) -> int:
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
