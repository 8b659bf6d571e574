"""Rows to token sequences, with a mask of the tokens to be predicted.

- text: documents, each followed by the end token, packed into sequences of max_length.
- classification: text, "\\n" text_b where there is one, "\\nLabel:" and " " label; the label is to be predicted.
- instruction, chat: the model's chat template; what the assistant says is to be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peertune.config import DataSection
from peertune.data.chat import ChatRenderer
from peertune.data.tokens import bos_tokens, encode
from peertune.data.tools import LOSSES
from peertune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, Any]]

_CUE = "\nLabel:"
_MISSING = {"NaN", "nan", "<NA>"}
"""What stands in a CSV file for a missing cell, written by pandas with `na_rep` or as text."""


@dataclass(frozen=True)
class Sample:
    """One sequence."""

    input_ids: NDArray[np.int32]
    """[length]"""
    loss_mask: NDArray[np.bool_]
    """[length], True where that token is a target to predict; never at position 0"""
    label: int = -1
    """Index into the labels (classification)."""
    prompt_length: int = 0
    """Tokens before the label or before the assistant's last turn; 0 for text."""
    row: int = -1
    """Index of its row among those rendered; -1 for text, which is packed."""
    calls: tuple[tuple[int, int], ...] = ()
    """Tokens [start, end) of the calls of each assistant turn that makes any."""


@dataclass(frozen=True)
class Rendered:
    """The samples of some rows, and what became of the rows."""

    samples: list[Sample]
    num_cut: int
    """Rows that were longer than max_length and lost a part, beside what was said of functions. Text is packed."""
    num_dropped: int
    """Rows with nothing to learn from: an empty text or answer, or no room for one."""
    num_tokens: int
    tools_cut: Mapping[str, int] = field(default_factory=dict)
    """Rows whose function schemas were shortened to make room, by what the schemas lost; see `data.tools.LOSSES`."""


def find_labels(rows: Rows, config: DataSection, at_least: int = 2) -> list[str]:
    """The classes of a data set: its distinct labels, sorted. Rows without a label do not count.

    Raises:
        DataError: there are fewer than `at_least`, or what pandas makes of missing cells is among them.
    """
    labels = sorted({row[config.label_field] for row in rows} - {""})
    missing = next((label for label in labels if label in _MISSING), None)
    if missing:
        raise DataError(
            f"data: got label {missing!r} in field {config.label_field!r}, which stands for a missing cell, expected a"
            " class; leave such cells empty, as rows without a label are left out"
        )
    fraction = next((label for label in labels if label.endswith(".0") and label[:-2] in labels), None)
    if fraction:
        raise DataError(
            f"data: got labels {fraction.removesuffix('.0')!r} and {fraction!r} in field {config.label_field!r},"
            " expected one name for a class: where cells are missing, pandas writes integers with a fraction; write"
            " the files alike"
        )
    if len(labels) < at_least:
        got = f"only the class {labels[0]!r}" if labels else "no label at all"
        files = config.train if isinstance(config.train, str) else ", ".join(config.train)
        raise DataError(
            f"{files}: got {got} in field {config.label_field!r} of {len(rows)} rows, expected at least"
            f" {at_least} classes; name the right field with data.label_field"
        )
    return labels


def listed(labels: Sequence[str]) -> str:
    """The first classes, as an error names them."""
    return ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
    """Token ids of " " + label as they follow "Label:", for each label.

    The probability of a label is the product of its tokens'. So where one's begin another's, as numbers' digits may,
    each ends with the token for a text's end, without which the longer one could not win.

    Raises:
        DataError: a label has no token, two labels have the same ones, or one's begin another's and there is no such
            token.
    """
    cue, *joined = encode(tokenizer, ["Label:", *(f"Label: {label}" for label in labels)])
    # encoded alone, a label would get a second leading space from tokenizers that put one before every text
    alone = encode(tokenizer, [f" {label}" for label in labels])
    tokens: list[list[int]] = []
    for both, single in zip(joined, alone, strict=True):
        follows = len(both) > len(cue) and bool((both[: len(cue)] == cue).all())
        tokens.append((both[len(cue) :] if follows else single).tolist())
    for index, ids in enumerate(tokens):
        if not ids or ids in tokens[:index]:
            other = f"the same tokens as {labels[tokens.index(ids)]!r}" if ids else "no token"
            raise DataError(f"data: the model's tokenizer gives label {labels[index]!r} {other}; rename the label")
    whole = {tuple(ids): label for label, ids in zip(labels, tokens, strict=True)}
    for label, ids in zip(labels, tokens, strict=True):
        shorter = next((whole[start] for end in range(1, len(ids)) if (start := tuple(ids[:end])) in whole), None)
        if shorter is not None and tokenizer.eos_token_id is not None:
            return [[*ids, tokenizer.eos_token_id] for ids in tokens]
        if shorter is not None:
            raise DataError(
                f"data: the model's tokenizer begins label {label!r} with all tokens of label {shorter!r}, which would"
                " always be the likelier of the two, and has no token for a text's end; rename one, such as by a"
                " distinguishing word put first"
            )
    return tokens


