"""What the lines of a run's events.jsonl and audit.jsonl add up to. Pure: no file, no clock, no network.

`Rounds` folds the one, `Links` the other, `snapshot` puts them together. Lines are taken as they come: what cannot be
read, or has another type than expected, is left out and counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peertune.logfields import MAX_NAMES, items, mapping, number, pair, parse_line, text, whole
from peertune.report.series import bin_size, downsample, mean

MAX_POINTS = 300
"""Points of a curve at most; more rounds are averaged over bins."""
MAX_MEMBERS = 4096
QUORUM = "the quorum"
"""What a paused run waits for."""
RECENT_ROUNDS = 32
"""Rounds from which the time of the next ones is foretold."""
RECENT_ARRIVALS = 8
"""Messages over which a neighbour's throughput is averaged."""
SILENT_S = 60.0
"""Without a lock to look at, a run that has written nothing for so long, and for five rounds, is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class PeerState:
    """One neighbour of this site; one peer of a simulation. None: not known."""

    index: int | None
    name: str
    status: str
    """Of a neighbour "connected", "missing", "ejected", or "offline": this site's own process has ended; of a peer
    "here"."""
    since: float | None = None
    """Unix seconds since which it is connected or missing."""
    heard: float | None = None
    """Unix seconds of the last message from it, or fetched by it."""
    round: int | None = None
    """The newest round it has sent or fetched a message of."""
    behind: int | None = None
    """Rounds by which that is behind this site."""
    bytes_per_s: float | None = None
    """At which its last messages came, from the moment they were asked for."""
    bytes_sent: int | None = None
    """Made ready for it; of a simulated peer what it sent to all."""
    bytes_received: int | None = None
    rounds_without: int = 0
    loss: float | None = None
    refusal: str = ""
    """Why a neighbour was last refused, or refuses this site; empty once it is connected."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment. Times are Unix seconds; None: not known."""

    now: float
    state: str
    """"empty", "starting", "running", "stopped" (unfinished, and no process is at work on it) or "finished"."""
    site: str
    """This site's name; empty for a simulation."""
    is_site: bool
    method: str
    rounds_done: int
    rounds_planned: int | None
    loss: float | None
    """Mean training loss of the last round over the peers known here."""
    consensus_distance: float | None
    bytes_sent: int | None
    elapsed_s: float | None
    left_s: float | None
    """Foretold from the last rounds."""
    checkpoint_round: int | None
    checkpoint_time: float | None
    last_line: float | None
    """When anything was written last."""
    waiting_for: tuple[str, ...]
    missing: tuple[str, ...]
    peers: tuple[PeerState, ...]
    edges: tuple[tuple[int, int], ...]
    """Of the whole graph, by member."""
    hub: int | None
    curve_rounds: tuple[int, ...]
    curve_loss: tuple[float | None, ...]
    curve_consensus: tuple[float | None, ...]
    recent: tuple[tuple[float, str], ...]
    """What happened last beside the rounds: (when, sentence)."""
    unreadable: int
    """Lines left out."""


@dataclass
class _Round:
    loss: tuple[float | None, ...]
    consensus_distance: float | None
    bytes_sent: tuple[float | None, ...]
    wall_s: float | None
    time: float | None


class _Log(ABC):
    """Lines of one file, as far as they can be read."""

    def __init__(self) -> None:
        self.last_line: float | None = None
        self.unreadable = 0

    def add(self, line: bytes) -> None:
        """Take one line in."""
        event = parse_line(line)
        if not event:
            self.unreadable += 1
            return
        time = number(event.get("time"))
        self.last_line = time or self.last_line
        self._take(text(event.get("event")), event, whole(event.get("round")), time)

    @abstractmethod
    def _take(self, kind: str, event: Mapping[str, Any], round: int | None, time: float | None) -> None:
        """Take in an event whose commonest fields are read already."""


class Rounds(_Log):
    """What events.jsonl tells. After a `resume` a run writes the file anew: fold it anew too."""

    def __init__(self) -> None:
        super().__init__()
        self.start: Mapping[str, Any] | None = None
        self.rounds: dict[int, _Round] = {}
        self.reached = 0
        """Rounds that are over by what other events say."""
        self.checkpoint: tuple[int, float | None] | None = None
        self.end_wall_s: float | None = None

    def _take(self, kind: str, event: Mapping[str, Any], round: int | None, time: float | None) -> None:
        if kind == "start":
            self.start = event
        elif kind == "round" and round is not None:
            losses, sent = (tuple(map(number, items(event.get(key)))) for key in ("loss", "bytes_sent"))
            wall_s = number(event.get("wall_s"))
            self.rounds[round] = _Round(losses, number(event.get("consensus_distance")), sent, wall_s, time)
        elif kind in ("checkpoint", "resume", "join") and round is not None:
            self.reached = max(self.reached, round)
            if kind == "checkpoint":
                self.checkpoint = (round, time)
            if kind == "resume":
                self.rounds = {r: then for r, then in self.rounds.items() if r < round}
                self.reached = round
        elif kind == "end":
            self.end_wall_s = number(event.get("wall_s"))

    @property
    def done(self) -> int:
        return max(self.reached, max(self.rounds, default=-1) + 1)

    def seconds_a_round(self) -> float | None:
        """Mean over the last rounds."""
        timed = [(r, seen.wall_s) for r, seen in sorted(self.rounds.items()) if seen.wall_s is not None]
        recent = [(-1, 0.0), *timed][-RECENT_ROUNDS - 1 :]
        (first, began), (last, ended) = recent[0], recent[-1]
        return (ended - began) / (last - first) if last > first and ended >= began else None


