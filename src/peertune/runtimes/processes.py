"""Which process with a neighbour's key is the neighbour: not one that was started beside another. Pure: no network."""

from __future__ import annotations

MAX_PROCESSES = 64
"""So many, the newest, are remembered."""


class Processes:
    """The processes that a neighbour was, by the `boot` that each of them tells.

    One that was restarted never comes back; of two that run at a time each comes back after the other.
    """

    def __init__(self) -> None:
        self._returns: dict[bytes, int] = {}
        """How often each came back after another one."""
        self._seconds: list[bytes] = []
        """Those that were started beside one that is still there."""

    def is_second(self, boot: bytes) -> bool:
        """Whether a process was started beside one that is still there."""
        return boot in self._seconds

    def take_over(self, boot: bytes, from_boot: bytes) -> bool:
        """A process takes another's place. Returns whether the other turns out to be a second one."""
        self._returns[boot] = returns = self._returns.get(boot, -1) + 1
        while len(self._returns) > MAX_PROCESSES:
            del self._returns[next(iter(self._returns))]
        if returns < 2:  # once may be a connection that was long under way
            return False
        self._seconds = [*self._seconds, from_boot][-MAX_PROCESSES:]
        return True
