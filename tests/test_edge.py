"""The protocol of one edge, without a network: what arrives, over streams that break, from neighbours who lie."""

import struct
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peertune.exchange import Payload
from peertune.runtimes import edge as module
from peertune.runtimes import message, outbox
from peertune.runtimes.edge import Edge, Listener
from peertune.runtimes.edge_frames import FRAMES, MAX_FRAME, STATE, Key, Kind
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.message import CHUNK_SIZE, SMALL_CHUNK, hash_of
from peertune.runtimes.outbox import GROWS_AFTER
from peertune.runtimes.presence import Presence


def make_payload(seed: int = 0, size: int = 5) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(size, 3, generator=rng), "b": torch.randn(7, generator=rng), "empty": torch.zeros(0)}


def same(one: Payload | None, other: Payload) -> bool:
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


class Pair:
    """Two ends and the stream between them, which may be cut after any number of frames."""

    def __init__(self) -> None:
        self.ends = [Edge(), Edge()]
        self.queues: list[deque[bytes]] = [deque(), deque()]
        self.got: list[dict[Key, Payload | None]] = [{}, {}]
        self.is_connected = False

    def connect(self) -> None:
        self.is_connected = True
        for queue in self.queues:
            queue.clear()
        for end in (0, 1):
            self.say(end, self.ends[end].connected())

    def say(self, end: int, frames: Iterable[bytes]) -> None:
        if self.is_connected:
            self.queues[1 - end].extend(frames)

    def post(self, end: int, key: Key, payload: Payload) -> None:
        self.say(end, self.ends[end].post(key, payload))

    def expect(self, end: int, key: Key, like: Payload) -> None:
        self.say(end, self.ends[end].expect(key, like, lambda found: self.got[end].update({key: found})))

    def delivered(self, end: int) -> list[Key]:
        return [key for key, kept in self.ends[end].outbox.messages.items() if kept.is_delivered]

    def run(self, frames: int = 10_000) -> None:
        for _ in range(frames):
            for end in (0, 1):
                if self.queues[end]:
                    self.say(end, self.ends[end].receive(self.queues[end].popleft()))
        if frames < 10_000:
            self.is_connected = False


@pytest.mark.parametrize("expected_first", [True, False])
def test_a_message_arrives_whole(expected_first: bool) -> None:
    pair, payload = Pair(), make_payload()
    pair.connect()
    steps = [lambda: pair.expect(1, (0, 0), make_payload(9)), lambda: pair.post(0, (0, 0), payload)]
    for step in steps if expected_first else reversed(steps):
        step()
        pair.run()
    assert same(pair.got[1][0, 0], payload)
    assert pair.delivered(0) == [(0, 0)]
    pair.ends[0].outbox.messages[0, 0].is_delivered = False  # as where the stream ended over the word of it
    pair.connect()
    pair.run()
    assert pair.delivered(0) == [(0, 0)] and not pair.ends[1].offers


@given(cuts=st.lists(st.integers(0, 9), max_size=12))
def test_messages_survive_any_breaks_of_the_stream(cuts: list[int]) -> None:
    """Both ways, three rounds, chunks of 16 bytes; the stream breaks after some frames, again and again."""
    sent = {(end, round): make_payload(10 * end + round) for end in (0, 1) for round in range(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "CHUNK_SIZE", 16)
        pair = Pair()
        for round in range(3):
            for end in (0, 1):
                pair.post(end, (round, 0), sent[end, round])
                pair.expect(end, (round, 0), make_payload())
            for cut in cuts:
                pair.connect()
                pair.run(cut)
            pair.connect()
            pair.run()
    for (end, round), payload in sent.items():
        assert same(pair.got[1 - end][round, 0], payload)


def test_a_transfer_goes_on_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "CHUNK_SIZE", 16)
    pair = Pair()
    pair.post(0, (0, 0), make_payload())
    pair.expect(1, (0, 0), make_payload())
    pair.connect()
    pair.run(5)
    (incoming,) = pair.ends[1].inbox.values()
    held = incoming.offset
    assert 0 < held < incoming.size
    pair.connect()
    assert [struct.unpack_from("<BIIQ", frame)[3] for frame in _frames(pair, 0, Kind.WANT)] == [held]


