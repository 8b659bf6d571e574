"""Public benchmarks, through EleutherAI's lm-evaluation-harness where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from peertune.errors import ConfigError


def require_harness() -> Any:
    """The package `lm_eval`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval: the package lm-eval cannot be imported ({error}); install it with"
            " `pip install 'peertune[eval]'`, or leave --lm-eval out"
        ) from None


def run_harness(
    module: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int = 0, max_length: int = 0
) -> dict[str, dict[str, Any]]:
    """What the harness measures.

    Args:
        module: a transformers model.
        tasks: names of the harness's tasks.
        limit: examples of a task at most; 0: all.
        max_length: longest sequence, tokens; 0: the model's own.
    Returns:
        For each task, and each part of a group, its metrics under the harness's own names, such as "acc" and
        "exact_match/strict-match"; standard errors end in "_stderr".
    Raises:
        ConfigError: the package is not installed, or it does not know or cannot load a task.
    """
    lm_eval = require_harness()
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    length = {"max_length": max_length} if max_length else {}
    model = wrapper(pretrained=module, tokenizer=tokenizer, batch_size=8, **length)
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit or None, log_samples=False)
    except (KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--lm-eval: got {','.join(tasks)!r}, but lm-eval refuses: {reason}; `lm-eval ls tasks` lists its tasks,"
            " and most need the network for their data"
        ) from None
    return {
        task: {
            _metric(key): value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, values in found["results"].items()
    }


def _metric(key: str) -> str:
    """The harness names a metric and the filter that answers went through: "acc,none"."""
    name, _, filtered = key.partition(",")
    return name if filtered in ("", "none") else f"{name}/{filtered}"
