"""`peertune run --help`: every key of a recipe, from the sections' own docstrings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin


def _keys_help() -> str:
    """All keys of a recipe with defaults and what they mean, from the sections' own docstrings."""
    from peertune.algorithms import METHODS
    from peertune.config import RunConfig, Section

    lines = ["keys of a recipe (set in the TOML file or with --set); in brackets, methods with another default:"]

    def shown(field: Any) -> str:
        return json.dumps(field.default, default=str)

    def line(name: str, field: Any, remark: str = "", after: str = "") -> None:
        meaning = " ".join((field.description or "").split())
        allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if len(allowed) > 1:
            meaning += f" One of {', '.join(allowed)}."
        lines.append(f"    {name} = {shown(field)}".ljust(38) + remark + meaning + after)

    def users_of(key: str) -> list[str]:
        return [method for method, config in METHODS.items() if key in config.model_fields]

    def elsewhere(key: str, users: Sequence[str]) -> str:
        """Methods' defaults of a key, where they are not the first one's."""
        found: dict[str, list[str]] = {}
        for user in users:
            found.setdefault(shown(METHODS[user].model_fields[key]), []).append(user)
        found.pop(shown(METHODS[users[0]].model_fields[key]))
        told = "; ".join(f"{', '.join(methods)}: {default}" for default, methods in found.items())
        return f" [{told}]" if told else ""

    def show(section: type[Section], prefix: str) -> None:
        lines.append(f"\n  [{prefix}]")
        inner: list[tuple[str, type[Section]]] = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                inner.append((name, kind))
                continue
            line(name, field, after=elsewhere(name, users_of(name)) if prefix == "algorithm" else "")
        for name, kind in inner:
            show(kind, f"{prefix}.{name}")

    for name, field in RunConfig.model_fields.items():
        if name == "algorithm":
            show(METHODS["deca"], name)
            lines.append("\n  [algorithm], of other methods")
            known = METHODS["deca"].model_fields.keys()
            for key in sorted({key for m in METHODS.values() for key in m.model_fields} - known):
                by_meaning: dict[str | None, list[str]] = {}
                for method in users_of(key):
                    by_meaning.setdefault(METHODS[method].model_fields[key].description, []).append(method)
                for users in by_meaning.values():
                    remark = f"({', '.join(users)}) "
                    line(key, METHODS[users[0]].model_fields[key], remark, elsewhere(key, users))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            show(field.annotation, name)
    return "\n".join(lines)


class KeysHelp(argparse.Action):
    """`peertune run --help` with all keys; made only when asked for, as it loads the methods."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = _keys_help()
        parser.print_help()
        parser.exit()