def test_a_restarted_neighbor_is_asked_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the old process's message is put together with the new one's."""
    monkeypatch.setattr(message, "CHUNK_SIZE", 16)
    pair = Pair()
    pair.post(0, (0, 0), make_payload(1))
    pair.expect(1, (0, 0), make_payload())
    pair.connect()
    pair.run(5)
    pair.ends[0] = Edge()
    pair.post(0, (0, 0), make_payload(2))
    pair.connect()
    pair.run()
    assert same(pair.got[1][0, 0], make_payload(2))


def test_messages_are_kept_until_the_neighbor_has_a_checkpoint_beyond_them() -> None:
    """One who was killed after the round, and comes back from an earlier checkpoint, gets them again."""
    pair = Pair()
    pair.connect()
    for round in range(3):
        pair.post(0, (round, 0), make_payload(round))
        pair.expect(1, (round, 0), make_payload())
        pair.run()
    pair.say(1, pair.ends[1].checkpointed(1))
    pair.run()
    assert list(pair.ends[0].outbox.messages) == [(1, 0), (2, 0)]
    pair.ends[1], pair.got[1] = Edge(), {}
    pair.ends[1].checkpointed(1)
    pair.connect()
    for round in (1, 2):
        pair.run()
        assert pair.ends[0].outbox.has_undelivered, "what the old process had says nothing of the new one"
        pair.expect(1, (round, 0), make_payload())
        pair.run()
        assert same(pair.got[1][round, 0], make_payload(round))
    assert not pair.ends[0].outbox.has_undelivered


def test_a_message_nobody_keeps_any_more_is_given_up() -> None:
    for expected_first in (True, False):
        pair = Pair()
        pair.post(0, (5, 0), make_payload())
        if expected_first:
            pair.expect(1, (3, 0), make_payload())
        pair.connect()
        pair.run()
        pair.expect(1, (3, 0), make_payload())
        assert pair.got[1] == {(3, 0): None}


@pytest.mark.parametrize("expected_first", [True, False])
def test_what_a_neighbor_who_is_beyond_the_round_does_not_offer_is_given_up(expected_first: bool) -> None:
    """It may have nothing for this site in its own round, and wait for one who waits for this site."""
    pair = Pair()
    pair.connect()
    pair.ends[0].round = 4
    for step in (0, 1):
        if expected_first == (step == 0):
            for round in (3, 4):
                pair.expect(1, (round, 0), make_payload())
        else:
            pair.say(0, [pair.ends[0].beat()])
        pair.run()
    assert pair.got[1] == {(3, 0): None}


def test_what_is_kept_for_one_whose_stream_broke_is_not_given_up() -> None:
    pair = Pair()
    pair.post(0, (3, 0), make_payload())
    pair.ends[0].round = 4
    pair.connect()
    pair.run()
    pair.connect()  # what it kept on the old stream is forgotten, and so is how far it was
    pair.expect(1, (3, 0), make_payload(9))
    pair.run()
    assert same(pair.got[1][3, 0], make_payload())


def test_old_messages_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "KEPT_BYTES", 250)
    pair = Pair()
    for number in range(5):
        pair.post(0, (7, number), make_payload(number))  # 88 bytes
    assert len(pair.ends[0].outbox.messages) == 5, "what it has not had yet is kept while it is there"
    pair.post(0, (9, 0), make_payload(5))
    assert list(pair.ends[0].outbox.messages) == [(7, 4), (9, 0)], "or even if it never gets on: nobody may wait for it"
    pair.post(0, (9, 1), make_payload(6, size=100))
    assert list(pair.ends[0].outbox.messages) == [(9, 0), (9, 1)]
    pair.ends[0].peer_is_away = True
    pair.post(0, (9, 2), make_payload(7, size=100))
    assert list(pair.ends[0].outbox.messages) == [(9, 2)]


def test_a_neighbor_that_is_there_and_fetches_nothing_takes_no_more_memory_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "KEPT_BYTES", 1)
    pair = Pair()
    pair.ends[0].peer_round = 9  # so it did without what is older
    for round in range(10):
        pair.post(0, (round, 0), make_payload(round))
    assert list(pair.ends[0].outbox.messages) == [(8, 0), (9, 0)]
    for round in range(10):
        pair.post(0, (round, STATE), make_payload(round))
    assert [key for key in pair.ends[0].outbox.messages if key[1] == STATE] == [(9, STATE)]


def test_messages_that_were_delivered_make_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "KEPT_BYTES", 250)
    pair = Pair()
    pair.connect()
    for round in range(4):
        pair.post(0, (round, 0), make_payload(round))
        pair.expect(1, (round, 0), make_payload())
        pair.run()
    assert list(pair.ends[0].outbox.messages) == [(2, 0), (3, 0)]


def test_a_message_dropped_after_it_was_offered_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "KEPT_BYTES", 1)
    pair = Pair()
    pair.connect()
    pair.post(0, (0, 0), make_payload())
    pair.run()
    pair.ends[0].peer_is_away = True
    pair.ends[0].post((1, 0), make_payload())  # its offer is still on the way
    pair.expect(1, (0, 0), make_payload())
    pair.run()
    assert pair.got[1] == {(0, 0): None}


def test_one_who_is_behind_gets_the_state_and_goes_on_from_there() -> None:
    pair = Pair()
    pair.connect()
    for round in (7, 8):
        pair.post(0, (round, 0), make_payload(round))
    pair.run()
    assert pair.ends[1].peer_round == 8
    arrived: list[tuple[int, Payload | None]] = []
    pair.expect(1, (2, 0), make_payload())
    pair.say(1, pair.ends[1].ask(make_payload(), lambda round, found: arrived.append((round, found))))
    pair.connect()  # the question survives a new stream
    pair.run()
    assert pair.ends[0].peer_asks
    pair.post(0, (8, STATE), make_payload(80))
    pair.run()
    ((round, found),) = arrived
    assert round == 8 and same(found, make_payload(80))
    assert (8, STATE) not in pair.ends[0].outbox.messages
    pair.ends[1].skip_to(8)
    assert pair.got[1] == {(2, 0): None}
    pair.expect(1, (8, 0), make_payload())
    pair.run()
    assert same(pair.got[1][8, 0], make_payload(8))


def test_one_who_skips_rounds_sends_and_takes_nothing_of_them() -> None:
    """What comes late to them is of weights that it holds no more; the round that it goes on with loses nothing."""
    pair, notes = apart(3, missing=[0])
    pair.expect(0, (7, 0), make_payload())
    pair.ends[0].skip_to(8)
    assert pair.got[0][7, 0] is None and not pair.ends[0].outbox.messages
    pair.post(1, (8, 0), make_payload(8))
    pair.connect()
    pair.run()
    pair.expect(0, (8, 0), make_payload())
    pair.run()
    assert same(pair.got[0][8, 0], make_payload(8)) and not notes[0].late


def test_a_neighbors_round_falls_only_where_it_is_another_process() -> None:
    pair = Pair()
    pair.connect()
    pair.ends[0].round = 4
    pair.post(0, (5, 0), make_payload())
    pair.say(0, [pair.ends[0].beat(), *pair.ends[0].finished()])
    pair.run()
    assert pair.ends[1].peer_round == 5 and pair.ends[1].peer_is_finished
    pair.ends[0] = Edge()
    pair.connect()
    pair.run()
    assert pair.ends[1].peer_round == 0 and not pair.ends[1].peer_is_finished


def test_a_state_can_be_had_twice_in_one_round() -> None:
    """As by one who was started again, or could not use the first."""
    pair = Pair()
    pair.connect()
    pair.run()
    arrived: list[Payload | None] = []
    for seed in (1, 2):
        pair.say(1, pair.ends[1].ask(make_payload(), lambda round, found: arrived.append(found)))
        pair.post(0, (8, STATE), make_payload(seed))
        assert pair.ends[0].outbox.has_undelivered
        pair.run()
    assert same(arrived[0], make_payload(1)) and same(arrived[1], make_payload(2))
    assert not pair.ends[0].outbox.has_undelivered


def test_a_state_that_is_refused_closes_no_round() -> None:
    """The rounds of this site still need their messages, also those before the state's."""
    pair = Pair()
    pair.connect()
    pair.run()
    told: list[Payload | None] = []
    pair.say(1, pair.ends[1].ask(make_payload(), lambda round, found: told.append(found)))
    pair.post(0, (8, STATE), {"x": torch.zeros(22)})
    with pytest.raises(ProtocolError, match="announced a message of"):
        pair.run()
    assert told == [None]
    pair.connect()
    pair.post(0, (3, 0), make_payload(3))
    pair.run()
    pair.expect(1, (3, 0), make_payload())
    pair.run()
    assert same(pair.got[1][3, 0], make_payload(3))


