"""Metrics of a model on held-out rows: loss and perplexity; accuracy and macro F1 by the likelihood of label words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from peertune.data.batches import collate
from peertune.data.render import Sample
from peertune.model.language_model import LanguageModel

Metrics = dict[str, float]


def evaluate(
    model: LanguageModel,
    samples: Sequence[Sample],
    pad_id: int,
    *,
    labels: Sequence[Sequence[int]] = (),
    batch_size: int = 32,
) -> Metrics:
    """Metrics over samples.

    Args:
        labels: token ids of each label, for classification; then accuracy and macro F1 are added.
        batch_size: sequences at a time; longer ones go together, so little is padding.
    Returns:
        "loss" (nats a target token), "perplexity", and for classification "accuracy", "macro_f1" in [0, 1].
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    total, count = 0.0, 0
    predicted = np.zeros(len(samples), dtype=np.int64)
    with model.evaluating():
        score = label_scores if not labels or _cache_is_exact(model, samples, pad_id, labels) else label_scores_plainly
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            chosen = [samples[i] for i in members]
            if labels:
                scores = score(model, chosen, pad_id, labels)
                predicted[members] = scores.argmax(1).numpy()
                total -= float(scores[torch.arange(len(chosen)), torch.tensor([s.label for s in chosen])].sum())
                count += sum(len(labels[s.label]) for s in chosen)
            else:
                loss, targets = model.loss_sum(collate(chosen, pad_id))
                total += float(loss)
                count += targets
    mean = total / max(1, count)
    metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    if labels:
        truth = np.array([s.label for s in samples])
        metrics |= {"accuracy": float((predicted == truth).mean()), "macro_f1": macro_f1(truth, predicted)}
    return metrics


def label_scores(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> Tensor:
    """log p(label | prompt) for each sample and label, summed over the label's tokens.

    The prompt is run once; labels of more than one token continue from its keys and values. Not every architecture
    allows that with padded prompts: `evaluate` asks `_cache_is_exact` first. Called within `model.evaluating()`.

    Args:
        labels: token ids of each label.
    Returns:
        float64 [samples, labels] on the CPU.
    """
    device = model.device
    lengths = torch.tensor([s.prompt_length for s in samples])
    prompts = torch.full((len(samples), int(lengths.max())), pad_id)
    for row, sample in zip(prompts, samples, strict=True):
        row[: sample.prompt_length] = torch.as_tensor(sample.input_ids[: sample.prompt_length].astype(np.int64))
    many = any(len(label) > 1 for label in labels)
    mask = (torch.arange(prompts.shape[1]) < lengths[:, None]).long()
    # No mask yet: padding comes after all that counts, and the fast causal attention applies.
    hidden, past = model.hidden(prompts.to(device), use_cache=many)
    first = _logits(model, hidden[torch.arange(len(samples)), lengths - 1])
    scores = torch.stack([first[:, label[0]] for label in labels], 1)
    for j, label in enumerate(labels):
        if len(label) == 1:
            continue
        head = torch.tensor(label[:-1]).expand(len(samples), -1)
        seen = torch.cat([mask, torch.ones_like(head)], 1)
        step, past = model.hidden(head.to(device), seen.to(device), use_cache=True, past=past)
        past.crop(1 - len(label))
        for t in range(len(label) - 1):
            scores[:, j] += _logits(model, step[:, t])[:, label[t + 1]]
    return scores.double().cpu()


def label_scores_plainly(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> Tensor:
    """As `label_scores`, but every prompt is run anew with every label: as many times slower as there are labels."""
    columns = []
    for label in labels:
        whole = [replace(s, input_ids=np.concatenate([s.input_ids[: s.prompt_length], label])) for s in samples]
        ids = collate([replace(s, loss_mask=np.zeros(len(s.input_ids), bool)) for s in whole], pad_id).input_ids
        where = torch.tensor([s.prompt_length - 1 for s in samples])[:, None] + torch.arange(len(label))
        # Of all places, those few are copied as float32.
        logits = model.all_logits(ids.to(model.device))[torch.arange(len(samples))[:, None], where].float()
        picked = logits.log_softmax(-1)[:, torch.arange(len(label)), torch.tensor(label)]
        columns.append(picked.sum(1).double().cpu())
    return torch.stack(columns, 1)


def _cache_is_exact(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> bool:
    """Whether `label_scores` is right for this model: tried on the shortest and the longest prompt, padded together.

    It is not where the head scales or caps its output, the state is no cache of keys and values, positions are counted
    by the cache's slots, or a prompt outgrows an attention window.
    """
    if not model.has_plain_head:
        return False
    if all(len(label) == 1 for label in labels):
        return True
    probe = [min(samples, key=lambda s: s.prompt_length), max(samples, key=lambda s: s.prompt_length)]
    some = sorted(labels, key=len)[-2:]
    try:
        fast = label_scores(model, probe, pad_id, some)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # state space models, attention windows
        return False
    plain = label_scores_plainly(model, probe, pad_id, some)
    tolerance = 1e-3 if next(model.module.parameters()).dtype == torch.float32 else 0.1
    return torch.allclose(fast, plain, rtol=tolerance, atol=tolerance)


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes in `truth` or `predicted` of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for label in np.union1d(truth, predicted):
        tp = float(((truth == label) & (predicted == label)).sum())
        wrong = float(((truth == label) ^ (predicted == label)).sum())
        scores.append(2 * tp / (2 * tp + wrong))
    return float(np.mean(scores)) if scores else 0.0


def _logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """log softmax of the head's output for hidden [rows, hidden]: float32 [rows, vocabulary]."""
    return torch.log_softmax(model.logits(hidden).float(), -1)
