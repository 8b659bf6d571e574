"""Reads a recipe: TOML plus `section.key=value` overrides, errors with the nearest key, remarks on keys without effect.

`load_recipe` is handed the table of methods, so that this module knows none of them.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peertune.config import AlgorithmConfig, RunConfig, Section
from peertune.errors import ConfigError

MAX_DEPTH = 20
"""Levels of a TOML file at most; ours have four."""
Methods = Mapping[str, type[AlgorithmConfig]]
ONLY_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model.train_embeddings": ("algorithm.adapter", ("none",)),
    "data.labels": ("data.task", ("classification",)),
    "data.partition.alpha": ("data.partition.kind", ("dirichlet", "quantity")),
    "topology.p": ("topology.kind", ("erdos_renyi",)),
    "topology.edges": ("topology.kind", ("edges",)),
    "topology.matrix": ("topology.kind", ("matrix",)),
    "algorithm.rank": ("algorithm.adapter", ("lora",)),
    "algorithm.lora_alpha": ("algorithm.adapter", ("lora",)),
    "algorithm.lora_dropout": ("algorithm.adapter", ("lora",)),
    "algorithm.target_modules": ("algorithm.adapter", ("lora",)),
    "algorithm.bottleneck_size": ("algorithm.adapter", ("bottleneck",)),
    "algorithm.num_virtual_tokens": ("algorithm.adapter", ("prompt", "prefix")),
    "exchange.clip_factor": ("exchange.robust", ("clip",)),
    "exchange.trim": ("exchange.robust", ("trimmed_mean",)),
}
"""Keys that mean something only where another key has one of some values."""


def load_recipe(path: str | Path | None, overrides: Sequence[str], methods: Methods) -> tuple[RunConfig, list[str]]:
    """Read a recipe.

    Args:
        path: TOML file; None stands for an empty one.
        overrides: `section.key=value` texts; the value is TOML, a bare word a string. They win over the file.
        methods: name -> the class of its [algorithm] keys.
    Returns:
        The recipe, and a line for each key that nothing uses: of another method, or of a choice not made.
    Raises:
        ConfigError: the file cannot be read, a key does not exist, or a value has the wrong type or is impossible.
    """
    tree = _read_toml(Path(path)) if path is not None else {}
    for text in overrides:
        apply_override(tree, text)
    return from_dict(tree, methods)


def from_dict(tree: Mapping[str, Any], methods: Methods) -> tuple[RunConfig, list[str]]:
    """Check a recipe given as nested dicts. Returns and raises as `load_recipe`."""
    raw = tree.get("algorithm", {})
    notes: list[str] = []
    method: type[AlgorithmConfig] = AlgorithmConfig
    if isinstance(raw, Mapping):
        name = raw.get("name", "deca")
        if not isinstance(name, str) or name not in methods:
            raise ConfigError(
                f"algorithm.name: got {name!r}, expected one of {', '.join(methods)}{_nearest(str(name), methods)}"
            )
        method = methods[name]
        others = {key for m in methods.values() for key in m.model_fields} - set(method.model_fields)
        for key in sorted(others & raw.keys()):
            users = ", ".join(n for n, m in methods.items() if key in m.model_fields)
            notes.append(f"algorithm.{key} is not used by {name} (it is a key of {users})")
        raw = {key: value for key, value in raw.items() if key not in others}
    try:
        algorithm = method.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, ("algorithm",), method)) from None
    try:
        config = RunConfig.model_validate({**tree, "algorithm": algorithm})
    except ValidationError as error:
        raise ConfigError(_explain(error, (), RunConfig)) from None
    if "train" not in config.data.model_fields_set and "test" not in config.data.model_fields_set:
        config = config.model_copy(update={"data": config.data.model_copy(update={"test": "stdlib-test"})})
    return config, notes + _unused(config)


def _unused(config: RunConfig) -> list[str]:
    """A line for each key of `ONLY_WITH` that is set although the other key is not."""
    values = flatten(config.to_dict())
    defaults = flatten(RunConfig(algorithm=type(config.algorithm)()).to_dict())
    return [
        f"{key} is not used with {other} = {values[other]!r} (but with {', '.join(map(repr, users))})"
        for key, (other, users) in ONLY_WITH.items()
        if values[key] != defaults[key] and values[other] not in users
    ]


def keys_of(section: type[Section], prefix: str = "") -> list[str]:
    """All dotted keys below a section, in order."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += keys_of(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML says that may come from anybody.

    Raises:
        ValueError: it is none, holds a number that Python does not read, or is nested as nothing of ours is.
    """
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return tree


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; expected a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set a key of nested dicts from `section.key=value`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {text!r}: expected section.key=value, such as algorithm.lr=1e-4")
    try:
        parsed = parse_toml(f"value = {value.strip()}")
    except ValueError as error:
        if value.strip()[:1] in ("[", "{"):  # as no text does; a shell takes away quotes that are not quoted
            raise ConfigError(
                f"--set {text!r}: not valid TOML: {error}; put the texts of a list into double quotes, and the whole"
                """ into single ones, as in --set 'data.labels=["yes", "no"]'"""
            ) from None
        parsed = {"value": value.strip()}
    if list(parsed) != ["value"]:
        raise ConfigError(f"--set {text!r}: expected one value")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is a value, not a section")
        node = child
    node[parts[-1]] = parsed["value"]


def _explain(error: ValidationError, prefix: tuple[str, ...], section: type[Section]) -> str:
    """One line for the first thing that is wrong: key, got, expected, nearest key."""
    problem = error.errors()[0]
    path = [str(p) for p in (*prefix, *problem["loc"]) if not _is_branch(str(p))]
    key, got = ".".join(path), json.dumps(problem["input"], default=str)
    if len(got) > 80:
        got = got[:77] + "..."
    if problem["type"] == "extra_forbidden":
        own = [f"algorithm.{k}" for k in section.model_fields] if prefix else []
        keys = list(dict.fromkeys([*own, *keys_of(RunConfig)]))
        known, place = [*dict.fromkeys(k.rpartition(".")[0] for k in keys), *keys], key.rpartition(".")[0]
        siblings = ", ".join(k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == place)
        others = f"[{place}] has {siblings}" if place else f"the sections are {siblings}"
        return f"{key}: no such key (got {got}){_nearest(key, known)}; {others}".replace("?;", "?")
    if problem["type"] == "literal_error":
        choices = str(problem["ctx"]["expected"])
        words = choices.replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: got {got}, expected {choices}{_nearest(str(problem['input']), words)}"
    return f"{key}: got {got}, expected {_expected(problem)}"


def _is_branch(part: str) -> bool:
    """Whether a part of a pydantic location names a branch of a union, not a key."""
    return part in {"str", "int", "float", "none"} or part.startswith(("list[", "constrained-"))


def _expected(problem: Any) -> str:
    if problem["type"] == "list_type" and str(problem["loc"][-1]).endswith("_modules"):
        return f"a list, such as {json.dumps([str(problem['input'])])}"
    message = str(problem["msg"]).replace("Input should be ", "")
    brief = re.sub(r"\d[\d.]{9,}", lambda digits: f"{float(digits[0]):g}", message)  # pydantic writes all zeros out
    return brief.removeprefix("a valid ")


def _nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known key with the same last part, else at the one spelled most alike; its own section first."""
    section, _, last = word.lower().rpartition(".")
    known = sorted(known, key=lambda k: k.rpartition(".")[0] != section)
    same = [k for k in known if k.rpartition(".")[2] == last]
    beside = [k for k in known if k.rpartition(".")[0] == section]
    for keys in (same, beside, known):
        by_last = {k.rpartition(".")[2]: k for k in reversed(keys)}
        if close := difflib.get_close_matches(last, by_last, 1, 0.6):
            return f"; did you mean {by_last[close[0]]}?"
    return ""
