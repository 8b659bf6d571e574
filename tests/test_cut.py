"""A line that is cut for six minutes, on a clock that the test moves: two sites in one process, joined in memory."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peertune.errors import PeerLostError
from peertune.exchange import Hop, Inbox
from peertune.identity import load_identity
from peertune.runtimes import message, neighbor, network, node
from peertune.runtimes.edge_frames import Kind
from peertune.runtimes.network import NetworkExchange
from peertune.runtimes.node import Node
from peertune.runtimes.presence import Presence
from tests.test_consortium import PATIENCE_S, make_charter, wait_for

CUT_S = 360.0
HOP = Hop("gossip", {(i, j): 0.5 for i in range(2) for j in range(2)}, takes_late=True)


class Clock:
    """What the runtime takes for the module `time`; it stands still, but for what a test moves it ahead."""

    ahead = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return self.ahead


class Pair:
    """Two sites and the line between them."""

    def __init__(self, folder: Path, clock: Clock, grace_s: float, quorum: int) -> None:
        self.clock = clock
        charter = make_charter(folder, ["a", "b"]).model_copy(update={"grace_s": grace_s, "quorum": quorum})
        self.log: list[list[tuple[str, Any]]] = [[], []]
        self.nodes, self.exchanges = [], []
        for i, name in enumerate("ab"):

            def log(kind: str, log: list[tuple[str, Any]] = self.log[i], **about: Any) -> None:
                log.append((kind, about.get("round", about.get("reason"))))

            made = Node(charter, load_identity(folder / name), "", log)
            made.start([(0, 1)])
            exchange = NetworkExchange(made)
            exchange.corrects = True
            self.nodes.append(made)
            self.exchanges.append(exchange)
            exchange.attend = lambda i=i, attend=exchange.attend: [self.looks.update([i]), attend()]  # type: ignore[method-assign]
        self.looks = Counter[int]()
        """How often each site has looked whether what it waits for has come."""
        self.talks: list[Future[None]] = []
        self.is_slow = False
        """Whether a part of a message goes out only when `let_through` says so."""
        self.gates: list[asyncio.Queue[None]] = [asyncio.Queue(), asyncio.Queue()]
        self.threads = ThreadPoolExecutor(2)

    def connect(self) -> None:
        known = [self.count(i, "connected") for i in (0, 1)]
        queues: list[asyncio.Queue[bytes]] = [asyncio.Queue(), asyncio.Queue()]
        for i in (0, 1):

            async def write(frame: bytes, to: int = 1 - i) -> None:
                if frame[0] == Kind.CHUNK and self.is_slow:
                    await self.gates[1 - to].get()
                self.nodes[to].soon(lambda: queues[to].put_nowait(frame))

            talk = self.nodes[i].neighbors[1 - i].talk(queues[i].get, write)
            self.talks.append(asyncio.run_coroutine_threadsafe(talk, self.nodes[i]._loop))
        wait_for(lambda: all(self.count(i, "connected") > known[i] for i in (0, 1)))
        edges = [self.nodes[i].neighbors[1 - i].edge for i in (0, 1)]
        wait_for(lambda: all(edges[i].peer_round >= edges[1 - i].round for i in (0, 1)))  # it was said which

    def cut(self) -> None:
        for talk in self.talks:
            talk.cancel()
        self.talks.clear()
        wait_for(lambda: not any(self.nodes[i].neighbors[1 - i].is_connected for i in (0, 1)))

    def until_they_wait(self, *sites: int) -> None:
        """Until these sites have begun to wait, and have looked at the clock as it is now."""
        known = Counter(self.looks)
        wait_for(lambda: all(self.looks[site] > known[site] + 1 for site in sites))

    def let_through(self, site: int) -> None:
        """Let one part of a message of a site's go out."""
        self.nodes[site].soon(partial(self.gates[site].put_nowait, None))

    def play(self, site: int, round: int, hop: Hop = HOP, value: float | None = None) -> "Future[Inbox | None]":
        """Begin a site's round; what the inbox will be."""
        out = {"w": torch.full((4,), 10.0 * round + site if value is None else value)}

        def go() -> Inbox | None:
            self.exchanges[site].start(round, hop, out)
            return self.exchanges[site].finish(round, hop, lambda: out)

        return self.threads.submit(go)

    def heard(self, round: int, sites: tuple[int, ...] = (0, 1)) -> list[list[int]]:
        """Play a round at some sites; whom each of them heard."""
        return [sorted(inbox.payloads) for inbox in self.ended([self.play(site, round) for site in sites])]

    def ended(self, rounds: "list[Future[Inbox | None]]") -> list[Inbox]:
        return [inbox for each in rounds if (inbox := each.result(timeout=PATIENCE_S)) is not None]

    def count(self, site: int, kind: str) -> int:
        return sum(event == kind for event, _ in self.log[site])

    def rounds(self, site: int, kind: str) -> list[Any]:
        """The rounds, or the reasons, of one kind of event."""
        return [about for event, about in self.log[site] if event == kind]

    def stop(self) -> None:
        self.cut()
        for each in self.nodes:
            each.stop()
        self.threads.shutdown()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pair]]:
    clock, made = Clock(), list[Pair]()
    for module in (neighbor, node, network):
        monkeypatch.setattr(module, "time", clock)

    def make(grace_s: float, quorum: int = 1) -> Pair:
        made.append(Pair(tmp_path, clock, grace_s, quorum))
        return made[-1]

    yield make
    for pair in made:
        pair.stop()


