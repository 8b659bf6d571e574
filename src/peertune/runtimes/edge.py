"""One neighbour, as a site sees him: what is on its way to him and from him. No clock, no thread, no network.

Both ends of an edge run the same protocol, in frames (edge_frames) over whatever stream connects them, and may lose and
regain that stream at any moment. What is ready for the neighbour lies in an outbox until he has a checkpoint beyond it;
one who stayed away for longer than that keeps asks for the state.

A message that a round went on without is still fetched when it is offered later, unless the neighbour went on without
this site's message of that key as well: then neither of the two has heard the other, and nothing is to be put right.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from peertune.exchange import Payload
from peertune.runtimes import message
from peertune.runtimes.edge_frames import FRAMES, STATE, Key, Kind
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.message import LARGEST, SMALL_CHUNK, Incoming, hash_of
from peertune.runtimes.outbox import KEPT_BYTES, Outbox
from peertune.runtimes.processes import Processes
from peertune.wire import payload_size

MAX_OFFERS = 1 << 16
"""Messages a neighbour may announce ahead of us."""
MAX_MISSED = 1024
"""Of so many, the newest, a neighbour is told that they were missed."""
_pack = FRAMES.pack


class Listener:
    """Callbacks of an `Edge`; all of them do nothing here."""

    def fetched(self, key: Key, size: int, *, again: bool) -> None:
        """The neighbour begins to fetch a message, of which so many bytes are still to go.

        Args:
            again: it has begun to before.
        """

    def asked(self, key: Key, size: int) -> None:
        """This site begins to fetch one, of which so many bytes are still to come."""

    def got_on(self) -> None:
        """More of a message is there."""

    def arrived(self, key: Key) -> None:
        """All of it is there."""

    def came_late(self, key: Key, theirs: Payload, mine: Payload) -> None:
        """A message is there without which its round went on.

        Args:
            mine: this site's own of the same key.
        """

    def was_missed(self, key: Key) -> None:
        """The neighbour went on without a message of this site's."""

    def refused_by(self, reason: str) -> None:
        """The neighbour refuses what this site sent, in its own words, and ends the stream."""

    def has_left(self) -> None:
        """The neighbour goes, and need not be waited for until it is back."""

    def has_finished(self) -> None:
        """The neighbour has finished the run."""

    def runs_twice(self) -> None:
        """A process of the neighbour is back that another one had replaced: there are two."""

    def tells(self) -> tuple[Sequence[float], Sequence[int]]:
        """What goes with a beat: ages, and as many steps (see presence)."""
        return (), ()

    def told(self, ages: Sequence[float], steps: Sequence[int]) -> None:
        """What came with one. Raises ValueError where it cannot be."""


