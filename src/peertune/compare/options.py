"""What `peertune compare` is asked for, read from the texts of its command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peertune.errors import ConfigError

Budget = Literal["samples", "bytes", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """A grid of one [algorithm] key, the same for all methods."""

    key: str
    values: tuple[float | int, ...]
    """Ascending; at least one."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A comparison to be made."""

    recipes: tuple[Path, ...]
    out: Path
    algorithms: tuple[str, ...] = ()
    """`name` or `name:key=value[:key=value]`; empty: each recipe is a contestant."""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = "samples"
    tune: Tune | None = None
    workers: int = 1
    """Cells run at a time, each in a process of its own; 1: one after the other in this process."""

    @classmethod
    def parse(
        cls,
        recipes: Sequence[str],
        out: str,
        *,
        algorithms: str | None = None,
        overrides: Sequence[str] = (),
        seeds: str = "0,1,2",
        budget: str = "samples",
        tune: str | None = None,
        workers: int = 1,
    ) -> Options:
        """The options from texts. Raises ConfigError where one cannot be used."""
        kinds: dict[str, Budget] = {kind: kind for kind in get_args(Budget)}
        if budget not in kinds:
            raise ConfigError(f"--budget: got {budget!r}, expected one of {', '.join(kinds)}")
        return cls(
            recipes=tuple(map(Path, recipes)),
            out=Path(out),
            algorithms=() if algorithms is None else _parse_algorithms(algorithms),
            overrides=tuple(overrides),
            seeds=_parse_seeds(seeds),
            budget=kinds[budget],
            tune=None if tune is None else _parse_tune(tune),
            workers=workers,
        )


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Parts of a text, but a separator within [brackets] or "quotes" is none: `deca:betas=[0.9, 0.99],local`."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter == "[") - (letter == "]")
        if letter == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _parse_algorithms(text: str) -> tuple[str, ...]:
    items = split_outside_brackets(text, ",")
    if not all(items):
        raise ConfigError(f"--algorithms: got {text!r}, expected names such as deca,local or deca:discrepancy=none")
    _refuse_twice("--algorithms", items)
    return tuple(items)


def _parse_seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds: got {text!r}, expected whole numbers from 0 on, such as 0,1,2")
    seeds = [int(part) for part in parts]
    _refuse_twice("--seeds", seeds)
    return tuple(seeds)


def _parse_tune(text: str) -> Tune:
    key, equals, listed = text.partition("=")
    key = key.strip().removeprefix("algorithm.")
    try:
        values = [json.loads(part) for part in listed.split(",")]
    except ValueError:
        values = []
    if not key or not equals or not values or not all(is_number(value) for value in values):
        raise ConfigError(f"--tune: got {text!r}, expected key=number,number,... such as lr=1e-4,3e-4,1e-3")
    _refuse_twice("--tune", values)
    return Tune(key=key, values=tuple(sorted(values)))


def is_number(value: Any) -> bool:
    """Whether it is one in TOML's sense, where true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_twice(option: str, items: Iterable[Any]) -> None:
    seen: set[Any] = set()
    for item in items:
        if item in seen:
            raise ConfigError(f"{option}: got {item} twice, expected each once")
        seen.add(item)