def test_a_cut_shorter_than_the_grace_costs_nothing_but_its_time(make: Callable[..., Pair]) -> None:
    pair = make(600.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    pair.cut()
    rounds = [pair.play(site, 1) for site in (0, 1)]
    pair.until_they_wait(0, 1)
    pair.clock.ahead += CUT_S
    wait_for(lambda: all(pair.count(site, "waiting") for site in (0, 1)))
    assert not any(each.done() for each in rounds)
    pair.connect()
    assert [sorted(inbox.payloads) for inbox in pair.ended(rounds)] == [[0, 1], [0, 1]]
    assert pair.heard(2) == [[0, 1], [0, 1]]
    assert not any(pair.count(site, "left_out") for site in (0, 1))


def test_a_cut_longer_than_the_grace_is_waited_for_once_and_moves_no_mean(make: Callable[..., Pair]) -> None:
    pair = make(120.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    pair.cut()
    rounds = [pair.play(site, 1) for site in (0, 1)]
    pair.until_they_wait(0, 1)
    pair.clock.ahead += 60.0
    wait_for(lambda: all(pair.count(site, "waiting") for site in (0, 1)))
    assert not any(each.done() for each in rounds), "half of the grace"
    pair.clock.ahead += CUT_S - 60.0
    assert [sorted(inbox.payloads) for inbox in pair.ended(rounds)] == [[0], [1]]
    assert pair.heard(2) == [[0], [1]], "at once: the clock stands"
    pair.connect()
    assert pair.heard(3) == [[0, 1], [0, 1]]
    for site in (0, 1):
        assert pair.rounds(site, "left_out") == pair.rounds(site, "was_missed") == [1, 2]
        assert pair.nodes[site].neighbors[1 - site].late.empty(), "neither heard the other"


def test_one_who_was_frozen_hears_what_was_kept_and_the_other_takes_it_late(make: Callable[..., Pair]) -> None:
    pair = make(120.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    pair.cut()
    first = pair.play(0, 1)
    wait_for(lambda: pair.rounds(0, "sent") == [0, 1])
    pair.clock.ahead += CUT_S
    assert sorted(pair.ended([first])[0].payloads) == [0]
    assert pair.heard(2, (0,)) == [[0]]
    pair.connect()
    assert pair.heard(1, (1,)) == pair.heard(2, (1,)) == [[0, 1]]
    assert pair.heard(3) == [[0, 1], [0, 1]]
    late = pair.nodes[0].neighbors[1].late
    for round in (1, 2):
        key, theirs, mine = late.get(timeout=PATIENCE_S)
        assert key == (round, 0)
        assert theirs["w"].tolist() == [10.0 * round + 1] * 4 and mine["w"].tolist() == [10.0 * round] * 4
    assert pair.rounds(1, "was_missed") == [1, 2] and not pair.count(1, "left_out")


def test_no_round_goes_on_without_the_one_that_makes_up_the_quorum(make: Callable[..., Pair]) -> None:
    """Others heard it a little later than this site did, and still count it; one who clearly hears it is believed."""
    pair = make(120.0, quorum=2)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    pair.cut()
    round = pair.play(0, 1)
    pair.clock.ahead += 121.0
    here = pair.nodes[0]

    def hear(age: float) -> None:
        here.call(asyncio.sleep(0, here.presence.told([0.0, age], [0, 0], pair.clock.monotonic())))

    hear(119.5)
    assert here.has_quorum
    pair.until_they_wait(0)
    assert not round.done()
    hear(1.0)
    assert sorted(pair.ended([round])[0].payloads) == [0]


AGREE = Hop("agree", HOP.weights)


def test_the_final_agreement_waits_for_a_message_that_takes_long(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one who has all it needs stays until the other has, too, however slowly that goes."""
    monkeypatch.setattr(message, "CHUNK_SIZE", 4)
    pair = make(10.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    pair.is_slow = True
    rounds = [pair.play(site, 1, AGREE) for site in (0, 1)]
    for _ in range(4):
        pair.let_through(1)
    assert sorted(pair.ended(rounds[:1])[0].payloads) == [0, 1]
    lingers, needs = Counter[float](), neighbor.Neighbor.needs
    monkeypatch.setattr(
        neighbor.Neighbor, "needs", lambda *about: [lingers.update([pair.clock.ahead]), needs(*about)][1]
    )
    stopped = pair.threads.submit(pair.nodes[0].stop, 10.0)
    got = pair.nodes[1].neighbors[0].edge
    for part in range(1, 5):
        wait_for(lambda: (1, 0) in got.inbox)
        pair.clock.ahead += 25.0
        pair.until_they_wait(1)
        wait_for(lambda: lingers[pair.clock.ahead] > 1)
        pair.let_through(0)
        wait_for(lambda part=part: (1, 0) not in got.inbox or got.inbox[1, 0].offset == 4 * part)
    assert sorted(pair.ended(rounds[1:])[0].payloads) == [0, 1], "100 s for 16 bytes"
    pair.nodes[1].soon(lambda: pair.nodes[1].neighbors[0].say(got.finished()))
    stopped.result(timeout=PATIENCE_S)


def test_one_who_is_back_within_the_grace_finds_those_who_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have finished at second 0, and linger for a grace of ten."""
    now = 0.0
    monkeypatch.setattr(neighbor, "time", SimpleNamespace(monotonic=lambda: now))
    charter: Any = SimpleNamespace(members=[SimpleNamespace(name=name) for name in "ab"], grace_s=10.0, stall_s=4.0)
    there = neighbor.Neighbor(1, charter, Presence(2, 0, 10.0), lambda *_, **__: None)

    def is_needed_until() -> float:
        nonlocal now
        while there.needs(0.0, 10.0):
            now += 1.0
        return now

    there.is_connected = True
    assert is_needed_until() == 10.0, "it never went"
    now, there.is_connected, there.last_heard = 8.0, False, 8.0
    assert is_needed_until() == 19.0, "it does not come back"
    now, there.is_connected, there.connected_at = 17.0, True, 17.0
    assert is_needed_until() == 27.0, "it is back, and asks for nothing"
    there.edge.post((0, 0), {"x": torch.ones(3)})
    now, there.last_sent = 26.0, 26.0
    assert is_needed_until() == 30.0, "it fetched something, and got stuck"
    now = there.connected_at = 99.0
    assert is_needed_until() == 100.0, "it comes and goes"


def test_two_who_wait_for_each_other_in_the_final_agreement_give_up(make: Callable[..., Pair]) -> None:
    """They are within reach of each other, and neither ever sends what the other waits for."""
    pair = make(10.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    exchanges = pair.exchanges
    for site in (0, 1):
        exchanges[site].start(1, AGREE, None)
    rounds = [pair.threads.submit(exchanges[site].finish, 1, AGREE, lambda: {"w": torch.zeros(4)}) for site in (0, 1)]
    pair.until_they_wait(0, 1)
    pair.clock.ahead += 49.0
    pair.until_they_wait(0, 1)
    assert not any(each.done() for each in rounds), "grace_s for each of the two, and stall_s"
    pair.clock.ahead += 2.0
    for each in rounds:
        with pytest.raises(PeerLostError, match="the final agreement went without"):
            each.result(timeout=PATIENCE_S)


def test_one_who_sends_nan_is_told_so(make: Callable[..., Pair]) -> None:
    pair = make(600.0)
    pair.connect()
    assert pair.heard(0) == [[0, 1], [0, 1]]
    said = "sent NaN, infinity or a number beyond 1e+18 in round {}"
    for round in (1, 2):
        rounds = [pair.play(0, round), pair.play(1, round, value=float("nan"))]
        assert sorted(pair.ended(rounds[:1])[0].payloads) == [0]
        wait_for(lambda: not any(pair.nodes[i].neighbors[1 - i].is_connected for i in (0, 1)))
        pair.connect()
        assert sorted(pair.ended(rounds[1:])[0].payloads) == [0, 1], "what is right arrives all the same"
    assert pair.rounds(1, "refused_by") == pair.rounds(0, "refused") == [said.format(1)], "once, not each round"
    assert pair.heard(3) == [[0, 1], [0, 1]]
    here = pair.nodes[1].neighbors[0]
    pair.nodes[1].soon(
        lambda: here.try_to_say(lambda: here.edge.receive(bytes([Kind.REFUSED]) + b"\x1b[2J" + b"x" * 999))
    )
    wait_for(lambda: pair.count(1, "refused_by") == 2)
    told = pair.rounds(1, "refused_by")[1]
    assert told.isprintable() and len(told) <= neighbor.MAX_REASON


def test_a_beat_overtakes_no_offer(make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that there are no others of earlier rounds; here the two come up at the same moment."""
    here, said = make(600.0).nodes[0], list[int]()
    neighbor_of = here.neighbors[1]
    monkeypatch.setattr(neighbor, "BEAT_S", 0.0)

    async def write(frame: bytes) -> None:
        said.append(frame[0])

    async def say() -> None:
        queue: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        writer = asyncio.create_task(neighbor_of._write(write, queue))
        await asyncio.sleep(0)  # it waits, and has done so for long enough
        queue.put_nowait(neighbor_of.edge.post((3, 0), {"x": torch.ones(3)}))
        neighbor_of.begin(4)
        while Kind.BEAT not in said:
            await asyncio.sleep(0)
        writer.cancel()

    here.call(say())
    assert said[:2] == [Kind.OFFER, Kind.BEAT]


def test_a_stream_that_ends_in_the_middle_of_a_write_is_no_failure(make: Callable[..., Pair]) -> None:
    """gRPC says so with errors of many kinds; one of this site's own is told."""
    pair = make(600.0)
    here = pair.nodes[0].neighbors[1]

    class ExecuteBatchError(Exception):
        """What gRPC raises is of no public class."""

    async def write(frame: bytes) -> None:
        raise ExecuteBatchError("<grpc._cython.cygrpc.SendMessageOperation object at 0x7f>")

    def broken() -> Iterator[bytes]:
        raise ValueError("no frame")
        yield b""

    async def say(frames: Iterable[bytes]) -> None:
        queue: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        queue.put_nowait(frames)
        await here._write(write, queue)

    pair.nodes[0].call(say([b"x"]))
    assert not pair.count(0, "failed")
    pair.nodes[0].call(say(broken()))
    assert pair.rounds(0, "failed") == ["ValueError: no frame"]


@pytest.mark.parametrize("is_cut", [False, True])
def test_how_long_a_part_took_is_told_also_where_the_stream_ends_over_it(
    is_cut: bool, make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, took = make(600.0), list[float]()
    here = pair.nodes[0].neighbors[1]
    monkeypatch.setattr(here.edge.outbox, "paced", took.append)

    async def write(frame: bytes) -> None:
        pair.clock.ahead += 29.0
        if is_cut:
            raise asyncio.CancelledError

    async def say() -> None:
        queue: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        queue.put_nowait([bytes([Kind.BEAT]), bytes([Kind.CHUNK]), here.edge.refuse("enough")][is_cut:])
        with suppress(asyncio.CancelledError):
            await here._write(write, queue)

    pair.nodes[0].call(say())
    assert [round(seconds) for seconds in took] == [29]
