"""What a run will ask of a machine, worked out before it begins: disk, memory, and a round's time and traffic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peertune.algorithms import Algorithm
from peertune.algorithms.local_steps import LocalSteps
from peertune.checkpoint import GENERATIONS
from peertune.codec import is_coded
from peertune.config import RunConfig
from peertune.exchange import Inbox
from peertune.model.quantization import num_weights
from peertune.runtimes.outbox import KEPT_BYTES
from peertune.wire import payload_size

SHORT = {"local_steps": 1, "local_epochs": 0, "gossip_every": 1, "inner_steps": 1}
"""Keys of methods under which a round is one local step, and each round another block's."""
REHEARSAL = 12, 20.0
"""Local steps that are timed at most, and seconds after which no other is begun."""
LOOKED_AT = 512
"""Rounds of a run of which the traffic is worked out, spread over all."""


@dataclass(frozen=True)
class Workload:
    """What a round asks of this site; means over the run."""

    rounds: int
    steps: float
    """Local steps."""
    step_s: float
    hops: float
    sent: Mapping[int, float]
    """Neighbour -> bytes."""
    received: Mapping[int, float]

    def line_s(self, neighbor: int, up: float, down: float, rtt_s: float) -> float:
        """Seconds of a round's messages over one line; both ways go on at the same time.

        Args:
            up, down: bytes a second to the neighbour, and from it.
        """
        there, back = self.sent.get(neighbor, 0.0) / up, self.received.get(neighbor, 0.0) / down
        return max(there, back) + self.hops * rtt_s


def needed_bytes(algorithm: Algorithm, num_neighbors: int) -> tuple[int, int]:
    """Memory of a run at a site, without activations: for weights and optimiser, and for messages.

    The base in its type; a copy of what is trained, for the peers' average; 16 more bits of each trained weight that is
    held in bfloat16; the largest block's gradient, and its two moments in float32; what else the method keeps. A
    message from each neighbour, the one before the site's own, and those of its own that are kept until the neighbours
    have a checkpoint, in float32; where a GPU trains, these are copied to the host for each of them.
    """
    parameters = dict(algorithm.peer.model.module.named_parameters())
    size = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    trained = [name for block in algorithm.peer.blocks for name in block.parameters]
    weights = sum(size.values()) + sum(size[name] for name in trained)
    weights += sum(2 * parameters[name].numel() for name in trained if parameters[name].dtype == torch.bfloat16)

    def block_bytes(each: Callable[[nn.Parameter], int]) -> int:
        return max(sum(each(parameters[name]) for name in block.parameters) for block in algorithm.blocks)

    weights += block_bytes(lambda p: p.numel() * (p.element_size() + 8))
    weights += 4 * algorithm.kept_per_weight * sum(parameters[name].numel() for name in trained)
    message = block_bytes(lambda p: 4 * p.numel())
    kept = max(2 * message, min(KEPT_BYTES, _rounds_between_checkpoints(algorithm) * message))
    copies = 1 if algorithm.peer.model.device.type == "cpu" else num_neighbors
    return weights, (num_neighbors + 1) * message + copies * kept


def _rounds_between_checkpoints(algorithm: Algorithm) -> int:
    """At most, in the first rounds of a run, where its recipe does not say."""
    longest = since = 0
    for round in range(min(algorithm.num_rounds, LOOKED_AT)):
        since += 1
        longest = max(longest, since)
        if algorithm.is_boundary(round):
            since = 0
    return longest


def foreseen_bytes(algorithm: Algorithm, num_members: int) -> int:
    """Disk the checkpoints and the exported model will need: generations kept, one being written, the model.

    What generations share is not taken off: the first one after a resumption is written whole beside those kept.

    Args:
        num_members: whose checkpoints lie in one folder.
    """
    sizes: dict[str, int] = {name: num_weights(p) for name, p in algorithm.peer.model.module.named_parameters()}
    trained = sum(sizes[n] for block in algorithm.peer.blocks for n in block.parameters)
    largest = max(sum(sizes[n] for n in block.parameters) for block in algorithm.blocks)
    a_member = 4 * (1 + algorithm.kept_per_weight) * trained + 8 * largest
    return (GENERATIONS + 1) * num_members * a_member + 4 * sum(sizes.values())


def rehearse(algorithm: Algorithm, config: RunConfig) -> Workload:
    """Time some local steps, and work out the messages of the run's rounds. It trains the model at hand."""
    peer, me = algorithm.peer, algorithm.peer.index
    keys = {key: value for key, value in SHORT.items() if key in type(config.algorithm).model_fields}
    short = type(algorithm)(peer, config.algorithm.model_copy(update=keys), algorithm.topology)
    times: list[float] = []
    ratios: dict[str, float] = {}
    count, end = REHEARSAL[0], time.monotonic() + REHEARSAL[1]
    for round in range(min(short.num_rounds, LOOKED_AT)):
        began = time.monotonic()
        report = short.local(round)
        if report is None:
            continue
        float(report.loss)  # a GPU's steps are over only then
        times.append(time.monotonic() - began)
        for hop in short.hops(round):
            out = short.outgoing(hop)
            sent_bytes = payload_size(out) / (2 if is_coded(config.exchange, hop) else 1)
            ratios[hop.name] = sent_bytes / max(1, _shared_bytes(short, round))
            sources = hop.sources(me)
            if sources:
                short.mix(hop, Inbox(sources, dict.fromkeys(sources, out)))
        if len(times) > count or time.monotonic() > end:
            break
    warm = times[1:] or times or [0.0]
    looked_at = range(0, algorithm.num_rounds, max(1, algorithm.num_rounds // LOOKED_AT))
    sent: dict[int, float] = {}
    received: dict[int, float] = {}
    num_hops = 0
    for round in looked_at:
        size = _shared_bytes(algorithm, round)
        for hop in algorithm.hops(round):
            num_hops += 1
            bytes = size * ratios.get(hop.name, 1.0) / len(looked_at)
            for target in hop.targets(me):
                sent[target] = sent.get(target, 0.0) + bytes
            for source in hop.sources(me):
                if source != me:
                    received[source] = received.get(source, 0.0) + bytes
    if isinstance(algorithm, LocalSteps):
        steps = statistics.fmean(algorithm.num_local_steps(round) for round in looked_at)
    else:
        steps = config.algorithm.num_steps(len(peer.blocks)) / algorithm.num_rounds
    mean = statistics.fmean(warm)
    return Workload(algorithm.num_rounds, steps, mean, num_hops / len(looked_at), sent, received)


def _shared_bytes(algorithm: Algorithm, round: int) -> int:
    """Of what a round trains and the peers share, in float32."""
    return 4 * sum(algorithm.masters.parameters[name].numel() for name in algorithm.shared_names(round))
