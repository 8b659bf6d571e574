"""The page put together: one file with its style and script inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from peertune.errors import StorageError
from peertune.report import results, setup
from peertune.report.events import Run, read_run

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
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    path, draft = run_dir / "report.html", run_dir / "report.html.tmp"
    try:
        # Whoever has the page open never reloads half of it.
        draft.write_text(page, encoding="utf-8", newline="\n")
        os.replace(draft, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or check the folder") from None
    return path


def render(run: Run) -> str:
    """The page as a string: a pure function of the run."""
    links = "".join(f'<a href="#{id}">{name}</a>' for id, name in SECTIONS.items())
    body = [
        results.header(run),
        f"<nav>{links}</nav>",
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


def document(title: str, body: str, extra_style: str = "") -> str:
    """A whole page with the report's style and script inside.

    Args:
        title, body: HTML.
        extra_style: CSS that comes after the report's own.
    """
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8") + extra_style
    script = (here / "report.js").read_text(encoding="utf-8")
    # The policy forbids every load, and every script but ours: a second lock behind the escaping.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>\n{style}</style></head>\n<body><main>\n"
        + body
        + '\n</main><div id="tip" hidden></div>\n'
        f"<script>{script}</script></body></html>\n"
    )
