"""A snapshot as pieces of HTML, one for each section of page.html. Pure; what comes from the files passes `esc`.

Ages go on by themselves: `<time data-at="UNIX SECONDS">` is filled in by watch.js.
"""

from __future__ import annotations

import math

from peertune.formatting import NONE, count, duration, number, percent, plural, traffic
from peertune.report.charts import Line, line_chart
from peertune.report.graph import BOX, CENTER, graph_svg
from peertune.report.html import box, empty, esc, table
from peertune.report.results import ONE_SITE
from peertune.watch.state import PeerState, Snapshot

STATES = {
    "empty": ("no run yet", "warn"),
    "starting": ("starting", ""),
    "running": ("running", ""),
    "stopped": ("stopped", "warn"),
    "finished": ("finished", "done"),
}
STYLES = {"connected": "done", "missing": "warn"}
LABELS_MAX = 12
"""Neighbours at most whose edges are labelled in the graph; the table has all."""
AROUND = 130


def fragments(state: Snapshot) -> dict[str, str]:
    """HTML by the id of the section it fills."""
    return {
        "head": _head(state),
        "says": esc(sentence(state)),
        "boxes": _boxes(state),
        "graph": _graph(state),
        "peers": _peers(state),
        "loss": _curve(state, state.curve_loss, state.loss, ("mean training loss", "nats"), "No round is logged yet."),
        "consensus": _curve(
            state,
            state.curve_consensus,
            state.consensus_distance,
            ("consensus distance", "L2 norm"),
            ONE_SITE if state.is_site else "Not known for any round yet.",
        ),
        "recent": _recent(state),
    }


def sentence(state: Snapshot) -> str:
    """What matters, in words; changes only when that does, for it is read out."""
    known = STATES[state.state][0]
    if state.state == "empty":
        return "There is no run in this folder yet."
    if state.state == "stopped":
        if state.is_ejected:
            return f"{state.site} was ejected from this run, and its process has ended."
        way = "The same command goes on." if state.is_site else "The same command with --resume goes on."
        return f"No process is at work on this run, and it is not finished. {way}"
    parts = [f"{state.site or 'The run'} is {known}"]
    if state.waiting_for:
        parts.append(f"waits for {', '.join(state.waiting_for)}")
    if state.state != "finished" and state.is_site:
        parts.append(f"missing: {', '.join(state.missing)}" if state.missing else "nobody is missing")
    return "; ".join(parts) + "."


def _head(state: Snapshot) -> str:
    known, style = STATES[state.state]
    share = state.rounds_done / state.rounds_planned if state.rounds_planned else 0.0
    what = f"{state.rounds_done} of {state.rounds_planned} rounds" if state.rounds_planned else "rounds not known"
    bar = (
        f'<span class="progress" role="progressbar" aria-label="rounds" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{share * 100:.0f}" aria-valuetext="{what}">'
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{share * 100:.1f}" height="6"/></svg></span>'
    )
    title = esc(state.site or (state.method and f"{state.method}, {plural(len(state.peers), 'peer')}") or "peertune")
    return f'{title} <span class="pill {style}">{known}</span>{bar}'


def _boxes(state: Snapshot) -> str:
    planned = NONE if state.rounds_planned is None else count(state.rounds_planned)
    share = "" if not state.rounds_planned else percent(state.rounds_done / state.rounds_planned)
    missing = "nobody" if not state.missing else esc(", ".join(state.missing), 60)
    saved = NONE if state.checkpoint_round is None else f"round {count(state.checkpoint_round)}"
    elapsed, left = duration(state.elapsed_s), NONE if state.left_s is None else duration(float(round(state.left_s)))
    if state.state == "running" and state.elapsed_s is not None:
        elapsed = _age(state.now - state.elapsed_s, "")
    boxes = [
        ("rounds done", f"{count(state.rounds_done)} <em>of {planned}</em>", share),
        ("training loss", number(state.loss), esc(state.method)),
        ("time elapsed", elapsed, "breaks left out"),
        ("time left", left, "at the pace of the last rounds"),
        ("checkpoint", saved, _age(state.checkpoint_time)),
        ("bytes sent", traffic(state.bytes_sent), "to neighbours" if state.is_site else "by all peers"),
    ]
    if state.consensus_distance is not None:
        boxes.append(("consensus distance", number(state.consensus_distance), "of the last round"))
    if state.is_site:
        boxes.append(("missing", missing, plural(len(state.missing), "neighbour") if state.missing else ""))
    return "".join(box(*each) for each in boxes)


