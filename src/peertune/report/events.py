"""Reading a run folder: events.jsonl, which may still be growing, and the summary.json of a run that has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peertune.errors import CheckpointError
from peertune.logfields import Log, items, mapping, number, pair, parse_line, whole

Json = Mapping[str, Any]
Metrics = Mapping[str, float]
Values = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One logged round. Lists have one entry a peer; what was not finite is None."""

    round: int
    block: int | None
    loss: Values
    consensus_distance: float | None
    bytes_sent: Values
    epochs: Values
    wall_s: float | None
    time: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out metrics after `round` rounds; 0 is before training."""

    round: int
    average_model: Metrics
    peers: tuple[Metrics, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    index: int
    name: str
    parameters: int
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one peer holds. `classes` maps a label to its number of samples; empty where there are no labels.

    `others` is the number of samples whose label it leaves out."""

    peer: int
    samples: int
    sequences: int
    tokens: int
    cut: int
    dropped: int
    classes: Mapping[str, int]
    others: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All a report shows, checked and typed."""

    config: Json
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    parameters: int
    frozen: tuple[str, ...]
    blocks: tuple[Block, ...]
    holdings: tuple[Holding, ...]
    edges: tuple[tuple[int, int], ...]
    weights: tuple[tuple[float, ...], ...]
    lambda2: float | None
    agrees: bool
    """Whether the peers end with one model."""
    planned_rounds: int
    rounds: tuple[Round, ...]
    evaluations: tuple[Evaluation, ...]
    personal: tuple[Metrics, ...]
    """Of the common model with each peer's own weights; empty where none stay with a peer."""
    bytes_sent: Values
    agreement_hops: int | None
    agreed_with: tuple[str, ...]
    """At a site the names of those who end with its model; both are empty elsewhere, and before the end."""
    agreed_without: tuple[str, ...]
    agreed_is_one: bool
    """Whether those named first do end with it, as far as is known."""
    started: float | None
    wall_s: float | None
    peak_memory_bytes: int | None
    resumes: tuple[int, ...]
    finished: bool

    def setting(self, section: str, key: str) -> object:
        """One value of the resolved recipe; None where it has none."""
        part = self.config.get(section)
        return part.get(key) if isinstance(part, Mapping) else None

    @property
    def num_peers(self) -> int:
        # A pooled run has one model, a site knows its own data, and W is not every method's.
        logged = max((len(r.loss) for r in self.rounds), default=1)
        return max(len(self.holdings), len(self.weights), logged)

    @property
    def is_site(self) -> bool:
        """Whether this is one site's view of the run: of the others it knows neither loss nor data."""
        return len(self.holdings) == 1 < self.num_peers and self.num_models > 1

    @property
    def num_models(self) -> int:
        """One a peer, but for pooled training: one model on the data of all peers."""
        return max((len(r.loss) for r in self.rounds), default=0) or len(self.weights) or self.num_peers

    @property
    def rounds_done(self) -> int:
        return self.rounds[-1].round + 1 if self.rounds else 0


