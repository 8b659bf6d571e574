"""A run's page: its sections in order, written beside its events."""

from __future__ import annotations

from pathlib import Path

from peertune.errors import StorageError
from peertune.report import results, setup
from peertune.report.events import RunRecord, read_run
from peertune.report.html import document, navigation
from peertune.storage import write_atomically

SECTIONS = {
    "loss": "Loss",
    "heldout": "Held-out",
    "consensus": "Consensus",
    "traffic": "Traffic",
    "graph": "Graph",
    "data": "Data",
    "blocks": "Blocks",
    "recipe": "Recipe",
    "notes": "Notes",
}
"""Id of each section and its name in the navigation, in order."""


def write_report(run_dir: Path) -> Path:
    """Write DIR/report.html from DIR/events.jsonl and, once the run has ended, DIR/summary.json.

    Args:
        run_dir: folder of a run, finished or in progress.
    Returns:
        Path of the page.
    Raises:
        CheckpointError: the folder holds no run.
        StorageError: the page cannot be written.
    """
    page, path = render(read_run(run_dir)), run_dir / "report.html"
    try:
        write_atomically(path, page)  # whoever has the page open never reloads half of it
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or check the folder") from None
    return path


def render(run: RunRecord) -> str:
    """The page as a string: a pure function of the run."""
    body = [
        results.header(run),
        navigation(SECTIONS),
        results.headline(run),
        results.loss(run),
        results.heldout(run),
        results.consensus(run),
        results.sent(run),
        setup.graph(run),
        setup.data(run),
        setup.blocks(run),
        setup.recipe(run),
        setup.notes(run),
    ]
    return document(f"{results.title(run)} · peertune", "\n".join(body))
