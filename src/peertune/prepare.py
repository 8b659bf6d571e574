"""What a run starts from: its device, the data dealt and tokenised, the model with adapter and blocks, and hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peertune.config import DataSection, PartitionSection, RunConfig
from peertune.data.chat import plain_template
from peertune.data.load import Row, Table, load_table
from peertune.data.partition import describe_partition, partition, rows_of_site
from peertune.data.render import Rendered, Rows, find_labels, label_tokens, listed, render
from peertune.data.tools import LOSSES
from peertune.errors import ConfigError, DataError, ModelError
from peertune.evaluation import HeldOut, references, remarks
from peertune.model.adapters import adapter_names, add_adapter, core_of
from peertune.model.blocks import Block, partition_blocks
from peertune.model.load import load_model, load_tokenizer
from peertune.model.quantization import refuse_quantized
from peertune.seeds import derive_seed, numpy_rng

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; "auto" is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"run.device: got {name!r}, expected auto, cpu, or a GPU of this machine such as cuda:0"
        ) from error
    return device


@dataclass(frozen=True)
class Prepared:
    """Data of a run, dealt and tokenised."""

    tokenizer: Any
    train: dict[int, Rendered]
    """By peer; a site holds its own only, a server none."""
    test: HeldOut
    """What is evaluated: held-out rows, or those kept back for validation."""
    holdings: list[dict[str, Any]]
    """What each peer holds, as `describe_partition` tells it, in the order of `train`."""
    label_names: Sequence[str] = ()
    """Names of the classes, in the order of their numbers; empty but for classification."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about the rows."""


def prepare_data(config: RunConfig, base: Path | None, site: int | None = None) -> Prepared:
    """Load, deal and tokenise the data.

    Args:
        site: the peer to which all rows belong; None: they are dealt to all peers.
    Raises:
        ConfigError: rows for validation are to be evaluated, and none are kept back.
        DataError, ModelError: the data or the tokenizer cannot be used.
    """
    section, seed = config.data, config.run.seed
    on_validation = config.eval.split == "validation"
    if on_validation and not section.validation_rows:
        raise ConfigError(
            'eval.split: got "validation", but data.validation_rows = 0 keeps no rows back; set it, such as to 500'
        )
    has_rows = bool(section.train) or site is None  # a server has none
    table = load_table(section.train, section, base=base) if has_rows else Table([], [])
    test = load_table(section.test, section, base=base).rows if section.test and not on_validation else []
    label_names = class_names(table.rows, test, section, site is not None)
    num_rows = len(table.rows)
    if label_names:
        table = table.take([i for i, row in enumerate(table.rows) if row[section.label_field]])
    num_unlabelled = num_rows - len(table.rows)
    partition_seed = seed if section.partition.seed is None else section.partition.seed
    if table.rows:
        kept_by = partition_seed if section.validation_seed is None else section.validation_seed
        table, validation = keep_back(table, section.validation_rows, kept_by)
        test = validation if on_validation else test
    if site is None:
        parts = dict(enumerate(partition(table.rows, table.source, config.run.num_peers, section, partition_seed)))
    else:
        parts = {site: rows_of_site(len(table.rows), site, section, partition_seed)} if table.rows else {}
    # Nothing of a site's is dealt: of columns that a recipe names only the labels' values are in its log and report.
    dealt = section if site is None else section.model_copy(update={"partition": PartitionSection()})
    tokenizer = prepare_tokenizer(config, base)
    length = config.model.max_length
    train = {}
    for peer, rows in parts.items():
        try:
            train[peer] = render([table.rows[i] for i in rows], section, tokenizer, length, label_names)
        except DataError as error:
            raise DataError(f"peer {peer}: {error}") from error
    measured = held_out(test, section, tokenizer, length, label_names, limit=config.eval.max_samples, seed=seed)
    return Prepared(
        tokenizer=tokenizer,
        train=train,
        test=measured,
        holdings=describe_partition(table.rows, list(parts.values()), dealt),
        label_names=label_names,
        notes=[
            *([f"{num_unlabelled} training rows have no label and were left out"] if num_unlabelled else []),
            *_shortened(list(train.values()), length),
            *_cut_or_dropped(list(train.values())),
            *remarks(measured, config.eval),
        ],
    )