class Events(Log):
    """What the lines of events.jsonl add up to. A run that goes on has taken out those of what it does again."""

    def __init__(self) -> None:
        super().__init__()
        self.start: Json | None = None
        self.end: Json | None = None
        self.rounds: dict[int, Round] = {}
        self.evaluations: dict[int, Evaluation] = {}
        self.agreement: Json | None = None
        self.resumes: list[int] = []
        self.reached = 0
        """Rounds that are over by what other events say."""
        self.checkpoint: tuple[int, float | None] | None = None
        """Rounds in the newest one, and when it was written."""

    def _take(self, kind: str, event: Json, round: int | None, time: float | None) -> None:
        if kind == "start":
            self.start = event
        elif kind == "round" and round is not None:
            self.rounds[round] = _round(round, event, time)
        elif kind == "eval" and round is not None:
            self.evaluations[round] = _evaluation(round, event.get("average_model"), event.get("peers"))
        elif kind == "agreement":
            self.agreement = event
        elif kind == "end":
            self.end = event
        elif kind in ("checkpoint", "resume", "join") and round is not None:
            self.reached = max(self.reached, round)
            if kind == "checkpoint":
                self.checkpoint = (round, time)
            elif kind == "resume":
                self.resumes.append(round)


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder.

    A last line that is half-written is left out; any other line that cannot be read is left out with a warning.

    Args:
        run_dir: folder with events.jsonl and, once the run has ended, summary.json.
    Returns:
        The run so far.
    Raises:
        CheckpointError: the folder holds no run, or cannot be read.
    """
    log, warnings = _read_log(run_dir), list[str]()
    if log.start is None:
        raise CheckpointError(
            f"{run_dir}: got no run (no events.jsonl with a start event); expected a folder that `peertune run` wrote"
        )
    if log.unreadable:
        warnings.append(f"{log.unreadable} unreadable line{'s' * (log.unreadable > 1)} of events.jsonl left out")
    # While a resumed run goes on, the summary of an earlier end would be stale.
    summary = {} if log.end is None else _read_summary(run_dir / "summary.json", warnings)
    start, end = log.start, log.end or {}
    rounds = tuple(log.rounds[r] for r in sorted(log.rounds))
    metrics = mapping(end.get("metrics")) or mapping(summary.get("metrics"))
    # A run's own report is written before its summary.
    agreement = mapping(end.get("agreement")) or mapping(summary.get("agreement"))
    model = mapping(start.get("model"))
    return RunRecord(
        config=mapping(start.get("config")) or mapping(summary.get("config")),
        versions={str(k): str(v) for k, v in mapping(start.get("versions")).items()},
        notes=tuple(str(n) for n in items(start.get("notes"))),
        warnings=tuple(warnings),
        parameters=whole(model.get("parameters")) or 0,
        frozen=tuple(str(n) for n in items(model.get("frozen"))),
        blocks=tuple(_block(i, mapping(b)) for i, b in enumerate(items(start.get("blocks")))),
        holdings=tuple(_holding(i, mapping(p)) for i, p in enumerate(items(start.get("peers")))),
        edges=tuple(e for e in map(pair, items(start.get("edges"))) if e is not None),
        weights=tuple(
            tuple(number(w) or 0.0 for w in items(row))
            for row in items(start.get("weights")) or items(summary.get("weights"))
        ),
        lambda2=number(start.get("lambda2")),
        agrees=start.get("agrees") is not False,
        planned_rounds=whole(start.get("rounds")) or 0,
        rounds=rounds,
        evaluations=_evaluations(log, metrics, rounds[-1].round + 1 if rounds else 0),
        personal=tuple(_metrics(p) for p in items(metrics.get("personal"))),
        bytes_sent=(
            _values(summary.get("bytes_sent_per_peer"))
            or _values((log.agreement or {}).get("bytes_sent"))
            or (rounds[-1].bytes_sent if rounds else ())
        ),
        agreed_with=tuple(str(name) for name in items(agreement.get("with"))),
        agreed_without=tuple(str(name) for name in items(agreement.get("without"))),
        agreed_is_one=agreement.get("is_one") is not False,
        agreement_hops=whole(log.agreement.get("hops")) or 0 if log.agreement else None,
        started=number(start.get("time")),
        wall_s=_first(end.get("wall_s"), summary.get("wall_s"), rounds[-1].wall_s if rounds else None),
        peak_memory_bytes=whole(_first(end.get("peak_memory_bytes"), summary.get("peak_memory_bytes"))) or None,
        resumes=tuple(log.resumes),
        finished=log.end is not None,
    )


def _read_log(run_dir: Path) -> Events:
    log = Events()
    try:
        *lines, rest = (run_dir / "events.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return log
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: events.jsonl cannot be read ({error.strerror}); expected a run folder"
        ) from None
    if parse_line(rest):  # else the piece after the last line end is still being written
        lines.append(rest)
    for line in filter(bytes.strip, lines):
        log.add(line)
    return log


def _read_summary(path: Path, warnings: list[str]) -> Json:
    try:
        return mapping(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        warnings.append("summary.json could not be read; the numbers are those of events.jsonl")
        return {}


def _evaluations(log: Events, metrics: Json, rounds_done: int) -> tuple[Evaluation, ...]:
    """Evaluations in order of rounds; the first and the last may be known only from the end of the run."""
    found = dict(log.evaluations)
    for round, name, peers in ((0, "before", None), (rounds_done, "average_model", metrics.get("peers"))):
        known = _evaluation(round, metrics.get(name), peers)
        if known.average_model:
            found.setdefault(round, known)
    return tuple(found[r] for r in sorted(found))


def _evaluation(round: int, average_model: object, peers: object) -> Evaluation:
    own = tuple(_metrics(peer) for peer in items(peers))
    return Evaluation(round=round, average_model=_metrics(average_model), peers=own)


def _round(round: int, event: Json, time: float | None) -> Round:
    return Round(
        round=round,
        block=whole(event.get("block")),
        loss=_values(event.get("loss")),
        consensus_distance=number(event.get("consensus_distance")),
        bytes_sent=_values(event.get("bytes_sent")),
        epochs=_values(event.get("epochs")),
        wall_s=number(event.get("wall_s")),
        time=time,
    )


def _block(position: int, block: Json) -> Block:
    return Block(
        index=whole(block.get("index", position)) or 0,
        name=str(block.get("name", f"block {position}")),
        parameters=whole(block.get("parameters")) or 0,
        tensors=whole(block.get("tensors")) or 0,
    )


def _holding(place: int, peer: Json) -> Holding:
    names = ("samples", "sequences", "tokens", "cut", "dropped", "others")
    counts = {name: whole(peer.get(name)) or 0 for name in names}
    classes = {str(k): whole(v) or 0 for k, v in mapping(peer.get("classes")).items()}
    return Holding(peer=whole(peer.get("peer", place)) or 0, classes=classes, **counts)


def _metrics(value: object) -> dict[str, float]:
    pairs = ((str(k), number(v)) for k, v in mapping(value).items())
    return {k: v for k, v in pairs if v is not None}


def _values(value: object) -> Values:
    return tuple(number(v) for v in items(value))


def _first(*values: object) -> float | None:
    return next((n for n in map(number, values) if n is not None), None)
