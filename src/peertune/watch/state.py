"""A run at one moment: what its logs have told so far, put together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peertune.logfields import MAX_MEMBERS, items, mapping, number, pair, text, whole
from peertune.report.events import Events, Round
from peertune.report.series import bin_size, downsample, mean
from peertune.watch.logs import Links

MAX_POINTS = 300
"""Points of a curve at most; more rounds are averaged over bins."""
RECENT_ROUNDS = 32
"""Rounds from which the time of the next ones is foretold."""
SILENT_S = 60.0
"""Without a lock to look at, a run that has written nothing for so long, and for five rounds, is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class PeerState:
    """One neighbour of this site; one peer of a simulation. None: not known."""

    index: int | None
    name: str
    status: str
    """Of a neighbour "connected", "missing", "left" in good order, "finished", "ejected", or "offline": this site's own
    process has ended; of a peer "here"."""
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
    """Why a neighbour was last refused, refuses this site or cannot be reached; empty once it is connected."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment. Times are Unix seconds; None: not known."""

    now: float
    state: str
    """"empty", "starting", "running", "stopped" (unfinished, and no process is at work on it) or "finished"."""
    site: str
    """This site's name; empty for a simulation."""
    is_site: bool
    is_ejected: bool
    """Whether the others put this site out."""
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


def snapshot(events: Events, links: Links, now: float, alive: bool | None, finished: bool) -> Snapshot:
    """The run at this moment.

    Args:
        now: Unix seconds.
        alive: whether a process works on it; None: cannot be told.
        finished: whether its summary is written.
    """
    newest = max(events.rounds, default=-1)
    start, last = events.start or {}, events.rounds.get(newest)
    planned = whole(start.get("rounds"))
    done = max(events.reached, newest + 1, links.round or 0)
    done = done if planned is None else min(done, planned)
    last_line = max((t for t in (events.last_line, links.last_line) if t is not None), default=None)
    pace = _seconds_a_round(events)
    is_site = links.started is not None or bool(links.links)
    if finished:
        state = "finished"
    elif last_line is None and not alive:
        state = "empty"
    elif alive is False or (alive is None and now - (last_line or now) > max(SILENT_S, 5 * (pace or 0.0))):
        state = "stopped"
    else:
        state = "running" if events.start is not None or done else "starting"  # its log may have been cut
    peers = _neighbors(links, done, state) if is_site else _simulated(start, last)
    config = mapping(start.get("config"))
    curves = _curves(events)
    sent = [peer.bytes_sent for peer in peers if peer.bytes_sent is not None]
    return Snapshot(
        now=now,
        state=state,
        site=links.name_of(links.site),
        is_site=is_site,
        is_ejected=links.is_ejected,
        method=text(mapping(config.get("algorithm")).get("name")),
        rounds_done=planned if finished and planned is not None else done,
        rounds_planned=planned,
        loss=None if last is None else mean(last.loss),
        consensus_distance=None if last is None else last.consensus_distance,
        bytes_sent=sum(sent) if sent else None,
        elapsed_s=_elapsed(events, last, now, state),
        left_s=pace * (planned - done) if pace is not None and planned is not None and state == "running" else None,
        checkpoint_round=events.checkpoint[0] if events.checkpoint else None,
        checkpoint_time=events.checkpoint[1] if events.checkpoint else None,
        last_line=last_line,
        waiting_for=tuple(links.waiting) if state == "running" else (),
        missing=tuple(peer.name for peer in peers if peer.status == "missing"),
        peers=peers,
        edges=tuple(e for e in map(pair, items(start.get("edges"))) if e is not None),
        hub=whole(start.get("hub")),
        curve_rounds=curves[0],
        curve_loss=curves[1],
        curve_consensus=curves[2],
        recent=tuple(links.recent),
        unreadable=events.unreadable + links.unreadable,
    )


def _neighbors(links: Links, done: int, state: str) -> tuple[PeerState, ...]:
    found = []
    for name, link in links.links.items():
        gone = link.farewell or "missing"
        status = "ejected" if link.is_ejected else "connected" if link.connected else gone
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


def _simulated(start: Mapping[str, Any], last: Round | None) -> tuple[PeerState, ...]:
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


def _elapsed(events: Events, last: Round | None, now: float, state: str) -> float | None:
    """Seconds the run's processes have worked, breaks between them left out."""
    ended = number((events.end or {}).get("wall_s"))
    if ended is not None:
        return ended
    began = number((events.start or {}).get("time"))
    known, since = (0.0, began) if last is None or last.wall_s is None else (last.wall_s, last.time)
    if since is None:
        return None
    return known + (max(0.0, now - since) if state == "running" else 0.0)


def _seconds_a_round(events: Events) -> float | None:
    """Mean over the last rounds; without the first, which waits for the neighbours, where there is another."""
    timed = [(r, seen.wall_s) for r, seen in sorted(events.rounds.items()) if seen.wall_s is not None]
    recent = [*([(-1, 0.0)] if len(timed) < 2 else []), *timed][-RECENT_ROUNDS - 1 :]
    (first, began), (last, ended) = recent[0], recent[-1]
    return (ended - began) / (last - first) if last > first and ended >= began else None


def _curves(events: Events) -> tuple[tuple[int, ...], tuple[float | None, ...], tuple[float | None, ...]]:
    logged = sorted(events.rounds.items())
    size = bin_size(len(logged), MAX_POINTS)
    if not logged:
        return (), (), ()

    def curve(pick: Callable[[Round], float | None]) -> tuple[float | None, ...]:
        return tuple(downsample([pick(seen) for _, seen in logged], size))

    return (
        tuple(logged[i][0] for i in range(0, len(logged), size)),
        curve(lambda seen: mean(seen.loss)),
        curve(lambda seen: seen.consensus_distance),
    )