@dataclass
class _Link:
    connected: bool = False
    since: float | None = None
    heard: float | None = None
    round: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    arrivals: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_ARRIVALS))
    without: set[int] = field(default_factory=set)
    refusal: str = ""
    is_ejected: bool = False


class Links(_Log):
    """What audit.jsonl, which is only ever added to, tells of a site and its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.members: list[str] = []
        self.site: int | None = None
        self.links: dict[str, _Link] = {}
        """By a neighbour's name."""
        self.round: int | None = None
        """Newest round of which this site made a message ready since it was started."""
        self.waiting: dict[str, int] = {}
        self.recent: deque[tuple[float, str]] = deque(maxlen=12)
        self.started: float | None = None

    def _take(self, kind: str, event: Mapping[str, Any], round: int | None, time: float | None) -> None:
        name, time = text(event.get("peer")), time or 0.0
        if kind == "started":
            self._started(event, time)
        elif kind in ("connected", "disconnected") and name:
            link = self._link(name)
            link.connected, link.since = kind == "connected", time
            if link.connected:
                link.heard, link.refusal = time, ""
                self.waiting.pop(name, None)
        elif kind in ("refused", "refused_by") and name:
            whose = "refused" if kind == "refused" else "it refuses this site"
            self._link(name).refusal = f"{whose}: {text(event.get('reason'), 300)}"
        elif kind == "sent" and name:
            self._link(name).bytes_sent += whole(event.get("bytes")) or 0
            if round is not None and event.get("hop") != "state":
                self.round = max(round, self.round or 0)
                self.waiting = {other: then for other, then in self.waiting.items() if then >= round}
        elif kind in ("fetched", "arrived") and name:
            self._moved(self._link(name), kind, event, time, round)
            self.waiting.pop(name, None)
        elif kind == "left_out":
            for other in filter(None, text(event.get("peers"), MAX_NAMES).split(", ")):
                self._link(other).without.add(-1 if round is None else round)
                self.waiting.pop(other, None)
        elif kind == "ejected" and name:
            self._link(name).is_ejected = True
            self.waiting.pop(name, None)
        elif kind == "paused":
            self.waiting[QUORUM] = round or 0
        elif kind == "resumed":
            self.waiting.pop(QUORUM, None)
        elif kind == "waiting" and name:
            self._link(name)
            self.waiting[name] = round or 0
        if kind not in ("sent", "fetched", "arrived", "left_out"):
            self.recent.append((time, _sentence(kind, event)))

    def _started(self, event: Mapping[str, Any], time: float) -> None:
        self.members = [text(name) for name in items(event.get("members"))[:MAX_MEMBERS]]
        self.site = whole(event.get("site"))
        self.started, self.round = time, None
        self.waiting.clear()
        connected = {self._name(whole(index)) for index in items(event.get("connected"))}
        for name in filter(None, (self._name(whole(index)) for index in items(event.get("neighbors")))):
            self._link(name)
        for name, link in self.links.items():
            if name not in connected:  # the process before had connections of its own
                link.connected, link.since = False, time

    def _moved(self, link: _Link, kind: str, event: Mapping[str, Any], time: float, round: int | None) -> None:
        link.heard = time
        if event.get("hop") == "state":
            round = None
        if round is not None:
            link.round = max(round, link.round or 0)
        size, seconds = whole(event.get("bytes")), number(event.get("seconds"))
        if kind == "arrived" and size is not None:
            link.bytes_received += size
            if seconds is not None:
                link.arrivals.append((size, seconds))

    def _link(self, name: str) -> _Link:
        if name not in self.links and len(self.links) >= MAX_MEMBERS:
            return _Link()
        return self.links.setdefault(name, _Link())

    def _name(self, index: int | None) -> str:
        return self.members[index] if index is not None and index < len(self.members) else ""


