"""Probabilities of labels after prompts: all labels in few passes, as a tree of tokens, or each with its own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from peertune.data.batches import collate
from peertune.data.render import Sample
from peertune.model.language_model import LanguageModel
from peertune.model.loss import chunk_rows

SLOTS = 256
"""Tokens of labels held behind a prompt at most; one label alone may have more."""
FEW = 8
"""Inner nodes of a tree that are run together, likely or not: a pass more costs more than so many tokens."""


@dataclass(frozen=True)
class LabelTree:
    """What labels begin with: node 0 is the prompt, each other node a token after those of the nodes above it.

    Nodes stand in depth-first order, so the nodes above one come before it.
    """

    tokens: Tensor
    """int64 [nodes]; 0 for the prompt."""
    parents: Tensor
    """int64 [nodes]; the prompt's is itself."""
    sees: Tensor
    """bool [nodes, nodes]: itself and the nodes above it, the prompt left out."""
    is_inner: Tensor
    """bool [nodes]: the prompt left out, nodes that a label goes on from."""
    ends: Tensor
    """int64 [labels]: the node of each label's last token."""
    depth: int
    """Most inner nodes on a way down."""

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelTree:
        """
        Args:
            labels: token ids of each label.
        """
        beginnings = sorted({tuple(label[:length]) for label in labels for length in range(len(label) + 1)})
        node = {beginning: index for index, beginning in enumerate(beginnings)}
        parents = torch.tensor([node[beginning[:-1]] for beginning in beginnings])
        sees = torch.eye(len(beginnings), dtype=torch.bool)
        for index in range(1, len(beginnings)):
            sees[index] |= sees[parents[index]]
        sees[1:, 0] = False
        is_inner = torch.zeros(len(beginnings), dtype=torch.bool).scatter_(0, parents, True)
        is_inner[0] = False
        return cls(
            tokens=torch.tensor([beginning[-1] if beginning else 0 for beginning in beginnings]),
            parents=parents,
            sees=sees,
            is_inner=is_inner,
            ends=torch.tensor([node[tuple(label)] for label in labels]),
            depth=max(map(len, labels)) - 1,
        )


def label_scores(
    model: LanguageModel,
    samples: Sequence[Sample],
    pad_id: int,
    labels: Sequence[Sequence[int]],
    *,
    only_likeliest: bool = False,
) -> Tensor:
    """log p(label | prompt) for each sample and label, summed over the label's tokens.

    The prompt is run once. Labels of more than one token go on from its keys and values, side by side: a token sees the
    prompt and the tokens above it in their tree. Not every architecture allows that: `evaluate` asks `cache_is_exact`
    first. Called within `model.evaluating()`.

    Args:
        labels: token ids of each label.
        only_likeliest: where it saves time, leave labels unfinished, at -inf, that cannot be a sample's likeliest: a
            label is no likelier than its beginning. A sample's own label is scored always, and first.
    Returns:
        float64 [samples, labels] on the CPU.
    """
    tree = LabelTree.of(labels)
    every = torch.arange(len(samples))
    lengths = torch.tensor([s.prompt_length for s in samples])
    prompts = torch.full((len(samples), int(lengths.max())), pad_id)
    for row, sample in zip(prompts, samples, strict=True):
        row[: sample.prompt_length] = torch.as_tensor(sample.input_ids[: sample.prompt_length].astype(np.int64))
    is_prompt = torch.arange(prompts.shape[1]) < lengths[:, None]
    # No mask yet: padding comes after all that counts, and the fast causal attention applies.
    hidden, past = model.hidden(prompts.to(model.device), use_cache=bool(tree.is_inner.any()))
    scores = _Scores(tree, len(samples))
    scores.add(model, every, torch.zeros_like(every), hidden[every, lengths - 1])
    wanted = tree.is_inner.expand(len(samples), -1)
    if only_likeliest and tree.is_inner.sum() > FEW:
        wanted = wanted & tree.sees[tree.ends[torch.tensor([s.label for s in samples])]]
    room = max(tree.depth, int(min(SLOTS, model.window() - 1 - model.num_virtual - prompts.shape[1])))
    held = torch.zeros(len(samples), 0, dtype=torch.int64)  # the nodes behind the prompt; 0 fills up
    while wanted.any() or (wanted := scores.hopeful()).any():
        is_held = torch.zeros_like(wanted).scatter_(1, held, True)
        needed = (wanted.float() @ tree.sees.float() > 0) & ~is_held  # with what they see
        width = min(room, int(needed.sum(1).max()))
        if held.shape[1] + width > room:  # what is still needed of these is run again
            past.crop(-held.shape[1])
            held = held[:, :0]
            continue
        first = needed.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        nodes = torch.where(needed.gather(1, first), first, 0)
        held = torch.cat([held, nodes], 1)
        seen = torch.cat([is_prompt[:, None].expand(-1, width, -1), tree.sees[nodes[:, :, None], held[:, None]]], 2)
        hidden, past = model.hidden(
            tree.tokens[nodes].to(model.device), seen.to(model.device), use_cache=True, past=past
        )
        rows, places = (~scores.is_run.gather(1, nodes)).nonzero(as_tuple=True)
        scores.add(model, rows, nodes[rows, places], hidden[rows, places])
        wanted = wanted & ~scores.is_run
    return scores.sums()[:, tree.ends]


