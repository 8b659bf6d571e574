"""The comparison as one HTML page, which loads nothing: verdicts in words, tables, curves, the peers' spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peertune.compare import table
from peertune.compare.cells import Cell, Point
from peertune.compare.charts import Curve, Mark, curve_chart, memory_axis, spread_strip
from peertune.compare.grid import Tuned
from peertune.compare.options import Options
from peertune.compare.stats import Pair, mean
from peertune.formatting import count, memory, middle, number, plural, traffic
from peertune.metric import METRICS
from peertune.report.charts import linear_axis, peer_color, place_ticks, tick_texts
from peertune.report.html import card, document, empty, esc, navigation, page_header, recipe_text
from peertune.report.html import table as html_table

Cells = Mapping[str, Sequence[Cell]]

STYLE = """
.peers { display: block; width: 100%; height: 20px; min-width: 220px; overflow: visible; }
.peers path { vector-effect: non-scaling-stroke; fill: none; stroke-linecap: round; }
.peers .range { stroke: var(--line); stroke-width: 3; }
.peers .each { stroke-width: 8; stroke-opacity: 0.75; }
.peers .result { stroke: var(--ink); stroke-width: 2.5; }
.spread td:last-child { width: 72%; }
.spread td:last-child, .spread th:last-child { text-align: left; padding-right: 12px; }
#table td:first-child, #peers td:first-child, #pairs td:first-child {
  white-space: normal; word-break: break-all; min-width: 120px;
}
.notes li.clear { background: var(--good-soft); color: var(--good); }
"""

TITLE_MAX = 80
"""Letters of a title that names the contestants; where that takes more, it says how many there are."""

SECTIONS = {
    "verdicts": "Verdicts",
    "table": "Table",
    "samples": "Over samples",
    "bytes": "Over bytes",
    "memory": "Over memory",
    "peers": "Peers",
    "pairs": "Pairs",
    "tuning": "Tuning",
    "fairness": "What is shared",
    "recipe": "Recipe",
}


def render(
    options: Options,
    cells: Cells,
    rows: Sequence[table.Row],
    found: Sequence[Pair],
    tuned: Sequence[Tuned],
    verdicts: Sequence[str],
) -> str:
    """The page as a string.

    Args:
        cells: the finished ones, by contestant; who has none is in the table only.
    """
    metric, (first, own) = rows[0].metric, next(iter(cells.items()))
    config = own[0].summary["config"]
    title = " · ".join(row.contestant for row in rows)
    title = esc(title) if len(title) <= TITLE_MAX else f"{len(rows)} contestants"
    colors = {row.contestant: peer_color(i) for i, row in enumerate(rows)}
    sections = {id: name for id, name in SECTIONS.items() if id != "tuning" or tuned}
    facts = [
        f"held-out {esc(METRICS[metric].title)}, {METRICS[metric].direction} is better",
        plural(rows[0].num_seeds, "seed"),
        f"equal {esc(options.budget)}",
    ]
    body = [
        page_header(title, facts),
        navigation(sections),
        card("verdicts", "Which differences are larger than the seed noise", _sentences(found, verdicts)),
        card("table", "Table", _table(rows), lead=_TABLE_LEAD),
        card(
            "samples",
            "Quality over samples",
            _over(cells, colors, metric, lambda point: point.samples, "samples drawn by a peer", count),
        ),
        card(
            "bytes",
            "Quality over bytes",
            _over(cells, colors, metric, lambda point: point.bytes, "sent by a peer (bytes)", traffic),
            wide=False,
            lead="The last point has the final agreement in it.",
        ),
        card("memory", "Quality over memory", _over_memory(cells, colors, metric), wide=False, lead=_MEMORY_LEAD),
        card("peers", "The peers' spread", _peers(cells, colors, metric), lead=_PEERS_LEAD),
        card("pairs", "Pairs", _pairs(found, metric), lead=_PAIRS_LEAD),
        *([card("tuning", "Tuning", _tuning(tuned, metric), lead=_TUNING_LEAD)] if tuned else []),
        card("fairness", "What is shared", _fairness(options, config), wide=False),
        card("recipe", f"Recipe of {esc(first, 40)}", recipe_text(config), wide=False),
    ]
    return document(f"{title} · peertune compare", "\n".join(body), STYLE)


_TABLE_LEAD = (
    "Quality of what peers end with: the agreed model, or without agreement or with personal parts each peer's own, on"
    " average. Worst peer: the worst of the peers' own models, before agreement where there are no personal parts, mean"
    " over seeds. CPU time is that of local training."
)
_MEMORY_LEAD = "Peak of the whole simulation: all peers in one process, the base model included."
_PEERS_LEAD = (
    "Dots: each peer's own model, before agreement where there are no personal parts, all seeds. Tick: what the"
    " contestant ends with, mean over seeds."
)
_PAIRS_LEAD = (
    "Runs of one seed share partition, graph and batches, but for what a name sets, so differences are taken seed by"
    " seed; the interval is Student's t over them."
)
_TUNING_LEAD = "On rows kept back from the training data, first seed; the test rows are not read for it."


def _sentences(found: Sequence[Pair], verdicts: Sequence[str]) -> str:
    own = table.told(found)  # whose sentences are the first, in their order
    kinds = [" class=clear" if pair.is_clear else "" for pair in own] + [""] * (len(verdicts) - len(own))
    items = "".join(f"<li{kind}>{esc(text, 100_000)}</li>" for kind, text in zip(kinds, verdicts, strict=True))
    return f'<ul class="notes">{items}</ul>'


def _table(rows: Sequence[table.Row]) -> str:
    keys = table.columns(rows)
    body = [[esc(middle(cell, 80)) for cell in table.cells_of(row, keys)] for row in rows]
    body = [[f'<i class="dot" style="--c:{peer_color(i)}"></i>{first}', *rest] for i, (first, *rest) in enumerate(body)]
    return html_table([esc(head) for head in table.heads(rows)], body)


def _over(
    cells: Cells,
    colors: Mapping[str, str],
    metric: str,
    x_of: Callable[[Point], float],
    x_title: str,
    show_x: Callable[[float], str],
) -> str:
    """Quality against what was spent so far: mean over seeds, bars from the lowest to the highest seed."""
    curves = []
    for name, own in cells.items():
        marks = [_mark([x_of(p) for p in points], [p.quality for p in points]) for points in _by_position(own)]
        curves.append(Curve(name=name, color=colors[name], marks=marks))
    if not any(mark.x for curve in curves for mark in curve.marks):
        return empty(f"All have {show_x(0.0)} here.")
    lead = _curve_note(cells)
    chart = curve_chart(curves, METRICS[metric], x_title, lambda value: show_x(value or 0.0))
    return chart + (f'<p class="lead">{lead}</p>' if lead else "")


def _over_memory(cells: Cells, colors: Mapping[str, str], metric: str) -> str:
    curves = [
        Curve(
            name=name,
            color=colors[name],
            marks=[_mark([float(c.summary["peak_memory_bytes"]) for c in own], [c.quality for c in own])],
        )
        for name, own in cells.items()
    ]
    return curve_chart(curves, METRICS[metric], "peak memory", memory, memory_axis)


def _by_position(cells: Sequence[Cell]) -> list[tuple[Point, ...]]:
    """The seeds' points with the same place on their curves. Only budgets of bytes and seconds give seeds other rounds,
    and then the shortest curve's count goes; the last points always belong together."""
    length = min(len(cell.points) for cell in cells)
    inner = [tuple(cell.points[i] for cell in cells) for i in range(length - 1)]
    return [*inner, tuple(cell.points[-1] for cell in cells)]


