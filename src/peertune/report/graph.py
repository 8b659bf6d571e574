"""The graph on a circle, and its mixing matrix W as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peertune.formatting import number
from peertune.report.charts import peer_color

Matrix = Sequence[Sequence[float]]

BOX = 400
RADIUS = 168
CENTER = BOX / 2
CELLS = 1000
SHADES = 20
TIPS_MAX = 16
"""Largest N whose matrix has a tooltip a cell: a page of 64 peers would carry 4096."""
STRONG = 0.7
"""From this share of the largest weight on, a number is in the card's colour, so that light and dark can be read."""


def graph_svg(num_peers: int, edges: Sequence[tuple[int, int]], weights: Matrix) -> str:
    """Peers on a circle, edges as wide as their weight; a node beyond the peers (a hub) stands in the middle.

    Args:
        edges: as `logfields.pair` reads them.
    """
    num_nodes = max([num_peers, *(1 + high for _, high in edges)])
    pairs = sorted(set(edges))
    largest = max((_weight(weights, a, b) for a, b in pairs), default=0.0)
    places = [_place(node, num_peers) for node in range(num_nodes)]
    crowd = min(1.0, 60 / max(1, len(pairs)))
    parts = ['<g class="edges">']
    for a, b in pairs:
        weight = _weight(weights, a, b)
        share = weight / largest if largest > 0 else 0.5
        width = (0.8 + 3.6 * share) * (0.3 + 0.7 * crowd)
        opacity = (0.3 + 0.5 * share) * (0.35 + 0.65 * crowd)
        (x1, y1), (x2, y2) = places[a], places[b]
        tip = f"{node_name(a, num_peers)} and {node_name(b, num_peers)}: weight {number(weight, 3)}"
        parts.append(
            f'<line data-a="{a}" data-b="{b}" data-tip="{tip}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke-width="{width:.2f}" stroke-opacity="{opacity:.2f}"/>'
        )
    parts.append('</g><g class="nodes">')
    size = max(5.0, min(17.0, 0.38 * 2 * math.pi * RADIUS / num_nodes))
    degree = [sum(node in pair for pair in pairs) for node in range(num_nodes)]
    for node, (x, y) in enumerate(places):
        color = peer_color(node) if node < num_peers else "var(--muted)"
        tip = f"{node_name(node, num_peers)}: {degree[node]} neighbor{'s' * (degree[node] != 1)}"
        label = str(node) if node < num_peers else "hub"
        font = size * (0.95 if len(label) < 3 else 0.75)
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" fill="{color}"/>'
        parts.append(f'<g data-node="{node}" data-tip="{tip}">{circle}')
        if size > 9:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{font:.1f}">{label}</text>')
        parts.append("</g>")
    title = f"Graph of {num_nodes} nodes and {len(pairs)} edges"
    return f'<svg class="graph" viewBox="0 0 {BOX} {BOX}" role="img" aria-label="{title}">{"".join(parts)}</g></svg>'


def heat_map(weights: Matrix) -> str:
    """W with one square an entry, darker for more weight; row i is what peer i takes from whom."""
    size = len(weights)
    side = CELLS / size
    largest = max((w for row in weights for w in row), default=0.0) or 1.0
    shades: dict[int, list[str]] = {}
    parts: list[str] = []
    gap = side * 0.06
    inner = side - 2 * gap
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            shade = math.ceil(SHADES * weight / largest) if weight > 0 else 0
            square = f"M{j * side + gap:.1f} {i * side + gap:.1f}h{inner:.1f}v{inner:.1f}h-{inner:.1f}z"
            if size <= TIPS_MAX:
                tip = f"W[{i}, {j}] = {number(weight, 3)}"
                parts.append(f'<path data-tip="{tip}" d="{square}"{_fill(shade)}/>')
            else:
                shades.setdefault(shade, []).append(square)
    parts += [f'<path d="{"".join(squares)}"{_fill(shade)}/>' for shade, squares in sorted(shades.items())]
    font = min(64.0, side / 3.4)
    if size <= 8:
        for i, row in enumerate(weights):
            for j, weight in enumerate(row):
                if weight:
                    strong = ' class="strong"' if weight > STRONG * largest else ""
                    x, y = (j + 0.5) * side, (i + 0.5) * side
                    parts.append(f'<text{strong} x="{x:.0f}" y="{y:.0f}" font-size="{font:.0f}">{weight:.2f}</text>')
    title = f"Mixing matrix W, {size} by {size}"
    return f'<svg class="heat" viewBox="0 0 {CELLS} {CELLS}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def node_name(node: int, num_peers: int) -> str:
    return f"peer {node}" if node < num_peers else "hub"


def _fill(shade: int) -> str:
    return f' class="cell" fill-opacity="{shade / SHADES:.2f}"' if shade else ' class="cell zero"'


def _place(node: int, num_peers: int) -> tuple[float, float]:
    if node >= num_peers:
        return CENTER, CENTER
    first = math.pi if num_peers == 2 else -math.pi / 2  # two peers stand side by side
    angle = first + 2 * math.pi * node / num_peers
    return CENTER + RADIUS * math.cos(angle), CENTER + RADIUS * math.sin(angle)


def _weight(weights: Matrix, a: int, b: int) -> float:
    """The larger of the two directions; 0 where W does not reach that far."""
    both = [weights[i][j] for i, j in ((a, b), (b, a)) if i < len(weights) and j < len(weights[i])]
    return max(both, default=0.0)
