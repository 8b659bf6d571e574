"""Metrics of any model on data files and public benchmarks; no run is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from peertune.algorithms import METHODS
from peertune.config import DataSection, EvalSection, ModelSection, Task
from peertune.data.load import load_table
from peertune.data.render import Rows, find_labels
from peertune.errors import ConfigError, DataError
from peertune.evaluation import measure, require_harness, run_harness
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_tokenizer, load_trained
from peertune.prepare import check_vocabulary, class_names, drawn, held_out
from peertune.recipe import apply_override, from_dict
from peertune.run_folder import read_labels


def evaluate_model(
    model: str,
    files: Sequence[str],
    task: Task | None,
    settings: EvalSection,
    *,
    max_length: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    harness_tasks: Sequence[str] = (),
    trust_remote_code: bool = False,
    overrides: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Measure a model folder or hub name on data files, then on tasks of lm-evaluation-harness.

    For classification the labels are those of `data.labels`; where that is not set, those that came with the model if a
    file has no others, else the file's.

    Args:
        task: of all files.
        settings: how many rows of a file are used at most, drawn from all of them, and how many are answered by
            generation.
        max_length: longest sequence, tokens; 0: 256 for files, the model's own for the harness.
        dtype: type the model's weights are held in.
        harness_tasks: names the harness knows.
        trust_remote_code: let code run that comes with the model, such as exported bottlenecks need.
        overrides: `data.key=value` texts, such as the names of the files' fields.
    Yields:
        For each file "data", its "rows", how many of them were "cut" to the longest length and how many "samples" of
        them were measured, for classification the number of "labels"; its metrics, and "by_client" where rows have a
        client. For each task of the harness "lm_eval" and its metrics.
    Raises:
        ConfigError: there are files and no task, a setting means nothing for the task, an override is no key of [data],
            or the harness is not installed or refuses.
        ModelError, DataError: model or data cannot be used.
    """
    if harness_tasks:
        require_harness()
    if files and task is None:
        raise ConfigError("--task: got none, expected text, classification, instruction or chat beside --data")
    if settings.generate_samples and task in ("text", "classification"):
        raise ConfigError(f"--generate: got it with --task {task}, expected instruction or chat, which have answers")
    if settings.choice_samples and task not in ("chat", None):
        raise ConfigError(f"--choices: got it with --task {task}, expected chat, whose rows offer functions")
    chosen = ModelSection(path=model, trust_remote_code=trust_remote_code, dtype=dtype)
    if max_length:
        chosen = chosen.model_copy(update={"max_length": max_length})
    # every file is read before the model, so that a wrong one is known at once
    sections = [_section(data, task, overrides) for data in files if task is not None]
    tables = [load_table(section.train, section).rows for section in sections]
    tokenizer = load_tokenizer(chosen)
    read = []
    for rows, section in zip(tables, sections, strict=True):
        names = _labels(model, rows, section) if section.task == "classification" else []
        try:
            read.append(held_out(drawn(rows, settings.max_samples, 0), section, tokenizer, chosen.max_length, names))
        except DataError as error:
            raise DataError(f"{section.train}: {error}") from error
    module = load_trained(chosen, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for test in read:
        check_vocabulary(module, model, test)
    measured = LanguageModel(module, chosen)
    for data, test in zip(files, read, strict=True):
        found = measure(measured, test, settings, by_client=True)
        nested = {"by_client": found.by_client} if found.by_client else {}
        counts = {"rows": test.num_rows, "cut": test.num_cut, "samples": len(test.samples)}
        counts |= {"labels": len(test.labels)} if test.labels else {}
        yield {"data": data, **counts, **found.overall, **nested}
    if harness_tasks:
        limit = settings.max_samples
        results = run_harness(module, tokenizer, harness_tasks, limit=limit, max_length=max_length)
        for name, metrics in results.items():
            yield {"lm_eval": name, **metrics}


def _labels(model: str, rows: Rows, section: DataSection) -> list[str]:
    """The classes to choose between: with fewer of them a model would seem better. Raises DataError."""
    if section.labels:
        return class_names(rows, [], section)
    known, found = read_labels(Path(model)), find_labels(rows, section, 1)
    return known if set(found) <= set(known) else find_labels(rows, section)


def _section(data: str, task: Task, overrides: Sequence[str]) -> DataSection:
    """How a file is read. Raises ConfigError."""
    tree: dict[str, Any] = {"data": {}}
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key.startswith("data.") or key in ("data.train", "data.test", "data.task"):
            raise ConfigError(
                f"--set {text!r}: got {key!r}, expected a key of [data] such as data.text_field; files and task are"
                " given by --data and --task"
            )
        apply_override(tree, text)
    tree["data"] |= {"train": data, "task": task}
    return from_dict(tree, METHODS)[0].data