class _Scores:
    """What is known of the nodes of a tree, for some samples."""

    def __init__(self, tree: LabelTree, num_samples: int) -> None:
        self.tree = tree
        self.log_p = torch.zeros(num_samples, len(tree.tokens), dtype=torch.float64)
        """Of each node's token after those above it; 0 where the node's parent was not run."""
        self.is_run = torch.zeros(num_samples, len(tree.tokens), dtype=torch.bool)

    def add(self, model: LanguageModel, rows: Tensor, nodes: Tensor, hidden: Tensor) -> None:
        """Take up nodes that were run.

        Args:
            rows, nodes: [n], the nodes and whose they are.
            hidden: [n, hidden], the last hidden state at each.
        """
        self.is_run[rows, nodes] = True
        place = torch.full_like(self.is_run, -1, dtype=torch.int64)
        place[rows, nodes] = torch.arange(len(nodes))
        place = place[:, self.tree.parents]
        place[:, 0] = -1
        owners, children = (place >= 0).nonzero(as_tuple=True)
        place = place[owners, children]
        size = chunk_rows(model.core.get_output_embeddings().weight)
        for start in range(0, len(nodes), size):
            log_p = torch.log_softmax(model.logits(hidden[start : start + size]).float(), -1)
            here = (place >= start) & (place < start + size)
            found = log_p[place[here] - start, self.tree.tokens[children[here]]]
            self.log_p[owners[here], children[here]] = found.double().cpu()

    def sums(self) -> Tensor:
        """log p of each node's tokens together, float64 [samples, nodes]; -inf where it is not known."""
        return torch.where(self.is_run[:, self.tree.parents], self.log_p @ self.tree.sees.T.double(), -torch.inf)

    def hopeful(self) -> Tensor:
        """Nodes yet to be run of which the likeliest label may come, bool [samples, nodes]."""
        sums = self.sums()
        return self.tree.is_inner & ~self.is_run & (sums > sums[:, self.tree.ends].amax(1, keepdim=True))


def label_scores_plainly(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> Tensor:
    """As `label_scores`, but every prompt is run anew with every label: as many times slower as there are labels."""
    columns = []
    for label in labels:
        whole = [replace(s, input_ids=np.concatenate([s.input_ids[: s.prompt_length], label])) for s in samples]
        ids = collate([replace(s, loss_mask=np.zeros(len(s.input_ids), bool)) for s in whole], pad_id).input_ids
        where = torch.tensor([s.prompt_length - 1 for s in samples])[:, None] + torch.arange(len(label))
        places, here = torch.unique(where, return_inverse=True)
        found = model.logits_at(ids.to(model.device), places.to(model.device))
        # Of these, those few that are a sample's own are copied as float32.
        logits = found[torch.arange(len(samples))[:, None], here].float()
        picked = logits.log_softmax(-1)[:, torch.arange(len(label)), torch.tensor(label)]
        columns.append(picked.sum(1).double().cpu())
    return torch.stack(columns, 1)


def cache_is_exact(
    model: LanguageModel, samples: Sequence[Sample], pad_id: int, labels: Sequence[Sequence[int]]
) -> bool:
    """Whether `label_scores` is right for this model: tried on the shortest and the longest prompt, padded together.

    It is not where the head scales or caps its output, the state is no cache of keys and values, positions are counted
    by the cache's slots or made of the mask, or a prompt outgrows an attention window.
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
