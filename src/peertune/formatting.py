"""Numbers and names as people read them, on pages, in tables and in the terminal. Plain text: no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "−"  # noqa: RUF001  a real minus sign has the width of the plus
NONE = "–"  # noqa: RUF001  an en dash for what is not known
THIN = "\u202f"


def middle(text: str, limit: int) -> str:
    """A long name without its middle: what tells names apart is often at the end."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[len(text) - (limit - 1) // 2 :]}"


def number(value: float | None, digits: int = 4) -> str:
    """About `digits` significant digits; a power of ten for the very small and the very large."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.{max(0, digits - 2)}e}".partition("e")
        return f"{mantissa}e{int(power)}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}".replace(",", THIN).replace("-", MINUS)


def count(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{round(value):,}".replace(",", THIN)


def short_count(value: float) -> str:
    """A whole number with k, M or B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 10 or (value >= unit and unit > 1e3):
            return f"{value / unit:.3g}{THIN}{name}"
    return count(value)


def traffic(value: float | None) -> str:
    """Bytes on a link, decimal units."""
    return _scaled(value, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def memory(value: float | None) -> str:
    """Bytes of memory, binary units."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float | None, base: float, units: Sequence[str]) -> str:
    if value is None:
        return NONE
    power = 0
    while abs(value) >= base * 0.9995 and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{value:.0f}{THIN}{units[0]}" if power == 0 else f"{_three(value)}{THIN}{units[power]}"


def _three(value: float) -> str:
    """Three significant digits, no power of ten, no trailing zeros after the point."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def duration(value: float | None) -> str:
    """Seconds as the two largest units."""
    if value is None:
        return NONE
    if value < 60:
        return f"{_three(value)}{THIN}s"
    whole = round(value)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next(i for i, (size, _) in enumerate(units) if whole >= size)
    (size, name), rest = units[first], whole % units[first][0]
    text = f"{whole // size}{THIN}{name}"
    if first + 1 < len(units) and rest // units[first + 1][0]:
        text += f" {rest // units[first + 1][0]}{THIN}{units[first + 1][1]}"
    return text


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 1 in percent."""
    return NONE if value is None else f"{value * 100:.{digits}f}{THIN}%".replace("-", MINUS)


def signed(value: float, text: str) -> str:
    """`text`, which says how large `value` is, with the value's sign."""
    return (MINUS if value < 0 else "+") + text.lstrip(MINUS)


def plural(value: float, noun: str) -> str:
    """ "1 peer", "8 peers"."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"
