"""Rows of Parquet files, and of data sets as the `datasets` library loads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peertune.errors import DataError


def read_parquet(path: Path, name: str, label_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, each with its place.

    Args:
        name: the file's, for errors.
        label_field: column whose class numbers become names, where the file holds those, as the hub's do.
    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: not a readable Parquet file: {reason}") from None
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{name}: two columns have the same name; got {', '.join(table.column_names)}; rename one")
    names = _class_names(table.schema.metadata, label_field)
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", _as_written(row, label_field, names)


def read_dataset(name: str, split: str, label_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set, each with its place.

    Args:
        name: the hub's, or a local folder: in the hub's layout, or written by `save_to_disk`.
        split: SPLIT or CONFIG:SPLIT.
        label_field: column whose class numbers become names.
    Raises:
        DataError: it cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = _load(name, split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\nExample of usage")[0] or type(error).__name__
        if type(error.__cause__) not in (type(None), type(error)):  # only "while generating" is said of a broken file
            reason += f": {error.__cause__}"
        reason = " ".join(reason.split())[:300].rstrip(".")
        what = "no data set in this folder" if Path(name).is_dir() else "no such file, and no data set of that name"
        raise DataError(f"{name}:{split}: {what} loads: {reason}; expected NAME[[:CONFIG]:SPLIT]") from None
    label = data.features.get(label_field)
    names = label.names if isinstance(label, datasets.ClassLabel) else []
    for number, row in enumerate(data, 1):
        yield f"{name}:{split}, row {number}", _as_written(row, label_field, names)


def _load(name: str, split: str) -> Any:
    import datasets

    config, _, split = split.rpartition(":")
    if not any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(name, config or None, split=split)
    try:
        saved = datasets.load_from_disk(name)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"what `save_to_disk` wrote there is damaged ({error!r}); save it anew") from None
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if config or split not in splits:
        raise ValueError(f"what `save_to_disk` wrote there has {', '.join(splits)} only")
    return splits[split]


def _class_names(metadata: dict[bytes, bytes] | None, field: str) -> list[str]:
    """Names of the classes of a column, as `datasets` keeps them in a Parquet file; none where it has none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][field]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _as_written(row: dict[str, Any], label_field: str, names: list[str]) -> dict[str, Any]:
    """A row with its label's name, and without the keys that Arrow adds: objects in one column get those of all rows.

    Args:
        names: of the classes, by number; none: the label stays.
    """
    label = row.get(label_field)
    if isinstance(label, int) and 0 <= label < len(names):
        row = {**row, label_field: names[label]}
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
