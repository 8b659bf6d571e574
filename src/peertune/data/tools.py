"""Function schemas made short: as signatures, and with less said about them where a conversation needs the room.

A signature says what a JSON schema says in a third of the tokens:

    Weather.get(city: string, day?: "today"|"tomorrow" = "today") - Weather of a city.
      city - Its name, such as Berlin.

All functions of a row lose the same things, so that what is left never tells which of them is to be called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LOSSES = (
    "nothing",
    "what their arguments mean",
    "all but a sentence of what they do",
    "what they do",
    "default and allowed values",
    "types of arguments",
    "their arguments",
)
"""What schemas lose to make room, step by step; each step includes those before it. Names of functions always stay."""

_PARAMETERS = ("parameters", "input_schema", "inputSchema")
"""Keys of a function's schema, by whoever wrote it, that hold the schema of its arguments."""
_MAX_DEPTH = 6
"""Levels of a nested argument that are described."""
_MAX_REFERENCES = 3
"""References within one another that are followed: of many in each, the text would grow without bound."""


def prune(tool: Any, step: int) -> Any:
    """A function's schema without what the steps up to `LOSSES[step]` take away; what is no schema is left as it is."""
    if not isinstance(tool, Mapping) or step == 0:
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": prune(tool["function"], step)}
    pruned = dict(tool)
    description = tool.get("description")
    if isinstance(description, str):
        # an empty text, not none at all: templates may count on the key
        pruned["description"] = description if step < 2 else _sentence(description) if step < 3 else ""
    for key in _PARAMETERS:
        if isinstance(tool.get(key), Mapping):
            nothing = {"type": "object", "properties": {}}
            pruned[key] = nothing if step >= 6 else _prune_value(_resolved(tool[key]), step)
    return pruned


def signature(tool: Any) -> str:
    """A function's schema as text: a line for the function, and one for each argument with a description."""
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str):
        return schema if isinstance(schema, str) else json.dumps(schema, separators=(",", ":"), ensure_ascii=False)
    given: Mapping[str, Any] = next((schema[key] for key in _PARAMETERS if isinstance(schema.get(key), Mapping)), {})
    parameters = _resolved(given)
    head = f"{schema['name']}({_arguments(parameters, 0)})"
    lines = [_described(head, schema)]
    for name, value in _properties(parameters).items():
        if isinstance(value, Mapping) and _text(value):
            lines.append(_described(f"  {name}", value))
    return "\n".join(lines)


def function_name(tool: Any) -> str:
    """The name in a schema; "" where there is none."""
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = schema.get("name") if isinstance(schema, Mapping) else None
    return name if isinstance(name, str) else ""


def _resolved(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters with what they refer to (`$ref`) in its place, and with the parts of `allOf` as one schema.

    A bare table of arguments, whose types say which are optional, becomes a schema.
    """
    is_table = parameters and all(isinstance(value, Mapping) for value in parameters.values())
    if is_table and not {"properties", "$defs", "definitions"} & parameters.keys():
        needed = [name for name, value in parameters.items() if "optional" not in str(value.get("type"))]
        parameters = {"type": "object", "properties": parameters, "required": needed}
    used = {key: value for key, value in parameters.items() if key not in ("$defs", "definitions")}
    return dict(_inline(used, parameters, ("#",)))


def _inline(schema: Any, root: Mapping[str, Any], within: tuple[str, ...], depth: int = 0) -> Any:
    """See `_resolved`. What refers back to itself, or to nothing that is there, stays as it is.

    Args:
        within: references that this is a part of.
    """
    if depth > 4 * _MAX_DEPTH:  # an argument's level is at most `items`, `anyOf`, `properties` and its name
        return schema
    if isinstance(schema, list):
        return [_inline(item, root, within, depth + 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in within and len(within) <= _MAX_REFERENCES:
        target: Any = root
        for part in reference.removeprefix("#").split("/")[1:] if reference.startswith("#") else [reference]:
            target = target.get(part) if isinstance(target, Mapping) else None
        if isinstance(target, Mapping):
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            return _inline({**target, **rest}, root, (*within, reference), depth + 1)
    found = {key: _inline(value, root, within, depth + 1) for key, value in schema.items()}
    parts = found.get("allOf")
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return found
    del found["allOf"]
    for part in parts:
        properties = {**_properties(part), **_properties(found)}
        lists = [each.get("required") for each in (found, part)]
        required = [name for names in lists if isinstance(names, list) for name in names]
        found = {**part, **found}
        found |= ({"properties": properties} if properties else {}) | ({"required": required} if required else {})
    return found


def _prune_value(schema: Any, step: int, names: bool = False) -> Any:
    """A schema of a value, or (names) a table of them, without descriptions, then values, then types."""
    if isinstance(schema, list):
        return [_prune_value(item, step) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if names:
        there = {key: value for key, value in schema.items() if value is not None}  # see _properties
        return {key: {} if step >= 5 else _prune_value(value, step) for key, value in there.items()}
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = _prune_value(value, step, names=True)
        elif key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties"):
            kept[key] = _prune_value(value, step)
        elif key in ("type", "required") or (step < 4 and key != "description"):
            kept[key] = value
    return kept


def _arguments(schema: Mapping[str, Any], depth: int) -> str:
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    shown = []
    for name, value in _properties(schema).items():
        kind = _kind(value, depth + 1) if isinstance(value, Mapping) else ""
        text = name + ("" if name in required else "?") + (f": {kind}" if kind else "")
        if isinstance(value, Mapping) and value.get("default") is not None:
            text += f" = {_json(value['default'])}"
        shown.append(text)
    return ", ".join(shown)


def _kind(schema: Mapping[str, Any], depth: int) -> str:
    """The type of a value; "" where the schema says none."""
    for key in ("enum", "const"):
        if (values := schema.get(key)) is not None:
            return "|".join(map(_json, values)) if isinstance(values, list) else _json(values)
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list) and depth < _MAX_DEPTH:
            return "|".join(_kind(c, depth + 1) or "any" for c in choices if isinstance(c, Mapping))
    kind = schema.get("type")
    if isinstance(kind, list):
        return "|".join(map(str, kind))
    if kind == "array" and isinstance(items := schema.get("items"), Mapping) and depth < _MAX_DEPTH:
        inner = _kind(items, depth + 1) or "any"
        return f"({inner})[]" if "|" in inner else f"{inner}[]"
    if _properties(schema) and depth < _MAX_DEPTH:
        return "{" + _arguments(schema, depth) + "}"
    return str(kind or schema.get("$ref", "")).rpartition("/")[2]


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Schemas of an object's members; a table of rows fills up the members of other rows with None."""
    found = schema.get("properties")
    return {str(k): v for k, v in found.items() if v is not None} if isinstance(found, Mapping) else {}


def _text(schema: Mapping[str, Any]) -> str:
    """A schema's description on one line."""
    description = schema.get("description")
    return " ".join(description.split()) if isinstance(description, str) else ""


def _described(head: str, schema: Mapping[str, Any]) -> str:
    return f"{head} - {_text(schema)}" if _text(schema) else head


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
