"""What two sites say to each other, in bytes: a kind, fields of a fixed size, and behind some kinds any bytes.

Which kinds there are, and what they mean, each protocol says for itself (edge, probe).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=IntEnum)


class ProtocolError(Exception):
    """A neighbour sent what no peertune sends; nothing of it is used."""


class Frames(Generic[K]):
    """The frames of one protocol.

    Args:
        fields: by kind, its fields in `struct`'s letters; little-endian, unpadded. Kinds that are left out have none.
        open_ended: kinds behind whose fields there may be more bytes.
    """

    def __init__(self, kind: type[K], fields: Mapping[K, str], open_ended: Collection[K]) -> None:
        self._kind, self._open_ended = kind, open_ended
        self._structs = {each: struct.Struct("<B" + fields.get(each, "")) for each in kind}

    def size(self, kind: K) -> int:
        """Bytes of a frame without what may be behind it."""
        return self._structs[kind].size

    def pack(self, kind: K, *fields: Any) -> bytes:
        return self._structs[kind].pack(kind, *fields)

    def unpack(self, frame: bytes) -> tuple[K, tuple[Any, ...], memoryview]:
        """A frame's kind, its fields, and what is behind them. Raises ProtocolError."""
        try:
            kind = self._kind(frame[0])
            fields = self._structs[kind].unpack_from(frame)
        except (IndexError, ValueError, struct.error):
            raise ProtocolError("sent bytes that are no frame") from None
        rest = memoryview(frame)[self._structs[kind].size :]
        if rest and kind not in self._open_ended:
            raise ProtocolError(f"sent a frame {kind.name} that is too long")
        return kind, fields[1:], rest
