"""What a site keeps ready for one neighbour, and how it is handed out. No clock, no thread, no network.

Messages are kept until the neighbour has a checkpoint beyond them, so one who was killed and came back asks for them
again and computes bitwise what he computed before: up to `KEPT_BYTES`, and of what he has not had, while he may get on
with it, all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peertune.exchange import Payload
from peertune.runtimes import message
from peertune.runtimes.edge_frames import STATE, Key
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.message import SMALL_CHUNK, Outgoing

KEPT_BYTES = 1 << 30
"""Bytes kept for one neighbour of messages that it has had, or, while it is away, of any but the newest."""
SLOW_S = 2.0
"""Seconds beyond which a chunk takes long to get out."""
GROWS_AFTER = 8
"""Chunks of one message in a row that got out at once, for the next ones to be larger: buffers on the way take the
first at once, however slow the line."""


class Outbox:
    """Messages by key, in the order in which they were made ready."""

    def __init__(self) -> None:
        self.messages: dict[Key, Outgoing] = {}
        self._chunk_size = SMALL_CHUNK
        self._quick = 0

    @property
    def has_undelivered(self) -> bool:
        """Whether the neighbour has not had all that was made ready for it."""
        return not all(kept.is_delivered for kept in self.messages.values())

    def add(self, key: Key, payload: Payload, may_go: Callable[[Key], bool]) -> Outgoing:
        """Make a message ready, and make room for it.

        Args:
            may_go: whether another one that the neighbour has not had may be dropped.
        """
        if key[1] == STATE:  # an older one serves nobody any more
            for old in [old for old in self.messages if old[1] == STATE]:
                del self.messages[old]
        self.messages[key] = made = Outgoing(payload)
        others = [old for old, kept in self.messages.items() if old != key and (kept.is_delivered or may_go(old))]
        while others and sum(kept.size for kept in self.messages.values()) > KEPT_BYTES:
            del self.messages[others.pop(0)]
        return made

    def drop_before(self, round: int) -> None:
        """Keep nothing of earlier rounds."""
        for key in [key for key in self.messages if key[0] < round]:
            del self.messages[key]

    def begin_stream(self) -> None:
        """What was asked for on an old stream has not come from there; and it may have had too large a chunk under way,
        which a buffer had taken at once.
        """
        for kept in self.messages.values():
            kept.is_asked_for = False
        self._chunk_size = SMALL_CHUNK

    def begin_process(self) -> None:
        """What an old process of the neighbour's had says nothing of the new one."""
        for kept in self.messages.values():
            kept.is_delivered = False

    def got(self, key: Key) -> None:
        """The neighbour has a message, or needs it no more."""
        if key in self.messages:
            self.messages[key].is_delivered = True
            if key[1] == STATE:
                del self.messages[key]

    def ask(self, key: Key, offset: int) -> None:
        """The neighbour wants a message from an offset on. Raises ProtocolError where none of ours asks so."""
        wanted = self.messages.get(key)
        if wanted is None:
            return
        if offset > wanted.size or offset % min(SMALL_CHUNK, message.CHUNK_SIZE):
            raise ProtocolError(f"asked for byte {offset} of a message of {wanted.size}")
        if wanted.is_asked_for:
            raise ProtocolError(f"asked for a message of round {key[0]} a second time on one stream")
        wanted.is_asked_for = True

    def chunks(self, sent: Outgoing, offset: int) -> Iterator[tuple[int, list[memoryview]]]:
        """A message from an offset on: offset and pieces of each chunk, as large as the line bears by then."""
        self._quick = 0
        while offset < sent.size:
            size = min(self._chunk_size, message.CHUNK_SIZE)
            yield offset, sent.cut(offset, size)
            offset += size

    def paced(self, seconds: float) -> None:
        """It took so long to get a chunk out: the next ones are as large as the line bears."""
        self._quick = self._quick + 1 if seconds < SLOW_S / 10 else 0
        if seconds > SLOW_S:
            self._chunk_size = SMALL_CHUNK
        elif self._quick == GROWS_AFTER:
            self._quick, self._chunk_size = 0, min(message.CHUNK_SIZE, 2 * self._chunk_size)
