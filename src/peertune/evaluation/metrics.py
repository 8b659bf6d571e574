"""All metrics of a model on held-out samples: those of `evaluate`, of calls, of generated answers; also by client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from peertune.config import EvalSection
from peertune.data.batches import collate
from peertune.data.render import Sample
from peertune.evaluation.answers import exact_match
from peertune.evaluation.calls import parse_calls, same_calls, same_names
from peertune.evaluation.generation import generate
from peertune.evaluation.likelihood import Metrics, evaluate
from peertune.evaluation.references import Reference, end_tokens, only_calls
from peertune.model.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """What models are measured on."""

    samples: Sequence[Sample]
    references: Sequence[Reference]
    """One for each sample."""
    tokenizer: PreTrainedTokenizerBase
    labels: Sequence[Sequence[int]] = ()
    """Token ids of each label (classification)."""
    num_rows: int = 0
    """Rows that the samples were drawn from."""
    num_cut: int = 0
    """Of them, those cut to the longest sample's length."""
    num_dropped: int = 0
    """Of them, those with nothing to predict."""


@dataclass(frozen=True)
class Measured:
    """Metrics of one model."""

    overall: Metrics
    by_client: dict[str, Metrics] = field(default_factory=dict)
    """The same for each client's rows alone, by name; empty where the rows name none."""


def measure(model: LanguageModel, data: HeldOut, settings: EvalSection, *, by_client: bool = False) -> Measured:
    """Metrics of a model.

    Beside those of `evaluate`, where rows make calls: "call_loss" (nats a token of the calls); with
    settings.choice_samples "function_name_choice_accuracy"; with settings.generate_samples "function_name_accuracy",
    "call_accuracy" and "calls_parsed". For instructions with settings.generate_samples "exact_match". All but the
    losses and the perplexity are shares in [0, 1].

    Args:
        by_client: also give them for each client's rows.
    """
    rows = range(len(data.samples))
    outcomes: list[dict[str, bool]] = [{} for _ in rows]
    _choose(model, data, settings.choice_samples, outcomes)
    _answer(model, data, settings, outcomes)
    clients = sorted({reference.client for reference in data.references}) if by_client else []
    if not any(clients):
        return Measured(_losses(model, data, rows) | _shares(rows, outcomes))
    held = {client: [i for i in rows if data.references[i].client == client] for client in clients}
    losses = {client: _losses(model, data, mine) for client, mine in held.items()}
    if data.labels:  # F1 is no mean of the clients'
        overall = _losses(model, data, rows)
    else:
        overall = _combine([(losses[client], [data.samples[i] for i in mine]) for client, mine in held.items()])
    parts = {client: losses[client] | _shares(mine, outcomes) for client, mine in held.items() if client}
    return Measured(overall | _shares(rows, outcomes), parts)


def remarks(data: HeldOut, settings: EvalSection) -> list[str]:
    """What a user should know about how these rows will be measured."""
    num_calls = sum(bool(sample.calls) for sample in data.samples)
    unread = sum(not reference.readable for reference in data.references)
    said = []
    if data.num_cut:
        said.append(
            f"{data.num_cut} of {data.num_rows} held-out rows were cut to model.max_length: what they are measured"
            " by may lack its end, or its question"
        )
    if data.num_dropped:
        said.append(f"{data.num_dropped} of {data.num_rows} held-out rows have nothing to predict and were left out")
    if num_calls and not settings.generate_samples:
        said.append(
            f"{num_calls} held-out rows make calls, but eval.generate_samples is 0: no answer is generated, and"
            " function_name_accuracy and call_accuracy are not measured"
        )
    can_answer = num_calls or any(reference.prompt is not None for reference in data.references)
    if settings.generate_samples and data.samples and not can_answer:
        said.append(
            f"eval.generate_samples = {settings.generate_samples} does nothing here: no held-out row is an instruction"
            " or has calls in tool_calls; calls that stand in a turn's text are learned, but not compared"
        )
    long = sum(reference.num_tokens > settings.max_new_tokens for reference in data.references)
    if long and settings.generate_samples:
        said.append(
            f"the answers of {long} of {len(data.references)} held-out rows are longer than eval.max_new_tokens ="
            f" {settings.max_new_tokens}: generated ones are cut off there, and count as wrong; raise it"
        )
    if unread:
        said.append(
            f"the calls of {unread} of {num_calls} held-out rows do not read back as the chat template writes them:"
            " they are cut off (raise model.max_length), or in a form that is not known, in which generated ones will"
            " not count"
        )
    return said