def _graph(state: Snapshot) -> str:
    if not state.peers:
        return empty("The neighbours are not known yet.")
    if not state.is_site:
        return graph_svg(len(state.peers), state.edges, ())
    places, is_row = [], len(state.peers) <= 2
    for i, peer in enumerate(state.peers):
        # One or two stand beside this site, so that its name is on no edge.
        angle = (math.pi if is_row else -math.pi / 2) + 2 * math.pi * i / len(state.peers)
        places.append((peer, CENTER + AROUND * math.cos(angle), CENTER + AROUND * math.sin(angle)))
    labelled = len(places) <= LABELS_MAX
    size = max(5.0, min(17.0, 300 / len(places)))
    lines, nodes = [], []
    for peer, x, y in places:
        line = f'<line class="{peer.status}" x1="{CENTER}" y1="{CENTER}" x2="{x:.1f}" y2="{y:.1f}"/>'
        lines.append(f"<g><title>{esc(peer.name)}: {esc(_edge(peer))}</title>{line}</g>")
        nodes.append(f'<circle class="{peer.status}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>')
        if labelled:
            up = -size - 21 if y < CENTER + 1 else size + 12
            nodes.append(f'<text x="{x:.1f}" y="{y + up:.1f}" class="name">{esc(peer.name, 18)}</text>')
            nodes.append(f'<text x="{x:.1f}" y="{y + up + 12:.1f}" class="edge">{esc(_edge(peer))}</text>')
    nodes.append(f'<circle class="self" cx="{CENTER}" cy="{CENTER}" r="19"/>')
    nodes.append(f'<text x="{CENTER}" y="{CENTER + 30}" class="name">{esc(state.site or "this site", 18)}</text>')
    height = BOX / 3 if is_row else BOX
    told = "; ".join(f"{peer.name} {_edge(peer)}" for peer in state.peers)
    title = esc(f"{state.site or 'This site'} and its neighbours: {told}", 2000)
    return (
        f'<svg class="site" viewBox="0 {(BOX - height) / 2:g} {BOX} {height:g}" role="img" aria-label="{title}">'
        f"{''.join(lines)}{''.join(nodes)}</svg>"
    )


def _edge(peer: PeerState) -> str:
    """An edge in a few words: its state, throughput and lag."""
    parts = [peer.status]
    if peer.status == "connected" and peer.bytes_per_s is not None:
        parts.append(f"{traffic(peer.bytes_per_s)}/s")
    if peer.behind:
        parts.append(f"{count(peer.behind)} behind")
    return ", ".join(parts)


def _peers(state: Snapshot) -> str:
    if not state.peers:
        return ""
    if state.is_site:
        names = "neighbour|state|since|last message|round|behind|throughput|sent to it|received|rounds without"
        rows = [
            [
                esc(peer.name),
                f'<span class="pill {STYLES.get(peer.status, "")}">{peer.status}</span>',
                _age(peer.since, "for"),
                _age(peer.heard),
                NONE if peer.round is None else count(peer.round),
                NONE if peer.behind is None else count(peer.behind),
                NONE if peer.bytes_per_s is None else f"{traffic(peer.bytes_per_s)}/s",
                traffic(peer.bytes_sent),
                traffic(peer.bytes_received),
                count(peer.rounds_without),
            ]
            for peer in state.peers
        ]
    else:
        names = "peer|training loss|bytes sent"
        rows = [[esc(peer.name), number(peer.loss), traffic(peer.bytes_sent)] for peer in state.peers]
    return table(names.split("|"), rows, label="Neighbours of this site" if state.is_site else "Peers of the run")


def _curve(
    state: Snapshot, values: tuple[float | None, ...], last: float | None, told: tuple[str, str], nothing: str
) -> str:
    title, unit = told
    x = [round + 1 for round in state.curve_rounds]  # as the report counts them, and "rounds done"
    chart = line_chart(x, [Line(name=title, values=values, style="mean")], y_title=f"{title} ({unit})")
    if not chart:
        return empty(nothing)
    return f'{chart}<p class="lead">{title} of the last round: {number(last)}</p>'


def _recent(state: Snapshot) -> str:
    if not state.recent:
        return ""
    entries = "".join(f"<li>{_age(when)}: {esc(text)}</li>" for when, text in reversed(state.recent))
    return f'<h2>What happened last</h2><ul class="notes">{entries}</ul>'


def _age(when: float | None, way: str = "ago") -> str:
    """How long ago that was, which the page's script puts as a time that goes on."""
    return NONE if not when else f'<time data-at="{when:.3f}" data-way="{way}"></time>'
