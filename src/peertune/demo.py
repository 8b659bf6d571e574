"""`peertune demo`: DECA between each peer alone and all data pooled, on text that is on every machine.

Everything it runs is an ordinary recipe, demo.toml; only the table is its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from peertune.algorithms import METHODS
from peertune.progress import Progress
from peertune.recipe import load_recipe
from peertune.run import run
from peertune.run_folder import RunFolder

RUNS = {"local": "each peer alone", "deca": "DECA", "pooled": "all data pooled"}


def demo(out: Path, bars: Callable[[str], AbstractContextManager[Progress]], overrides: Sequence[str] = ()) -> Table:
    """Run the three methods of `RUNS` and compare them.

    Args:
        out: folder; each method's run goes to a folder of its own in it.
        bars: makes a progress display from a label.
        overrides: `section.key=value` texts that change the recipe of all three.
    Returns:
        The table.
    Raises:
        CheckpointError: `out` holds a demo of another recipe. An unfinished one goes on, a finished one is shown again.
    """
    summaries: dict[str, dict[str, Any]] = {}
    with resources.as_file(resources.files("peertune") / "demo.toml") as recipe:
        configs = {
            name: load_recipe(
                recipe,
                [*overrides, f"algorithm.name={name}", f"run.out={json.dumps(str(out / name), ensure_ascii=False)}"],
                METHODS,
            )[0]
            for name in RUNS
        }
    folders = {name: RunFolder(Path(config.run.out)) for name, config in configs.items()}
    for name, config in configs.items():
        folders[name].check(config.to_dict(), resume=True)
    for name, config in configs.items():
        with bars(RUNS[name]) as progress:
            summaries[name] = run(config, resume=folders[name].holds_run, progress=progress)
    return comparison(summaries)


def comparison(summaries: dict[str, dict[str, Any]]) -> Table:
    """The demo's table, from the summaries of "local", "deca" and "pooled"."""
    before = summaries["deca"]["metrics"]["before"]["loss"]
    pooled = summaries["pooled"]["metrics"]["average_model"]["loss"]
    table = Table(title="held-out text of all eight peers (lower is better)")
    table.add_column("", no_wrap=True)
    for column in ("loss", "share of pooled's gain", "sent by a peer", "peak memory", "time"):
        table.add_column(column, justify="right")

    def row(label: str, metrics: dict[str, float], summary: dict[str, Any] | None, style: str = "") -> None:
        share = (before - metrics["loss"]) / (before - pooled)
        cost = ("", "", "")
        if summary is not None:
            sent = summary["bytes_sent_per_peer"]
            cost = (
                f"{sum(sent) / len(sent) / 1e6:.1f} MB",
                f"{summary['peak_memory_bytes'] / 1e6:.0f} MB",
                f"{summary['wall_s']:.0f} s",
            )
        table.add_row(label, f"{metrics['loss']:.3f}", f"{share:.0%}", *cost, style=style)

    row("before: the base as shipped", summaries["deca"]["metrics"]["before"], None)
    alone = sorted(summaries["local"]["metrics"]["peers"], key=lambda m: m["loss"])
    for label, metrics in (("a peer alone: the best", alone[0]), ("a peer alone: the worst", alone[-1])):
        row(label, metrics, summaries["local"])
    row("DECA: no data left its peer", summaries["deca"]["metrics"]["average_model"], summaries["deca"], "bold")
    row("the bound: all data pooled", summaries["pooled"]["metrics"]["average_model"], summaries["pooled"])
    table.caption = "memory is that of the whole simulation: all eight peers in one process"
    return table
