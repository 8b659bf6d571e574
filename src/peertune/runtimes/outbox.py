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


class Outbox:
    """Messages by key, in the order in which they were made ready."""

    def __init__(self) -> None:
        self.messages: dict[Key, Outgoing] = {}
        self.delivered: set[Key] = set()
        """Those that the neighbour has."""
        self._fetched: set[Key] = set()
        """Those that it has asked for on the stream that is open."""
        self._begun: set[Key] = set()
        """Those that it has begun to fetch, on any stream."""
        self._chunk_size = SMALL_CHUNK

    @property
    def has_undelivered(self) -> bool:
        """Whether the neighbour has not had all that was made ready for it."""
        return not self.messages.keys() <= self.delivered

    def add(self, key: Key, payload: Payload, may_go: Callable[[Key], bool]) -> Outgoing:
        """Make a message ready, and make room for it.

        Args:
            may_go: whether another one that the neighbour has not had may be dropped.
        """
        if key[1] == STATE:  # an older one serves nobody any more
            for old in [old for old in self.messages if old[1] == STATE]:
                self.drop(old)
        self.messages[key] = made = Outgoing(payload)
        others = [old for old in self.messages if old != key and (old in self.delivered or may_go(old))]
        while others and sum(kept.size for kept in self.messages.values()) > KEPT_BYTES:
            self.drop(others.pop(0))
        return made

    def drop(self, key: Key) -> None:
        """Keep a message no more."""
        del self.messages[key]
        self.delivered.discard(key)
        self._fetched.discard(key)
        self._begun.discard(key)

    def drop_before(self, round: int) -> None:
        """Keep nothing of earlier rounds."""
        for key in [key for key in self.messages if key[0] < round]:
            self.drop(key)

    def begin_stream(self) -> None:
        """What was asked for on an old stream has not come from there; and it may have had too large a chunk under way,
        which a buffer had taken at once.
        """
        self._fetched.clear()
        self._chunk_size = SMALL_CHUNK

    def begin_process(self) -> None:
        """What an old process of the neighbour's had says nothing of the new one."""
        self.delivered.clear()

    def got(self, key: Key) -> None:
        """The neighbour has a message, or needs it no more."""
        if key in self.messages:
            self.delivered.add(key)
            if key[1] == STATE:
                self.drop(key)

    def ask(self, key: Key, offset: int) -> None:
        """The neighbour wants a message from an offset on. Raises ProtocolError where none of ours asks so."""
        wanted = self.messages.get(key)
        if wanted is None:
            return
        if offset > wanted.size or offset % min(SMALL_CHUNK, message.CHUNK_SIZE):
            raise ProtocolError(f"asked for byte {offset} of a message of {wanted.size}")
        if key in self._fetched:
            raise ProtocolError(f"asked for a message of round {key[0]} a second time on one stream")
        self._fetched.add(key)

    def size_from(self, key: Key, offset: int) -> int | None:
        """Bytes of a message from an offset on; None: it is not kept."""
        wanted = self.messages.get(key)
        return None if wanted is None else wanted.size - offset

    def begins_again(self, key: Key) -> bool:
        """The neighbour begins to fetch a message. Returns whether it has done so before."""
        is_again = key in self._begun
        self._begun.add(key)
        return is_again

    def chunks(self, key: Key, offset: int) -> Iterator[tuple[int, list[memoryview]]]:
        """A message from an offset on: offset and pieces of each chunk, as large as the line bears by then."""
        sent = self.messages[key]  # which may be dropped while it is on its way
        while offset < sent.size:
            size = min(self._chunk_size, message.CHUNK_SIZE)
            yield offset, sent.cut(offset, size)
            offset += size

    def paced(self, seconds: float) -> None:
        """It took so long to get a chunk out: the next ones are as large as the line bears."""
        if seconds > SLOW_S:
            self._chunk_size = SMALL_CHUNK
        elif seconds < SLOW_S / 10:
            self._chunk_size = min(message.CHUNK_SIZE, 2 * self._chunk_size)
