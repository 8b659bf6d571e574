"""Metrics of a model on held-out rows: loss and perplexity; accuracy and macro F1 by the likelihood of label words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from peertune.data.batches import collate
from peertune.data.render import Sample
from peertune.evaluation.label_scores import cache_is_exact, label_scores, label_scores_plainly
from peertune.model.language_model import LanguageModel

Metrics = dict[str, float]
BATCH_SIZE = 32
"""Sequences at a time; fewer where their logits would not fit `LOGITS_BYTES`."""
LOGITS_BYTES = 1 << 29
"""Memory that a batch's float32 logits may take, beside what the model makes on the way, where all are made at once."""


def evaluate(
    model: LanguageModel,
    samples: Sequence[Sample],
    pad_id: int,
    *,
    labels: Sequence[Sequence[int]] = (),
) -> Metrics:
    """Metrics over samples; longer ones go together, so that little is padding.

    Args:
        labels: token ids of each label, for classification; then accuracy and macro F1 are added.
    Returns:
        "loss" (nats a target token), "perplexity", and for classification "accuracy", "macro_f1" in [0, 1].
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), i))
    total, count, batch_size = 0.0, 0, BATCH_SIZE
    predicted = np.zeros(len(samples), dtype=np.int64)
    with model.evaluating():
        exact = bool(labels) and cache_is_exact(model, samples, pad_id, labels)
        score = partial(label_scores, only_likeliest=True) if exact else label_scores_plainly
        if not model.has_plain_head and order:  # whose logits are made of all places at once, not in chunks
            places = len(samples[order[-1]].input_ids)
            if labels:  # where they begin, in prompts of unlike length
                places = min(places, BATCH_SIZE + max(map(len, labels)))
            batch_size = max(1, min(BATCH_SIZE, LOGITS_BYTES // (4 * places * model.vocabulary)))
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


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes in `truth` or `predicted` of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for label in np.union1d(truth, predicted):
        tp = float(((truth == label) & (predicted == label)).sum())
        wrong = float(((truth == label) ^ (predicted == label)).sum())
        scores.append(2 * tp / (2 * tp + wrong))
    return float(np.mean(scores)) if scores else 0.0
