"""The lock of a run's folder: two processes in one would mix their events, checkpoints and connections.

The operating system lets go of it when the process ends, however it ends; so it tells whether the run lives.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from peertune.errors import CheckpointError
from peertune.storage import refusal

WAIT_S = 1.0
"""Seconds an attempt lasts: whoever looks whether the lock is held has it for a moment himself."""


class FolderLock:
    """DIR/lock, held while a process works on the run in DIR; it says which, and is gone after an orderly end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "lock"
        self._file: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take it; makes the folder. On a file system without locks the run goes on without one.

        Raises:
            CheckpointError: another process has it, or the folder cannot be written.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        end = time.monotonic() + WAIT_S
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try():
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"{self.folder}: {self._holder()} is at work on this run; wait until it has ended, or name"
                        " another folder with --out"
                    )
                time.sleep(0.02)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {refusal(error)}") from error

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)  # else other users could hold it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            pass  # no locks here
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(self.path)):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                self._file = file
                return True
        os.close(file)  # it was removed in between: that is no lock any more
        return False

    def _holder(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def release(self) -> None:
        """Let go of it, where it is held, and of the folder where nothing else was written."""
        if self._file is None:
            return
        with suppress(OSError):
            self.path.unlink()
            for path in self._made:
                path.rmdir()  # not where something is in it
        os.close(self._file)
        self._file = None


def is_held(folder: Path) -> bool | None:
    """Whether a process works on the run in a folder; None where the file system has no locks, or the file is another
    user's, who alone may ask for it.
    """
    try:
        file = os.open(folder / "lock", os.O_RDONLY)
    except PermissionError:
        return None
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False
