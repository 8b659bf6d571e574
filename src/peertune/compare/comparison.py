"""`peertune compare`: the grid carried out, and what came out of it written as CSV, Markdown, JSON and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peertune.compare import page, table
from peertune.compare.cells import Cell, DivergedCell
from peertune.compare.contestants import read_contestants
from peertune.compare.grid import Grid, GridProgress, Tuned
from peertune.compare.options import Options
from peertune.compare.stats import Pair, pairs
from peertune.errors import DivergedError
from peertune.storage import storage_errors


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison."""

    rows: list[table.Row]
    pairs: list[Pair]
    tuned: list[Tuned]
    verdicts: list[str]
    """Sentences: which differences are larger than the seed noise, and where a grid's edge was chosen."""
    files: dict[str, Path]
    """Kind -> what was written: "table", "cells", "markdown", "json", "page"."""


def compare(options: Options, progress: GridProgress) -> Comparison:
    """Run what is not finished yet, and write the tables and the page.

    Raises:
        InputError: something given cannot be used; nothing was trained.
        RunError: a cell had to stop; the same call goes on from its last checkpoint. One that diverges is marked, and
            is an error only where no cell is left.
    """
    lineup = read_contestants(options)
    grid = Grid(lineup, options, progress)
    for note in lineup.notes:
        progress.note(note)
    tuned = grid.tune()
    cells = grid.play(tuned)
    return write(options, cells, tuned, grid.version_notes)


def write(
    options: Options, cells: list[Cell | DivergedCell], tuned: list[Tuned], notes: Sequence[str] = ()
) -> Comparison:
    """Tables, sentences and the page of finished cells. Raises DivergedError where there is none.

    Args:
        notes: further sentences.
    """
    by_name: dict[str, list[Cell]] = {cell.contestant: [] for cell in cells}
    lost: dict[str, list[int]] = {cell.contestant: [] for cell in cells}
    for cell in cells:
        if isinstance(cell, Cell):
            by_name[cell.contestant].append(cell)
        else:
            lost[cell.contestant].append(cell.seed)
    metric = next((cell.metric for cell in cells if isinstance(cell, Cell)), None)
    if metric is None:
        raise DivergedError(
            f"compare: training diverged with every contestant and seed, so {options.out} has nothing to compare; lower"
            " algorithm.lr or set algorithm.max_grad_norm, with another --out"
        )
    choices = {choice.contestant: choice for choice in tuned}
    rows = [table.row(name, own, lost[name], metric, choices.get(name)) for name, own in by_name.items()]
    found = pairs({name: [cell.quality for cell in own] for name, own in by_name.items() if not lost[name]})
    verdicts = table.verdicts(found, metric) + table.budget_notes(rows, options.budget)
    verdicts += [*table.diverged_notes(lost, len(options.seeds)), *table.tuning_notes(tuned), *notes]
    by_name = {name: own for name, own in by_name.items() if own}
    out = options.out
    files = {
        "table": out / "table.csv",
        "cells": out / "cells.csv",
        "markdown": out / "table.md",
        "json": out / "compare.json",
        "page": out / "compare.html",
    }
    record = {
        "metric": metric,
        "budget": options.budget,
        "seeds": options.seeds,
        "rows": [asdict(row) for row in rows],
        "pairs": [asdict(pair) | {"is_clear": pair.is_clear} for pair in found],
        "tuned": [asdict(choice) | {"is_at_edge": choice.is_at_edge} for choice in tuned],
        "verdicts": verdicts,
    }
    texts = {
        "table": table.csv_of_rows(rows),
        "cells": table.csv_of_cells(cells, metric),
        "markdown": table.markdown(rows, found, verdicts, metric),
        "json": json.dumps(record, indent=1) + "\n",
        "page": page.render(options, by_name, rows, found, tuned, verdicts),
    }
    with storage_errors(out):
        for kind, path in files.items():
            path.write_text(texts[kind], encoding="utf-8", newline="\n")
    return Comparison(rows=rows, pairs=found, tuned=tuned, verdicts=verdicts, files=files)