def _losses(model: LanguageModel, data: HeldOut, rows: Sequence[int]) -> Metrics:
    """What needs no answer, over some rows."""
    samples, pad_id = [data.samples[i] for i in rows], data.tokenizer.pad_token_id
    metrics = evaluate(model, samples, pad_id, labels=data.labels)
    if calling := only_calls(samples):
        metrics["call_loss"] = evaluate(model, calling, pad_id)["loss"]
    return metrics


def _combine(parts: Sequence[tuple[Metrics, Sequence[Sample]]]) -> Metrics:
    """The losses over all samples, of those over each part, each weighted by its tokens to be predicted."""
    combined: Metrics = {}
    for name, counted in (("loss", list), ("call_loss", only_calls)):
        weights = [sum(int(sample.loss_mask.sum()) for sample in counted(samples)) for _, samples in parts]
        if total := sum(weights):
            combined[name] = sum(m.get(name, 0.0) * w for (m, _), w in zip(parts, weights, strict=True)) / total
        if name == "loss":
            combined["perplexity"] = math.exp(min(combined[name], 700.0))
    return combined


def _shares(rows: Sequence[int], outcomes: Sequence[Mapping[str, bool]]) -> Metrics:
    """How often each outcome was good, over the rows that have it."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome)
    values = {name: [outcomes[i][name] for i in rows if name in outcomes[i]] for name in names}
    return {name: float(np.mean(found)) for name, found in values.items() if found}


def _choose(model: LanguageModel, data: HeldOut, limit: int, outcomes: list[dict[str, bool]]) -> None:
    """Whether, of the functions offered, one that is to be called is the likeliest where the first call names it."""
    with model.evaluating():
        for i in _spread(data.references, limit, lambda reference: bool(reference.choices)):
            expected = {call.name for call in data.references[i].calls}
            losses = {
                name: float(model.loss_sum(collate([sample], data.tokenizer.pad_token_id))[0])
                for name, sample in data.references[i].choices
            }
            outcomes[i]["function_name_choice_accuracy"] = min(losses, key=lambda name: losses[name]) in expected


def _answer(model: LanguageModel, data: HeldOut, settings: EvalSection, outcomes: list[dict[str, bool]]) -> None:
    """Whether generated answers are right."""
    chosen = _spread(data.references, settings.generate_samples, lambda reference: reference.prompt is not None)
    prompts = [prompt for i in chosen if (prompt := data.references[i].prompt) is not None]
    stop = end_tokens(data.samples, data.tokenizer) if chosen else []
    texts = generate(model, data.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, stop=stop)
    for i, text in zip(chosen, texts, strict=True):
        reference = data.references[i]
        if reference.answer is not None:
            outcomes[i]["exact_match"] = exact_match(text, reference.answer)
            continue
        made = parse_calls(text)
        outcomes[i] |= {
            "function_name_accuracy": same_names(made, reference.calls),
            "call_accuracy": same_calls(made, reference.calls),
            "calls_parsed": bool(made),
        }


def _spread(references: Sequence[Reference], limit: int, wanted: Callable[[Reference], bool]) -> list[int]:
    """At most `limit` of the rows wanted, evenly spread: files are often sorted by what they are about."""
    fit = [i for i, reference in enumerate(references) if wanted(reference)]
    return [fit[int(k * len(fit) / limit)] for k in range(limit)] if len(fit) > limit else fit
