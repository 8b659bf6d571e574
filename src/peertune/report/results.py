"""The half of the page that says what came out: headline, loss, held-out metrics, consensus distance, traffic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

from peertune.formatting import count, duration, memory, number, percent, plural, short_count, traffic
from peertune.metric import METRICS, metric_named
from peertune.report import series
from peertune.report.charts import LEGEND_MAX, NUM_COLORS, Band, Line, line_chart, peer_color
from peertune.report.events import Metrics, RunRecord
from peertune.report.html import box, card, empty, esc, page_header, table

ONE_SITE = "A site sees only its own model: how far the models are apart is known in a simulation and on a cluster."
"""Why a site has no consensus distance."""


def title(run: RunRecord) -> str:
    """The method and its number of peers, as HTML."""
    name = str(run.setting("algorithm", "name") or "run")
    return f"{esc(name, 40)}, {plural(run.num_peers, 'peer')}"


def header(run: RunRecord) -> str:
    """Method, model, data, when, and how far the run is."""
    facts = [esc(_brief(run.setting("model", "path") or "model"), 80)]
    if run.parameters:
        facts.append(f"{short_count(run.parameters)} parameters")
    facts += [esc(_brief(value), 60) for value in (run.setting("data", "task"), run.setting("data", "train")) if value]
    if run.setting("run", "seed") is not None:
        facts.append(f"seed {esc(run.setting('run', 'seed'), 20)}")
    if run.started is not None and 0 <= run.started < 2**34:
        facts.append(f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M} UTC")
    planned = max(run.planned_rounds, run.rounds_done)
    if run.finished:
        state = '<span class="pill done">finished</span>'
    else:
        share = run.rounds_done / planned if planned else 0.0
        state = (
            f'<span class="pill">{percent(share, 0)} of {plural(planned, "round")}</span>'
            f'<span class="progress"><i style="width:{share * 100:.1f}%"></i></span>'
        )
    if run.warnings:
        state += f'<a class="pill warn" href="#notes">{plural(len(run.warnings), "warning")}</a>'
    return page_header(f"{title(run)} {state}", facts)


def headline(run: RunRecord) -> str:
    """Cards with the numbers one asks for first."""
    boxes: list[str] = []
    names = _metric_names(run)
    models, whose = [e.average_model for e in run.evaluations], _exported(run)
    own = run.evaluations[-1].peers if run.evaluations else ()
    if not run.agrees and own and all(own):  # nobody holds the average model
        means = {name: statistics.fmean(_known(own, name)) for name in own[0]}
        models, whose = [models[0], means], "the peers' own, mean"
    if names:
        name, metric = names[0], metric_named(names[0])
        seen = [m[name] for m in models if name in m]
        first, last = seen[0], seen[-1]
        what = f"Held-out {esc(metric.title)}, {whose}"
        if len(seen) == 1:
            boxes.append(box(what, metric.show(first), "before training" if not run.rounds else "one evaluation"))
        else:
            span = f"{metric.show(first)} <em>→</em> {metric.show(last)}"
            boxes.append(box(what, span, "before → after" if run.finished else "before → so far"))
            boxes.append(box("Gain", metric.gain(first, last), _second_metric(names, models)))
    else:
        last_loss = series.mean(run.rounds[-1].loss) if run.rounds else None
        boxes.append(box("Training loss, mean of peers", number(last_loss), "no held-out metric yet"))
    most, average = max((b for b in run.bytes_sent if b is not None), default=None), series.mean(run.bytes_sent)
    same = most is None or average is None or most - average <= 0.01 * most
    boxes += [
        box("Sent per peer", traffic(average), "each" if same else f"mean; at most {traffic(most)}"),
        box("Peak memory", memory(run.peak_memory_bytes), "whole run" if run.finished else "known at the end"),
        box("Wall time", duration(run.wall_s), _per_round(run)),
        box("Rounds", count(run.rounds_done), f"of {count(run.planned_rounds)} planned"),
    ]
    return f'<div id="summary" class="boxes">{"".join(boxes)}</div>'


def loss(run: RunRecord) -> str:
    """Training loss per peer and its mean."""
    rounds = run.rounds
    size = series.bin_size(len(rounds))
    curves = [series.downsample(c, size) for c in series.columns([r.loss for r in rounds])]
    window = series.window_of(len(curves[0])) if curves else 1
    curves = [series.smooth(c, window) for c in curves]
    x = [v for v in series.downsample([r.round + 1 for r in rounds], size) if v is not None]
    lines, band = peer_lines(curves, own="this site" if run.is_site else "")
    chart = line_chart(x, lines, band=band, y_title="training loss (nats)", show=number, tall=True)
    lead = "Each peer's loss on its own data." if run.num_models > 1 else "The model's loss on its batches."
    if run.is_site:
        lead = "This site's loss on its own data; of the others it knows none."
    if size * window > 1:
        lead += f" Curves are moving averages over {plural(size * window, 'logged round')}."
    return card("loss", "Training loss", chart or empty("No round has been logged yet."), lead=lead)


def heldout(run: RunRecord) -> str:
    """Held-out metrics of the average model and of the peers' own models, over rounds and as a table."""
    names = _metric_names(run)
    if not names:
        reason = "No evaluation yet." if not run.finished else "Nothing was evaluated: the recipe has no held-out data."
        return card("heldout", "Held-out metrics", empty(reason))
    charts = [_metric_chart(run, name) for name in _charted(names)]
    first, last = run.evaluations[0].average_model, run.evaluations[-1].average_model
    peers = next((e.peers for e in reversed(run.evaluations) if e.peers), ())
    rows = [["before training", *(_cell(n, first) for n in names)]] if run.evaluations[0].round == 0 else []
    if len(run.evaluations) > 1 or not rows:
        when = _exported(run) + ("" if run.finished else f", round {count(run.evaluations[-1].round)}")
        rows.append([f"<b>{when}</b>", *(f"<b>{_cell(n, last)}</b>" for n in names)])
    for models, whose in ((peers, "peer"), (run.personal, "personal model")):
        if run.is_site and any(models):
            label = "before agreement" if whose == "peer" else "this site's personal model"
            rows.append([label, *(_cell(n, next(filter(None, models))) for n in names)])
        elif len(models) > 1:
            for label, reduce in (
                (f"mean of {whose}s", series.mean),
                (f"lowest {whose}", partial(min, default=None)),
                (f"highest {whose}", partial(max, default=None)),
            ):
                rows.append([label, *(metric_named(n).show(reduce(_known(models, n))) for n in names)])
    summary = table(["model", *(esc(metric_named(n).title, 30) for n in names)], rows)
    lead = (
        "The average model is what the run exports; a peer's model is what that peer ends with. All see the same rows."
    )
    if run.is_site:
        lead = "This site's model is what it exports."
    if run.personal:
        lead += " A personal model is the common one with that peer's own weights in their places."
    beside, below = (f"<div>{summary}</div>", "") if len(names) <= 3 else ("", summary)
    body = f'<div class="row">{"".join(charts)}{beside}</div>{below}'
    return card("heldout", "Held-out metrics", body, lead=lead)