class Edge:
    """What is on its way between this site and one neighbour.

    Every method that returns frames returns them for the stream that is connected now, if any. They are made when they
    are iterated over, so a large message is not copied whole.

    Args:
        listener: told what happens on the edge.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener or Listener()
        self.outbox = Outbox()
        self.inbox: dict[Key, Incoming] = {}
        self.offers: dict[Key, tuple[int, bytes]] = {}
        self.closed: Key = (-1, 0)
        """Messages up to this one have arrived, or are needed no more."""
        self.saved = 0
        """Round of this site's newest checkpoint."""
        self.boot, self.peer_boot = os.urandom(8), b""
        self._processes = Processes()
        self.round = 0
        """The round that this site is in; its messages of all earlier ones were posted before this was set."""
        self.is_finished = self.peer_is_finished = False
        self.peer_round = 0
        self.peer_passed = 0
        """The round that the neighbour is in by the stream that is open: what it keeps of earlier ones is offered."""
        self.peer_is_away = False
        """Whether the rounds go on without the neighbour, and what it has not fetched may be dropped."""
        self.peer_has_left = False
        """Whether it said that it goes, and is not back."""
        self.peer_asks = False
        """Whether the neighbour is behind, and wants the state."""
        self.late: dict[Key, Payload] = {}
        """By key of a message that this site went on without and still wants, its own of the same key; on the host."""
        self.missed: list[Key] = []
        """Keys that the neighbour is told of as missed, at each new stream; ascending."""
        self.peer_missed: set[Key] = set()
        self.missed_until = -1
        """The newest round in which the neighbour went on without this site's message; -1: none."""
        self._joining: tuple[Payload, Callable[[int, Payload | None], None]] | None = None

    def connected(self) -> Iterator[bytes]:
        """A new stream begins: forget what was said on the old one, and say it anew."""
        self.offers.clear()
        self.outbox.begin_stream()
        self.peer_passed = 0
        frames = [_pack(Kind.HELLO, self.boot), *self.checkpointed(self.saved)]
        frames += [_pack(Kind.MISSED, *key) for key in self.missed]
        frames += [_pack(Kind.OFFER, *key, ready.size, ready.hash) for key, ready in self.outbox.messages.items()]
        frames += [self.beat()] + [_pack(Kind.ASK)] * (self._joining is not None)
        return iter([*frames, *([_pack(Kind.DONE)] if self.is_finished else [])])

    def disconnected(self) -> None:
        """A stream has ended: what was offered on it is offered anew on the next, where it can be refused, too."""
        self.offers.clear()

    def refuse(self, reason: str) -> bytes:
        """What the neighbour said is wrong: the last frame of the stream, and no offer of it is believed any more."""
        self.offers.clear()
        return _pack(Kind.REFUSED) + reason.encode()

    def post(self, key: Key, payload: Payload) -> Iterable[bytes]:
        """Make a message ready for the neighbour."""
        # In a graph whose edges go one way nobody waits for a neighbour who gets no further.
        newest = max(key[0], self.peer_round)
        ready = self.outbox.add(key, payload, may_go=lambda old: self.peer_is_away or old[0] < newest - 1)
        if key in self.peer_missed:
            self._listener.was_missed(key)
        return [_pack(Kind.OFFER, *key, ready.size, ready.hash)]

    def expect(self, key: Key, like: Payload, done: Callable[[Payload | None], None]) -> Iterable[bytes]:
        """Ask for a message of given names and shapes; `done` is told when it is there."""
        self.inbox[key] = incoming = Incoming(like, done)
        newer = any(other > key and other[1] != STATE for other in self.offers)
        if key not in self.offers and (newer or key[0] < self.peer_passed or self.peer_is_finished):
            self.give_up(key)  # offers come in order: it is not kept any more
            return []
        if key in self.offers:
            return self._want(key, incoming)
        return []

    def give_up(self, key: Key) -> None:
        """Go on without a message; should it come later, it is dropped."""
        incoming = self.inbox.pop(key, None)
        if key[1] != STATE:
            self.closed = max(self.closed, key)
        if incoming is not None:
            incoming.done(None)

    def miss(self, key: Key, *, corrects: bool = True) -> Iterable[bytes]:
        """Go on without a message, and say so.

        Args:
            corrects: should it come later, the listener gets it; False: it is dropped.
        """
        incoming = self.inbox.get(key)
        if incoming is None:
            return []  # it has just come
        self.give_up(key)
        self.missed = [*self.missed, key][-MAX_MISSED:]
        if corrects and key not in self.peer_missed:
            self.late[key] = {name: tensor.detach().cpu() for name, tensor in incoming.like.items()}
            while sum(map(payload_size, self.late.values())) > KEPT_BYTES:
                del self.late[min(self.late)]
        return [_pack(Kind.MISSED, *key)]

    def ask(self, like: Payload, done: Callable[[int, Payload | None], None]) -> Iterable[bytes]:
        """Ask for the state; `done` is told the round it is the beginning of, and the tensors."""
        self._joining = (like, done)
        return [_pack(Kind.ASK)]

    def no_state(self) -> None:
        """The neighbour will not send the state that it was asked for."""
        for key in [key for key in self.inbox if key[1] == STATE]:
            self.offers.pop(key, None)
            self.inbox.pop(key).done(None)
        self.ask_no_more()

    def ask_no_more(self) -> None:
        """Want the state no more, but where it is on its way."""
        if self._joining is not None:
            (_, done), self._joining = self._joining, None
            done(0, None)

    def skip_to(self, round: int) -> None:
        """Go on from the beginning of a round: nothing of earlier ones is sent or expected any more."""
        for key in [key for key in self.inbox if key[0] < round]:
            self.give_up(key)
        self.outbox.drop_before(round)
        self.closed = max(self.closed, (round - 1, STATE))
        self.late.clear()  # this site now holds what another one made of its rounds

    def checkpointed(self, round: int) -> Iterable[bytes]:
        """This site has a checkpoint of that round."""
        self.saved = round
        return [_pack(Kind.SAVED, min([round, *(key[0] for key in self.late)]))]

    def finished(self) -> Iterable[bytes]:
        """This site has all it needs."""
        self.is_finished = True
        return [_pack(Kind.DONE)]

    def leaving(self) -> Iterable[bytes]:
        """This site goes before the run's end."""
        return [_pack(Kind.LEAVE)]

    def beat(self) -> bytes:
        ages, steps = self._listener.tells()
        return _pack(Kind.BEAT, self.round) + struct.pack(f"<{len(ages)}f{len(steps)}Q", *ages, *steps)

    def is_second(self, frame: bytes) -> bool:
        """Whether a stream that begins with this frame is of a process that was started beside the neighbour's own.

        Raises:
            ProtocolError: it is none of ours.
        """
        kind, fields, _ = FRAMES.unpack(frame)
        if kind is not Kind.HELLO or fields[0] == self.peer_boot:
            return False
        is_second = self._processes.is_second(fields[0])
        if not is_second and self._processes.take_over(fields[0], self.peer_boot):
            self._listener.runs_twice()
        return is_second

    def receive(self, frame: bytes) -> Iterable[bytes]:
        """Take a frame in; returns what to answer.

        Raises:
            ProtocolError: it is none of ours, or not in its place.
        """
        kind, fields, rest = FRAMES.unpack(frame)
        key: Any = fields[:2]  # of what is said of one message
        if kind is Kind.OFFER:
            return self._offered(key, fields[2], fields[3])
        if kind is Kind.WANT:
            self.outbox.ask(key, fields[2])
            return self._chunks(key, fields[2])
        if kind is Kind.CHUNK:
            return self._arrived(key, fields[2], fields[3], rest)
        if kind is Kind.HELLO:
            self._greeted(fields[0])
        elif kind is Kind.GOT:
            self.outbox.got(key)
        elif kind is Kind.GONE:
            if key in self.inbox:  # else it would close rounds that nobody has asked for yet
                self.give_up(key)
        elif kind is Kind.MISSED:
            self._was_missed(key)
        elif kind is Kind.SAVED:
            self.outbox.drop_before(fields[0])
            self.peer_missed = {key for key in self.peer_missed if key[0] >= fields[0]}
        elif kind is Kind.BEAT:
            self._heard_beat(fields[0], rest)
        elif kind is Kind.ASK:
            self.peer_asks = True
        elif kind is Kind.LEAVE:
            if not self.peer_has_left:
                self._listener.has_left()
            self.peer_has_left = True
        elif kind is Kind.REFUSED:
            self._listener.refused_by(bytes(rest).decode(errors="replace"))
        else:
            if not self.peer_is_finished:
                self._listener.has_finished()
            self.peer_is_finished = True
            self.no_state()
            for key in [key for key in self.inbox if key not in self.offers]:
                self.give_up(key)
        return []

    def _greeted(self, boot: bytes) -> None:
        if boot != self.peer_boot:
            # A new process makes its messages anew: no part of an old one is put together with those.
            for incoming in self.inbox.values():
                incoming.offset = 0
            self.peer_round, self.peer_is_finished = 0, False
            self.outbox.begin_process()
            self.no_state()
        self.peer_boot, self.peer_has_left = boot, False

    def _heard_beat(self, round: int, word: memoryview) -> None:
        count = len(word) // struct.calcsize("<fQ")
        try:
            told = struct.unpack(f"<{count}f{count}Q", word)
            self._listener.told(told[:count], told[count:])
        except (ValueError, struct.error) as error:
            raise ProtocolError(f"sent a beat that is none: {error}") from None
        self.peer_round, self.peer_passed = max(self.peer_round, round), round
        # Else those who exchange with others in each round could wait for each other in a circle.
        for key in [key for key in self.inbox if key[0] < round and key not in self.offers and key[1] != STATE]:
            self.give_up(key)

    def _offered(self, key: Key, size: int, hash: bytes) -> Iterable[bytes]:
        self.peer_round = max(self.peer_round, key[0])
        if key[1] == STATE and self._joining is not None and key not in self.inbox:
            (like, joined), self._joining = self._joining, None
            self.offers[key] = (size, hash)
            self.inbox[key] = Incoming(like, partial(joined, key[0]))
            return self._want(key, self.inbox[key])
        for old in [old for old in self.late if old < key and old not in self.offers]:
            del self.late[old]  # offers come in order: it is not kept any more
        mine = self.late.pop(key, None)
        if mine is not None:
            self.inbox[key] = Incoming(mine, partial(self._came_late, key, mine))
        elif (key <= self.closed or key[1] == STATE) and key not in self.inbox:
            return [_pack(Kind.GOT, *key)]
        if len(self.offers) >= MAX_OFFERS:
            raise ProtocolError(f"announced more than {MAX_OFFERS} messages")
        self.offers[key] = (size, hash)
        # What is older and was not offered on this stream is not kept any more.
        for old in [old for old in self.inbox if old < key and old not in self.offers and old[1] != STATE]:
            self.give_up(old)
        incoming = self.inbox.get(key)
        return [] if incoming is None else self._want(key, incoming)

    def _came_late(self, key: Key, mine: Payload, theirs: Payload | None) -> None:
        if theirs is not None:
            self._listener.came_late(key, theirs, mine)

    def _was_missed(self, key: Key) -> None:
        if key in self.peer_missed:
            return
        if len(self.peer_missed) >= MAX_OFFERS:
            raise ProtocolError(f"went on without more than {MAX_OFFERS} messages")
        self.peer_missed.add(key)
        self.missed_until = max(self.missed_until, key[0])
        if key in self.outbox.messages:
            self._listener.was_missed(key)
        self.late.pop(key, None)
        if key in self.inbox and key <= self.closed:
            self.give_up(key)

    def _want(self, key: Key, incoming: Incoming) -> Iterable[bytes]:
        offered = self.offers[key]
        if offered != (incoming.size, incoming.hash):
            self.give_up(key)
            raise ProtocolError(
                f"announced a message of {offered[0]} bytes for round {key[0]}, expected {incoming.size}, and"
                " the same names and shapes as here"
            )
        self._listener.asked(key, incoming.size - incoming.offset)
        if not incoming.offset:
            incoming.make_room()
            if not incoming.size:
                return self._complete(key, incoming)
        return [_pack(Kind.WANT, *key, incoming.offset)]

    def _chunks(self, key: Key, offset: int) -> Iterator[bytes]:
        """Frames of a message's chunks, one copied at a time.

        Before its turn to go out has come nothing holds the message but the outbox: else one who asks for each and
        reads none would have all of them kept.
        """
        sent = self.outbox.messages.get(key)  # it may be dropped while it is on its way
        if sent is None:
            yield _pack(Kind.GONE, *key)
            return
        self._listener.fetched(key, sent.size - offset, again=sent.was_begun)
        sent.was_begun = True
        for start, pieces in self.outbox.chunks(sent, offset):
            yield b"".join([_pack(Kind.CHUNK, *key, start, hash_of(*pieces)), *pieces])

    def _arrived(self, key: Key, offset: int, hash: bytes, data: memoryview) -> Iterable[bytes]:
        incoming = self.inbox.get(key)
        if incoming is None:
            if key <= self.closed:
                return []
            raise ProtocolError(f"sent a part of a message of round {key[0]} that nobody asked for")
        if offset < incoming.offset:
            return []  # of an answer to an earlier stream's question
        expected, small = (min(size, incoming.size - incoming.offset) for size in (message.CHUNK_SIZE, SMALL_CHUNK))
        is_sized = len(data) == expected or (small <= len(data) < expected and not len(data) % SMALL_CHUNK)
        if key not in self.offers or offset != incoming.offset or not is_sized:
            raise ProtocolError(
                f"sent {len(data)} bytes at {offset} of a message of round {key[0]}, expected {expected} at"
                f" {incoming.offset}"
            )
        if hash_of(data) != hash:
            raise ProtocolError(f"sent bytes at {offset} of a message of round {key[0]} that do not match their hash")
        if not incoming.take(data):
            self.give_up(key)
            raise ProtocolError(f"sent NaN, infinity or a number beyond {LARGEST:g} in round {key[0]}")
        self._listener.got_on()
        return self._complete(key, incoming) if incoming.offset == incoming.size else []

    def _complete(self, key: Key, incoming: Incoming) -> Iterable[bytes]:
        del self.inbox[key]
        self._listener.arrived(key)
        if key[1] == STATE:
            del self.offers[key]
        else:
            for old in [old for old in self.offers if old <= key]:
                del self.offers[old]
            self.closed = max(self.closed, key)
        incoming.done(incoming.payload())
        return [_pack(Kind.GOT, *key)]
