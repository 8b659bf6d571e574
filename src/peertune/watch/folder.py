"""A run's folder, followed while it grows: the lines of its two logs, as they are written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from peertune.errors import CheckpointError
from peertune.lock import is_held
from peertune.watch.logs import Links, Rounds
from peertune.watch.state import Snapshot, snapshot

CHUNK = 1 << 20
MAX_LINE = 1 << 26
"""Bytes of a line at most; a longer one is none of ours."""


class Tail:
    """The whole lines of a file that is added to, cut, replaced or not there yet.

    Args:
        path: the file.
        anew: told that the file was cut or replaced, and is read from its beginning.
        line: told each whole line.
    """

    def __init__(self, path: Path, anew: Callable[[], None], line: Callable[[bytes], None]) -> None:
        self.path, self._anew, self._line = path, anew, line
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
                self._line(line)
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
        self._anew()
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
        self._rounds, self._links = Rounds(), Links()
        self._tails = (
            Tail(path / "events.jsonl", self._new_rounds, lambda line: self._rounds.add(line)),
            Tail(path / "audit.jsonl", self._new_links, lambda line: self._links.add(line)),
        )
        self._alive: bool | None = False
        self._finished = False

    def _new_rounds(self) -> None:
        self._rounds = Rounds()

    def _new_links(self) -> None:
        self._links = Links()

    def poll(self) -> bool:
        """Read what is new. Returns whether anything changed.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        # The lock first: a run that ends between the two looks has written its last line before it lets go.
        alive = is_held(self.path)
        try:
            grown = [tail.poll() for tail in self._tails]
            finished = (self.path / "summary.json").exists()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; expected a run's folder") from error
        # Without a lock its life is judged by how long it has been silent, which changes by itself.
        changed = any(grown) or alive is None or (alive, finished) != (self._alive, self._finished)
        self._alive, self._finished = alive, finished
        return changed

    def snapshot(self) -> Snapshot:
        """The run as of the last `poll`."""
        return snapshot(self._rounds, self._links, time.time(), self._alive, self._finished)

    def close(self) -> None:
        for tail in self._tails:
            tail.close()


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