def consensus(run: RunRecord) -> str:
    """Consensus distance over rounds, logarithmic."""
    size = series.bin_size(len(run.rounds))
    measured = series.downsample([r.consensus_distance for r in run.rounds], size)
    x = [v for v in series.downsample([r.round + 1 for r in run.rounds], size) if v is not None]
    lines = [Line(name="consensus distance", values=measured, color="var(--accent)", style="mean", dots=len(x) <= 40)]
    chart = line_chart(x, lines, y_title="consensus distance (L2 norm, log)", log=True, show=partial(number, digits=3))
    reason = "One model: nothing to disagree about." if run.num_models == 1 else "Not measured yet, or zero throughout."
    if run.is_site:
        reason = ONE_SITE
    lead = "How far the peers' trained weights are from their average."
    return card("consensus", "Consensus distance", chart or empty(reason), wide=False, lead=lead)


def sent(run: RunRecord) -> str:
    """Cumulative bytes each peer has sent."""
    size = series.bin_size(len(run.rounds))
    logged = run.rounds[::-1][::size][::-1]  # keeps the last, and totals are never averaged
    x, rows = [float(r.round + 1) for r in logged], [r.bytes_sent for r in logged]
    if run.agreement_hops is not None and run.bytes_sent and rows:
        x, rows = [*x, x[-1] + 1], [*rows, run.bytes_sent]
    if not any(series.mean(row) for row in rows):
        return card("traffic", "Traffic", empty("Nothing has been sent."), wide=False)
    lines, band = peer_lines(series.columns(rows), own="this site" if run.is_site else "")
    chart = line_chart(x, lines, band=band, y_title="sent since the start (bytes)", from_zero=True, show=traffic)
    lead = f"What {'this site' if run.is_site else 'each peer'} has put on the wire."
    if run.agreement_hops is not None:
        lead += f" Last: the final agreement, {plural(run.agreement_hops, 'hop')}."
    return card("traffic", "Traffic", chart, wide=False, lead=lead)