def test_a_state_on_its_way_says_nothing_of_what_else_is_kept() -> None:
    pair = Pair()
    pair.connect()
    pair.run()
    pair.say(1, pair.ends[1].ask(make_payload(), lambda round, found: None))
    pair.ends[1].receive(pair.ends[0].post((8, STATE), make_payload())[0])  # type: ignore[index]
    pair.expect(1, (7, 0), make_payload())
    assert (7, 0) not in pair.got[1]
    pair.post(0, (7, 0), make_payload(7))
    pair.run()
    assert same(pair.got[1][7, 0], make_payload(7))


def test_a_state_nobody_asked_for_takes_no_memory() -> None:
    pair = Pair()
    pair.connect()
    pair.post(0, (3, STATE), make_payload())
    pair.run()
    assert not pair.ends[1].inbox and not pair.ends[1].offers and not pair.ends[0].outbox.messages


def test_one_who_leaves_is_away_until_it_is_back() -> None:
    class Farewells(Listener):
        def has_left(self) -> None:
            said.append("left")

        def has_finished(self) -> None:
            said.append("finished")

    pair, said = Pair(), list[str]()
    pair.ends[0] = Edge(Farewells())
    pair.connect()
    for _ in range(2):
        pair.say(1, pair.ends[1].leaving())
        pair.say(1, pair.ends[1].finished())
    pair.run()
    assert pair.ends[0].peer_has_left and said == ["left", "finished"], "each is told once"
    pair.ends[1] = Edge()
    pair.connect()
    pair.run()
    assert not pair.ends[0].peer_has_left