def snapshot(rounds: Rounds, links: Links, now: float, alive: bool | None, finished: bool) -> Snapshot:
    """The run at this moment.

    Args:
        now: Unix seconds.
        alive: whether a process works on it; None: cannot be told.
        finished: whether its summary is written.
    """
    start, last = rounds.start or {}, rounds.rounds.get(max(rounds.rounds, default=-1))
    planned = whole(start.get("rounds"))
    done = max(rounds.done, links.round or 0)
    done = done if planned is None else min(done, planned)
    last_line = max((t for t in (rounds.last_line, links.last_line) if t is not None), default=None)
    pace = rounds.seconds_a_round()
    is_site = links.started is not None or bool(links.links)
    if finished:
        state = "finished"
    elif last_line is None and not alive:
        state = "empty"
    elif alive is False or (alive is None and now - (last_line or now) > max(SILENT_S, 5 * (pace or 0.0))):
        state = "stopped"
    else:
        state = "running" if rounds.start is not None else "starting"
    peers = _neighbors(links, done, state) if is_site else _simulated(start, last)
    config = mapping(start.get("config"))
    curves = _curves(rounds)
    edges = tuple(e for e in map(pair, items(start.get("edges"))) if e is not None and e[0] < e[1] < MAX_MEMBERS)
    sent = [peer.bytes_sent for peer in peers if peer.bytes_sent is not None]
    return Snapshot(
        now=now,
        state=state,
        site=links._name(links.site),
        is_site=is_site,
        method=text(mapping(config.get("algorithm")).get("name")),
        rounds_done=planned if finished and planned is not None else done,
        rounds_planned=planned,
        loss=None if last is None else mean(last.loss),
        consensus_distance=None if last is None else last.consensus_distance,
        bytes_sent=sum(sent) if sent else None,
        elapsed_s=_elapsed(rounds, last, now, state),
        left_s=pace * (planned - done) if pace is not None and planned is not None and state == "running" else None,
        checkpoint_round=rounds.checkpoint[0] if rounds.checkpoint else None,
        checkpoint_time=rounds.checkpoint[1] if rounds.checkpoint else None,
        last_line=last_line,
        waiting_for=tuple(links.waiting) if state == "running" else (),
        missing=tuple(peer.name for peer in peers if peer.status == "missing"),
        peers=peers,
        edges=edges,
        hub=whole(start.get("hub")),
        curve_rounds=curves[0],
        curve_loss=curves[1],
        curve_consensus=curves[2],
        recent=tuple(links.recent),
        unreadable=rounds.unreadable + links.unreadable,
    )


def _neighbors(links: Links, done: int, state: str) -> tuple[PeerState, ...]:
    found = []
    for name, link in links.links.items():
        status = "ejected" if link.is_ejected else "connected" if link.connected else "missing"
        moved, seconds = sum(size for size, _ in link.arrivals), sum(seconds for _, seconds in link.arrivals)
        found.append(
            PeerState(
                index=links.members.index(name) if name in links.members else None,
                name=name,
                status=status if state in ("starting", "running") else "offline",
                since=link.since,
                heard=link.heard,
                round=link.round,
                behind=None if link.round is None else max(0, done - 1 - link.round),
                bytes_per_s=moved / seconds if seconds > 0 else None,
                bytes_sent=link.bytes_sent,
                bytes_received=link.bytes_received,
                rounds_without=len(link.without),
                refusal=link.refusal,
            )
        )
    return tuple(sorted(found, key=lambda peer: (peer.index is None, peer.index or 0, peer.name)))


def _simulated(start: Mapping[str, Any], last: _Round | None) -> tuple[PeerState, ...]:
    planned = whole(mapping(mapping(start.get("config")).get("run")).get("num_peers")) or 0
    losses, sent = ((), ()) if last is None else (last.loss, last.bytes_sent)
    count = min(max(len(losses), len(sent), planned), MAX_MEMBERS) if start else 0

    return tuple(
        PeerState(
            index=i,
            name=f"peer {i}",
            status="here",
            loss=losses[i] if i < len(losses) else None,
            bytes_sent=whole(sent[i]) if i < len(sent) else None,
        )
        for i in range(count)
    )


def _elapsed(rounds: Rounds, last: _Round | None, now: float, state: str) -> float | None:
    """Seconds the run's processes have worked, breaks between them left out."""
    if rounds.end_wall_s is not None:
        return rounds.end_wall_s
    began = number((rounds.start or {}).get("time"))
    known, since = (0.0, began) if last is None or last.wall_s is None else (last.wall_s, last.time)
    if since is None:
        return None
    return known + (max(0.0, now - since) if state == "running" else 0.0)


def _curves(rounds: Rounds) -> tuple[tuple[int, ...], tuple[float | None, ...], tuple[float | None, ...]]:
    logged = sorted(rounds.rounds.items())
    size = bin_size(len(logged), MAX_POINTS)
    if not logged:
        return (), (), ()

    def curve(pick: Callable[[_Round], float | None]) -> tuple[float | None, ...]:
        return tuple(downsample([pick(seen) for _, seen in logged], size))

    return (
        tuple(logged[i][0] for i in range(0, len(logged), size)),
        curve(lambda seen: mean(seen.loss)),
        curve(lambda seen: seen.consensus_distance),
    )


def _sentence(kind: str, event: Mapping[str, Any]) -> str:
    """An event as one line of text; its lists, and what is said elsewhere, left out."""
    told = {key: value for key, value in event.items() if isinstance(value, str | int | float)}
    words = [f"{key} {text(value, 200)}" for key, value in told.items() if key not in ("event", "time", "site")]
    return ", ".join([kind.replace("_", " "), *words])