def peer_lines(curves: Sequence[series.Column], dots: bool = False, *, own: str = "") -> tuple[list[Line], Band | None]:
    """Curves of N peers: named lines up to 8; beyond that their range, with faint lines up to 32. Always their mean.

    A site knows its own alone: then that is the only one, under the name `own`.
    """
    num = len(curves)
    known = [i for i, curve in enumerate(curves) if any(value is not None for value in curve)]
    if own and known:
        index = known[0]
        return [Line(name=own, values=curves[index], color=peer_color(index), style="mean", dots=dots)], None
    if num == 1:
        return [Line(name="model", values=curves[0], color=peer_color(0), style="mean", dots=dots)], None
    few = num <= LEGEND_MAX
    style = "peer" if few else "faint"
    lines = [
        Line(name=f"peer {i}", values=c, color=peer_color(i), style=style, dots=dots and few, listed=few)
        for i, c in enumerate(curves if num <= NUM_COLORS else [])
    ]
    lines.append(Line(name="mean of peers", values=series.across(curves, series.mean), style="mean", dots=dots))
    band = Band(name=f"range of {num} peers", low=series.across(curves, min), high=series.across(curves, max))
    return lines, None if few else band


def _brief(value: object) -> str:
    """A model or data source without the folders it lies in; the recipe has them."""
    if isinstance(value, list | tuple):
        return ", ".join(_brief(v) for v in value)
    name = str(value).replace("\\", "/").rstrip("/")
    return name.rpartition("/")[2] if name.startswith(("/", ".", "~")) or name[1:2] == ":" else name


def _metric_chart(run: RunRecord, name: str) -> str:
    metric = metric_named(name)
    x = [float(e.round) for e in run.evaluations]
    num = max(len(e.peers) for e in run.evaluations)
    rows = [[p.get(name) for p in e.peers] or [None] * num for e in run.evaluations]
    lines: list[Line] = []
    band, own = None, "before agreement" if run.is_site else ""
    if num > 1:
        lines, band = peer_lines(series.columns(rows), dots=len(x) <= 40, own=own)
    average = [e.average_model.get(name) for e in run.evaluations]
    lines.append(Line(name=_exported(run), values=average, color="var(--accent)", style="star", dots=len(x) <= 40))
    return line_chart(x, lines, band=band, y_title=metric.axis_title, x_title="rounds done", show=metric.show)


def _exported(run: RunRecord) -> str:
    return "this site's model" if run.is_site else "average model"


def _metric_names(run: RunRecord) -> list[str]:
    """Metrics of the average model that were measured, headline first."""
    found = {name: None for e in run.evaluations for name in e.average_model}
    return [n for n in METRICS if n in found] + [n for n in found if n not in METRICS]


def _charted(names: Sequence[str]) -> list[str]:
    """At most two: the headline and the loss; perplexity is the loss again."""
    return [n for n in names if n in (names[0], "loss")]


def _second_metric(names: Sequence[str], models: Sequence[Metrics]) -> str:
    for name in names[1:]:
        seen = [m[name] for m in models if name in m]
        if len(seen) > 1:
            metric = metric_named(name)
            return f"{esc(metric.title, 30)} {metric.show(seen[0])} → {metric.show(seen[-1])}"
    return "on held-out rows"


def _per_round(run: RunRecord) -> str:
    if run.wall_s is None or not run.rounds_done:
        return "no round yet"
    return f"{duration(run.wall_s / run.rounds_done)} a round"


def _cell(name: str, metrics: Metrics) -> str:
    return metric_named(name).show(metrics.get(name))


def _known(peers: Sequence[Metrics], name: str) -> list[float]:
    return [p[name] for p in peers if name in p]
