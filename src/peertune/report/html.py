"""What pages are put together from. Every string that did not come from this package passes through `esc`."""

from __future__ import annotations

import html
import re

# Control characters and lone surrogates cannot stand in an HTML file.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def esc(value: object, limit: int = 400) -> str:
    """Text for HTML, quoted for attributes too, and cut to `limit` characters."""
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)
