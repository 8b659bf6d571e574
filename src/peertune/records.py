"""What a run says of itself: the fields of its events and of its summary."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.config import RunConfig
from peertune.evaluation import Measured
from peertune.model.blocks import Block, frozen_names
from peertune.model.quantization import num_weights
from peertune.plugins import code_version
from peertune.prepare import Prepared
from peertune.run_state import Agreed
from peertune.runtimes import Member

SUMMED = ("bytes_sent", "header_bytes_sent", "cpu_s")
"""Fields of a member that add up over its ranks."""


def start_event(
    config: RunConfig, method: Algorithm, data: Prepared, notes: Sequence[str], agrees: bool
) -> dict[str, Any]:
    """What is known before the first round.

    Args:
        notes: what a user should know about the recipe and the rows.
        agrees: whether the peers are to end with one model.
    """
    module, topology = method.peer.model.module, method.topology
    sizes = {name: num_weights(p) for name, p in module.named_parameters()}
    held = [
        {
            "peer": peer,
            **shown,
            "sequences": len(rendered.samples),
            "tokens": rendered.num_tokens,
            "cut": rendered.num_cut,
            "dropped": rendered.num_dropped,
        }
        for shown, (peer, rendered) in zip(data.holdings, data.train.items(), strict=True)
    ]
    return {
        "config": config.to_dict(),
        "versions": versions(config.algorithm.name),
        "notes": list(notes),
        "model": {
            "parameters": sum(sizes.values()),
            "trained": sum(sizes[n] for block in method.blocks for n in block.parameters),
            "frozen": frozen_names(module, method.blocks),
        },
        "blocks": [_describe(block, sizes) for block in method.blocks],
        "peers": held,
        "edges": topology.edges,
        "hub": topology.num_peers if topology.has_hub else None,
        **_mixing(method),
        "agrees": agrees,
        "rounds": method.num_rounds,
    }


def peer_fields(member: Member, report: LocalReport | None, cpu_s: float) -> dict[str, Any]:
    """What one member tells of a round; `report` is None where it had no part in it."""
    batches = member.algorithm.peer.batches
    return {
        "loss": None if report is None else float(report.loss),
        "grad_norm": None if report is None else float(report.grad_norm),
        "lr": None if report is None else report.lr,
        "bytes_sent": member.exchange.sent.payload_bytes,
        "epochs": None if batches is None else batches.epochs,
        "left_out": list(member.exchange.left_out),
        "cpu_s": cpu_s,
    }


def combined_fields(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a member tells whose ranks told this, in `peer_fields` or `totals`."""
    sums = {key: sum(part[key] for part in parts) for key in SUMMED if key in parts[0]}
    if "bytes_by_target" in parts[0]:
        ways = zip(*(part["bytes_by_target"] for part in parts), strict=True)
        sums["bytes_by_target"] = [(way[0][0], sum(p for _, p, _ in way), sum(h for _, _, h in way)) for way in ways]
        sums["peak_memory_bytes"] = max(part["peak_memory_bytes"] for part in parts)
    return {**parts[0], **sums}


def quality_of(
    before: Measured, agreed: Measured, own: Sequence[Measured | None], personal: Sequence[Measured | None]
) -> dict[str, Any]:
    """What the summary says of quality.

    Args:
        before: the base model's.
        agreed: the average model's.
        own: each peer's, before the final agreement; None where it is not known here.
        personal: each peer's own weights on the average model; empty where there are none.
    """

    def overall(each: Sequence[Measured | None]) -> list[Any]:
        return [None if measured is None else measured.overall for measured in each]

    metrics: dict[str, Any] = {"before": before.overall, "average_model": agreed.overall, "peers": overall(own)}
    if personal:
        metrics["personal"] = overall(personal)
    if agreed.by_client:
        metrics["by_client"] = {
            "before": before.by_client,
            "average_model": agreed.by_client,
            "peers": [None if measured is None else measured.by_client for measured in own],
        }
    return metrics


