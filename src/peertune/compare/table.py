"""The comparison as tables and sentences: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from peertune.compare.cells import Cell, DivergedCell
from peertune.compare.grid import Tuned
from peertune.compare.stats import LEVEL, Pair, mean, spread
from peertune.formatting import NONE, count, duration, memory, number, percent, plural, traffic
from peertune.metric import METRICS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant over all seeds. Where some diverged, there is no quality, and what was spent is the others'."""

    contestant: str
    num_seeds: int
    metric: str
    mean: float | None
    """Of the metric over seeds; where peers never agree, first over peers. None where a seed diverged."""
    spread: float | None
    """Sample standard deviation over seeds."""
    worst_peer: float | None
    """Mean over seeds of the worst peer's own model."""
    macro_f1: float | None
    """Mean over seeds; None where there are no classes."""
    samples: float | None
    """Drawn by a peer; this and the next ones are None where all seeds diverged."""
    bytes_sent: float | None
    """By a peer, the final agreement included."""
    bytes_sent_by_hub: float | None
    """By the server; None where there is none."""
    peak_memory_bytes: int | None
    """Of the whole simulation, all peers in one process; the most over seeds."""
    cpu_s: float | None
    """CPU seconds of a peer's training."""
    simulated_s: float | None
    lambda2: float | None
    """Second eigenvalue of W, mean over seeds; None where the method has no W."""
    tuned: str
    """The chosen setting; empty where none was tuned."""
    diverged: tuple[int, ...] = ()
    """Seeds with which training diverged."""


SLACK = {"samples": 0.1, "bytes": 0.1, "seconds": 0.5}
"""By which share of the first contestant's another may miss a budget without a word: rounds are whole, clocks noisy."""
SPARE = ("simulated_s", "cpu_s", "bytes_sent_by_hub", "peak_memory_bytes")
"""Columns that a narrow terminal does without, the first first."""
NAME_WIDTH = 28
"""Characters of a name in one line of the terminal's table."""
PAIRS_MAX = 10
"""Pairs that have a sentence each; of more, those have whose difference is larger than the seed noise."""
SENTENCES_MAX = 200
"""Where more pairs than these have one, only those with the first contestant do: others are found in the table."""
DIVERGED = "diverged"
"""Stands in tables in the place of a number that there is none of."""


def row(contestant: str, cells: Sequence[Cell], diverged: Sequence[int], metric: str, tuned: Tuned | None) -> Row:
    """One contestant's cells as a row.

    Args:
        cells: the finished ones.
        diverged: the seeds of the others.
    """
    whole = [] if diverged else cells
    qualities = [cell.quality for cell in whole]
    lambda2 = [cell.summary["lambda2"] for cell in cells]
    f1 = [cell.macro_f1 for cell in whole if cell.macro_f1 is not None]
    by_hub = [cell.bytes_sent_by_hub for cell in cells if cell.bytes_sent_by_hub is not None]

    def over_seeds(value: Callable[[Cell], float], of: Sequence[Cell] = cells) -> float | None:
        return mean([value(cell) for cell in of]) if of else None

    return Row(
        contestant=contestant,
        num_seeds=len(cells) + len(diverged),
        metric=metric,
        mean=mean(qualities) if whole else None,
        spread=spread(qualities) if whole else None,
        worst_peer=over_seeds(lambda cell: cell.worst_peer, whole),
        macro_f1=mean(f1) if f1 else None,
        samples=over_seeds(lambda cell: cell.samples),
        bytes_sent=over_seeds(lambda cell: cell.bytes_sent),
        bytes_sent_by_hub=mean(by_hub) if by_hub else None,
        peak_memory_bytes=max((int(cell.summary["peak_memory_bytes"]) for cell in cells), default=None),
        cpu_s=over_seeds(lambda cell: cell.cpu_s),
        simulated_s=over_seeds(lambda cell: float(cell.summary["simulated_s"])),
        lambda2=None if None in lambda2 or not lambda2 else mean(lambda2),
        tuned=_chosen(tuned),
        diverged=tuple(diverged),
    )


