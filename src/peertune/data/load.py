"""Read the rows of a data set and check that they have the fields the task needs.

Rows are plain dicts. What is checked here is presence and type; a row whose text is empty passes, and `render` drops
and counts it.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peertune.config import DataSection
from peertune.data.arrow import read_dataset, read_parquet
from peertune.errors import DataError

Row = dict[str, Any]
Located = Iterator[tuple[str, Row]]
"""Rows with the place each one came from, as "file:line"."""

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_EXPECTED = (
    ".jsonl, .json, .csv, .tsv or .txt (each also with .gz), .parquet, or a Hugging Face data set"
    " org/name[[:config]:split]"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS |= {"function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool"}
"""Roles by what stands in `from` where conversations are written as ShareGPT's were."""
OPTIONAL = {
    "classification": ("text_b_field",),
    "instruction": ("input_field",),
    "chat": ("system_field", "tools_field"),
}
"""By task, the keys of [data] that name a field which rows may lack."""


@dataclass(frozen=True)
class Table:
    """Rows of one or several sources."""

    rows: list[Row]
    """One dict a row, with at least the fields of the task; labels are text."""
    source: list[int]
    """source[i] is the index of the given source that row i came from ("stdlib": of the group of packages)."""

    def take(self, places: Sequence[int]) -> Table:
        """Some of the rows, by their places."""
        return Table([self.rows[i] for i in places], [self.source[i] for i in places])


