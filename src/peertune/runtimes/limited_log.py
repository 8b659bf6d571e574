"""A log that a member cannot fill: of what its connections cause, so many lines at once, then one now and then.

A refusal for the reason of the last one, numbers aside, is written down once, and then now and then with how often it
was `repeated`: a broken GPU sends NaN every round.

What a message causes (`sent`, `fetched`, `arrived`) is not limited: it is the account of what left the site and came.
But that one is fetched `again` is: a member can have that as often as it opens a stream.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CAUSED_BY_CONNECTIONS = {
    "connected", "disconnected", "failed", "finished", "left", "probed", "refused", "refused_by", "runs_twice",
    "stalled", "stranger", "turned_away", "unreachable",
}  # fmt: skip
BURST = 100
"""Lines of one member's that may come at once."""
REFILL_S = 10.0
"""Seconds after which one more may."""
REFUSALS = {"refused", "refused_by"}
REPEAT_S = 600.0
"""Seconds after which a refusal is written down again though its reason is the last one's."""


@dataclass
class Allowance:
    """What one member's connections may still write."""

    since: float
    lines: float = BURST
    suppressed: int = 0


@dataclass
class Refusal:
    """The newest kind of refusal of one member's."""

    kind: str
    written: float
    repeated: int = 0


@dataclass
class LimitedLog:
    """Passes lines on to `log`; of a line that follows others that were left out, `suppressed` says how many.

    Args:
        clock: seconds; never goes back.
    """

    log: Callable[..., None]
    clock: Callable[[], float] = time.monotonic
    _allowed: dict[str, Allowance] = field(default_factory=dict)
    _refusals: dict[tuple[str, str], Refusal] = field(default_factory=dict)
    """(event, member) -> the last one."""

    def __call__(self, event: str, **about: object) -> None:
        if event not in CAUSED_BY_CONNECTIONS and not about.get("again"):
            self.log(event, **about)
            return
        now = self.clock()
        who = "" if event == "stranger" else str(about.get("peer", ""))  # a stranger has a new address each time
        if event in REFUSALS:
            kind = re.sub(r"\d+", "", str(about.get("reason", "")))
            last = self._refusals.get((event, who))
            if last is not None and last.kind == kind:
                if now - last.written < REPEAT_S:
                    last.repeated += 1
                    return
                about |= {"repeated": last.repeated} if last.repeated else {}
            self._refusals[event, who] = Refusal(kind, now)
        allowed = self._allowed.setdefault(who, Allowance(now))
        allowed.lines = min(BURST, allowed.lines + (now - allowed.since) / REFILL_S)
        allowed.since = now
        if allowed.lines < 1:
            allowed.suppressed += 1
            return
        more = {"suppressed": allowed.suppressed} if allowed.suppressed else {}
        allowed.lines, allowed.suppressed = allowed.lines - 1, 0
        self.log(event, **about, **more)