def held_out(
    rows: Rows,
    section: DataSection,
    tokenizer: Any,
    max_length: int,
    label_names: Sequence[str],
    *,
    limit: int = 0,
    seed: int = 0,
) -> HeldOut:
    """Held-out rows as models are measured on them.

    Args:
        rows: may be none.
        max_length: longest sample, tokens.
        label_names: the classes; empty but for classification.
        limit: samples at most, drawn by `seed`; 0: all.
    Raises:
        DataError: as `render` and `label_tokens`.
    """
    if not rows:
        return HeldOut([], [], tokenizer, label_tokens(tokenizer, label_names))
    try:
        rendered = render(rows, section, tokenizer, max_length, label_names)
    except DataError as error:
        raise DataError(f"held-out rows: {error}") from error
    samples = drawn(rendered.samples, limit, seed)
    known = references(rows, samples, section, tokenizer)
    labels = label_tokens(tokenizer, label_names)
    return HeldOut(samples, known, tokenizer, labels, len(rows), rendered.num_cut, rendered.num_dropped)


def drawn(items: Sequence[T], limit: int, seed: int) -> Sequence[T]:
    """At most `limit` held-out rows or samples, in their order; drawn by `seed`, as files are often sorted. 0: all."""
    if not limit or len(items) <= limit:
        return items
    return [items[i] for i in sorted(numpy_rng(seed, "eval").choice(len(items), limit, replace=False))]


def class_names(train: Rows, test: Rows, section: DataSection, is_site: bool = False) -> list[str]:
    """The names of the classes; none but for classification. Raises DataError.

    Where the recipe does not name them, they are those of all training rows, sorted: one that only validation rows have
    is still a class. At a site, which may lack one to learn, they are those of its test rows too.
    """
    if section.task != "classification":
        return []
    if section.labels:
        _require_known_labels([*train, *test], section)
        return section.labels
    if not (train or test):  # a server may have no rows at all
        return []
    # To learn, a site needs one; to be measured, two.
    known, at_least = ([*train, *test], 2 if test else 1) if is_site else (train, 2)
    names = find_labels(known, section, at_least)
    if is_site and train and test:
        _require_common_labels(train, test, section)
    return names


def _require_known_labels(rows: Rows, section: DataSection) -> None:
    """Refuse rows whose label is none of those that the recipe names. Raises DataError."""
    unknown = next((name for name in find_labels(rows, section, min(1, len(rows))) if name not in section.labels), None)
    if unknown is not None:
        count = sum(row[section.label_field] == unknown for row in rows)
        raise DataError(
            f"data.labels: got {count} rows with label {unknown!r} in field {section.label_field!r}, expected one of"
            f" {listed(section.labels)}; correct the rows, or name it too"
        )


def _require_common_labels(train: Rows, test: Rows, section: DataSection) -> None:
    """Refuse a site's files that have no class in common: one of them names its classes otherwise. Raises DataError."""
    own, measured = (find_labels(rows, section, 0) for rows in (train, test))
    if own and measured and not set(own) & set(measured):  # rows without any label are refused where they are used
        raise DataError(
            f"data.test: its labels ({', '.join(measured[:4])}) are none of the training rows' ({', '.join(own[:4])}),"
            " expected the same names; give both files the same, or name the right field with data.label_field"
        )


def keep_back(table: Table, num_rows: int, seed: int) -> tuple[Table, list[Row]]:
    """Split rows off for validation.

    Args:
        num_rows: how many; 0: none.
        seed: decides which.
    Returns:
        The rows to train on, in their order, and the others, in theirs.
    Raises:
        DataError: nothing would be left to train on.
    """
    if num_rows == 0:
        return table, []
    total = len(table.rows)
    if num_rows >= total:
        raise DataError(
            f"data.validation_rows: got {num_rows} of {total} training rows, expected fewer than all of them; lower it"
        )
    kept = set(numpy_rng(seed, "validation").choice(total, num_rows, replace=False).tolist())
    return table.take([i for i in range(total) if i not in kept]), [table.rows[i] for i in sorted(kept)]


def prepare_tokenizer(config: RunConfig, base: Path | None) -> Any:
    """The model's tokenizer; for conversations with the template they are rendered with, so that it is exported too."""
    tokenizer = load_tokenizer(config.model, base)
    if config.data.task in ("instruction", "chat") and tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    return tokenizer


