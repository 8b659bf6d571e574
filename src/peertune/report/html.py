"""What pages are put together from: the whole file, its top, boxes, tables, a recipe in colour.

Every string that did not come from this package passes through `esc`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Control characters and lone surrogates cannot stand in an HTML file.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def esc(value: object, limit: int = 400) -> str:
    """Text for HTML, quoted for attributes too, and cut to `limit` characters."""
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)


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


def page_header(heading: str, facts: Sequence[str]) -> str:
    """The top of a page. `heading` and `facts` are HTML."""
    dots = " <b>·</b> ".join(f"<span>{fact}</span>" for fact in facts)
    return f'<header><div class="brand">peertune</div><h1>{heading}</h1><p class="facts">{dots}</p></header>'


def navigation(sections: Mapping[str, str]) -> str:
    """Links to sections of the page: id -> name."""
    links = "".join(f'<a href="#{id}">{name}</a>' for id, name in sections.items())
    return f"<nav>{links}</nav>"


def card(id: str, title: str, body: str, *, wide: bool = True, lead: str = "") -> str:
    """A titled box of the page. `title`, `lead` and `body` are HTML."""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{id}" class="card{" wide" if wide else ""}"><h2>{title}</h2>{intro}{body}</section>'


def box(label: str, value: str, note: str) -> str:
    """A number with what it is above it, and a remark below. All are HTML."""
    parts = f'<div class="label">{label}</div><div class="value">{value}</div><div class="note">{note}</div>'
    return f'<div class="box">{parts}</div>'


def empty(text: str) -> str:
    """What stands where there is nothing to show yet."""
    return f'<p class="empty">{esc(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", label: str = "") -> str:
    """A table of HTML cells, the first column left-aligned; long ones scroll: with a label by the keyboard too."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    named = f' aria-label="{label}"' if label else ""
    region = f' tabindex="0" role="region"{named}' if label else ""
    inner = f'<table class="{kind}"{named}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll"{region}>{inner}</div>'


def recipe_text(config: Mapping[str, Any]) -> str:
    """A resolved recipe as the TOML that says it, in colour."""
    return f'<pre class="toml">{"".join(_toml(config, "")).rstrip()}</pre>'


def _toml(section: Mapping[str, Any], prefix: str) -> list[str]:
    lines = [
        f'<span class="k">{esc(key, 80)}</span> = {_value(value)}\n'
        for key, value in section.items()
        if not isinstance(value, Mapping) and value is not None
    ]
    if lines and prefix:
        lines.insert(0, f'<span class="s">[{esc(prefix, 120)}]</span>\n')
    if lines:
        lines.append("\n")
    for key, value in section.items():
        if isinstance(value, Mapping):
            lines += _toml(value, f"{prefix}.{key}" if prefix else str(key))
    return lines


def _value(value: object) -> str:
    kind = "t" if isinstance(value, str) else "n"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f'<span class="{kind}">{esc(text, 600)}</span>'
