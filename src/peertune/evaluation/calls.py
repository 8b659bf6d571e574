"""Function calls read out of what a model wrote, and compared with those it should have made.

Text is only ever read: nothing is executed or evaluated. What cannot be read is left out, and nothing raises: a model
may write anything, and a broken call counts as a call not made.

Forms that are read: JSON objects with a name and arguments (an object, or its JSON text), alone, in lists, within
`tool_calls`, `function` or `function_call`, anywhere in the text, so also within Hermes' `<tool_call>` tags or a fenced
block; and a name before an object, as in `<function=NAME>{...}` and `[TOOL_CALLS]NAME[ARGS]{...}`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 50_000
"""Of a text; what follows is not read."""

_MAX_DEPTH = 32
"""Levels of lists and objects in arguments."""

_MAX_BROKEN = 200
"""Brackets tried in vain before the rest of a text is given up: each may cost a pass over that rest."""

_DECODER = json.JSONDecoder(strict=False)  # a model may write a line break into a string
_OPENING = re.compile(r"[\[{]")
_NAMED = re.compile(r"(?:<function=|\[TOOL_CALLS\]\s*)([\w.:/-]{1,256})\s*(?:>|\[ARGS\])?\s*$")


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    name: str
    arguments: Mapping[str, Any]
    """By name; JSON values."""

    def key(self) -> Hashable:
        """Equal for calls that do the same: order-free, 1 is 1.0, texts without the space around them."""
        return self.name, _key(dict(self.arguments))


def parse_calls(text: str) -> list[Call]:
    """The calls in a text, in its order; never raises."""
    text, calls = text[:MAX_CHARS], []
    position = broken = 0
    while broken < _MAX_BROKEN and (opening := _OPENING.search(text, position)):
        start = opening.start()
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            # what is cut off or wrong further out may hold whole calls
            position = start + 1
            broken += 1
            continue
        named = _NAMED.search(text, max(0, start - 300), start)
        if named and (call := as_call(named[1], value)):
            calls.append(call)
        else:
            calls += _calls_in(value)
    return calls


def calls_of_message(message: Mapping[str, Any]) -> list[Call]:
    """The calls of an assistant's message; those that are not well formed are left out."""
    return _calls_in(message.get("tool_calls"))


def as_call(name: Any, arguments: Any) -> Call | None:
    """A call, or None where name or arguments have the wrong type."""
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict) or _too_deep(arguments):
        return None
    return Call(name.strip(), arguments)


def same_calls(made: Sequence[Call], expected: Sequence[Call]) -> bool:
    """Whether the same calls were made, each as often, in any order."""
    return Counter(call.key() for call in made) == Counter(call.key() for call in expected)


def same_names(made: Sequence[Call], expected: Sequence[Call]) -> bool:
    """Whether the same functions were called, each as often, in any order."""
    return Counter(call.name for call in made) == Counter(call.name for call in expected)


def _calls_in(value: Any, depth: int = 0) -> list[Call]:
    if depth > 4:
        return []
    if isinstance(value, list):
        return [call for item in value for call in _calls_in(item, depth + 1)]
    if not isinstance(value, dict):
        return []
    for key in ("tool_calls", "tool_call", "function_call", "function"):
        if isinstance(value.get(key), dict | list):
            return _calls_in(value[key], depth + 1)
    for key in ("arguments", "parameters"):
        if key in value:
            call = as_call(value.get("name"), value[key])
            return [call] if call else []
    return []


def _key(value: Any) -> Hashable:
    """A hashable stand-in for a JSON value."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(item)) for name, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_key, value))
    if isinstance(value, str):
        return "string", value.strip()
    if isinstance(value, bool) or value is None:  # in Python True is 1
        return "constant", str(value)
    return "number", value


def _too_deep(value: Any) -> bool:
    """Whether a value nests deeper than `_MAX_DEPTH`; found without recursion, which is what must be bounded."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [i for v in level if isinstance(v, dict | list) for i in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True