def test_one_who_finished_while_nobody_heard_it_says_so_on_the_next_stream() -> None:
    """Nothing of it is waited for that it does not offer."""
    pair = Pair()
    list(pair.ends[0].finished())
    pair.expect(1, (0, 0), make_payload())
    pair.connect()
    pair.run()
    assert pair.ends[1].peer_is_finished and pair.got[1] == {(0, 0): None}
    pair.expect(1, (1, 0), make_payload())
    assert pair.got[1][1, 0] is None


def test_a_beat_carries_ages_and_wrong_ones_are_refused() -> None:
    class Told(Listener):
        def __init__(self, count: int) -> None:
            self.presence = Presence(count, 0, 1.0)
            self.heard: list[float] = []

        def tells(self) -> tuple[Sequence[float], Sequence[int]]:
            return (0.0, 2.5, -1.0), (7, 0, 2**64 - 1)

        def told(self, ages: Sequence[float], steps: Sequence[int]) -> None:
            self.presence.told(ages, steps, 0.0)
            self.heard.extend([*ages, *steps])

    listener = Told(3)
    sender, receiver = Edge(listener), Edge(listener)
    assert receiver.receive(sender.beat()) == [] and listener.heard == [0.0, 2.5, -1.0, 7, 0, 2**64 - 1]
    with pytest.raises(ProtocolError, match="a beat that is none"):
        receiver.receive(sender.beat() + b"x")
    with pytest.raises(ProtocolError, match="got 3 ages, expected 2"):
        Edge(Told(2)).receive(sender.beat())


def test_what_comes_too_late_is_dropped() -> None:
    pair = Pair()
    pair.connect()
    pair.expect(1, (0, 0), make_payload())
    pair.ends[1].give_up((0, 0))
    pair.post(0, (0, 0), make_payload())
    pair.run()
    assert pair.got[1] == {(0, 0): None} and pair.delivered(0) == [(0, 0)]


class Notes(Listener):
    """What an edge told."""

    def __init__(self) -> None:
        self.late: dict[Key, tuple[Payload, Payload]] = {}
        self.missed: list[Key] = []

    def came_late(self, key: Key, theirs: Payload, mine: Payload) -> None:
        self.late[key] = (theirs, mine)

    def was_missed(self, key: Key) -> None:
        self.missed.append(key)


def apart(rounds: int, missing: Sequence[int]) -> tuple[Pair, list[Notes]]:
    """Two ends that exchanged messages in one round, and made some more while nothing came through.

    Args:
        missing: ends that go on without the other's messages.
    """
    pair, notes = Pair(), [Notes(), Notes()]
    pair.ends = [Edge(each) for each in notes]
    pair.connect()
    for round in range(rounds):
        for end in (0, 1):
            pair.post(end, (round, 0), make_payload(10 * end + round))
            pair.expect(end, (round, 0), make_payload(10 * end + round))
        pair.run(10_000 if round == 0 else 0)
        if round:
            for end in missing:
                list(pair.ends[end].miss((round, 0)))
    return pair, notes


