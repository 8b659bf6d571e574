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


@torch.no_grad()
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
    mode = model.module.training
    model.module.eval()
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    total, count = 0.0, 0
    predicted = np.zeros(len(samples), dtype=np.int64)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        chosen = [samples[i] for i in members]
        if labels:
            scores = label_scores(model, chosen, pad_id, labels)
            predicted[members] = scores.argmax(1).numpy()
            total -= float(scores[torch.arange(len(chosen)), torch.tensor([s.label for s in chosen])].sum())
            count += sum(len(labels[s.label]) for s in chosen)
        else:
            loss, targets = model.loss_sum(collate(chosen, pad_id))
            total += float(loss)
            count += targets
    model.module.train(mode)
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

    The prompt is run once; labels of more than one token continue from its keys and values.

    Args:
        labels: token ids of each label.
    Returns:
        float64 [samples, labels] on the CPU.
    """
    window = getattr(model.module.config, "sliding_window", None)
    longest = max(s.prompt_length for s in samples) + max(map(len, labels))
    if not model.has_plain_head or (window is not None and longest > window):
        return label_scores_plainly(model, samples, pad_id, labels)
    module, device = model.module, model.device
    lengths = torch.tensor([s.prompt_length for s in samples])
    prompts = torch.full((len(samples), int(lengths.max())), pad_id)
    for row, sample in zip(prompts, samples, strict=True):
        row[: sample.prompt_length] = torch.as_tensor(sample.input_ids[: sample.prompt_length].astype(np.int64))
    many = any(len(label) > 1 for label in labels)
    mask = (torch.arange(prompts.shape[1]) < lengths[:, None]).long()
    model.stack.begin_batch(None)
    out = module.base_model(input_ids=prompts.to(device), attention_mask=mask.to(device), use_cache=many)
    last = out.last_hidden_state[torch.arange(len(samples)), lengths - 1]
    first = _logits(model, last)
    scores = torch.stack([first[:, label[0]] for label in labels], 1)
    past = out.past_key_values if many else None
    for j, label in enumerate(labels):
        if len(label) == 1:
            continue
        head = torch.tensor(label[:-1]).expand(len(samples), -1)
        positions = lengths[:, None] + torch.arange(len(label) - 1)
        seen = torch.cat([mask, torch.ones_like(head)], 1)
        step = module.base_model(
            input_ids=head.to(device),
            attention_mask=seen.to(device),
            position_ids=positions.to(device),
            past_key_values=past,
            use_cache=True,
        )
        assert past is not None
        past.crop(1 - len(label))
        for t in range(len(label) - 1):
            scores[:, j] += _logits(model, step.last_hidden_state[:, t])[:, label[t + 1]]
    return scores.double().cpu()


@torch.no_grad()
def label_scores_plainly(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> Tensor:
    """As `label_scores`, but running every prompt anew with every label: for models whose head scales or caps its
    output or whose attention window a prompt outgrows. About as many times slower as there are labels."""
    columns = []
    for label in labels:
        whole = [replace(s, input_ids=np.concatenate([s.input_ids[: s.prompt_length], label])) for s in samples]
        ids = collate([replace(s, loss_mask=np.zeros(len(s.input_ids), bool)) for s in whole], pad_id).input_ids
        logits = model.module(input_ids=ids.to(model.device), use_cache=False).logits.float().log_softmax(-1)
        where = torch.tensor([s.prompt_length - 1 for s in samples])[:, None] + torch.arange(len(label))
        picked = logits[torch.arange(len(samples))[:, None], where, torch.tensor(label)[None]]
        columns.append(picked.sum(1).double().cpu())
    return torch.stack(columns, 1)


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
