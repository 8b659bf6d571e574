"""Greedy generation, many prompts at a time where that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from peertune.model.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = NDArray[np.int32]
NEVER = -1
"""No token; as the end token it lets nothing end. With none at all transformers takes the model's own."""


def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    batch_size: int = 16,
) -> list[str]:
    """What the model says after each prompt, taking the likeliest token each time.

    Prompts of unlike length are padded on the left and go together where a trial shows that the model then computes
    the same; else each goes alone.

    Args:
        prompts: token ids [length] each.
        max_new_tokens: tokens generated at most; fewer where the model has no positions left.
        stop: tokens that end an answer, beside the tokenizer's end token; they are not part of the text.
    Returns:
        A text for each prompt, special tokens included; "" where a prompt is empty or fills all positions.
    """
    ends = sorted({*stop} | ({tokenizer.eos_token_id} - {None}))
    positions = getattr(model.module.config, "max_position_embeddings", None) or 2**31
    positions -= model.num_virtual
    texts = [""] * len(prompts)
    order = sorted((i for i, p in enumerate(prompts) if 0 < len(p) < positions), key=lambda i: (len(prompts[i]), i))
    with model.evaluating():
        size = batch_size if len(order) < 2 or _padding_is_exact(model, tokenizer, prompts, order) else 1
        for start in range(0, len(order), size):
            members = order[start : start + size]
            # what a shorter prompt of the batch may say must not depend on the longest: that one is on its own then
            room = positions - len(prompts[members[-1]])
            groups = [members] if room >= max_new_tokens else [[i] for i in members]
            for group in groups:
                limit = min(max_new_tokens, positions - len(prompts[group[-1]]))
                new = _continue(model, tokenizer, [prompts[i] for i in group], ends, limit).sequences
                width = max(len(prompts[i]) for i in group)
                for i, row in zip(group, new[:, width:].tolist(), strict=True):
                    length = next((n for n, token in enumerate(row) if token in ends), len(row))
                    texts[i] = str(tokenizer.decode(row[:length], clean_up_tokenization_spaces=False))
    return texts


def _continue(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    ends: Sequence[int],
    limit: int,
    *,
    logits: bool = False,
) -> Any:
    """`sequences` [prompts, longest prompt + new], and where asked for the `logits` of each step [prompts, vocabulary].

    Those of all steps stand in memory together: of 16 prompts, 128 tokens and a vocabulary of 150,000 more than 1 GB.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        row[width - len(prompt) :] = torch.as_tensor(prompt.astype(np.int64))
        seen[width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) or [NEVER],
        return_dict_in_generate=True,
        output_logits=logits,
    )
    with _without_own_settings(model):
        return model.module.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )


@contextmanager
def _without_own_settings(model: LanguageModel) -> Iterator[None]:
    """Context in which the model's own settings of generation, which may sample, penalise or suppress, say nothing."""
    from transformers import GenerationConfig

    holders = [model.module] if model.core is model.module else [model.module, model.core]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, settings in zip(holders, own, strict=True):
            holder.generation_config = settings


def _padding_is_exact(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], order: Sequence[int]
) -> bool:
    """Whether the shortest prompt, padded to the longest, gives the same logits as alone, for two tokens.

    It does not where positions are counted by place or the state runs over padding.
    """
    short, long = prompts[order[0]], prompts[order[-1]]
    if len(short) == len(long):
        return True
    try:
        alone = _continue(model, tokenizer, [short], [], 2, logits=True).logits
        padded = _continue(model, tokenizer, [short, long], [], 2, logits=True).logits
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a model without such a cache or mask
        return False
    tolerance = 1e-3 if next(model.module.parameters()).dtype == torch.float32 else 0.1
    return all(
        torch.allclose(a[0].float(), p[0].float(), rtol=tolerance, atol=tolerance)
        for a, p in zip(alone, padded, strict=True)
    )