@pytest.mark.parametrize("cuts", [[], [1], [5, 7], [8, 3, 9]])
def test_what_one_end_went_without_still_comes_and_the_other_learns_of_it(
    cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message, "CHUNK_SIZE", 16)
    pair, notes = apart(3, missing=[0])
    assert pair.got[0][1, 0] is None
    for cut in cuts:
        pair.connect()
        pair.run(cut)
    pair.connect()
    pair.run()
    assert notes[0].late.keys() == {(1, 0), (2, 0)}
    for (round, _), (theirs, mine) in notes[0].late.items():
        assert same(theirs, make_payload(10 + round)) and same(mine, make_payload(round))
    assert notes[1].missed == [(1, 0), (2, 0)] and not notes[1].late and not notes[0].missed
    assert [end.missed_until for end in pair.ends] == [-1, 2]
    assert all(same(pair.got[1][round, 0], make_payload(round)) for round in range(3))
    pair.connect()
    pair.run()
    assert len(notes[0].late) == 2 and not pair.ends[0].late and notes[1].missed == [(1, 0), (2, 0)]


def test_what_both_ends_went_without_is_fetched_by_neither() -> None:
    pair, notes = apart(3, missing=[0, 1])
    pair.connect()
    pair.run()
    assert notes[0].missed == notes[1].missed == [(1, 0), (2, 0)]
    assert not any(each.late for each in notes) and not any(end.late for end in pair.ends)
    edge = Edge(told := Notes())
    for round in (2, 1):  # the neighbour says so before this site goes on without it, or has made its own
        edge.receive(FRAMES.pack(Kind.MISSED, round, 0))
    edge.expect((1, 0), make_payload(), lambda found: None)
    assert edge.miss((1, 0)) and not edge.late and edge.missed_until == 2 and not told.missed
    edge.post((1, 0), make_payload())
    assert told.missed == [(1, 0)]


def test_what_the_neighbor_turns_out_to_have_missed_as_well_is_fetched_no_further() -> None:
    pair, notes = apart(2, missing=[0])
    for frame in pair.ends[1].connected():
        list(pair.ends[0].receive(frame))
    assert (1, 0) in pair.ends[0].inbox
    pair.ends[0].receive(FRAMES.pack(Kind.MISSED, 1, 0))
    assert not pair.ends[0].inbox and not notes[0].late and notes[0].missed == [(1, 0)]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [(Kind.OFFER, (88, b"x" * 16), "announced more than 3"), (Kind.MISSED, (), "went on without more than 3")],
)
def test_what_a_neighbor_may_say_of_messages_is_bounded(
    kind: Kind, fields: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OFFERS", 3)
    edge = Edge()
    for round in range(3):
        assert edge.receive(FRAMES.pack(kind, round, 0, *fields)) == []
    with pytest.raises(ProtocolError, match=message):
        edge.receive(FRAMES.pack(kind, 3, 0, *fields))


def test_what_was_missed_is_kept_by_the_neighbor_beyond_this_sites_checkpoints() -> None:
    pair, notes = apart(3, missing=[0])
    list(pair.ends[0].checkpointed(3))
    pair.connect()
    pair.run()
    assert notes[0].late.keys() == {(1, 0), (2, 0)}
    assert pair.ends[1].peer_missed == {(1, 0), (2, 0)}
    pair.say(0, pair.ends[0].checkpointed(3))
    pair.run()
    assert not pair.ends[1].outbox.messages and not pair.ends[1].peer_missed


def test_what_corrects_nothing_is_told_as_missed_and_dropped() -> None:
    pair, notes = apart(1, missing=[])
    pair.expect(0, (1, 0), make_payload())
    pair.say(0, pair.ends[0].miss((1, 0), corrects=False))
    pair.post(1, (1, 0), make_payload(11))
    pair.run()
    assert notes[1].missed == [(1, 0)] and not notes[0].late and not pair.ends[0].late
    assert pair.delivered(1) == [(0, 0), (1, 0)]


def test_what_is_told_of_as_missed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MISSED", 2)
    pair, _ = apart(5, missing=[0])
    assert pair.ends[0].missed == [(3, 0), (4, 0)]


def test_what_the_neighbor_keeps_no_more_is_not_waited_for() -> None:
    pair, notes = apart(3, missing=[0])
    pair.ends[1].outbox.messages.pop((1, 0))
    pair.connect()
    pair.run()
    assert notes[0].late.keys() == {(2, 0)} and not pair.ends[0].late


def test_own_messages_are_kept_for_late_ones_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * 4 * 22)
    pair, _ = apart(5, missing=[0])
    assert list(pair.ends[0].late) == [(3, 0), (4, 0)]


