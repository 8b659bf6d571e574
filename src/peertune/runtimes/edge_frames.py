"""The frames that the two ends of an edge say to each other.

    HELLO boot                          a stream begins; boot tells whether the sender is still the same process
    OFFER key, size, hash of header     a message is ready
    WANT  key, offset                   the receiver knows its shapes, has made room, and holds `offset` bytes already
    CHUNK key, offset, hash, bytes      of it, SMALL_CHUNK to CHUNK_SIZE; less at its end
    GOT   key                           all of it has arrived, or is needed no more
    GONE  key                           it was offered, but is kept no more
    MISSED key                          the sender's round went on without it
    SAVED round                         whoever says this has a checkpoint of that round: it will never again ask for a
                                        message of an earlier one
    BEAT  round, ages, steps            nothing else to say: no message of an earlier round is kept but those offered;
                                        and how long ago each member was heard of, and how often it got on (presence)
    ASK                                 this site is behind: it wants the state of one who is not
    DONE                                this site has finished the run
    LEAVE                               this site goes, and need not be waited for until it is back
    REFUSED reason                      the receiver has sent what it must not; the last frame of a stream

A key is (round, number of the hop in it); a state is a message of the key (round, STATE).
"""

from __future__ import annotations

from enum import IntEnum

from peertune.runtimes.frames import Frames
from peertune.runtimes.message import CHUNK_SIZE, HASH_SIZE

Key = tuple[int, int]
STATE = (1 << 32) - 1
"""The number of the hop in the key of a state."""


class Kind(IntEnum):
    HELLO, OFFER, WANT, CHUNK, GOT, GONE, SAVED, BEAT, ASK, DONE, LEAVE, MISSED, REFUSED = range(1, 14)


FRAMES = Frames(
    Kind,
    {
        Kind.HELLO: "8s",
        Kind.OFFER: f"IIQ{HASH_SIZE}s",
        Kind.WANT: "IIQ",
        Kind.CHUNK: f"IIQ{HASH_SIZE}s",
        Kind.GOT: "II",
        Kind.GONE: "II",
        Kind.SAVED: "I",
        Kind.BEAT: "I",
        Kind.MISSED: "II",
    },
    open_ended=(Kind.CHUNK, Kind.BEAT, Kind.REFUSED),
)
MAX_FRAME = CHUNK_SIZE + FRAMES.size(Kind.CHUNK)
