"""A run's folder, followed while it grows: the lines of its two logs, as they are written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from peertune.errors import CheckpointError
from peertune.lock import is_held
from peertune.logfields import Log
from peertune.report.events import Events
from peertune.watch.logs import Links
from peertune.watch.state import Snapshot, snapshot

L = TypeVar("L", bound=Log)
CHUNK = 1 << 20
MAX_LINE = 1 << 26
"""Bytes of a line at most; a longer one is none of ours."""


class Tail(Generic[L]):
    """The whole lines of a file that is added to, cut, replaced or not there yet.

    Args:
        path: the file.
        make: makes the log that takes the lines in, anew where the file was cut or replaced.
    """

    def __init__(self, path: Path, make: Callable[[], L]) -> None:
        self.path, self._make = path, make
        self.log = make()
        self._file: BinaryIO | None = None
        self._half = b""

    def poll(self) -> bool:
        """Read what is new. Returns whether anything changed."""
        changed = self._reopen()
        if self._file is None:
            return changed
        while data := self._file.read(CHUNK):
            *lines, self._half = (self._half + data).split(b"\n")
            for line in filter(bytes.strip, lines):
                changed = True
                self.log.add(line)
            if len(self._half) > MAX_LINE:
                self._half = b""
        return changed

    def _reopen(self) -> bool:
        """Open the file where it is new. Open all the time: so no other can have its number."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return self._forget()
        if self._file is not None:
            known = os.fstat(self._file.fileno())
            if os.path.samestat(known, there) and known.st_size >= self._file.tell():
                return False
        changed = self._forget()
        self._file = self.path.open("rb")
        return changed

    def _forget(self) -> bool:
        if self._file is None:
            return False
        self.close()
        self.log = self._make()
        return True

    def close(self) -> None:
        """Close the file; the next `poll` reads it from its beginning."""
        if self._file is not None:
            self._file.close()
        self._file, self._half = None, b""


class RunWatch:
    """What a folder tells of its run, now and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events, self._audit = Tail(path / "events.jsonl", Events), Tail(path / "audit.jsonl", Links)
        self._alive: bool | None = False
        self._finished = False

    def poll(self) -> bool:
        """Read what is new. Returns whether anything changed.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        # The lock first: a run that ends between the two looks has written its last line before it lets go.
        alive = is_held(self.path)
        try:
            grown = [self._events.poll(), self._audit.poll()]
            finished = (self.path / "summary.json").exists()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; expected a run's folder") from error
        # Without a lock its life is judged by how long it has been silent, which changes by itself.
        changed = any(grown) or alive is None or (alive, finished) != (self._alive, self._finished)
        self._alive, self._finished = alive, finished
        return changed

    def snapshot(self) -> Snapshot:
        """The run as of the last `poll`."""
        return snapshot(self._events.log, self._audit.log, time.time(), self._alive, self._finished)

    def close(self) -> None:
        self._events.close()
        self._audit.close()


def read_state(path: Path) -> Snapshot:
    """The run in a folder, at this moment.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    watch = RunWatch(path)
    try:
        watch.poll()
        state = watch.snapshot()
    finally:
        watch.close()
    if state.state == "empty":
        raise CheckpointError(
            f"{path}: got no run; expected a folder that `peertune join` or `peertune run` works in (--out)"
        )
    return state
