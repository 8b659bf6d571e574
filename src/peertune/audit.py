"""A site's audit log: what was made ready for whom, when it was fetched, what came, and who was missing.

Nothing in it decides how the run goes on: people and `watch` read it, and the summary's `contributions` are made of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peertune.errors import StorageError
from peertune.logfields import MAX_NAMES, items, number, parse_line, text, whole
from peertune.storage import append_line, storage_errors

AUDIT = "audit.jsonl"


class AuditLog:
    """DIR/audit.jsonl, one line an event; on a disk that may be full: a gap is told when it begins, and when it ends.

    Args:
        note: told of both in words; the log itself has a line `gap` where lines are `lost`.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path, self._note = path, note
        self._lock = threading.Lock()
        self._lost = 0

    def contributions(self, num_rounds: int) -> list[dict[str, Any]]:
        """What came from each neighbour (see `contributions` below); nothing where the log cannot be read."""
        try:
            with self.path.open("rb") as file:
                return contributions(file, num_rounds)
        except OSError:
            return []

    def __call__(self, event: str, **fields: Any) -> None:
        said = ""
        with self._lock:
            try:
                if self._lost:
                    self._append("gap", lost=self._lost)
                    said = f"the audit log goes on; {self._lost} of its lines are lost"
                    self._lost = 0
                self._append(event, **fields)
            except StorageError as error:
                self._lost += 1
                said = f"the audit log has a gap: {error}" if self._lost == 1 else ""
        if said:
            self._note(said)

    def _append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, line)


class Repeats:
    """What is said of a round, and was said of the round before too: a long absence is told once."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}

    def is_one(self, event: str, fields: Mapping[str, Any]) -> bool:
        who, at = str(fields.get("peers", fields.get("peer"))), fields.get("round")
        if event not in ("left_out", "was_missed", "late") or not isinstance(at, int):
            return False
        before, self._last[event, who] = self._last.get((event, who)), at
        return before is not None and before <= at <= before + 1


@dataclass
class Contribution:
    """What came from one neighbour; the key of a message begins with its round."""

    in_time: set[tuple[int, int]] = field(default_factory=set)
    late: set[tuple[int, int]] = field(default_factory=set)
    """Those that came after their round had gone on without them, also where nobody asked any more what to do."""
    used: set[tuple[int, float]] = field(default_factory=set)
    """(round, amount) of the late ones that were used."""
    left_out: defaultdict[int, set[str]] = field(default_factory=partial(defaultdict, set))
    """By round, the hops that went without it."""

    def came(self, key: tuple[int, int]) -> None:
        (self.late if key[0] in self.left_out else self.in_time).add(key)

    def forget(self, round: int) -> None:
        """Drop what is done over again from a round on."""
        self.in_time = {key for key in self.in_time if key[0] < round}
        self.late = {key for key in self.late if key[0] < round}
        self.used = {key for key in self.used if key[0] < round}
        for key in [key for key in self.left_out if key >= round]:
            del self.left_out[key]

    def counts(self) -> dict[str, int]:
        return {
            "in_time": len(self.in_time),
            "late_used": len(self.used),
            "late_unused": max(0, len(self.late) - len(self.used)),
            "missed": max(0, sum(map(len, self.left_out.values())) - len(self.late)),
        }


def contributions(lines: Iterable[bytes], num_rounds: int) -> list[dict[str, Any]]:
    """What came from each neighbour of a site in the rounds of a run, as far as its audit log holds it.

    Args:
        lines: of audit.jsonl. Rounds that a restarted process did over again count once.
        num_rounds: messages of the final agreement, which comes after them, are left out.
    Returns:
        By neighbour: `neighbor`, its name; messages `in_time`, `late_used` and `late_unused` (docs/consortium.md), and
        `missed`, those that never came.
    """
    found: dict[str, Contribution] = {}
    is_new = False
    for event in filter(None, map(parse_line, lines)):
        kind, name, round = text(event.get("event")), text(event.get("peer")), whole(event.get("round"))
        if kind == "started":
            is_new, members = True, items(event.get("members"))
            for place in map(whole, items(event.get("neighbors"))):
                if place is not None and place < len(members):
                    found.setdefault(text(members[place]), Contribution())
        if kind not in ("sent", "arrived", "late", "left_out") or round is None or event.get("hop") == "state":
            continue
        if is_new:  # the first round of a process: the one before went on from there for nothing
            is_new = False
            for each in found.values():
                each.forget(round)
        if round >= num_rounds:
            continue
        if kind == "left_out":
            for other in text(event.get("peers"), MAX_NAMES).split(", "):
                if other in found:
                    found[other].left_out[round].add(text(event.get("hop")))
        elif name in found and kind == "arrived":
            found[name].came((round, whole(event.get("hop")) or 0))
        elif name in found and kind == "late" and event.get("used") is True:
            found[name].used.add((round, number(event.get("amount")) or 0.0))
    return [{"neighbor": name, **each.counts()} for name, each in found.items()]
