"""What a run starts from: data loaded, dealt to the peers and tokenised, and checked against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peertune.config import RunConfig
from peertune.data.chat import plain_template
from peertune.data.load import load_table
from peertune.data.partition import describe_partition, partition
from peertune.data.render import Rendered, Sample, find_labels, label_tokens, render
from peertune.data.tools import LOSSES
from peertune.errors import DataError, ModelError
from peertune.evaluation import HeldOut, references, remarks
from peertune.model.load import load_tokenizer
from peertune.seeds import numpy_rng


@dataclass(frozen=True)
class Prepared:
    """Data of a run, dealt and tokenised."""

    tokenizer: Any
    train: list[Rendered]
    """By peer."""
    test: HeldOut
    labels: list[list[int]]
    """Token ids of each label; empty unless the task is classification."""
    classes: list[dict[str, Any]]
    """Who holds what, by peer, for the report."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about the rows."""


def prepare_data(config: RunConfig, base: Path | None) -> Prepared:
    """Load, deal and tokenise the data. Raises DataError, and ModelError where the tokenizer cannot be used."""
    section, seed = config.data, config.run.seed
    table = load_table(section.train, section, base=base)
    test = load_table(section.test, section, base=base) if section.test else None
    label_names = find_labels(table.rows, section) if section.task == "classification" else []
    partition_seed = seed if section.partition.seed is None else section.partition.seed
    parts = partition(table.rows, table.source, config.run.num_peers, section, partition_seed)
    tokenizer = prepare_tokenizer(config, base)
    length = config.model.max_length
    train = []
    for peer, rows in enumerate(parts):
        try:
            train.append(render([table.rows[i] for i in rows], section, tokenizer, length, label_names))
        except DataError as error:
            raise DataError(f"peer {peer}: {error}") from error
    held_out: list[Sample] = []
    if test is not None:
        held_out = render(test.rows, section, tokenizer, length, label_names).samples
        limit = config.eval.max_samples
        if limit and len(held_out) > limit:
            keep = numpy_rng(seed, "eval").choice(len(held_out), limit, replace=False)
            held_out = [held_out[i] for i in sorted(keep)]
    labels = label_tokens(tokenizer, label_names)
    known = references(test.rows, held_out, section, tokenizer) if test is not None else []
    measured = HeldOut(held_out, known, tokenizer, labels)
    return Prepared(
        tokenizer=tokenizer,
        train=train,
        test=measured,
        labels=labels,
        classes=describe_partition(table.rows, parts, section),
        notes=[*_shortened(train, length), *remarks(measured, config.eval)],
    )


def prepare_tokenizer(config: RunConfig, base: Path | None) -> Any:
    """The model's tokenizer; for conversations with the template they are rendered with, so that it is exported too."""
    tokenizer = load_tokenizer(config.model, base)
    if config.data.task in ("instruction", "chat") and tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    return tokenizer


def check_vocabulary(data: Prepared, num_embeddings: int, path: str) -> None:
    """Refuse a tokenizer that is larger than the model's embedding. Raises ModelError."""
    samples = [sample for rendered in data.train for sample in rendered.samples] + [*data.test.samples]
    largest = max(int(sample.input_ids.max()) for sample in samples)
    largest = max(largest, data.tokenizer.pad_token_id, *(token for label in data.labels for token in label), 0)
    if largest >= num_embeddings:
        raise ModelError(
            f"model.path: the tokenizer of {path!r} makes token {largest}, but the model embeds only {num_embeddings};"
            " take the tokenizer that belongs to the model"
        )


def _shortened(train: Sequence[Rendered], max_length: int) -> list[str]:
    """Says how many rows' function schemas were shortened."""
    totals: dict[str, int] = {}
    for rendered in train:
        for what, count in rendered.tools_cut.items():
            totals[what] = totals.get(what, 0) + count
    if not totals:
        return []
    # a row that lost one thing lost those before it too
    without = {what: sum(totals.get(later, 0) for later in LOSSES[i:]) for i, what in enumerate(LOSSES)}
    parts = ", ".join(f"{what} in {without[what]}" for what in LOSSES[1:] if without[what])
    return [
        f"functions of {sum(totals.values())} training rows were described shorter to fit model.max_length ="
        f" {max_length}; left out: {parts}"
    ]


def data_print(held: Sequence[Rendered]) -> str:
    """A hash of a peer's samples: a resumed run must train on the same ones."""
    digest = hashlib.sha256()
    for rendered in held:
        for sample in rendered.samples:
            digest.update(len(sample.input_ids).to_bytes(8, "little"))
            digest.update(sample.input_ids.tobytes())
            digest.update(sample.loss_mask.tobytes())
    return digest.hexdigest()


def base_print(module: nn.Module, trained: set[str]) -> str:
    """A hash of what a checkpoint leaves out of a model: the frozen weights, and the shapes of all."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if name not in trained:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