def _frames(pair: Pair, end: int, kind: Kind) -> Iterable[bytes]:
    """What `end` answers with, of one kind, while all that is under way arrives."""
    found: list[bytes] = []
    while any(pair.queues):
        for receiver in (0, 1):
            if pair.queues[receiver]:
                frame = pair.queues[receiver].popleft()
                found += [frame] if receiver == end and frame[0] == kind else []
                pair.say(receiver, pair.ends[receiver].receive(frame))
    return found


def test_wrong_shapes_and_sizes_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(*_: object) -> None:
        raise AssertionError("took memory")

    monkeypatch.setattr(module.Incoming, "make_room", room)
    for lie in ({"w": torch.zeros(6, 3)}, {**make_payload(), "more": torch.zeros(2)}, {"x": torch.zeros(22)}):
        pair = Pair()
        pair.connect()
        pair.expect(1, (0, 0), make_payload())
        pair.post(0, (0, 0), lie)
        with pytest.raises(ProtocolError, match="announced a message of"):
            pair.run()
    huge = struct.pack("<BIIQ16s", Kind.OFFER, 0, 0, 10_000_000_000, b"x" * 16)
    edge = Edge()
    edge.expect((0, 0), make_payload(), lambda found: None)
    with pytest.raises(ProtocolError, match="10000000000 bytes"):
        edge.receive(huge)


@pytest.mark.parametrize("expected_first", [True, False])
def test_a_refused_message_is_given_up_and_not_asked_for_again(expected_first: bool) -> None:
    pair = Pair()
    pair.connect()
    steps = [lambda: pair.expect(1, (0, 0), make_payload()), lambda: pair.post(0, (0, 0), {"x": torch.zeros(22)})]
    with pytest.raises(ProtocolError):
        for step in steps if expected_first else reversed(steps):
            step()
            pair.run()
    assert pair.got[1] == {(0, 0): None}
    pair.connect()
    pair.run()
    assert pair.delivered(0) == [(0, 0)]


def test_of_one_who_was_refused_no_earlier_offer_is_believed() -> None:
    """Else each round finds another false one, of a stream that ended long ago."""
    edge = Edge()
    for round in range(3):
        assert edge.receive(struct.pack("<BIIQ16s", Kind.OFFER, round, 0, 5, b"x" * 16)) == []
    with pytest.raises(ProtocolError, match="a message of 5 bytes for round 0"):
        edge.expect((0, 0), make_payload(), lambda found: None)
    assert edge.refuse("sent what it must not") == bytes([Kind.REFUSED]) + b"sent what it must not"
    for round in (1, 2):
        assert edge.expect((round, 0), make_payload(), lambda found: None) == []


@pytest.mark.parametrize("restarts", [True, False])
def test_a_helper_that_restarts_or_finishes_is_asked_no_more(restarts: bool) -> None:
    """The one who asked is told, so that it can ask again."""
    pair = Pair()
    pair.connect()
    pair.run()
    told: list[Payload | None] = []
    pair.say(1, pair.ends[1].ask(make_payload(), lambda round, found: told.append(found)))
    pair.run()
    assert not told
    if restarts:
        pair.ends[0] = Edge()
    else:
        list(pair.ends[0].finished())
    pair.connect()
    pair.run()
    assert told == [None]


def test_a_message_goes_out_once_on_a_stream() -> None:
    """Else a member could have a site send all the time."""
    pair = Pair()
    pair.connect()
    pair.post(0, (0, 0), make_payload())
    want = FRAMES.pack(Kind.WANT, 0, 0, 0)
    list(pair.ends[0].receive(want))
    with pytest.raises(ProtocolError, match="a message of round 0 a second time on one stream"):
        pair.ends[0].receive(want)
    pair.ends[0].connected()
    assert list(pair.ends[0].receive(want))
    with pytest.raises(ProtocolError, match="asked for byte 65536 of a message of 88"):
        pair.ends[0].receive(FRAMES.pack(Kind.WANT, 0, 0, SMALL_CHUNK))


def test_what_is_fetched_is_told() -> None:
    pair = Pair()
    told: list[tuple[Key, int, bool]] = []

    class Told(Listener):
        def fetched(self, key: Key, size: int, *, again: bool) -> None:
            told.append((key, size, again))

    pair.ends[0] = Edge(Told())
    pair.connect()
    pair.post(0, (0, 0), make_payload())
    pair.run()
    assert told == []
    pair.expect(1, (0, 0), make_payload())
    pair.run()
    pair.ends[0].connected()
    list(pair.ends[0].receive(FRAMES.pack(Kind.WANT, 0, 0, 0)))
    assert told == [((0, 0), 88, False), ((0, 0), 88, True)]
    for _ in range(2):  # the second one is another state, as of one who asked twice in a round
        pair.post(0, (1, STATE), make_payload())
        list(pair.ends[0].receive(FRAMES.pack(Kind.WANT, 1, STATE, 0)))
        pair.ends[0].receive(FRAMES.pack(Kind.GOT, 1, STATE))
    assert told[2:] == [((1, STATE), 88, False)] * 2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e18])
