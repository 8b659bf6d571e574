"""Whom a run tells how it goes on."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how a run goes on. The command line draws bars; tests listen."""

    def note(self, message: str) -> None:
        """A sentence for the user."""

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        """`done` of `total` rounds are over; mean training loss of the last."""


class Silent:
    """A `Progress` that says nothing."""

    def note(self, message: str) -> None: ...

    def rounds(self, done: int, total: int, loss: float | None) -> None: ...
