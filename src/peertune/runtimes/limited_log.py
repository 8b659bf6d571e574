"""A log that a member cannot fill: of what its connections cause, so many lines at once, then one now and then.

What a message causes (`sent`, `fetched`, `arrived`) is not limited: it is the account of what left the site and came.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

CAUSED_BY_CONNECTIONS = {
    "connected", "disconnected", "failed", "probed", "refused", "refused_by", "runs_twice", "stalled", "stranger",
    "turned_away", "unreachable",
}  # fmt: skip
BURST = 100
"""Lines of one member's that may come at once."""
REFILL_S = 10.0
"""Seconds after which one more may."""


@dataclass
class Allowance:
    """What one member's connections may still write."""

    since: float
    lines: float = BURST
    suppressed: int = 0


@dataclass
class LimitedLog:
    """Passes lines on to `log`; of a line that follows others that were left out, `suppressed` says how many.

    Args:
        clock: seconds; never goes back.
    """

    log: Callable[..., None]
    clock: Callable[[], float] = time.monotonic
    _allowed: dict[str, Allowance] = field(default_factory=dict)

    def __call__(self, event: str, **about: object) -> None:
        if event not in CAUSED_BY_CONNECTIONS:
            self.log(event, **about)
            return
        now = self.clock()
        who = "" if event == "stranger" else str(about.get("peer", ""))  # a stranger has a new address each time
        allowed = self._allowed.setdefault(who, Allowance(now))
        allowed.lines = min(BURST, allowed.lines + (now - allowed.since) / REFILL_S)
        allowed.since = now
        if allowed.lines < 1:
            allowed.suppressed += 1
            return
        more = {"suppressed": allowed.suppressed} if allowed.suppressed else {}
        allowed.lines, allowed.suppressed = allowed.lines - 1, 0
        self.log(event, **about, **more)