def test_nan_infinity_and_numbers_without_a_square_are_refused(value: float, dtype: torch.dtype, sign: int) -> None:
    pair, payload = Pair(), {name: tensor.to(dtype) for name, tensor in make_payload().items()}
    pair.connect()
    pair.expect(1, (3, 0), payload)
    pair.post(0, (3, 0), payload | {"b": torch.full((7,), sign * 9e17, dtype=dtype)})
    pair.run()
    assert pair.got[1].pop((3, 0)) is not None
    payload["w"][2, 1] = sign * value
    pair.expect(1, (4, 0), payload)
    pair.post(0, (4, 0), payload)
    with pytest.raises(ProtocolError, match="NaN, infinity or a number beyond 1e\\+18 in round 4"):
        pair.run()
    assert pair.got[1] == {(4, 0): None}


def test_bits_of_a_methods_own_are_no_numbers() -> None:
    """Signs that are packed would be NaN for one who takes them for float32."""
    payload = {"signs": torch.full((CHUNK_SIZE + 3,), 255, dtype=torch.uint8), "scale": torch.ones(1).view(torch.uint8)}
    pair = Pair()
    pair.connect()
    pair.expect(1, (3, 0), payload)
    pair.post(0, (3, 0), payload)
    pair.run()
    assert same(pair.got[1][3, 0], payload)


def test_what_was_offered_on_a_stream_that_is_gone_is_refused_on_the_next() -> None:
    """Who sends it has to be told, and without a stream could not be."""
    sender, receiver = Edge(), Edge()
    (offer,) = sender.post((0, 0), make_payload())
    receiver.receive(offer)
    receiver.disconnected()
    assert receiver.expect((0, 0), {"x": torch.zeros(5)}, lambda found: None) == []
    list(receiver.connected())
    with pytest.raises(ProtocolError, match="the same names and shapes as here"):
        for frame in sender.connected():
            receiver.receive(frame)


def test_a_message_that_is_dropped_while_it_is_on_its_way_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "CHUNK_SIZE", 16)
    sender, receiver, got = Edge(), Edge(), list[Payload | None]()
    (offer,) = sender.post((0, 0), make_payload())
    receiver.expect((0, 0), make_payload(9), got.append)
    (want,) = receiver.receive(offer)
    chunks = iter(sender.receive(want))
    receiver.receive(next(chunks))
    sender.skip_to(1)
    for frame in chunks:
        receiver.receive(frame)
    assert same(got[0], make_payload())


