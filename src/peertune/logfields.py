"""Reading what anybody may have written, lines of a run's logs above all: what has another type than expected becomes
nothing, never an error."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 1e100
"""Beyond it a number is nothing that was measured, and what is worked out from it may be no float any more."""
MAX_MEMBERS = 4096
MAX_NAMES = 1 << 16
"""Letters of a list of names at most."""
SENTENCES = {
    "asked": "asked {peer} for its weights",
    "connected": "connected to {peer}",
    "disconnected": "no longer connected to {peer}",
    "ejected": "{peer} is ejected: signed by {signed_by}",
    "finished": "{peer} has finished the run",
    "joined": "took a neighbour's weights, goes on with round {round}",
    "late": "a message of {peer} for round {round} came late",
    "left": "{peer} has left in good order",
    "left_out": "round {round} goes on without {peers}",
    "paused": "waits for the quorum of {quorum}; here: {present}",
    "refused": "refused what {peer} sent: {reason}",
    "refused_by": "{peer} refuses this site: {reason}",
    "resumed": "the quorum is here again: {present}",
    "stalled": "nothing from {peer} for {seconds} s: the connection is given up and dialled anew",
    "stranger": "somebody connected from {peer}, but {reason}",
    "unreachable": "{peer} cannot be reached: {reason}",
    "waiting": "waits for {peer}, round {round}",
    "was_missed": "{peer} made round {round} without this site",
}
"""What the lines of an audit.jsonl say in words; what else a line holds is put behind."""
_FIELD = re.compile(r"\{(\w+)\}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def parse_line(line: bytes) -> Mapping[str, Any] | None:
    """An event; empty where the line is JSON, but no object; None where it is not JSON."""
    try:
        return mapping(json.loads(line))
    except (ValueError, RecursionError):
        return None


class Log(ABC):
    """What the lines of one file add up to, taken in one by one, as far as they can be read. No file, no clock."""

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


def printable(shown: str) -> str:
    """A line as it may be shown in a terminal: without control characters, which could write to other lines."""
    return _UNPRINTABLE.sub("\ufffd", shown)


def text(value: object, limit: int = 80) -> str:
    """A string as it may be shown in a terminal: cut, and `printable`."""
    shown = printable(str(value)) if isinstance(value, str | int | float) else ""
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def sentence(kind: str, fields: Mapping[str, Any]) -> str:
    """A line of an audit log in words; its lists, and what is said elsewhere, left out."""
    words = {
        key: _word(value)
        for key, value in fields.items()
        if isinstance(value, str | int | float) and key not in ("event", "time", "site")
    }
    known = SENTENCES.get(kind, "")
    said = set(_FIELD.findall(known))
    if not known or not said <= words.keys():
        known, said = kind.replace("_", " "), set()
    rest = [f"{key}: {word}" for key, word in words.items() if key not in said]
    return ", ".join([_FIELD.sub(lambda field: words[field[1]], known), *rest])


def _word(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else text(value, 200)


def number(value: object) -> float | None:
    """A number of at most `LARGEST`, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST <= value <= LARGEST else None  # false of NaN


def whole(value: object) -> int | None:
    """A number from 0 on, without its fraction, or None."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else None


def pair(value: object) -> tuple[int, int] | None:
    """The places of two members, the lower one first, or None."""
    one, other = map(whole, value) if isinstance(value, list) and len(value) == 2 else (None, None)
    if one is None or other is None or one == other or max(one, other) >= MAX_MEMBERS:
        return None
    return min(one, other), max(one, other)


def items(value: object) -> Sequence[Any]:
    """A list, or an empty one."""
    return value if isinstance(value, list) else ()


def mapping(value: object) -> Mapping[str, Any]:
    """An object, or an empty one."""
    return value if isinstance(value, dict) else {}