def _chosen(tuned: Tuned | None) -> str:
    if tuned is None:
        return ""
    if tuned.best is None:
        return f"{tuned.key}: all {DIVERGED}"
    return f"{tuned.key} = {tuned.best:g}" + (" (edge)" if tuned.is_at_edge else "")


def cells_of(row: Row, keys: Sequence[str]) -> list[str]:
    """A row's texts, by the keys of `columns`."""
    return [COLUMNS[key][1](row) for key in keys]


def _with_spread(row: Row) -> str:
    """ "61.1 ± 4.8 %": the unit once; "diverged (1 of 3)" where seeds did."""
    metric = METRICS[row.metric]
    if row.mean is None:
        is_part = len(row.diverged) < row.num_seeds
        return DIVERGED + (f" ({len(row.diverged)} of {row.num_seeds})" if is_part else "")
    if row.spread is None:
        return metric.show(row.mean)
    center = metric.show(row.mean).removesuffix("%").rstrip() if metric.share else metric.show(row.mean)
    return f"{center} ± {metric.show(row.spread)}"


COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "contestant": ("method", lambda row: row.contestant),
    "mean": ("", _with_spread),
    "worst_peer": ("worst peer", lambda row: METRICS[row.metric].show(row.worst_peer)),
    "macro_f1": ("F1", lambda row: METRICS["macro_f1"].show(row.macro_f1)),
    "samples": ("samples", lambda row: NONE if row.samples is None else count(row.samples)),
    "bytes_sent": ("sent", lambda row: traffic(row.bytes_sent)),
    "bytes_sent_by_hub": ("server sent", lambda row: traffic(row.bytes_sent_by_hub)),
    "peak_memory_bytes": ("memory", lambda row: memory(row.peak_memory_bytes)),
    "cpu_s": ("CPU", lambda row: duration(row.cpu_s)),
    "simulated_s": ("sim. time", lambda row: duration(row.simulated_s)),
    "lambda2": ("λ2", lambda row: number(row.lambda2, 2)),
    "tuned": ("tuned", lambda row: row.tuned),
}
"""Title and text of each; samples, bytes and CPU time are a peer's. The metric's own title stands for the empty one."""


def heads(rows: Sequence[Row]) -> list[str]:
    """Titles of the columns; those that no row fills are left out."""
    return [COLUMNS[key][0] or METRICS[rows[0].metric].title for key in columns(rows)]


def columns(rows: Sequence[Row]) -> list[str]:
    """Keys of the columns that are shown: the same for all rows of a comparison."""
    optional = ("macro_f1", "bytes_sent_by_hub", "tuned")
    without = {key for key in optional if not any(getattr(row, key) not in (None, "") for row in rows)}
    if not any(":topology." in row.contestant.replace(" ", "") for row in rows):
        without.add("lambda2")
    return [key for key in COLUMNS if key not in without]


