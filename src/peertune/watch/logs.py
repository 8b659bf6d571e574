"""What the lines of a site's audit.jsonl tell of it and its neighbours, taken in one by one. No file, no clock.

Lines are taken as they come: what cannot be read, or has another type than expected, is left out and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peertune.logfields import MAX_MEMBERS, MAX_NAMES, Log, items, number, sentence, text, whole

QUORUM = "the quorum"
"""What a paused run waits for."""
RECENT_ARRIVALS = 8
"""Messages over which a neighbour's throughput is averaged."""


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
    farewell: str = ""
    """The last it said: "left", until it is back, or "finished"."""


class Links(Log):
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
        self._told = ("", "")
        self.started: float | None = None
        self.is_ejected = False
        """Whether the others put this site out."""

    def _take(self, kind: str, event: Mapping[str, Any], round: int | None, time: float | None) -> None:
        name, time = text(event.get("peer")), time or 0.0
        if kind == "started":
            self._started(event, time)
        elif kind in ("connected", "disconnected") and name:
            link = self._link(name)
            link.connected, link.since = kind == "connected", time
            if link.connected:
                link.heard, link.refusal = time, ""
                link.farewell = "" if link.farewell == "left" else link.farewell
                self.waiting.pop(name, None)
        elif kind in ("left", "finished") and name:
            self._link(name).farewell = kind
            self.waiting.pop(name, None)
        elif kind == "unreachable" and name:
            self._link(name).refusal = f"cannot be reached: {text(event.get('reason'), 300)}"
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
            if name == self.name_of(self.site):
                self.is_ejected = True
            else:
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
            if kind in ("late", "was_missed") and (kind, name) == self._told:
                self.recent.pop()  # one a round, of a long absence: the newest says enough
            self._told = (kind, name)
            self.recent.append((time, sentence(kind, event)))

    def _started(self, event: Mapping[str, Any], time: float) -> None:
        self.members = [text(name) for name in items(event.get("members"))[:MAX_MEMBERS]]
        self.site = whole(event.get("site"))
        self.started, self.round = time, None
        self.waiting.clear()
        connected = {self.name_of(whole(index)) for index in items(event.get("connected"))}
        for name in filter(None, (self.name_of(whole(index)) for index in items(event.get("neighbors")))):
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

    def name_of(self, index: int | None) -> str:
        """A member's name; empty where there is none of that index."""
        return self.members[index] if index is not None and index < len(self.members) else ""
