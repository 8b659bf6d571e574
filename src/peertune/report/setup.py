"""The half of the page that says what went in: graph, data, blocks, recipe, versions, notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peertune.formatting import count, duration, middle, number, percent, plural, short_count, traffic
from peertune.report.charts import SIZE, Axis, peer_color, place_ticks, round_axis
from peertune.report.events import Holding, RunRecord
from peertune.report.graph import graph_svg, heat_map
from peertune.report.html import card, empty, esc, recipe_text, table

MAX_CLASSES = 12
"""More classes than this share the last colour as "other"."""


def graph(run: RunRecord) -> str:
    """The graph, its mixing matrix and its spectral gap."""
    if run.num_models == 1 or not (run.edges or run.weights):
        reason = "One model: no graph." if run.num_models == 1 else "The run has no graph: no peer has a neighbor."
        return card("graph", "Graph and mixing matrix", empty(reason))
    kind = esc(str(run.setting("topology", "kind") or "graph").replace("_", " "), 40)
    facts = [kind, plural(run.num_peers, "peer"), plural(len(set(run.edges)), "edge")]
    if run.weights and run.setting("topology", "weights"):
        facts.append(f"{esc(run.setting('topology', 'weights'), 40)} weights")
    gap = ""
    if run.lambda2 is not None:
        lambda2 = run.lambda2 if abs(run.lambda2) > 1e-12 else 0.0  # what is less is the arithmetic's
        gap = (
            f"<b>λ<sub>2</sub> = {number(lambda2, 4)}</b>, spectral gap <b>1 − |λ<sub>2</sub>| = "  # noqa: RUF001
            f"{number(1 - abs(lambda2), 4)}</b>: a round of mixing shrinks the peers' disagreement to at most "
            f"{percent(abs(lambda2))}."
        )
    drawn = graph_svg(run.num_peers, run.edges, run.weights)
    parts = [f"<figure>{drawn}<figcaption>Width of an edge: its weight. {gap}</figcaption></figure>"]
    if run.weights:
        largest = max(max(row, default=0.0) for row in run.weights)
        scale = f'<span class="scale">0<i></i>{number(largest, 3)}</span>'
        parts.append(
            f"<figure>{heat_map(run.weights)}<figcaption>Mixing matrix W: row i holds the weights peer i gives to "
            f"itself and to its neighbors. {scale}</figcaption></figure>"
        )
    body = f'<div class="row pair">{"".join(parts)}</div>'
    return card("graph", "Graph and mixing matrix", body, lead=", ".join(facts))


def data(run: RunRecord) -> str:
    """Who holds which data: a bar of classes a peer, beside the counts."""
    if not run.holdings:
        return card("data", "Who holds which data", empty("The run has not said who holds what."))
    colors = _class_colors(run.holdings)
    largest = max((_size(h) for h in run.holdings), default=0) or 1
    epochs = run.rounds[-1].epochs if run.rounds else ()
    lost = [name for name in ("cut", "dropped") if any(getattr(h, name) for h in run.holdings)]
    rows = []
    for held in run.holdings:
        peer = held.peer
        # A pooled model counts epochs of the union, not of a peer.
        done = epochs[peer] if len(epochs) == run.num_peers else None
        total = run.bytes_sent[peer] if len(run.bytes_sent) == run.num_peers else None
        rows.append(
            [
                f'<i class="dot" style="--c:{peer_color(peer)}"></i>{peer}',
                _bar(held, colors, largest),
                count(held.samples),
                count(held.sequences),
                short_count(held.tokens),
                *(count(getattr(held, name)) for name in lost),
                number(done, 3),
                traffic(total),
            ]
        )
    bars = "by class" if colors else ""
    head = ["peer", bars, "samples", "sequences", "tokens", *lost, "epochs", "sent"]
    total_samples = sum(h.samples for h in run.holdings)
    lead = f"{plural(total_samples, 'sample')} over {plural(len(run.holdings), 'peer')}; none leaves its peer."
    if run.is_site:
        lead = f"This site's {plural(total_samples, 'sample')}; nobody else sees them, nor this site the others'."
    kind = run.setting("data", "partition")
    if isinstance(kind, Mapping) and kind.get("kind") and not run.is_site:
        alpha = f", α = {esc(kind.get('alpha'), 20)}" if kind.get("kind") in ("dirichlet", "quantity") else ""  # noqa: RUF001
        lead += f" Partition: {esc(kind.get('kind'), 40)}{alpha}."
    body = _class_legend(run.holdings, colors) + table(head, rows, f"data{_density(rows)}")
    return card("data", "Who holds which data", body, lead=lead)


def blocks(run: RunRecord) -> str:
    """The blocks, and the rounds in which each was trained."""
    if not run.blocks:
        return card("blocks", "Block timeline", empty("No blocks: every round trains all that is trained."))
    turns = _turns(run)
    axis = round_axis(0, max(run.planned_rounds, run.rounds_done, 1))
    trained = sum(b.parameters for b in run.blocks) or 1
    rounds: Counter[int] = Counter()
    for turn in turns:
        rounds[turn.block] += turn.end - turn.start
    rows = [
        [
            str(block.index),
            f'<span class="name" title="{esc(block.name)}">{esc(block.name, 48)}</span>',
            short_count(block.parameters),
            percent(block.parameters / trained),
            count(block.tensors),
            count(rounds[block.index]),
            _strip([t for t in turns if t.block == block.index], axis),
        ]
        for block in run.blocks
    ]
    ticks = place_ticks(axis, "left", [count(t) for t in axis.ticks], long=0)
    head = ["block", "name", "parameters", "share", "tensors", "rounds", f'<div class="when">{ticks}<b>round</b></div>']
    lead = f"{plural(len(run.blocks), 'block')}, {short_count(trained)} trained parameters; a bar marks a block's turn."
    if run.frozen:
        shown = ", ".join(f"<code>{esc(name, 80)}</code>" for name in run.frozen[:6])
        more = f" and {count(len(run.frozen) - 6)} more" if len(run.frozen) > 6 else ""
        lead += f" Frozen: {shown}{more}."
    return card("blocks", "Block timeline", table(head, rows, f"blocks{_density(rows)}"), lead=lead)


def recipe(run: RunRecord) -> str:
    """The resolved recipe, as TOML would say it."""
    body = recipe_text(run.config) if run.config else empty("No recipe was recorded.")
    return card("recipe", "Resolved recipe", body, wide=False)


def notes(run: RunRecord) -> str:
    """Warnings, notes, how the run went, versions."""
    facts = []
    if run.wall_s is not None:
        facts.append(f"{duration(run.wall_s)} of wall time.")
    if run.agreed_with or run.agreed_without:
        names = (", ".join(of) or "nobody" for of in (run.agreed_with, run.agreed_without))
        agreed = "This site's model is also that of: {}; not that of: {}."
        if not run.agreed_is_one:
            agreed = "Warning: agreed with: {}; without: {}; but they do not all hold one model."
        facts.append(agreed.format(*names))
    facts += [f"Resumed at round {count(r)}." for r in run.resumes]
    if not run.finished:
        facts.append("The run has not ended: this page shows it so far.")
    items = [f'<li class="warn">{esc(text)}</li>' for text in run.warnings]
    items += [f"<li>{esc(text)}</li>" for text in (*run.notes, *facts)]
    listed = f'<ul class="notes">{"".join(items)}</ul>' if items else empty("Nothing to note.")
    pairs = "".join(f"<div><dt>{esc(k, 40)}</dt><dd>{esc(v, 60)}</dd></div>" for k, v in run.versions.items())
    versions = f'<h3 id="versions">Versions</h3><dl>{pairs}</dl>' if pairs else ""
    return card("notes", "Notes and warnings", listed + versions, wide=False)


@dataclass
class _Turn:
    """Rounds start to end - 1, all of one block."""

    block: int
    start: int
    end: int


def _turns(run: RunRecord) -> list[_Turn]:
    """Logged rounds joined to runs of one block; a round that was not logged belongs to the one logged before it."""
    turns: list[_Turn] = []
    for i, logged in enumerate(run.rounds):
        if logged.block is None:
            continue
        end = run.rounds[i + 1].round if i + 1 < len(run.rounds) else logged.round + 1
        if turns and turns[-1].block == logged.block and turns[-1].end == logged.round:
            turns[-1].end = end
        else:
            turns.append(_Turn(logged.block, logged.round, end))
    return turns


def _strip(turns: Sequence[_Turn], axis: Axis) -> str:
    spans = [(axis.place(t.start) * SIZE, axis.place(t.end) * SIZE) for t in turns]
    # A turn far shorter than a pixel stays visible.
    d = "".join(f"M{start:.1f} 0H{max(end, start + 0.8):.1f}V10H{start:.1f}z" for start, end in spans)
    shown = "; ".join(f"{count(t.start + 1)} to {count(t.end)}" for t in turns[:4]) + ("; …" if len(turns) > 4 else "")
    tip = f'data-tip="rounds {shown}"' if turns else 'data-tip="not trained yet"'
    box = f'viewBox="0 0 {SIZE} 10" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="strip" {tip} {box}><path d="{d}"/></svg>'


def _density(rows: Sequence[object]) -> str:
    return " dense" if len(rows) > 24 else ""


def _size(held: Holding) -> int:
    return max(held.samples, sum(held.classes.values()) + held.others)


def _class_colors(holdings: Sequence[Holding]) -> dict[str, str]:
    """A colour a class, the most frequent first; those beyond the limit share one."""
    totals = _totals(holdings)
    keep = MAX_CLASSES if len(totals) <= MAX_CLASSES else MAX_CLASSES - 1
    return {name: f"var(--k{i})" if i < keep else "var(--other)" for i, (name, _) in enumerate(totals)}


def _totals(holdings: Sequence[Holding]) -> list[tuple[str, int]]:
    totals: Counter[str] = Counter()
    for held in holdings:
        totals.update(held.classes)
    return sorted(totals.items(), key=lambda item: (-item[1], item[0]))


def _bar(held: Holding, colors: Mapping[str, str], largest: int) -> str:
    parts = [(name, held.classes[name], color) for name, color in colors.items() if held.classes.get(name)]
    named = [part for part in parts if part[2] != "var(--other)"]
    rest = sum(n for _, n, c in parts if c == "var(--other)") + held.others
    shown = [*named, ("other", rest, "var(--other)")] if rest else named
    shown = shown or ([("samples", held.samples, "var(--accent)")] if held.samples else [])
    size = _size(held) or 1
    pieces = "".join(
        f'<i style="width:{n / largest * 100:.2f}%;background:{color}" '
        f'data-tip="{esc(name, 60)}: {count(n)} ({percent(n / size)})"></i>'
        for name, n, color in shown
    )
    return f'<div class="bar">{pieces}</div>'


def _class_legend(holdings: Sequence[Holding], colors: Mapping[str, str]) -> str:
    if not colors:
        return ""
    totals = _totals(holdings)
    named = [(n, t) for n, t in totals if colors[n] != "var(--other)"]
    entries = [
        f'<span title="{esc(name)}"><i class="key swatch" style="--c:{colors[name]}"></i>'
        f"<bdi>{esc(middle(name, 36))}</bdi> <small>{count(total)}</small></span>"
        for name, total in named
    ]
    others = totals[len(named) :]
    unlisted = sum(held.others for held in holdings)
    if others or unlisted:
        number_of = f"{count(len(others))} " if not unlisted else ""
        label = f"{number_of}other classes <small>{count(sum(total for _, total in others) + unlisted)}</small>"
        entries.append(f'<span><i class="key swatch" style="--c:var(--other)"></i>{label}</span>')
    return f'<div class="legend top">{"".join(entries)}</div>'