def terminal_table(rows: Sequence[Row], width: int = 80) -> Table:
    """The table as rich draws it; on a terminal of few columns without those of `SPARE`."""
    metric = METRICS[rows[0].metric]
    table = Table(
        title=f"held-out {metric.title} ({metric.direction} is better), {plural(rows[0].num_seeds, 'seed')}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    titles = dict(zip(columns(rows), heads(rows), strict=True))
    keys = [key for key in titles if key != "tuned"]  # a sentence below the table says it
    texts = [dict(zip(keys, cells_of(each, keys), strict=True)) for each in rows]
    widths = {key: max(len(titles[key]), *(len(text[key]) for text in texts)) for key in keys}
    widths["contestant"] = min(widths["contestant"], NAME_WIDTH)  # a longer one goes on in the next line
    left_out = []
    for key in SPARE:
        if sum(widths.values()) + len(widths) > width and key in widths:
            left_out.append(key)
            del widths[key]
    spare = width - sum(widths.values()) - len(widths)
    widths["contestant"] = max(8, widths["contestant"] + min(0, spare))
    elsewhere = f"; {', '.join(titles[key] for key in left_out)}: in table.md" if left_out else ""
    table.caption = f"mean ± standard deviation over seeds; samples, bytes sent and CPU time are a peer's{elsewhere}"
    for key, least in widths.items():
        is_name = key == "contestant"
        table.add_column(titles[key], justify="left" if is_name else "right", min_width=least, overflow="fold")
    for text in texts:
        table.add_row(*(escape(text[key]) for key in widths))
    return table


def csv_of_rows(rows: Sequence[Row]) -> str:
    """Plain numbers, a line a contestant; units stand in the names: _bytes, _s."""
    lines = []
    for each in rows:
        marks = {"mean": DIVERGED, "worst_peer": DIVERGED} if each.diverged else {}
        lines.append(asdict(each) | marks | {"diverged": " ".join(map(str, each.diverged))})
    return _csv(lines)


def csv_of_cells(cells: Sequence[Cell | DivergedCell], metric: str) -> str:
    """Plain numbers, a line a contestant and seed; of one that diverged, only that it did."""
    lines: list[dict[str, object]] = []
    for cell in cells:
        line = {"contestant": cell.contestant, "seed": cell.seed, "metric": metric, "quality": DIVERGED}
        if isinstance(cell, Cell):
            line |= _measured(cell)
        lines.append(line | {"folder": str(cell.folder)})
    keys = list(dict.fromkeys(key for line in lines for key in line if key != "folder"))
    return _csv([{key: line.get(key) for key in [*keys, "folder"]} for line in lines])


def _measured(cell: Cell) -> dict[str, object]:
    return {
        "quality": cell.quality,
        "worst_peer": cell.worst_peer,
        "macro_f1": cell.macro_f1,
        "samples": cell.samples,
        "bytes_sent": cell.bytes_sent,
        "bytes_sent_by_hub": cell.bytes_sent_by_hub,
        "peak_memory_bytes": cell.summary["peak_memory_bytes"],
        "cpu_s": cell.cpu_s,
        "simulated_s": cell.summary["simulated_s"],
        "rounds": cell.summary["rounds"],
        "lr": cell.summary["config"]["algorithm"]["lr"],
    }


def markdown(rows: Sequence[Row], found: Sequence[Pair], sentences: Sequence[str], metric: str) -> str:
    """Both tables and the sentences."""
    parts = [_markdown_table(heads(rows), [cells_of(each, columns(rows)) for each in rows])]
    parts.append(_markdown_table(PAIR_HEAD, [pair_cells(pair, metric) for pair in found]))
    parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(parts) + "\n"


_LEVEL = percent(LEVEL, 0)
PAIR_HEAD = ["pair", "mean difference", f"{_LEVEL} interval", "larger than the seed noise"]


def pair_cells(pair: Pair, metric: str) -> list[str]:
    """A pair's texts: who, difference, interval, verdict."""
    interval = NONE if pair.interval is None else " to ".join(_change(end, metric) for end in pair.interval)
    verdict = "cannot be told" if pair.interval is None else "yes" if pair.is_clear else "no"
    return [f"{pair.one} − {pair.other}", _change(pair.difference, metric), interval, verdict]  # noqa: RUF001


def told(found: Sequence[Pair]) -> list[Pair]:
    """The pairs that have a sentence of their own."""
    chosen = [pair for pair in found if pair.is_clear or len(found) <= PAIRS_MAX]
    return chosen if len(chosen) <= SENTENCES_MAX else [pair for pair in chosen if pair.one == found[0].one]


def verdicts(found: Sequence[Pair], metric: str) -> list[str]:
    """What the pairs say, in words: first a sentence for each pair of `told`."""
    title = METRICS[metric].title
    sentences = []
    for pair in told(found):
        ahead, behind = pair.one, pair.other
        if METRICS[metric].is_better(0.0, pair.difference):
            ahead, behind = behind, ahead
        size = _amount(pair.difference, metric)
        seeds = plural(pair.num_seeds, "seed")
        over = f"in {seeds}"
        if pair.interval is None:
            said = "equal" if pair.is_tie else f"{ahead} is ahead by {size}"
            where = "with this one seed" if pair.num_seeds == 1 else f"in each of {seeds}, so no noise can be told"
            sentences.append(f"{pair.one} and {pair.other}: {said} {where}.")
            continue
        if pair.is_clear:
            ends = " to ".join(_amount(end, metric) for end in sorted(map(abs, pair.interval)))
            sentences.append(
                f"{ahead} is better than {behind} in {title} by {size} {over}: larger than the seed noise"
                f" ({_LEVEL} interval {ends})."
            )
        else:
            ends = " to ".join(_change(end, metric) for end in pair.interval)
            sentences.append(
                f"{pair.one} and {pair.other}: the mean difference of {_change(pair.difference, metric)} {over} is not"
                f" larger than the seed noise ({_LEVEL} interval {ends})."
            )
    if len(told(found)) < len(found):
        above = "none" if not told(found) else "the one above" if len(told(found)) == 1 else "those above"
        clear = sum(pair.is_clear for pair in found)
        if len(told(found)) < clear:
            above = f"{clear}, with {found[0].one} those above,"
        beyond = f"Of these, {above} can be told from the seed noise." if found[0].num_seeds > 1 else ""
        where = f"The differences of all {len(found)} pairs stand in table.md and on the page under Pairs."
        sentences.append(f"{where} {beyond}".rstrip())
    if found and found[0].num_seeds == 1:
        sentences.append("With one seed no noise can be told: no difference here is a finding; use --seeds 0,1,2.")
    elif len(found) > 1:
        sentences.append(
            f"{len(found)} pairs are judged at {_LEVEL} each: by chance alone one in {1 / (1 - LEVEL):.0f} would"
            " look like a difference."
        )
    return sentences


def budget_notes(rows: Sequence[Row], budget: str) -> list[str]:
    """Who spent clearly more or less than the first contestant, though the budget was to make them equal."""
    spent: dict[str, Callable[[Row], float | None]] = {
        "samples": lambda row: row.samples, "bytes": lambda row: row.bytes_sent, "seconds": lambda row: row.cpu_s
    }  # fmt: skip
    first = spent[budget](rows[0])
    missed: dict[str, list[str]] = {}
    for row in rows[1:] if first else []:
        own = spent[budget](row)
        if own and first and abs(own / first - 1) > SLACK[budget]:
            missed.setdefault(number(own / first, 2), []).append(row.contestant)
    return [
        f"{', '.join(names)} took {times} times the {budget} of {rows[0].contestant}: the budget could not be met, and"
        " what they reached does not compare."
        for times, names in missed.items()
    ]


def diverged_notes(lost: Mapping[str, Sequence[int]], num_seeds: int) -> list[str]:
    """Who is not in the pairs, because training diverged.

    Args:
        lost: by contestant, the seeds with which it did.
        num_seeds: of all.
    """
    return [
        f"{name}: training diverged with seed {', '.join(map(str, seeds))}; it is left out of the pairs"
        + (", and what is shown of it is of its other seeds." if len(seeds) < num_seeds else ".")
        for name, seeds in lost.items()
        if seeds
    ]


def tuning_notes(tuned: Sequence[Tuned]) -> list[str]:
    """What was chosen, and where the best may lie outside the grid."""
    sentences = []
    for choice in tuned:
        listed = ", ".join(f"{value:g}" for value in choice.values)
        if choice.best is None:
            sentences.append(
                f"{choice.contestant}: training diverged with every {choice.key} of {listed}; tune over smaller values."
            )
            continue
        said = f"{choice.contestant}: {choice.key} = {choice.best:g} of {listed}, chosen on validation rows"
        if len(choice.values) == 1:
            said += "; the grid has one value, so nothing was chosen between"
        elif choice.is_at_edge:
            said += "; it lies at the grid's edge, so a value beyond may be better: widen the grid"
        sentences.append(said + ".")
    return sentences


def _change(value: float, metric: str) -> str:
    """A signed difference, "+3.1 points" for a share."""
    return METRICS[metric].gain(0.0, value)


def _amount(value: float, metric: str) -> str:
    return _change(abs(value), metric).lstrip("+")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _csv(records: Sequence[dict[str, object]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {k: v if isinstance(v, str) else json.dumps(v) if v is not None else "" for k, v in record.items()}
        )
    return file.getvalue()