def test_one_who_asks_for_all_messages_and_reads_none_has_none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what waits for its turn to go out nothing is held but what is kept anyway."""
    monkeypatch.setattr(outbox, "KEPT_BYTES", 250)
    sender, held, unread = Edge(), list[Any](), list[Iterable[bytes]]()
    for round in range(9):
        sender.post((round, 0), make_payload(round))
        held.append(weakref.ref(sender.outbox.messages[round, 0]))
        unread.append(sender.receive(FRAMES.pack(Kind.WANT, round, 0, 0)))
        sender.receive(FRAMES.pack(Kind.GOT, round, 0))
    assert [made() is not None for made in held] == 7 * [False] + 2 * [True]
    said = [list(frames) for frames in unread]
    assert said[:7] == [[FRAMES.pack(Kind.GONE, round, 0)] for round in range(7)]
    assert [frame[0] for frames in said[7:] for frame in frames] == 2 * [Kind.CHUNK]


def test_damaged_and_misplaced_chunks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "CHUNK_SIZE", 16)
    for change, reason in (
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "do not match their hash"),
        (lambda frame: frame[:9] + struct.pack("<Q", 32) + frame[17:], "expected 16 at 0"),
        (lambda frame: frame[:-1], "sent 15 bytes"),
        (lambda frame: frame[:1] + struct.pack("<I", 7) + frame[5:], "nobody asked for"),
    ):
        sender, receiver = Edge(), Edge()
        (offer,) = sender.post((0, 0), make_payload())
        receiver.expect((0, 0), make_payload(), lambda found: None)
        (want,) = receiver.receive(offer)
        chunk = next(iter(sender.receive(want)))
        with pytest.raises(ProtocolError, match=reason):
            receiver.receive(change(chunk))


def test_parts_are_small_where_they_take_long_to_get_out() -> None:
    """Also where a transfer goes on after the stream was given up over a part that was too large, though it was out at
    once: into a buffer that took as long to drain."""
    payload, got = make_payload(size=1_400_000), list[Payload | None]()
    sender, receiver = Edge(), Edge()
    (offer,) = sender.post((0, 0), payload)
    receiver.expect((0, 0), make_payload(9, size=1_400_000), got.append)
    found: list[list[int]] = []
    for seconds in ([0.01] * 34, [0.01] * 7 + [1.0] + [0.01] * 8 + [1.0, 10.0, 1.0], [10.0] * 3 + [0.01] * 999):
        list(sender.connected()), list(receiver.connected())
        (want,) = receiver.receive(offer)
        found.append([])
        for frame, took in zip(sender.receive(want), seconds, strict=False):
            found[-1].append((len(frame) - FRAMES.size(Kind.CHUNK)) // SMALL_CHUNK)
            assert len(frame) <= MAX_FRAME
            receiver.receive(frame)
            sender.outbox.paced(took)
    grows = [size for size in (1, 2, 4, 8) for _ in range(GROWS_AFTER)]
    assert found[0] == [*grows, 16, 16] and found[1] == [1] * 16 + [2, 2, 1]
    assert found[2][: 3 + 24] == [1] * 3 + grows[:24]
    assert len(got) == 1 and same(got[0], payload)


def test_messages_that_buffers_take_at_once_go_out_in_small_parts() -> None:
    """They say nothing of a line that drains the buffers slowly: a large part may take longer than a line may be
    silent."""
    sender, receiver = Edge(), Edge()
    for round in range(2 * GROWS_AFTER):
        (offer,) = sender.post((round, 0), make_payload(size=30_000))
        receiver.expect((round, 0), make_payload(size=30_000), lambda found: None)
        (want,) = receiver.receive(offer)
        for frame in sender.receive(want):
            assert len(frame) - FRAMES.size(Kind.CHUNK) <= SMALL_CHUNK
            sender.outbox.paced(0.01)
            receiver.receive(frame)


def test_parts_are_not_as_small_as_a_member_likes() -> None:
    sender, receiver = Edge(), Edge()
    (offer,) = sender.post((0, 0), make_payload(size=100_000))
    receiver.expect((0, 0), make_payload(size=100_000), lambda found: None)
    list(receiver.receive(offer))
    for size in (4, SMALL_CHUNK - 4, SMALL_CHUNK + 4, 2 * CHUNK_SIZE):
        data = bytes(size)
        frame = struct.pack("<BIIQ16s", Kind.CHUNK, 0, 0, 0, hash_of(data)) + data
        with pytest.raises(ProtocolError, match=f"sent {size} bytes at 0"):
            receiver.receive(frame)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_random_bytes_are_refused_or_ignored(frames: list[bytes]) -> None:
    """Nothing but a ProtocolError, and no memory beyond what was expected."""
    edge = Edge()
    edge.expect((0, 0), make_payload(), lambda found: None)
    for frame in frames:
        try:
            list(edge.receive(frame))
        except ProtocolError:
            return


@given(kind=st.sampled_from(Kind), body=st.binary(max_size=60))
def test_frames_with_random_fields_are_refused_or_ignored(kind: Kind, body: bytes) -> None:
    edge = Edge()
    edge.expect((0, 0), make_payload(), lambda found: None)
    edge.post((0, 0), make_payload())
    try:
        list(edge.receive(bytes([kind]) + body))
    except ProtocolError:
        return


def test_of_two_processes_that_take_turns_the_second_is_known() -> None:
    """One that was restarted is not, nor is one whose old connection is heard of once more."""
    told: list[str] = []

    class Told(Listener):
        def runs_twice(self) -> None:
            told.append("twice")

    here, first, second = Edge(Told()), Edge(), Edge()

    def dials(other: Edge) -> bool:
        hello = next(iter(other.connected()))
        if here.is_second(hello):
            return False
        here.receive(hello)
        return True

    assert all(dials(other) for other in (first, first, second, second, first, second))
    assert told == []
    assert dials(first) and told == ["twice"]
    assert not dials(second) and not dials(second) and dials(first) and told == ["twice"]
