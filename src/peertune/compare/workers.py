"""One cell of a comparison carried out, here or, several at a time, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from peertune import run as runs
from peertune.compare.cells import Summary
from peertune.config import RunConfig
from peertune.errors import DivergedError, PeerLostError, PeertuneError
from peertune.formatting import duration, plural
from peertune.progress import Progress
from peertune.run_folder import RunFolder
from peertune.storage import storage_errors

_DIVERGED = "diverged.txt"


def diverged(folder: Path) -> bool:
    """Whether a run was given up because it diverged."""
    return (folder / _DIVERGED).exists()


def carry_out(config: RunConfig, base: Path, progress: Progress | None = None) -> Summary | None:
    """One run, begun or gone on with; None where it diverged, which its folder then says."""
    folder = RunFolder(Path(config.run.out))
    try:
        summary = runs.run(config, base=base, resume=folder.holds_run, progress=progress)
    except DivergedError as error:
        summary = None
        with storage_errors(folder.path):
            (folder.path / _DIVERGED).write_text(f"{error}\n", encoding="utf-8")
    # A grid's checkpoints would fill a disk; a finished run needs none, and one that diverged would do so again.
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return summary


def play_ahead(
    cells: Sequence[tuple[RunConfig, str]],
    base: Path,
    workers: int,
    note: Callable[[str], None],
) -> None:
    """Carry out the cells that are not finished, each in a fresh process, so that none inherits another's memory.

    Args:
        cells: recipes with their labels.
        workers: processes at a time.
        note: told how many are to be done, and of each that is, with the time that the rest may take.
    Raises:
        PeertuneError: a cell's; cells not begun are left.
        PeerLostError: a cell's process was killed.
    """
    todo = []
    for config, label in cells:
        folder = RunFolder(Path(config.run.out))
        if not folder.summary.exists() and not diverged(folder.path):
            todo.append((config, label))
    if todo:
        note(f"{plural(len(todo), 'run')} to be done, {min(workers, len(todo))} at a time")
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _end_with_parent, max_tasks_per_child=1) as pool:
        futures = {pool.submit(carry_out, config, base): label for config, label in todo}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                try:
                    outcome = "diverged" if future.result() is None else "done"
                except PeertuneError:
                    note(f"{futures[future]}: failed")
                    raise
                left_s = (time.monotonic() - began) / number * (len(todo) - number)
                left = f", about {duration(left_s)} left" if left_s else ""
                note(f"{futures[future]}: {outcome} ({number} of {len(todo)}{left})")
        except BrokenProcessPool:
            raise PeerLostError(
                f"--workers: the process of a cell was killed, as by the system where memory ran out with {workers} at"
                " a time; the same command goes on, and with fewer --workers it needs less"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Let this process die when the one that started it is killed: its cell goes on from its checkpoint next time."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