def render(
    rows: Rows,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[str] = (),
) -> Rendered:
    """Turn rows into samples of at most max_length tokens.

    Args:
        rows: as `load_table` gives them.
        config: the task and the names of its fields.
        tokenizer: the model's.
        max_length: longest sample, tokens.
        labels: the training rows' classes (classification); empty: those of `rows`.
    Returns:
        The samples, in the order of the rows, and counts.
    Raises:
        DataError: a label that is not among `labels`, a conversation that the chat template refuses, or rows of which
            none leaves a token to be predicted.
    """
    tools_cut: dict[str, int] = {}
    if config.task == "text":
        samples, num_cut, num_dropped = _pack(rows, config, tokenizer, max_length)
    elif config.task == "classification":
        samples, num_cut, num_dropped = _classify(rows, config, tokenizer, max_length, labels)
    else:
        samples, num_cut, num_dropped, tools_cut = _converse(rows, config, tokenizer, max_length)
    if not samples:
        if config.task == "chat" and not any(m["role"] == "assistant" for r in rows for m in r[config.messages_field]):
            roles = ", ".join(sorted({m["role"] for r in rows for m in r[config.messages_field]}))
            raise DataError(
                f"data: no turn of {len(rows)} conversations has the role 'assistant', whose words are learned; got"
                f" {roles or 'no turns'}; rename the roles"
            )
        raise DataError(
            f"data: none of {len(rows)} rows leaves a token to predict within model.max_length = {max_length}: they "
            "are empty or too long; raise model.max_length (`eval`: --max-length), or check the fields' names under"
            " [data]"
        )
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    return Rendered(samples, num_cut, num_dropped, num_tokens, tools_cut)


def _pack(
    rows: Rows, config: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Sample], int, int]:
    documents = [row[config.text_field] for row in rows if (row[config.text_field] or "").strip()]
    bos = bos_tokens(tokenizer)
    eos = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    pieces = [piece for ids in encode(tokenizer, documents) for piece in (bos, ids, eos)]
    stream = np.concatenate([*pieces, np.empty(0, dtype=np.int32)])
    samples = []
    for start in range(0, len(stream) - 1, max_length):
        ids = stream[start : start + max_length]
        if len(ids) >= 2:
            samples.append(Sample(ids, np.arange(len(ids)) > 0))
    return samples, 0, len(rows) - len(documents)


def _classify(
    rows: Rows, config: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]
) -> tuple[list[Sample], int, int]:
    labels = labels or find_labels(rows, config)
    index_of = {label: index for index, label in enumerate(labels)}
    targets = [np.array(ids, dtype=np.int32) for ids in label_tokens(tokenizer, labels)]
    bos, [cue] = bos_tokens(tokenizer), encode(tokenizer, [_CUE])
    # room for the longest label, whichever the row has: the cut must not tell the label, and any label must be scorable
    room = max_length - len(bos) - len(cue) - max(map(len, targets))
    texts = encode(tokenizer, [row[config.text_field] or "" for row in rows])
    seconds = [row.get(config.text_b_field) for row in rows]
    pairs = encode(tokenizer, ["\n" + second if second else "" for second in seconds])
    samples, num_cut = [], 0
    for number, (row, text, pair) in enumerate(zip(rows, texts, pairs, strict=True), 1):
        name = row[config.label_field]
        if name and name not in index_of:
            raise DataError(
                f"data: row {number} has label {name!r}, expected one of the training rows' labels: {listed(labels)};"
                " correct it, or add training rows with that label"
            )
        if not name or not (row[config.text_field] or "").strip() or room < 1:
            continue
        # the longer of the two is cut first
        left_pair = min(len(pair), max(room // 2, room - len(text)))
        left_text = min(len(text), room - left_pair)
        num_cut += left_pair < len(pair) or left_text < len(text)
        prompt = np.concatenate([bos, text[:left_text], pair[:left_pair], cue])
        label = index_of[name]
        ids = np.concatenate([prompt, targets[label]])
        samples.append(Sample(ids, np.arange(len(ids)) >= len(prompt), label, len(prompt), number - 1))
    return samples, num_cut, len(rows) - len(samples)


def _converse(
    rows: Rows, config: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Sample], int, int, dict[str, int]]:
    conversations = [(*_conversation(row, config), f"row {number}") for number, row in enumerate(rows, 1)]
    samples, num_cut, losses = [], 0, [0] * len(LOSSES)
    for row, fitted in enumerate(ChatRenderer(tokenizer).fit(conversations, max_length)):
        if fitted is None:
            continue
        mask = np.zeros(len(fitted.ids), dtype=np.bool_)
        for start, end in fitted.turns:
            mask[start:end] = True
        mask[:1] = False  # the first token has nothing before it to be predicted from
        if mask.any():
            num_cut += fitted.cut
            losses[fitted.loss] += 1
            calls = tuple((start, end) for start, end in fitted.calls if start < end)
            samples.append(Sample(fitted.ids, mask, -1, fitted.turns[-1][0], row, calls))
    tools_cut = {what: count for what, count in zip(LOSSES[1:], losses[1:], strict=True) if count}
    return samples, num_cut, len(rows) - len(samples), tools_cut


def _conversation(row: Mapping[str, Any], config: DataSection) -> tuple[list[dict[str, Any]], Sequence[Any] | None]:
    if config.task == "chat":
        return row[config.messages_field], row.get(config.tools_field)
    parts = [row[config.instruction_field], row.get(config.input_field)]
    request = "\n".join(part for part in parts if part and part.strip())
    answer = row[config.output_field] or ""
    if not request or not answer.strip():
        return [], None
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}], None
