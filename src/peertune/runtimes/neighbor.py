"""A neighbour, as a site's thread for the network sees it: streams to it come and go, the edge and its state stay.

`edge` says what is said and holds what is to be sent; here its frames go out over the stream that is open, what arrives
is passed to it, a silent stream is ended after `stall_s`, and what happened is written to the log.

The thread that trains calls in from outside with `Node.soon`. Directly it only reads single values, and settles whom it
waits for: `mark_away`, `welcome`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc

from peertune.charter import Charter
from peertune.exchange import Payload
from peertune.logfields import text
from peertune.runtimes.edge import MAX_OFFERS, Edge, Listener
from peertune.runtimes.edge_frames import STATE, Key, Kind
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.presence import Presence

BEAT_S = 1.0
"""Seconds after which a silent connection says that it is alive."""
REFUSAL_S = 2.0
"""Seconds in which one who was refused takes that in, and ends the stream; then it is ended here."""
LINGERS = 10
"""One who is lost and back again and again is lingered for so many times as long as one who stays, at most."""
MAX_REASON = 200
"""Characters of what another says of why it ends a stream."""


class Neighbor(Listener):
    """One edge's connection: streams come and go, `edge` stays."""

    def __init__(self, index: int, charter: Charter, presence: Presence, log: Callable[..., None]) -> None:
        self.index, self.name, self.charter, self.presence = index, charter.members[index].name, charter, presence
        self.edge, self.log = Edge(self), log
        self.last_heard = self.last_heard_on_stream = time.monotonic()
        self.last_sent = self.last_got = self.connected_at = -math.inf
        """When a part of a message last went out, and came, and when the neighbour was last back."""
        self.is_connected = self.was_seen = self.is_ejected = False
        self.turns_away = ""
        """Why the neighbour takes nothing from this site any more; empty: it does."""
        self.late: SimpleQueue[tuple[Key, Payload, Payload]] = SimpleQueue()
        """Messages that came after their rounds: key, the neighbour's, this site's own."""
        self._queue: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        self._talk: asyncio.Task[Any] | None = None
        self._ended: asyncio.Task[Any] | None = None
        self._last_word = b""
        """What is still to be said on the stream that is open; empty: it goes on."""
        self._is_refused = False
        """Whether the neighbour has ended the stream for what this site sent."""
        self._coming: dict[Key, tuple[int, float]] = {}
        """Bytes of each message that is being fetched, and since when."""

    def fetched(self, key: Key, size: int, *, again: bool) -> None:
        what, more = "state" if key[1] == STATE else key[1], {"again": True} if again else {}
        self.log("fetched", peer=self.name, round=key[0], hop=what, bytes=size, **more)

    def asked(self, key: Key, size: int) -> None:
        if size > self._coming.get(key, (-1, 0.0))[0]:  # not where a transfer goes on after a break
            self._coming[key] = (size, time.monotonic())

    def arrived(self, key: Key) -> None:
        size, began = self._coming.pop(key)
        self._coming = {other: begun for other, begun in self._coming.items() if other in self.edge.inbox}
        what, seconds = "state" if key[1] == STATE else key[1], round(time.monotonic() - began, 4)
        self.log("arrived", peer=self.name, round=key[0], hop=what, bytes=size, seconds=seconds)

    def came_late(self, key: Key, theirs: Payload, mine: Payload) -> None:
        self.late.put((key, theirs, mine))

    def was_missed(self, key: Key) -> None:
        self.log("was_missed", peer=self.name, round=key[0])

    def refused_by(self, reason: str) -> None:
        self._is_refused = True
        self.log("refused_by", peer=self.name, reason=text(reason, MAX_REASON))

    def has_left(self) -> None:
        self.log("left", peer=self.name)

    def has_finished(self) -> None:
        self.log("finished", peer=self.name)

    def runs_twice(self) -> None:
        self.log("runs_twice", peer=self.name)

    def got_on(self) -> None:
        self.last_got = time.monotonic()
        self.presence.got_on(self.last_got)

    def tells(self) -> tuple[Sequence[float], Sequence[int]]:
        return self.presence.ages(time.monotonic()), self.presence.steps()

    def told(self, ages: Sequence[float], steps: Sequence[int]) -> None:
        self.presence.told(ages, steps, time.monotonic())

    def say(self, frames: Iterable[bytes]) -> None:
        if self._talk is not None and frames != []:  # a chunk is answered by nothing, and there are many
            self._queue.put_nowait(frames)

    def try_to_say(self, frames: Callable[[], Iterable[bytes]]) -> None:
        """Say what a call of the edge gives; end the stream where the edge finds the neighbour's messages wrong."""
        try:
            self.say(frames())
        except ProtocolError as error:
            self._refuse(error)

    def _refuse(self, error: ProtocolError) -> None:
        """Tell the neighbour why, if there is a stream, and believe nothing more that comes over it."""
        if self._last_word:
            return
        self.log("refused", peer=self.name, reason=str(error))
        last_word = self.edge.refuse(str(error))
        if self._talk is not None:
            self._last_word = last_word
            self._queue.put_nowait([])
            asyncio.get_running_loop().call_later(REFUSAL_S, self._end_if_open, self._talk)

    def _end_if_open(self, talk: asyncio.Task[Any] | None) -> None:
        if self._talk is talk:
            self.end()

    def end(self) -> None:
        """End the stream that is open, if any; it is dialled anew."""
        if self._talk is not None:
            self._ended = self._talk
            self._talk.cancel()

    @property
    def is_out_of_reach(self) -> bool:
        """For the grace, or since it was left out for that, or since it left; or for good."""
        if self.is_ejected:
            return True
        late = time.monotonic() - self.last_heard > self.charter.grace_s
        return not self.is_connected and (late or self.edge.peer_is_away or self.edge.peer_has_left)

    def needs(self, since: float, linger_s: float) -> bool:
        """Whether it may still want something of a site that has finished the run.

        It has so many seconds to ask, once more where it was lost meanwhile and is back within the grace; what it is
        fetching goes on for as long as any of it goes out.
        """
        if self.edge.peer_is_finished or self.is_out_of_reach:
            return False
        now = time.monotonic()
        asks_since = min(max(since, self.connected_at if self.is_connected else now), since + (LINGERS - 1) * linger_s)
        is_fetching = self.is_connected and self.edge.outbox.has_undelivered
        return now < max(asks_since + linger_s, self.last_sent + self.charter.stall_s if is_fetching else -math.inf)

    def mark_away(self, round: int) -> bool:
        """Settle whether to go on with a round without it: out of reach for the grace, or still behind after that."""
        behind = self.edge.peer_round < round - 1
        self.edge.peer_is_away = self.is_out_of_reach or (self.edge.peer_is_away and behind)
        return self.edge.peer_is_away

    def welcome(self, round: int) -> None:
        """It gets the state of a round's beginning and is waited for again: else it would fall behind anew."""
        self.edge.peer_asks, self.edge.peer_round, self.edge.peer_is_away = False, round, False

    def begin(self, round: int) -> None:
        """This site's next round: all messages of those before it are posted."""
        self.edge.round = round

    def post(self, key: Key, payload: Payload) -> None:
        self.edge.peer_is_away |= self.is_out_of_reach
        self.say(self.edge.post(key, payload))

    def ask(self, like: Payload, done: Callable[[int, Payload | None], None]) -> None:
        self.try_to_say(partial(self.edge.ask, like, done))

    def expect(self, key: Key, like: Payload, done: Callable[[Payload | None], None]) -> None:
        self.try_to_say(partial(self.edge.expect, key, like, done))

    def miss(self, key: Key, corrects: bool) -> None:
        self.say(self.edge.miss(key, corrects=corrects))

    def checkpointed(self, round: int) -> None:
        self.say(self.edge.checkpointed(round))

    def skip_to(self, round: int) -> None:
        self.edge.skip_to(round)
        self.begin(round)
        self.say([self.edge.beat()])

    async def talk(self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Carry the edge over one stream until it ends, or the next one begins."""
        if self.is_ejected:  # while the stream was opened
            return
        self.end()  # the other end is back before this one saw it go
        self._talk = this = asyncio.current_task()
        self._queue, self._last_word, self._is_refused = asyncio.Queue(), b"", False
        self._queue.put_nowait(self.edge.connected())
        self.last_heard_on_stream = time.monotonic()
        writer = asyncio.create_task(self._write(write, self._queue))
        watch = asyncio.create_task(self._watch(this))
        try:
            while not self._is_refused and (frame := await read()) is not grpc.aio.EOF:
                if self._last_word and frame[:1] != bytes([Kind.REFUSED]):
                    continue  # what was under way when it was refused
                self.last_heard = self.last_heard_on_stream = time.monotonic()
                if not self.is_connected:  # only now: a refused stream opens too
                    self.is_connected, self.was_seen, self.turns_away = True, True, ""
                    self.connected_at = self.last_heard
                    self.log("connected", peer=self.name)
                self.presence.heard(self.index, self.last_heard)
                try:
                    self.say(self.edge.receive(frame))
                    if self._queue.qsize() > MAX_OFFERS:
                        raise ProtocolError("asks for more than it reads")
                except ProtocolError as error:
                    self._refuse(error)
                if self.edge.peer_is_finished:
                    self.presence.finished(self.index)
        except asyncio.CancelledError:
            if self._ended is not this:
                raise
            self._ended = None  # whoever dials is this task again, and may be cancelled for good next time
        except grpc.RpcError:
            pass  # it is gone; whoever dials tries again
        finally:
            writer.cancel()
            watch.cancel()
            if self._talk is this:
                self._talk = None
                self.edge.disconnected()
                if self.is_connected:
                    self.is_connected = False
                    self.log("disconnected", peer=self.name)

    async def _watch(self, talk: asyncio.Task[Any] | None) -> None:
        """End a stream on which nothing comes any more."""
        while (left := self.last_heard_on_stream + self.charter.stall_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        if self._talk is talk:
            self.log("stalled", peer=self.name, seconds=self.charter.stall_s)
            self.end()

    def _until_the_last_word(self, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            if self._last_word:
                break
            yield frame
        if self._last_word:
            yield self._last_word

    async def _write(self, write: Callable[[bytes], Awaitable[None]], queue: asyncio.Queue[Iterable[bytes]]) -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(BEAT_S):  # wait_for may lose a cancellation that comes with a frame
                        frames = await queue.get()
                except TimeoutError:
                    queue.put_nowait([self.edge.beat()])  # not before an offer that has just been posted
                    continue
                for frame in self._until_the_last_word(frames):
                    began = time.monotonic()
                    try:
                        await write(frame)
                    except Exception:
                        return  # the stream has ended, and the reader sees it too; gRPC says so by many errors
                    finally:  # also where the stream was given up over it
                        now = time.monotonic()
                        if frame[0] == Kind.CHUNK:
                            self.edge.outbox.paced(now - began)
                    if frame[0] == Kind.CHUNK:
                        self.last_sent = now
                    elif frame[0] == Kind.REFUSED:
                        return
        except Exception as error:
            self.log("failed", peer=self.name, reason=f"{type(error).__name__}: {error}")
            self.end()