def load_table(sources: str | list[str], config: DataSection, *, base: Path | None = None) -> Table:
    """Read all rows of one or several sources.

    Args:
        sources: paths, names of Hugging Face data sets ("org/name", "org/name:split" or "org/name:config:split",
            "train" where no split is named; also a local folder in the hub's layout or of `save_to_disk`), "stdlib" or
            "stdlib-test".
        config: the task and the names of its fields.
        base: folder that relative paths are tried against where the working directory does not have them.
    Returns:
        The rows in the order of the sources.
    Raises:
        DataError: a source is missing, unreadable or empty, or a row lacks a field or has one of the wrong type.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names or not all(names):
        raise DataError(f"data: got {sources!r}, expected a path or a data set name: {_EXPECTED}")
    rows: list[Row] = []
    source: list[int] = []
    for index, name in enumerate(names):
        if name in ("stdlib", "stdlib-test"):
            from peertune.data.stdlib import load_stdlib

            found, groups = load_stdlib("test" if name == "stdlib-test" else "train")
            located: Located = (("stdlib", {config.text_field: row["text"], **row}) for row in found)
            origin = groups if len(names) == 1 else [index] * len(found)
        else:
            located, origin = _open(name, config, base), []
        before = len(rows)
        rows += [_check(row, where, config) for where, row in located]
        if len(rows) == before:
            raise DataError(f"{name}: is empty; expected at least one row")
        source.extend(origin or [index] * (len(rows) - before))
    _check_optional(rows, config, ", ".join(names))
    return Table(rows, source)


def _check_optional(rows: list[Row], config: DataSection, where: str) -> None:
    """Refuse the name of an optional field that was set and that no row has: it is a wrong one. Raises DataError."""
    for key in OPTIONAL.get(config.task, ()):
        field = getattr(config, key)
        if field not in ("", type(config).model_fields[key].default) and not any(field in row for row in rows):
            raise DataError(
                f"{where}: no row has the field {field!r} (the first has {', '.join(map(str, rows[0]))}); name the"
                f" right one with data.{key}, or leave that out"
            )


def _open(name: str, config: DataSection, base: Path | None) -> Located:
    found, kind = locate(name, base), _kind(name)
    if found is None:
        hub, _, wanted = name.partition(":")
        # `data/train.xlsx` is a path with a typing error or an unknown type where there is a folder `data`
        if not kind and _HUB_NAME.fullmatch(hub) and _find(hub.split("/")[0], base) is None:
            return read_dataset(hub, wanted or "train", config.label_field)
        tried = Path(name).absolute() if base is None or Path(name).is_absolute() else f"{Path.cwd()} and {base}"
        raise DataError(f"{name}: no such file (looked in {tried}){_similar(name, base)}; expected {_EXPECTED}")
    path, split = found
    if path.is_dir():
        return read_dataset(str(path), split, config.label_field)
    if not kind:
        raise DataError(f"{name}: unknown type of file {''.join(path.suffixes[-2:])!r}; expected {_EXPECTED}")
    if kind == ".parquet":
        return read_parquet(path, name, config.label_field)
    text = _read_text(path, name)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    if kind in readers:
        return readers[kind](text, name)
    return iter([(name, {config.text_field: text})] if text.strip() else [])


def _kind(name: str) -> str:
    lower = name.lower()
    stem = lower.removesuffix(".gz")
    kind = next((k for k in _KINDS if stem.endswith(k)), "")
    return "" if kind == ".parquet" and lower.endswith(".gz") else kind


def locate(name: str, base: Path | None) -> tuple[Path, str] | None:
    """The local file or folder that a source names, as NAME or FOLDER[:CONFIG]:SPLIT, and what follows; None for none.

    Args:
        base: folder that relative paths are tried against where the working directory does not have them.
    """
    path = _find(name, base)
    if path is not None:
        return path, "train"
    parts = re.fullmatch(r"(.+?):((?:[\w.-]+:)?[\w.-]+)", name)
    folder = _find(parts[1], base) if parts else None
    return (folder, parts[2]) if parts and folder is not None and folder.is_dir() else None


def _find(name: str, base: Path | None) -> Path | None:
    for folder in (Path(), base):
        if folder is not None and (folder / name).exists():
            return folder / name
    return None


def _similar(name: str, base: Path | None) -> str:
    for folder in (Path(name).parent, (base or Path()) / Path(name).parent):
        if folder.is_dir():
            close = difflib.get_close_matches(Path(name).name, sorted(p.name for p in folder.iterdir()), 1, 0.6)
            if close:
                return f"; did you mean {Path(name).parent / close[0]}?"
    return ""


def _read_text(path: Path, name: str) -> str:
    try:
        raw = path.read_bytes()
        if name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: not a whole gzip file ({error}); copy it again or unpack it") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        raise DataError(f"{name}:1: is UTF-16 or UTF-32, or no text at all, expected UTF-8; save the file anew as that")
    try:
        return raw.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file to UTF-8"
        ) from None


def _read_jsonl(text: str, name: str) -> Located:
    # not splitlines(): U+2028 and its like may stand unescaped inside a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name}:{number}", _parse_object(line, f"{name}:{number}")


def _parse_object(line: str, where: str) -> Row:
    hint = "; a list of objects must be named .json" if line.startswith("[") else ""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}{hint}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{where}: broken JSON: {_unreadable(error)}") from None
    return _as_object(value, where, hint)


def _unreadable(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _as_object(value: Any, where: str, hint: str = "") -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: got {_type(value)}, expected a JSON object with a field for each column{hint}")
    return value


def _read_json(text: str, name: str) -> Located:
    try:
        values = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        place, reason = (error.lineno, error.msg) if is_syntax else (1, _unreadable(error))  # type: ignore[union-attr]
        raise DataError(
            f"{name}:{place}: broken JSON: {reason}; a file of one object a line must be named .jsonl"
        ) from None
    if not isinstance(values, list):
        raise DataError(f"{name}: got {_type(values)}, expected a list of objects; one object a line is .jsonl")
    for number, value in enumerate(values, 1):
        yield f"{name}, row {number}", _as_object(value, f"{name}, row {number}")


def _read_csv(text: str, name: str) -> Located:
    limit = csv.field_size_limit(len(text) + 1)  # whole documents may stand in one cell; the default is 131072
    file = io.StringIO(text, newline="")
    separator = max(",;\t|", key=lambda separator: _num_cells(file, separator))  # a comma where nothing splits the rows
    file.seek(0)
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num}: broken CSV: {error}; expected {separator!r} between cells, and a quote within a"
            " quoted cell doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)
    header = lines[0][1] if lines else []
    named = [column for column in header if column]  # spreadsheets leave columns without a name, and cells, behind
    if len(set(named)) < len(named):
        raise DataError(f"{name}:1: two columns have the same name; got {', '.join(named)}; rename one")
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{name}:{number}: got {len(cells)} cells, expected {len(header)} as in the first line, with"
                f" {separator!r} between them"
            )
        yield f"{name}:{number}", dict(zip(header, cells, strict=True))


def _num_cells(file: io.StringIO, separator: str) -> int:
    """Into how many cells it splits each of the first two rows of a CSV file; 1 where it does not split them alike.

    Spreadsheets write semicolons where a comma is the decimal point.
    """
    file.seek(0)
    counts = [len(cells) for cells in islice(filter(None, csv.reader(file, delimiter=separator)), 2)]
    return counts[0] if len(counts) == 2 and counts[0] == counts[1] else 1


def _check(row: Row, where: str, config: DataSection) -> Row:
    """The row with its label as text and its messages as a list; raises where a field is missing or of a wrong type."""
    if config.task == "text":
        _text(row, where, "text_field", config)
    elif config.task == "classification":
        _text(row, where, "text_field", config)
        _text(row, where, "text_b_field", config, optional=True)
        row = {**row, config.label_field: _label(row, where, config)}
    elif config.task == "instruction":
        _text(row, where, "instruction_field", config)
        _text(row, where, "input_field", config, optional=True)
        _text(row, where, "output_field", config)
    else:
        _text(row, where, "system_field", config, optional=True)
        messages, system = _messages(row, where, config), row.get(config.system_field)
        if system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        row = {**row, config.messages_field: messages}
        if row.get(config.tools_field) is not None:
            row[config.tools_field] = _objects(row[config.tools_field], where, config.tools_field, "tools_field")
    return row


def _value(row: Row, where: str, key: str, config: DataSection) -> Any:
    field = getattr(config, key)
    if field not in row:
        has = ", ".join(map(str, row)) or "no field at all"
        raise DataError(f"{where}: no field {field!r} (it has {has}); name the right one with data.{key}")
    return row[field]


def _text(row: Row, where: str, key: str, config: DataSection, optional: bool = False) -> None:
    if optional and getattr(config, key) not in row:
        return
    value = _value(row, where, key, config)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field {getattr(config, key)!r} is {_type(value)}, expected text (data.{key})")
    _check_encodable(value or "", where)


def _label(row: Row, where: str, config: DataSection) -> str:
    value = _value(row, where, "label_field", config)
    if isinstance(value, float) and not value % 1:  # where cells are missing, pandas has no integers
        value = int(value)
    if value is None or value != value:  # NaN is how it writes a missing one
        return ""
    if not isinstance(value, str | int):
        raise DataError(
            f"{where}: field {config.label_field!r} is {_type(value)}, expected text, an integer or a boolean "
            "(data.label_field)"
        )
    _check_encodable(str(value), where)
    return str(value).strip()


def _objects(value: Any, where: str, field: str, key: str = "") -> list[Row]:
    """A field's list of objects, or its JSON text as CSV files have it.

    Args:
        key: that of [data] which names the field, if any.
    """
    named = f" (data.{key})" if key else ""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError:
            pass  # reported below as text where a list was expected
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: field {field!r}: broken JSON: {_unreadable(error)}{named}") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        got = _type(value) if not isinstance(value, list) else "a list that does not hold objects only"
        raise DataError(f"{where}: field {field!r} is {got}, expected a list of objects{named}")
    _check_encodable(json.dumps(value, ensure_ascii=False), where)
    return value


def _messages(row: Row, where: str, config: DataSection) -> list[Row]:
    messages = []
    value = _value(row, where, "messages_field", config)
    for number, message in enumerate(_objects(value, where, config.messages_field, "messages_field"), 1):
        place = f"{where}, message {number}"
        if "role" not in message and "from" in message:
            message = _of_sharegpt(message, place)
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{place}: no text in field 'role' (it has {', '.join(message)}), expected role and content"
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise DataError(f"{place}: content has a part that is not text, expected text only")
            content = "".join(texts)
        if content is not None and not isinstance(content, str):
            raise DataError(f"{place}: content is {_type(content)}, expected text")
        # templates test for presence
        kept = {key: value for key, value in message.items() if value is not None}
        messages.append({**_with_tool_calls(kept, place), "content": content or ""})
    return messages


def _of_sharegpt(message: Row, where: str) -> Row:
    """A message with `from` and `value` as one with role and content; a call's value is its JSON text."""
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where}: field 'from' is {speaker!r:.40}, expected one of {', '.join(_SPEAKERS)}")
    said: Row = {"content": value}
    if speaker == "function_call":
        is_one = isinstance(value, str) and value.lstrip().startswith("{")
        calls = _objects(f"[{value}]" if is_one else value, where, "value")
        said = {"tool_calls": [{"type": "function", "function": call} for call in calls]}
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], **rest, **said}


def _with_tool_calls(message: Row, where: str) -> Row:
    """A message whose calls are a list of objects, also where it has them as their JSON text or in the older form.

    That is one `function_call` of an assistant, answered by the role "function"; templates know those above and "tool".
    """
    older = message.get("function_call")
    if older is not None:
        if not isinstance(older, dict):
            raise DataError(f"{where}: field 'function_call' is {_type(older)}, expected an object")
        message = {key: value for key, value in message.items() if key != "function_call"}
        message = {"tool_calls": [{"type": "function", "function": older}], **message}
    if message["role"] == "function":
        message = {**message, "role": "tool"}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        calls = _objects([calls] if isinstance(calls, dict) else calls, where, "tool_calls")
        message = {**message, "tool_calls": calls}
    return message


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: holds half of a surrogate pair, which is no character; write the file anew"
        ) from None


def _type(value: Any) -> str:
    names: dict[type, str] = {bool: "a boolean", int: "an integer", float: "a number", str: "text"}
    names |= {type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