def prepare_model(config: RunConfig, device: torch.device, base: Path | None) -> nn.Module:
    """The base model with the adapter that the method trains, if any; the same on every peer.

    Raises:
        ModelError, ConfigError: as `load_model` and `add_adapter`; too few positions; an adapter on random weights, or
            in the base's place.
    """
    if config.model.init == "random" and config.algorithm.adapter != "none":
        # The base would never learn, and whoever merges or loads the adapter later does not have it.
        raise ConfigError(
            f'model.init: got "random" with algorithm.adapter = {config.algorithm.adapter!r}, expected "pretrained"'
            " below an adapter; change one of the two"
        )
    module = load_model(config.model, device, base, seed=derive_seed(config.run.seed, "base"))
    if getattr(module, "_hf_peft_config_loaded", False):  # transformers puts it on its base; it cannot be saved whole
        raise ModelError(
            f"model.path: {config.model.path!r} is an adapter, expected a whole model; merge it into its base (peft's"
            " merge_and_unload), save that, and name its folder"
        )
    positions = getattr(module.config, "max_position_embeddings", None) or math.inf
    virtual = config.algorithm.num_virtual_tokens if config.algorithm.adapter in ("prompt", "prefix") else 0
    if config.model.max_length + virtual > positions:
        room = int(positions) - virtual
        raise ConfigError(
            f"model.max_length: got {config.model.max_length} beside {virtual} virtual tokens, but"
            f" {config.model.path!r} has {positions} positions for both; {f'lower it to {room}, or ' * (room >= 8)}take"
            " fewer (algorithm.num_virtual_tokens)"
        )
    return add_adapter(module, config.algorithm, derive_seed(config.run.seed, "adapter"))


def model_blocks(config: RunConfig, module: nn.Module, frozen: Sequence[str] = ()) -> list[Block]:
    """The blocks of what is trained.

    Args:
        module: as `prepare_model` gives it.
        frozen: an adapter's parameters whose name holds one of these texts stay as they are.
    Raises:
        ModelError: what would be trained is held in 4 bits.
    """
    layers = getattr(config.algorithm, "layers_per_block", 0)
    kind = config.algorithm.adapter
    if kind == "none":
        embeddings = config.model.train_embeddings
        if config.model.init == "random" and embeddings == "untied":
            embeddings = "all"  # random ones that stay frozen would never learn
        blocks = partition_blocks(module, layers, embeddings)
    else:
        names = {name for name in adapter_names(module) if not any(text in name for text in frozen)}
        blocks = partition_blocks(module, layers if kind in ("lora", "bottleneck") else 0, only=names)
    refuse_quantized(module, {name for block in blocks for name in block.parameters})
    return blocks


def check_vocabulary(module: torch.nn.Module, path: str, test: HeldOut, train: Iterable[Rendered] = ()) -> None:
    """Refuse a tokenizer that is larger than the model's embedding. Raises ModelError."""
    num_embeddings = core_of(module).get_input_embeddings().weight.shape[0]
    samples = [*(sample for rendered in train for sample in rendered.samples), *test.samples]
    largest = max((int(sample.input_ids.max()) for sample in samples), default=0)
    largest = max(largest, test.tokenizer.pad_token_id, *(token for label in test.labels for token in label), 0)
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


def _cut_or_dropped(train: Sequence[Rendered]) -> list[str]:
    """Says how many rows lost a part or all of themselves."""
    cut, dropped = sum(rendered.num_cut for rendered in train), sum(rendered.num_dropped for rendered in train)
    if not cut and not dropped:
        return []
    return [f"{cut} training rows were cut to model.max_length, {dropped} had nothing to learn from"]


def data_fingerprint(held: Sequence[Rendered]) -> str:
    """A hash of a peer's samples: a resumed run must train on the same ones."""
    digest = hashlib.sha256()
    for rendered in held:
        for sample in rendered.samples:
            digest.update(len(sample.input_ids).to_bytes(8, "little"))
            digest.update(sample.input_ids.tobytes())
            digest.update(sample.loss_mask.tobytes())
    return digest.hexdigest()


def base_fingerprint(module: nn.Module, trained: set[str]) -> str:
    """A hash of what a checkpoint leaves out of a model: frozen weights, stored buffers, scales, and all shapes."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor, content: bool) -> None:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if content:
            # Flat, because a tensor without dimensions has no view of its bytes.
            flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(flat)

    for name, parameter in module.named_parameters():
        add(name, parameter, name not in trained)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            add(name, tensor, True)
    return digest.hexdigest()