def _mark(xs: Sequence[float], ys: Sequence[float]) -> Mark:
    return Mark(x=mean(xs), y=mean(ys), low=min(ys), high=max(ys))


def _curve_note(cells: Cells) -> str:
    few = [name for name, own in cells.items() if len(own[0].points) == 2]
    if not few or len(few) == len(cells):
        return ""
    names = ", ".join(esc(name, 40) for name in few)
    return f"{names}: start and end only; on the way nobody holds the average model, which is what is measured there."


def _peers(cells: Cells, colors: Mapping[str, str], metric: str) -> str:
    every = [value for own in cells.values() for cell in own for value in (*cell.peers, cell.quality)]
    axis = linear_axis(min(every), max(every))
    show = METRICS[metric].show
    body = []
    for name, own in cells.items():
        values = [value for cell in own for value in cell.peers]
        tip = f"{name}: peers {show(min(values))} to {show(max(values))}"
        strip = spread_strip(values, mean([c.quality for c in own]), axis, colors[name], tip)
        gap = show(max(values) - min(values))
        body.append([esc(middle(name, 80)), show(min(values)), show(max(values)), gap, strip])
    ticks = place_ticks(axis, "left", tick_texts(axis, show))
    head = ["method", "lowest", "highest", "range", f'<div class="when">{ticks}</div>']
    return html_table(head, body, "spread")


def _pairs(found: Sequence[Pair], metric: str) -> str:
    return html_table(
        [esc(head) for head in table.PAIR_HEAD],
        [[esc(middle(cell, 160)) for cell in table.pair_cells(pair, metric)] for pair in found],
    )


def _tuning(tuned: Sequence[Tuned], metric: str) -> str:
    head = ["method", *(esc(f"{tuned[0].key} = {value:g}") for value in tuned[0].values), "chosen"]
    body = []
    for choice in tuned:
        texts = [table.DIVERGED if q is None else METRICS[metric].show(q) for q in choice.qualities]
        chosen = "none"
        if choice.best is not None:
            best = choice.values.index(choice.best)
            texts[best] = f"<b>{texts[best]}</b>"
            chosen = f"{choice.best:g}" + (" (the grid's edge)" if choice.is_at_edge else "")
        body.append([esc(middle(choice.contestant, 80)), *texts, chosen])
    return html_table(head, body)


def _fairness(options: Options, config: Mapping[str, Any]) -> str:
    link, kept = config["link"], config["data"]["validation_rows"]
    budget = {
        "samples": "Every contestant draws as many samples a peer as the first's recipe foresees.",
        "bytes": "Every contestant trains as long as the bytes a peer that the first sends allow; one that sends"
        " nothing while it trains draws as many samples as the first.",
        "seconds": "Every contestant trains as long as the first's CPU time of training allows, at a probe's rate.",
    }[options.budget]
    items = [
        f"Seeds {', '.join(map(str, options.seeds))}: with one seed all have the same partition, graph and order of"
        " batches. What a contestant's name sets is its own.",
        budget + " The table says what each really used.",
        f"{count(kept)} rows kept back from training, for all." if kept else "No rows kept back from training.",
        f"Simulated time: {number(link['bandwidth_mbit'])} Mbit/s and {number(link['latency_ms'])} ms a link; each"
        " round waits for its slowest peer.",
    ]
    return f'<ul class="notes">{"".join(f"<li>{esc(item)}</li>" for item in items)}</ul>'
