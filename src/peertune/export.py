"""What one does with a run afterwards: export its average model, and measure any model on a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from peertune.algorithms import METHODS
from peertune.checkpoint import CheckpointStore
from peertune.config import DataSection, ModelSection, from_dict
from peertune.data.load import load_table
from peertune.data.render import find_labels, label_tokens, render
from peertune.errors import CheckpointError
from peertune.evaluate import Metrics, evaluate
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_full_model, load_model, load_tokenizer
from peertune.optim import join_bfloat16
from peertune.prepare import prepare_model, prepare_tokenizer
from peertune.run_folder import RunFolder, check_writable, save_trained, storage_errors

Task = Literal["text", "classification", "instruction", "chat"]


def export(run: Path, to: Path) -> None:
    """Write a run's average model to a folder: the finished one, else that of the newest complete checkpoint.

    Raises:
        CheckpointError: there is no run, no checkpoint, or `to` exists already.
    """
    folder = RunFolder(run)
    if not folder.holds_run:
        raise CheckpointError(f"{run}: holds no run; expected a folder that `peertune run` wrote")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"--to: {to} exists already; name a new folder")
    check_writable(to, "--to")
    if folder.summary.exists():
        with storage_errors(to):
            shutil.copytree(folder.model if folder.model.exists() else folder.adapter, to, dirs_exist_ok=True)
        return
    recipe = folder.read_recipe()
    config, _ = from_dict(recipe["config"], METHODS)
    store = CheckpointStore(folder.checkpoints, recipe["members"])
    done = store.newest_complete()
    if done is None:
        raise CheckpointError(f"{run}: the run has no complete checkpoint yet; wait for one")
    base, cpu = Path(recipe["base"]), torch.device("cpu")
    module = prepare_model(config, cpu, base)
    weights: list[float] = store.load(0, done)[1]["consensus"]
    average: dict[str, torch.Tensor] = {}
    for peer, weight in enumerate(weights):
        tensors, state = store.load(peer, done)
        for name in state["common"]:
            high, low = tensors[f"weights/{name}"], tensors.get(f"remainder/{name}")
            master = high.float() if low is None else join_bfloat16(high, low)
            average[name] = master * weight if peer == 0 else average[name].add_(master, alpha=weight)
    own = dict(module.named_parameters())
    for name, value in average.items():
        own[name].data.copy_(value)
    save_trained(to, module, prepare_tokenizer(config, base), lambda: load_full_model(config.model, cpu, base))


def evaluate_model(model: str, data: str, task: Task, *, max_samples: int = 0, max_length: int = 256) -> Metrics:
    """Metrics of a model folder or hub name on one data file.

    For classification the labels are those found in the file.

    Args:
        max_samples: the file's first rows, at most; 0: all.
        max_length: longest sequence, tokens.
    Raises:
        ModelError, DataError: model or data cannot be used.
    """
    section = DataSection(train=data, task=task)
    rows = load_table(data, section).rows
    names = find_labels(rows, section) if task == "classification" else []
    chosen = ModelSection(path=model, max_length=max_length)
    tokenizer = load_tokenizer(chosen)
    samples = render(rows[: max_samples or None], section, tokenizer, max_length, names).samples
    module = load_model(chosen, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    metrics = evaluate(
        LanguageModel(module, chosen), samples, tokenizer.pad_token_id, labels=label_tokens(tokenizer, names)
    )
    return {"samples": len(samples), **metrics}
