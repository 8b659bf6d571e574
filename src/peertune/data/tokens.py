"""Text to token ids, many texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.int32]

_CHUNK = 1024
_CHARS = 1 << 20
"""Texts encoded at a time, and characters after which no other is taken along: while it works, a tokenizer holds some
160 bytes for each."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    """Token ids of each text, without special tokens at its ends: int32 [length] each."""
    encoded: list[Tokens] = []
    while len(encoded) < len(texts):
        chunk = list(texts[len(encoded) : len(encoded) + _CHUNK])
        sizes = accumulate(map(len, chunk))
        ids = tokenizer(
            chunk[: 1 + sum(size < _CHARS for size in sizes)],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        encoded += [np.asarray(row, dtype=np.int32) for row in ids]
    return encoded


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """What the tokenizer puts before every text: int32 [0 or more]."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return np.asarray(whole[:start], dtype=np.int32)
    return np.empty(0, dtype=np.int32)


def common_length(a: Tokens, b: Tokens) -> int:
    """Number of tokens that two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
