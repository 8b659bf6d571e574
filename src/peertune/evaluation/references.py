"""What a held-out row asks for, beside its tokens: the calls to be made, the answer, whose row it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peertune.config import DataSection
from peertune.data.render import Sample
from peertune.data.tokens import Tokens, common_length, encode
from peertune.data.tools import function_name
from peertune.evaluation.calls import Call, calls_of_message, parse_calls, same_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLIENT = "client"
"""Field that names a row's natural owner."""


@dataclass(frozen=True)
class Reference:
    """What one sample is measured against, beside its own tokens."""

    client: str = ""
    prompt: Tokens | None = None
    """Tokens to generate from, int32 [length]; None where there is nothing to compare with."""
    answer: str | None = None
    """The expected text (instruction)."""
    calls: tuple[Call, ...] = ()
    """The calls expected of the last turn that makes any and is learned (chat)."""
    num_tokens: int = 0
    """Tokens after the prompt, up to the end of the answer, or of its calls."""
    readable: bool = True
    """Whether the calls, as they stand in the sample, read back the same."""
    choices: tuple[tuple[str, Sample], ...] = ()
    """For each function offered its name, and a sample whose targets are that name where the first call stands."""


def references(
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Reference]:
    """What each sample is measured against.

    Args:
        rows: those the samples were rendered from.
    """
    found = []
    for sample in samples:
        row = rows[sample.row] if sample.row >= 0 else {}
        client = str(row[CLIENT]) if row.get(CLIENT) is not None else ""
        if config.task == "instruction":
            prompt = sample.input_ids[: sample.prompt_length]
            answer = str(row[config.output_field] or "")
            found.append(Reference(client, prompt, answer, num_tokens=int(sample.loss_mask.sum())))
        elif config.task == "chat" and sample.calls:
            found.append(_of_calls(client, row, sample, config, tokenizer))
        else:
            found.append(Reference(client))
    return found


def end_tokens(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that end what is to be learned: a template may close its turns with one of its own."""
    last = {int(sample.input_ids[np.flatnonzero(sample.loss_mask)[-1]]) for sample in samples}
    return sorted(last & set(tokenizer.added_tokens_decoder))


def only_calls(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that make calls, with nothing else to be predicted."""
    found = []
    for sample in samples:
        mask = np.zeros(len(sample.input_ids), dtype=np.bool_)
        for start, end in sample.calls:
            mask[start:end] = True
        mask[:1] = False
        if mask.any():
            found.append(Sample(sample.input_ids, mask, row=sample.row))
    return found


def _of_calls(
    client: str, row: Mapping[str, Any], sample: Sample, config: DataSection, tokenizer: PreTrainedTokenizerBase
) -> Reference:
    made = [c for m in row[config.messages_field] if m["role"] == "assistant" and (c := calls_of_message(m))]
    start, end = sample.calls[-1]
    written = tokenizer.decode(sample.input_ids[start:end], clean_up_tokenization_spaces=False)
    assert isinstance(written, str)
    read = parse_calls(written)
    # The row's last turns may be cut off, or not be learned: which one this is is known where it reads back.
    calls = next((calls for calls in reversed(made) if same_calls(read, calls)), [])
    is_other = len(sample.calls) < len(made)  # maybe
    if not calls and (not made or is_other or made[-1][0].name not in written):  # or it says them in some other way
        return Reference(client, readable=False)
    expected = calls or made[-1]
    before = np.flatnonzero(~sample.loss_mask[:start])
    turn = int(before[-1]) + 1 if len(before) else start
    offered = [name for tool in row.get(config.tools_field) or () if (name := function_name(tool))]
    return Reference(
        client,
        sample.input_ids[:turn],
        calls=tuple(expected),
        num_tokens=end - turn,
        readable=bool(calls),
        choices=_choices(sample, start, end, written, expected[0].name, offered, tokenizer),
    )


def _choices(
    sample: Sample,
    start: int,
    end: int,
    written: str,
    name: str,
    offered: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[str, Sample], ...]:
    """The functions offered as continuations of what stands before the first call's name.

    A name goes with the character after it, so that one that another begins with is told from it. Empty where fewer
    than two are offered, or where the tokenizer does not encode the call alone as it does within the conversation.
    """
    names = list(dict.fromkeys([name, *offered]))
    at = written.find(name)
    after = written[at + len(name) : at + len(name) + 1]
    if len(names) < 2:
        return ()
    tails = encode(tokenizer, [written[:at] + candidate + after for candidate in names])
    shared = min(common_length(tails[0], tail) for tail in tails[1:])
    true, whole = tails[0], sample.input_ids[start:end]
    # the last token may hold more than the one character after the name
    if common_length(true, whole) < len(true) - 1 or any(len(tail) <= shared for tail in tails):
        return ()
    found = []
    for candidate, tail in zip(names, tails, strict=True):
        ids = np.concatenate([sample.input_ids[:start], tail])
        found.append((candidate, Sample(ids, np.arange(len(ids)) >= start + shared)))
    return tuple(found)
