"""What a run says of itself: the fields of its events and of its summary."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import peertune
from peertune.algorithms.base import Algorithm, LocalReport
from peertune.config import RunConfig
from peertune.link import Clock
from peertune.model.blocks import Block, frozen_names
from peertune.model.quantization import num_weights
from peertune.prepare import Prepared
from peertune.runtimes import Member
from peertune.topology import Topology


def start_event(config: RunConfig, method: Algorithm, data: Prepared, notes: list[str]) -> dict[str, Any]:
    """What is known before the first round. Adds a note on rows that were cut."""
    module, topology = method.peer.model.module, method.topology
    sizes = {name: num_weights(p) for name, p in module.named_parameters()}
    held = [
        {
            "samples": shown["samples"],
            "classes": shown["classes"],
            "sequences": len(rendered.samples),
            "tokens": rendered.num_tokens,
            "cut": rendered.num_cut,
            "dropped": rendered.num_dropped,
        }
        for shown, rendered in zip(data.classes, data.train, strict=True)
    ]
    cut, dropped = (sum(peer[key] for peer in held) for key in ("cut", "dropped"))
    if cut or dropped:
        notes.append(f"{cut} training rows were cut to model.max_length, {dropped} had nothing to learn from")
    return {
        "config": config.to_dict(),
        "versions": versions(),
        "notes": notes,
        "model": {
            "parameters": sum(sizes.values()),
            "trained": sum(sizes[n] for block in method.blocks for n in block.parameters),
            "frozen": frozen_names(module, method.blocks),
        },
        "blocks": [_describe(block, sizes) for block in method.blocks],
        "peers": held,
        "edges": topology.edges,
        "hub": topology.num_peers if topology.has_hub else None,
        "weights": topology.weights.tolist(),
        "lambda2": topology.second_eigenvalue,
        "rounds": method.num_rounds,
    }


def round_event(
    round: int,
    members: Sequence[Member],
    reports: Sequence[LocalReport | None],
    consensus_distance: float | None,
    clock: Clock,
    wall_s: float,
) -> dict[str, Any]:
    """What a round did; lists are by peer, with null for a peer that had no part in it."""
    trained = [report for report in reports if report is not None]
    return {
        "round": round,
        **members[0].algorithm.position(round),
        "loss": [None if report is None else float(report.loss) for report in reports],
        "lr": trained[0].lr if trained else None,
        "grad_norm": [None if report is None else float(report.grad_norm) for report in reports],
        "consensus_distance": consensus_distance,
        "bytes_sent": bytes_sent(members),
        "epochs": [m.algorithm.peer.batches.epochs for m in members if m.algorithm.peer.batches is not None],
        "wall_s": wall_s,
        "cpu_s": sum(clock.cpu_s),
        "simulated_s": clock.simulated_s,
    }


def summary_of(
    config: RunConfig,
    members: Sequence[Member],
    metrics: Mapping[str, Any],
    clock: Clock,
    wall_s: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The contents of summary.json."""
    topology: Topology = members[0].algorithm.topology
    hubs = [member.exchange.sent.payload_bytes for member in members if member.is_hub]
    return {
        "config": config.to_dict(),
        "versions": versions(),
        "seed": config.run.seed,
        "algorithm": config.algorithm.name,
        "metrics": metrics,
        "bytes_sent_per_peer": bytes_sent(members),
        "bytes_sent_by_hub": hubs[0] if hubs else None,
        "header_bytes_sent_per_peer": [member.exchange.sent.header_bytes for member in members if not member.is_hub],
        "bytes_by_edge": [
            {"source": member.index, "target": target, "payload": payload, "header": header}
            for member in members
            for target, payload, header in member.exchange.sent.by_target()
        ],
        "rounds": members[0].algorithm.num_rounds,
        "wall_s": wall_s,
        "cpu_s": sum(clock.cpu_s),
        "cpu_s_per_peer": clock.cpu_s,
        "simulated_s": clock.simulated_s,
        "peak_memory_bytes": peak_memory_bytes,
        "weights": topology.weights.tolist(),
        "lambda2": topology.second_eigenvalue,
    }


def bytes_sent(members: Sequence[Member]) -> list[int]:
    """Bytes of payload each peer has sent so far, the hub left out."""
    return [member.exchange.sent.payload_bytes for member in members if not member.is_hub]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import transformers

    return {
        "peertune": peertune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _describe(block: Block, sizes: Mapping[str, int]) -> dict[str, Any]:
    count = sum(sizes[name] for name in block.parameters)
    return {"index": block.index, "name": block.name, "parameters": count, "tensors": len(block.parameters)}
