"""What a finished cell says: the quality of what its peers end with, and its curve over the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peertune.algorithms import ALGORITHMS
from peertune.compare.budget import bytes_a_peer
from peertune.metric import METRICS
from peertune.report.events import RunRecord, read_run
from peertune.report.series import mean
from peertune.robust import ends_in_agreement

Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation on the way."""

    samples: float
    """Drawn by a peer so far, mean over peers."""
    bytes: float
    """Sent by a peer so far, mean over peers."""
    quality: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One contestant with one seed."""

    contestant: str
    seed: int
    folder: Path
    summary: Summary
    metric: str
    points: tuple[Point, ...]

    @property
    def quality(self) -> float:
        return quality(self.summary, self.metric)

    @property
    def macro_f1(self) -> float | None:
        """Macro F1 of what peers end with; None where there are no classes."""
        return quality(self.summary, "macro_f1") if "macro_f1" in self.summary["metrics"]["average_model"] else None

    @property
    def peers(self) -> list[float]:
        """The metric of each peer's own model: before any final agreement, or with its personal parts after it."""
        return [peer[self.metric] for peer in _own(self.summary)]

    @property
    def worst_peer(self) -> float:
        return METRICS[self.metric].worst(self.peers)

    @property
    def bytes_sent(self) -> float:
        return bytes_a_peer(self.summary)

    @property
    def bytes_sent_by_hub(self) -> float | None:
        """What the server sent in the whole run; None where there is none."""
        sent = self.summary.get("bytes_sent_by_hub")
        return None if sent is None else float(sent)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of training a peer; a pooled model's are shared out, as it draws every peer's batches."""
        return float(self.summary["cpu_s"]) / int(self.summary["config"]["run"]["num_peers"])

    @property
    def samples(self) -> float:
        return self.points[-1].samples


@dataclass(frozen=True, kw_only=True)
class DivergedCell:
    """One contestant with one seed, given up because its training diverged."""

    contestant: str
    seed: int
    folder: Path


def metric_of(summary: Summary) -> str:
    """What is compared: accuracy where there are classes, else the loss."""
    return "accuracy" if "accuracy" in summary["metrics"]["average_model"] else "loss"


def quality(summary: Summary, metric: str) -> float:
    """The metric of what a peer ends with: the agreed model; without one, or with personal parts, the peers' mean."""
    if _has_one_model(summary):
        return float(summary["metrics"]["average_model"][metric])
    own = [peer[metric] for peer in _own(summary)]
    return float(sum(own) / len(own))


def _own(summary: Summary) -> list[dict[str, float]]:
    """Metrics of the peers' own models: with personal parts on the common model, else before any agreement."""
    metrics = summary["metrics"]
    return list(metrics.get("personal") or metrics["peers"])


def _has_one_model(summary: Summary) -> bool:
    """Whether what all peers end with is one model, without personal parts."""
    rule = summary["config"].get("exchange", {}).get("robust", "none")
    agrees = ends_in_agreement(rule, has_hub=summary.get("bytes_sent_by_hub") is not None)
    return agrees and ALGORITHMS[summary["algorithm"]].agrees and not summary["metrics"].get("personal")


def read_cell(contestant: str, seed: int, folder: Path, summary: Summary) -> Cell:
    """Join a cell's summary with the curve in its events."""
    metric = metric_of(summary)
    points = _points(read_run(folder), summary, metric)
    return Cell(contestant=contestant, seed=seed, folder=folder, summary=summary, metric=metric, points=tuple(points))


def samples_a_peer(run: RunRecord, epochs: Sequence[float | None]) -> float:
    """Samples drawn so far, mean over peers.

    Args:
        epochs: passes so far, by peer; a single one of a pooled model counts for the data of all.
    """
    held = [holding.sequences for holding in run.holdings]
    if len(epochs) == 1:
        return (epochs[0] or 0.0) * sum(held) / len(held)
    drawn = [(passes or 0.0) * size for passes, size in zip(epochs, held, strict=False)]
    return sum(drawn) / len(drawn)


def _points(run: RunRecord, summary: Summary, metric: str) -> list[Point]:
    """The curve; counters stand in "round" events, which may be fewer than rounds, so they are interpolated."""
    rounds = [0.0, *(logged.round + 1.0 for logged in run.rounds)]
    samples = [0.0, *(samples_a_peer(run, logged.epochs) for logged in run.rounds)]
    sent = [0.0, *(mean(logged.bytes_sent) or 0.0 for logged in run.rounds)]
    last = rounds[-1]
    points = []
    for evaluation in run.evaluations:
        ends = evaluation.round >= last
        # On the way only the average model is measured; without agreement, or with personal parts, nobody holds that.
        alone = run.num_models > 1 and not _has_one_model(summary)
        if metric not in evaluation.average_model or (alone and evaluation.round > 0 and not ends):
            continue
        points.append(
            Point(
                samples=float(np.interp(evaluation.round, rounds, samples)),
                bytes=bytes_a_peer(summary) if ends else float(np.interp(evaluation.round, rounds, sent)),
                quality=quality(summary, metric) if ends else evaluation.average_model[metric],
            )
        )
    return points
