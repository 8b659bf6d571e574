"""What people ask of a site while it runs, by files that it looks for: that it leaves, that a member is ejected."""

from __future__ import annotations

import time
from pathlib import Path

from peertune.charter import Charter
from peertune.ejection import Ejection, ejected

LOOK_S = 1.0
"""Seconds between two looks."""


class Requests:
    """The files of one site.

    Args:
        charter: signed by all.
        path: where it lies; ejections lie beside it.
        leave: a file; once it is there, the site is to leave.
    """

    def __init__(self, charter: Charter, path: Path, leave: Path) -> None:
        self.charter, self.path, self.leave = charter, path, leave
        self._ejected: set[int] = set()
        self._looked = float("-inf")

    @property
    def is_leaving(self) -> bool:
        return self.leave.exists()

    def ejections(self) -> dict[int, Ejection]:
        """Those that hold since the last call, by the member's place; looks no oftener than LOOK_S."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return {}
        self._looked = now
        new = {i: ejection for i, ejection in ejected(self.path, self.charter).items() if i not in self._ejected}
        self._ejected |= new.keys()
        return new