def round_event(
    round: int,
    position: Mapping[str, int],
    told: Sequence[Mapping[str, Any] | None],
    consensus_distance: float | None,
    simulated_s: float | None,
    wall_s: float,
) -> dict[str, Any]:
    """What a round did; lists are by peer, with null for one that had no part in it or is not known.

    Args:
        told: by peer, its `peer_fields`.
    """

    def by_peer(key: str) -> list[Any]:
        return [None if fields is None else fields[key] for fields in told]

    return {
        "round": round,
        **position,
        "loss": by_peer("loss"),
        "lr": next((lr for lr in by_peer("lr") if lr is not None), None),
        "grad_norm": by_peer("grad_norm"),
        "consensus_distance": consensus_distance,
        "bytes_sent": by_peer("bytes_sent"),
        "epochs": by_peer("epochs"),
        "left_out": by_peer("left_out") if any(by_peer("left_out")) else None,
        "wall_s": wall_s,
        "cpu_s": sum(spent for spent in by_peer("cpu_s") if spent is not None),
        "simulated_s": simulated_s,
    }


def totals(member: Member, cpu_s: float, peak: int) -> dict[str, Any]:
    """What one member tells of the whole run; `peak` is its process's memory, bytes."""
    sent = member.exchange.sent
    return {
        "bytes_sent": sent.payload_bytes,
        "header_bytes_sent": sent.header_bytes,
        "bytes_by_target": sent.by_target(),
        "rounds_without": dict(member.exchange.rounds_without),
        "cpu_s": cpu_s,
        "peak_memory_bytes": peak,
    }


def summary_of(
    config: RunConfig,
    method: Algorithm,
    metrics: Mapping[str, Any],
    told: Sequence[Mapping[str, Any] | None],
    simulated_s: float | None,
    wall_s: float,
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        told: by member, its `totals`; None where it is not known.
    """
    topology = method.topology
    peers, hub = told[: topology.num_peers], told[-1] if topology.has_hub else None

    def by_peer(key: str) -> list[Any]:
        return [None if fields is None else fields[key] for fields in peers]

    return {
        "config": config.to_dict(),
        "versions": versions(config.algorithm.name),
        "seed": config.run.seed,
        "algorithm": config.algorithm.name,
        "metrics": metrics,
        "bytes_sent_per_peer": by_peer("bytes_sent"),
        "bytes_sent_by_hub": None if hub is None else hub["bytes_sent"],
        "header_bytes_sent_per_peer": by_peer("header_bytes_sent"),
        "bytes_by_edge": [
            {"source": source, "target": target, "payload": payload, "header": header}
            for source, fields in enumerate(told)
            for target, payload, header in ([] if fields is None else fields["bytes_by_target"])
        ],
        "rounds": method.num_rounds,
        "rounds_without": [
            {"peer": peer, "went_without": other, "rounds": rounds}
            for peer, fields in enumerate(told)
            for other, rounds in ({} if fields is None else fields["rounds_without"]).items()
        ],
        "wall_s": wall_s,
        "cpu_s": sum(spent for spent in by_peer("cpu_s") if spent is not None),
        "cpu_s_per_peer": by_peer("cpu_s"),
        "simulated_s": simulated_s,
        "peak_memory_bytes": max(fields["peak_memory_bytes"] for fields in told if fields is not None),
        **_mixing(method),
    }


def _mixing(method: Algorithm) -> dict[str, Any]:
    """W and its second eigenvalue, where the method mixes by it."""
    topology = method.topology
    if not method.mixes:
        return {"weights": [], "lambda2": None}
    return {"weights": topology.weights.tolist(), "lambda2": topology.second_eigenvalue}


def versions(method: str) -> dict[str, str]:
    """Versions that a result of a method depends on."""
    import transformers

    return {
        "peertune": code_version(method),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _describe(block: Block, sizes: Mapping[str, int]) -> dict[str, Any]:
    count = sum(sizes[name] for name in block.parameters)
    return {"index": block.index, "name": block.name, "parameters": count, "tensors": len(block.parameters)}


def agreement_of(peers: Sequence[str], own: int, agreed: Agreed) -> dict[str, Any] | None:
    """With whom a site agreed on its model in the end, by name; None where there is one anyway, as over a server.

    Args:
        peers: names, by index.
        own: this site's index.
    """
    if agreed.is_reached and not agreed.hops and not agreed.absent:
        return None
    others = [peer for peer in range(len(peers)) if peer != own]
    lost = agreed.absent if agreed.is_reached else others
    return {
        "with": [peers[peer] for peer in others if peer not in lost],
        "without": [peers[peer] for peer in others if peer in lost],
        "unheard": [peers[peer] for peer in agreed.unheard],
        "is_one": agreed.is_one,
    }
