"""One message on its way: a payload cut into chunks, and put together again in memory that was taken for it.

Nothing here knows of keys, rounds or frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from peertune.exchange import Payload
from peertune.memory import room
from peertune.wire import header, parts_of, payload_size

CHUNK_SIZE = 1 << 20
SMALL_CHUNK = 1 << 16
"""What is under way over a slow line: of less than a chunk the receiver sees nothing, and a line on which nothing comes
for long is given up."""
HASH_SIZE = 16
LARGEST = 1e18
"""What a message may hold: beyond it float32 has no squares, and one number would spoil every norm."""
LARGEST_BITS = int(torch.tensor(LARGEST, dtype=torch.bfloat16).view(torch.int16))
"""The same as bfloat16, which NaN and infinity are beyond."""


class Outgoing:
    """A message to a neighbour; its tensors are snapshots that nobody writes to."""

    def __init__(self, payload: Payload) -> None:
        self.parts = [_view(payload[name].detach().cpu().contiguous().view(-1)) for name in sorted(payload)]
        self.size, self.hash = payload_size(payload), shapes_hash(payload)
        self.is_delivered = False
        """Whether the neighbour has it, or needs it no more."""
        self.is_asked_for = False
        """Whether the neighbour has asked for it on the stream that is open."""
        self.was_begun = False
        """Whether the neighbour has begun to fetch it, on any stream."""

    def cut(self, start: int, size: int) -> list[memoryview]:
        """So many bytes from an offset on, in pieces; fewer at the end."""
        found: list[memoryview] = []
        for part in self.parts:
            if start < len(part):
                piece = part[start : start + size]
                found.append(piece)
                size -= len(piece)
                if not size:
                    break
            start = max(0, start - len(part))
        return found


@dataclass
class Incoming:
    """A message from a neighbour, in memory of its own, once there is room."""

    like: Payload
    """The names and shapes that are expected."""
    done: Callable[[Payload | None], None]
    """Told the payload when it is whole; None: it will not come."""
    offset: int = 0
    """Bytes that are there."""
    _buffer: Tensor = field(init=False)
    _bytes: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.size, self.hash = payload_size(self.like), shapes_hash(self.like)

    def make_room(self) -> None:
        dtype = next((tensor.dtype for tensor in self.like.values()), torch.float32)
        self._buffer = room(-(-self.size // 4)).view(dtype)[: self.size // dtype.itemsize]
        self._bytes = _view(self._buffer)

    def take(self, data: memoryview) -> bool:
        """Take the next bytes in. Returns whether they are numbers of at most `LARGEST`, all of them, or bare bytes."""
        start, self.offset = self.offset, self.offset + len(data)
        self._bytes[start : self.offset] = data
        if self._buffer.dtype == torch.uint8:
            return True
        # A part at a time, while it lies in the cache; by numpy, as torch would take threads from the training for it.
        if self._buffer.dtype == torch.bfloat16:  # but for the sign, its bits are in the order of the numbers
            bits = np.frombuffer(self._bytes[start : self.offset], np.uint16)
            return int(np.bitwise_and(bits, 0x7FFF).max()) <= LARGEST_BITS
        numbers = np.frombuffer(self._bytes[start : self.offset], np.float32)
        return bool(numbers.min() >= -LARGEST and numbers.max() <= LARGEST)  # false of NaN

    def payload(self) -> Payload:
        """What has arrived, when all has; it shares the message's memory."""
        return parts_of(self._buffer, self.like)


def shapes_hash(payload: Payload) -> bytes:
    """Of names, types and shapes, not of values."""
    return hash_of(header(payload))


def hash_of(*pieces: Any) -> bytes:
    """Against errors, at the speed of memory; against enemies there is the connection's encryption."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a flat tensor, shared with it."""
    flat: Any = tensor.view(torch.uint8).numpy()
    return memoryview(flat) if tensor.numel() else memoryview(b"")
