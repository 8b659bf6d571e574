"""How many bytes a payload is, and the order of its tensors on the way: raw bytes, so nothing in it can be run.

Messages are counted alike in every runtime, as if each were one safetensors file, for each edge and in two parts:

    header    8 bytes of length, then JSON: each tensor's name, type, shape and place; padded to a multiple of 8
    payload   the tensors' bytes, one after the other, in the order of their names

What runtimes carry is the payload; of the header sites send a hash, as both ends know what it has to be. What a
transport adds (frames, encryption, acknowledgements) is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""What a payload may hold, all of one type, as safetensors calls it."""


def header(payload: Mapping[str, Tensor]) -> bytes:
    """A message's first part; the same for all payloads of the same names, types and shapes."""
    return _header(tuple((name, payload[name].dtype, tuple(payload[name].shape)) for name in sorted(payload)))


def payload_size(payload: Mapping[str, Tensor]) -> int:
    """Bytes of the message's second part."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def parts_of(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A payload whose tensors lie one after the other in a vector, in the order of their names: views of it.

    Args:
        flat: of the payload's type.
        like: has the payload's names and shapes.
    """
    names = sorted(like)
    parts = torch.split(flat, [like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


@lru_cache(maxsize=64)
def _header(tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    entries, end = {}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        if dtype not in DTYPES:
            raise TypeError(f"a payload's {name!r} is {dtype}, expected {', '.join(map(str, DTYPES))}")
        if dtype != tensors[0][1]:
            raise TypeError(f"a payload's {name!r} is {dtype} beside {tensors[0][1]}, expected one type for all")
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclass
class Traffic:
    """Bytes that one peer has sent since the run began, by target."""

    payload: dict[int, int] = field(default_factory=dict)
    header: dict[int, int] = field(default_factory=dict)

    def count(self, targets: Sequence[int], payload: Mapping[str, Tensor], is_control: bool = False) -> int:
        """Count one message to each target. Returns the bytes of all of them.

        Args:
            is_control: the message is not the method's: all of it counts as header.
        """
        parts = payload_size(payload), len(header(payload))
        if is_control:
            parts = 0, sum(parts)
        for target in targets:
            for counted, size in zip((self.payload, self.header), parts, strict=True):
                counted[target] = counted.get(target, 0) + size
        return len(targets) * sum(parts)

    @property
    def payload_bytes(self) -> int:
        return sum(self.payload.values())

    @property
    def header_bytes(self) -> int:
        return sum(self.header.values())

    def by_target(self) -> list[tuple[int, int, int]]:
        """(target, payload bytes, header bytes), in the order of the targets."""
        return [(target, self.payload[target], self.header[target]) for target in sorted(self.payload)]

    def state_dict(self) -> dict[str, Any]:
        return {"by_target": self.by_target()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.payload = {target: payload for target, payload, _ in state["by_target"]}
        self.header = {target: header for target, _, header in state["by_target"]}
