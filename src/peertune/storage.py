"""Small files on a disk that may be full, or go away in the middle of a write; and whether a folder can be written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peertune.errors import CheckpointError, StorageError


def write_atomically(path: Path, text: str) -> None:
    """Write a file aside, sync it and rename it into place: it is whole or as it was. Raises OSError."""
    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)  # a link, in a folder that somebody sent, would lead to another file
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; what a full disk left of the one before stays on a line of its own. Raises OSError."""
    with path.open("ab+") as file:
        is_whole = True
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            is_whole = file.read(1) == b"\n"
        file.write(f"{'' if is_whole else chr(10)}{line}\n".encode())


def refusal(error: Exception) -> str:
    """Why a disk refused a write, and what to do about it."""
    reason = str(getattr(error, "strerror", None) or error)
    is_full = "space" in reason or "quota" in reason
    mend = "free some space" if is_full else "see to that disk, and that this user may write there"
    return f"{reason}; {mend}; a run that stopped goes on with the same command (`peertune run`: with --resume)"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Context in which an operating-system error means that the disk refused a write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot write: {refusal(error)}") from error


def share_weights(folder: Path, like: Path) -> None:
    """Let those read a folder's weights who may read the file beside them, `like`, whose mode the umask gave it.

    safetensors makes its files for their owner alone, whatever the umask says. One that a checkpoint shares may be
    another user's, and stays as he made it. Raises OSError.
    """
    mode = stat.S_IMODE(like.stat().st_mode)
    for weights in folder.glob("*.safetensors"):
        if weights.stat().st_uid == like.stat().st_uid:
            weights.chmod(mode)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_writable(path: Path, key: str) -> None:
    """Refuse a folder that lies under a file or cannot be written. Raises CheckpointError, naming the key."""
    place = nearest_existing(path)
    if not place.is_dir():
        raise CheckpointError(f"{key}: got {str(path)!r}, but {place} is a file; name a folder")
    if not os.access(place, os.W_OK):
        raise CheckpointError(f"{key}: got {str(path)!r}, but {place} is not writable; name another folder")
