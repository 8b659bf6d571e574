"""A port that anybody may knock at: hostile bytes, frames, replays and connections, at one edge and at a real node."""

import asyncio
import json
import multiprocessing
import os
import random
import resource
import socket
import ssl
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peertune.charter import Charter
from peertune.exchange import Hop, Payload
from peertune.identity import Identity, load_identity
from peertune.runtimes import message
from peertune.runtimes import node as node_module
from peertune.runtimes.edge import Edge, Listener
from peertune.runtimes.edge_frames import FRAMES, MAX_FRAME, STATE, Key, Kind
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.message import HASH_SIZE, Incoming, hash_of, shapes_hash
from peertune.runtimes.network import NetworkExchange
from peertune.runtimes.node import MAX_STREAMS, Node
from peertune.runtimes.probe import diagnose
from tests.test_consortium import PATIENCE_S, free_ports, make_charter, wait_for
from tests.test_edge import make_payload, same

MESSAGE = 22 * 4
"""Bytes of `make_payload`."""
SIZE = 300_000
"""Float32 numbers of the message that the sites exchange: more than a frame holds."""
ROUNDS, HOPS = st.sampled_from([0, 1, 2, 7, STATE]), st.sampled_from([0, 1, STATE])
SIZES = st.one_of(st.sampled_from([0, 1, 4, 16, MESSAGE, 10_000_000_000, 2**64 - 1]), st.integers(0, 2**64 - 1))
HASHES = st.one_of(st.just(shapes_hash(make_payload())), st.binary(min_size=16, max_size=16))
FIELDS: dict[Kind, st.SearchStrategy[tuple[Any, ...]]] = {
    Kind.HELLO: st.tuples(st.sampled_from([b"a" * 8, b"b" * 8])),
    Kind.OFFER: st.tuples(ROUNDS, HOPS, SIZES, HASHES),
    Kind.WANT: st.tuples(ROUNDS, HOPS, SIZES),
    Kind.CHUNK: st.tuples(ROUNDS, HOPS, SIZES, HASHES),
    Kind.GOT: st.tuples(ROUNDS, HOPS),
    Kind.GONE: st.tuples(ROUNDS, HOPS),
    Kind.SAVED: st.tuples(ROUNDS),
    Kind.BEAT: st.tuples(ROUNDS),
    Kind.ASK: st.just(()),
    Kind.DONE: st.just(()),
    Kind.LEAVE: st.just(()),
    Kind.MISSED: st.tuples(ROUNDS, HOPS),
    Kind.REFUSED: st.just(()),
}


@st.composite
def valid_frames(draw: st.DrawFn) -> bytes:
    """Any frame that can be read; chunks with hashes that match, and with those that do not."""
    kind = draw(st.sampled_from(Kind))
    fields = draw(FIELDS[kind])
    body = b""
    if kind is Kind.CHUNK:
        body = draw(st.binary(max_size=MESSAGE))
        if draw(st.booleans()):
            fields = (*fields[:3], hash_of(body))
    elif kind is Kind.BEAT:
        body = draw(st.binary(max_size=24))  # ages and steps, and what is none
    return FRAMES.pack(kind, *fields) + body


def conversation(payload: Payload, keys: Iterable[Key] = ((0, 0), (1, 0))) -> list[bytes]:
    """All that an honest sender says to one who asks for a few messages."""
    sender, receiver, said = Edge(), Edge(), []
    said += list(sender.connected())
    for key in keys:
        said += sender.post(key, payload)
    for key in keys:
        receiver.expect(key, payload, lambda found: None)
    answers = [answer for frame in said for answer in receiver.receive(frame)]
    while answers:
        told = [frame for answer in answers for frame in sender.receive(answer)]
        said += told
        answers = [answer for frame in told for answer in receiver.receive(frame)]
    return said


@st.composite
def mutated(draw: st.DrawFn) -> list[bytes]:
    """A real conversation with frames damaged, dropped, doubled and out of order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "CHUNK_SIZE", 16)
        frames = conversation(make_payload(3))
    for _ in range(draw(st.integers(1, 6))):
        if not frames:
            break
        place = draw(st.integers(0, len(frames) - 1))
        how = draw(st.sampled_from(["flip", "cut", "drop", "double", "swap", "lengthen"]))
        frame = frames[place]
        if how == "flip" and frame:
            at = draw(st.integers(0, len(frame) - 1))
            frames[place] = frame[:at] + bytes([frame[at] ^ draw(st.integers(1, 255))]) + frame[at + 1 :]
        elif how == "cut":
            frames[place] = frame[: draw(st.integers(0, len(frame)))]
        elif how == "drop":
            del frames[place]
        elif how == "double":
            frames.insert(draw(st.integers(0, len(frames))), frame)
        elif how == "swap":
            other = draw(st.integers(0, len(frames) - 1))
            frames[place], frames[other] = frames[other], frame
        else:
            frames[place] = frame + draw(st.binary(min_size=1, max_size=20))
    return frames


def attack(frames: Iterable[bytes], asks: bool) -> tuple[Edge, list[tuple[str, Payload | None]]]:
    """An edge in mid-run that is told the frames, over a new stream after each refusal, as `node` opens them.

    Returns:
        The edge, and what it delivered.
    """
    edge, got = Edge(), []
    edge.post((0, 0), make_payload(1))
    for round in (0, 1):
        edge.expect((round, 0), make_payload(), lambda found, round=round: got.append((f"round {round}", found)))
    if asks:
        edge.ask(make_payload(), lambda round, found: got.append(("state", found)))
    list(edge.connected())
    for frame in frames:
        try:
            for answer in edge.receive(frame):
                assert len(answer) <= MAX_FRAME
        except ProtocolError:
            list(edge.connected())
    return edge, got


def still_delivers(edge: Edge) -> None:
    """Over a new stream, from a neighbour that is a new process and honest."""
    key, payload, got, sender = (9, 0), make_payload(5), [], Edge()
    for frame in edge.connected():
        list(sender.receive(frame))  # what it wants of the old process is gone
    for frame in sender.connected():
        assert list(edge.receive(frame)) == []
    edge.expect(key, make_payload(), got.append)
    frames = list(sender.post(key, payload))
    while frames:
        answers = [answer for frame in frames for answer in edge.receive(frame)]
        frames = [frame for answer in answers for frame in sender.receive(answer)]
    assert len(got) == 1 and same(got[0], payload)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all memory that edges took for messages: never more than what was expected."""
    taken: list[int] = []
    make_room = Incoming.make_room

    def watched(self: Any) -> None:
        taken.append(self.size)
        assert self.size in (MESSAGE, 4 * SIZE), "took memory on a stranger's word"
        make_room(self)

    monkeypatch.setattr(Incoming, "make_room", watched)
    return taken


@settings(max_examples=150)
@given(frames=st.lists(st.binary(max_size=80), max_size=12), asks=st.booleans())
def test_an_edge_outlives_any_bytes(frames: list[bytes], asks: bool) -> None:
    edge, got = attack(frames, asks)
    assert all(found is None for _, found in got)
    still_delivers(edge)


@settings(max_examples=400)
@given(frames=st.lists(valid_frames(), max_size=25), asks=st.booleans())
def test_an_edge_outlives_valid_frames_in_any_order(frames: list[bytes], asks: bool) -> None:
    edge, _ = attack(frames, asks)
    still_delivers(edge)


@settings(max_examples=300)
@given(frames=mutated(), asks=st.booleans())
def test_of_a_damaged_conversation_only_whole_messages_are_delivered(frames: list[bytes], asks: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "CHUNK_SIZE", 16)
        edge, got = attack(frames, asks)
        for what, found in got:
            assert found is None or what == "state" or same(found, make_payload(3))
        still_delivers(edge)


class Late(Listener):
    def __init__(self) -> None:
        self.got: list[Payload] = []

    def came_late(self, key: Key, theirs: Payload, mine: Payload) -> None:
        self.got.append(theirs)


@settings(max_examples=200)
@given(frames=mutated())
def test_what_comes_late_of_a_damaged_conversation_is_whole(frames: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "CHUNK_SIZE", 16)
        late = Late()
        edge = Edge(late)
        for round in (0, 1):
            edge.expect((round, 0), make_payload(), lambda found: None)
            list(edge.miss((round, 0)))
        for frame in frames:
            try:
                list(edge.receive(frame))
            except ProtocolError:
                list(edge.connected())
        assert all(same(found, make_payload(3)) for found in late.got)
        still_delivers(edge)


def test_a_damaged_conversation_that_is_whole_is_delivered(room: list[int]) -> None:
    """The other tests' conversation is one that means something."""
    _, got = attack(conversation(make_payload(3)), asks=False)
    assert [what for what, found in got if same(found, make_payload(3))] == ["round 0", "round 1"] and room


def test_ten_gigabytes_announced_take_no_memory(room: list[int]) -> None:
    """Neither for a message, nor for a state."""
    for key, asks in (((0, 0), False), ((1, STATE), True), ((5, 0), False)):
        attack([FRAMES.pack(Kind.OFFER, *key, 10_000_000_000, b"x" * HASH_SIZE)], asks)
    assert not room


def replay(chunk_of: Key, as_key: Key) -> bytes:
    """The first chunk of a message, told as another's."""
    frame = next(f for f in conversation(make_payload(4), [chunk_of]) if f[0] == Kind.CHUNK)
    return frame[:1] + struct.pack("<II", *as_key) + frame[9:]


def test_replayed_messages_are_ignored() -> None:
    """A whole conversation again, on the same stream or a new one: nothing is delivered twice or instead of another."""
    first, got = conversation(make_payload(3), [(0, 0)]), []
    edge = Edge()
    for new_stream in (False, True, False):
        if new_stream:
            list(edge.connected())
        if edge.closed < (0, 0):
            edge.expect((0, 0), make_payload(), got.append)
        for frame in first:
            list(edge.receive(frame))
        edge.expect((1, 0), make_payload(), got.append) if not new_stream and len(got) == 1 else None
    assert len(got) == 1 and same(got[0], make_payload(3))
    assert (1, 0) in edge.inbox and edge.inbox[1, 0].offset == 0, "the next round's is still waited for"


def test_another_rounds_message_is_not_taken_for_this_ones() -> None:
    """The right bytes under a wrong key: of a round that is over, ignored; of one nobody asked for, refused."""
    got: list[Payload | None] = []
    edge = Edge()
    edge.expect((0, 0), make_payload(), got.append)
    for frame in conversation(make_payload(3), [(0, 0)]):
        list(edge.receive(frame))
    (edge_got,) = got
    edge.expect((1, 0), make_payload(), got.append)
    assert list(edge.receive(replay((1, 0), (0, 0)))) == [] and edge.inbox[1, 0].offset == 0
    with pytest.raises(ProtocolError, match="nobody asked for"):
        edge.receive(replay((1, 0), (2, 0)))
    with pytest.raises(ProtocolError, match="expected 88 at 0"):
        edge.receive(replay((1, 0), (1, 0)))  # never offered on this stream
    assert got == [edge_got]
    still_delivers(edge)


def test_that_something_unasked_for_is_gone_changes_nothing() -> None:
    """Or one frame would close all rounds to come."""
    edge = Edge()
    list(edge.receive(FRAMES.pack(Kind.GONE, STATE, 0)))
    assert edge.closed == (-1, 0)
    still_delivers(edge)


def test_an_old_offer_is_answered_and_takes_nothing(room: list[int]) -> None:
    edge = Edge()
    edge.skip_to(5)
    for round in range(5):
        frames = list(edge.receive(FRAMES.pack(Kind.OFFER, round, 0, MESSAGE, b"x" * 16)))
        assert frames == [FRAMES.pack(Kind.GOT, round, 0)]
    assert not edge.offers and not edge.inbox and not room


HOP = Hop("gossip", {(i, j): 0.5 for i in range(2) for j in range(2)})


def used() -> dict[str, int]:
    """What this process holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "bytes": 1024 * int(status["VmRSS"].split()[0]),
    }


def play_site(charter: Charter, identity: Identity, listen: str, pipe: Any) -> None:
    """A site that exchanges a message with the honest neighbour when told to, and says what it got and holds."""
    node = Node(charter, identity, listen, lambda *_, **__: None)
    node.start([(0, 1), (0, 2)] if listen else [(0, 1)])
    exchange, round = NetworkExchange(node), 0
    while pipe.recv():
        exchange.start(round, HOP, {"w": torch.full((SIZE,), float(10 * round + node.index))})
        inbox = exchange.finish(round, HOP, dict)
        assert inbox is not None
        pipe.send(([float(inbox.payloads[j]["w"].sum()) / SIZE for j in sorted(inbox.payloads)], used()))
        exchange.saved(round := round + 1)
    node.stop(0)
    os._exit(0)


class Honest:
    """Sites a and b at work, a with an open port; c is a member too, whose key the test has."""

    def __init__(self, folder: Path) -> None:
        self.port, self.round = free_ports(1)[0], 0
        charter = make_charter(folder, ["a", "b", "c"])
        address = f"127.0.0.1:{self.port}"
        members = [charter.members[0].model_copy(update={"address": address}), *charter.members[1:]]
        charter = charter.model_copy(update={"members": members})
        identities = [load_identity(folder / name) for name in "abc"]
        for identity in identities:
            charter = charter.signed(identity)
        self.charter, self.liar = charter, identities[2]
        fork = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for identity, listen in zip(identities, (address, ""), strict=False):
            near, far = fork.Pipe()
            self.processes.append(fork.Process(target=play_site, args=(charter, identity, listen, far), daemon=True))
            self.processes[-1].start()
            self.pipes.append(near)
        (folder / "c.pem").write_bytes(identities[2].key_pem + identities[2].certificate_pem)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        self.tls.load_cert_chain(folder / "c.pem")
        self.tls.set_alpn_protocols(["h2"])

    def exchange(self) -> dict[str, int]:
        """One more round of both. Returns what a holds after it."""
        for pipe in self.pipes:
            pipe.send(True)
        held = {}
        for pipe in reversed(self.pipes):
            assert pipe.poll(PATIENCE_S), f"round {self.round} hangs"
            values, held = pipe.recv()
            assert values == [10.0 * self.round, 10.0 * self.round + 1]
        self.round += 1
        return held

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)  # half of gRPC's own patience

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join(PATIENCE_S)
            assert process.exitcode == 0


def send_packed(charter: Charter, identity: Identity) -> None:
    """A member sends a frame that is a thousand times as large when it is unpacked; ends with what it is told."""
    trusted = charter.certificate(0), identity.key_pem, identity.certificate_pem
    named = [("grpc.ssl_target_name_override", charter.members[0].id)]
    channel = grpc.secure_channel(charter.members[0].address, grpc.ssl_channel_credentials(*trusted), options=named)
    call = channel.stream_stream(node_module.METHOD)
    metadata = [(node_module.CHARTER_KEY, json.dumps(charter.parts()))]
    try:
        list(call(iter([bytes(1 << 20)]), metadata=metadata, compression=grpc.Compression.Gzip, timeout=PATIENCE_S))
    except grpc.RpcError as error:
        os._exit(error.code() is grpc.StatusCode.UNIMPLEMENTED)
    os._exit(0)


def open_streams(charter: Charter, identity: Identity) -> None:
    """A member opens all the streams that three connections have and says nothing; ends with how many are refused."""
    trusted = charter.certificate(0), identity.key_pem, identity.certificate_pem
    named = [("grpc.ssl_target_name_override", charter.members[0].id), ("grpc.use_local_subchannel_pool", 1)]

    async def refused() -> int:
        credentials = grpc.ssl_channel_credentials(*trusted)
        channels = [grpc.aio.secure_channel(charter.members[0].address, credentials, options=named) for _ in range(3)]
        calls = [channel.stream_stream(node_module.EJECTION)() for channel in channels for _ in range(MAX_STREAMS)]
        codes = asyncio.as_completed([call.code() for call in calls], timeout=60)
        found = [await code for _, code in zip(range(2 * MAX_STREAMS), codes, strict=False)]
        return found.count(grpc.StatusCode.RESOURCE_EXHAUSTED)

    os._exit(asyncio.run(refused()))


def client_hello() -> bytes:
    """What opens a TLS connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(came, goes).do_handshake()
    return goes.read()


def is_let_go(raw: socket.socket) -> bool:
    """Whether the other end closes, in bounded time."""
    try:
        while raw.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Honest:
    monkeypatch.setattr(node_module, "HANDSHAKE_S", 3.0)
    sites = Honest(tmp_path)
    sites.exchange()
    return sites


def test_two_hundred_strangers_who_say_nothing_or_nonsense_do_not_disturb_a_site(honest: Honest) -> None:
    """Idle ones, half a handshake, random bytes: rounds go on, all are let go of, and nothing is left of them."""
    rng, hello = random.Random(0), client_hello()
    before = honest.exchange()
    with ExitStack() as stack:
        dialled = [stack.enter_context(honest.dial()) for _ in range(200)]
        for i, raw in enumerate(dialled):
            if i % 4 == 1:
                raw.sendall(hello[: len(hello) // 2])
            elif i % 4 == 2:
                raw.sendall(hello)
            elif i % 4 == 3:
                raw.sendall(rng.randbytes(rng.randrange(1, 5000)))
        for _ in range(5):
            during = honest.exchange()
        assert during["threads"] <= before["threads"] + 8
        assert all(is_let_go(raw) for raw in dialled)
        wait_for(lambda: honest.exchange()["descriptors"] <= before["descriptors"] + 8)
        after = honest.exchange()
    assert after["threads"] <= before["threads"] + 8
    assert after["bytes"] <= before["bytes"] + 60_000_000
    honest.end()


def test_more_strangers_than_the_process_has_descriptors_leave_it_some_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "HANDSHAKE_S", 3.0)
    limits, few = resource.getrlimit(resource.RLIMIT_NOFILE), 2 * used()["descriptors"] + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        sites = Honest(tmp_path)  # whose processes have the same limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    sites.exchange()
    with ExitStack() as stack:
        dialled = [stack.enter_context(sites.dial()) for _ in range(few + 50)]
        for _ in range(3):
            sites.exchange()  # looks into /proc, which takes a descriptor
        assert "as many open as it takes" in asyncio.run(diagnose(sites.charter, 0))
        assert all(is_let_go(raw) for raw in dialled)
    sites.exchange()
    sites.end()


def test_wave_after_wave_of_strangers_leaves_nothing_behind(honest: Honest) -> None:
    rng = random.Random(1)
    held = []
    for _ in range(6):
        for _ in range(40):
            with honest.dial() as raw:
                raw.sendall(rng.randbytes(300))
        held.append(honest.exchange())
    wait_for(lambda: honest.exchange()["descriptors"] <= held[1]["descriptors"] + 8)
    assert held[-1]["threads"] <= held[1]["threads"] + 4
    assert held[-1]["bytes"] <= held[1]["bytes"] + 30_000_000
    honest.end()


def test_a_member_who_sends_a_byte_at_a_time_does_not_disturb_the_others(honest: Honest) -> None:
    """A key of the charter's, a whole TLS handshake, and then HTTP/2 drop by drop, in many sessions."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    before = honest.exchange()
    with ExitStack() as stack:
        sessions = [stack.enter_context(honest.tls.wrap_socket(honest.dial())) for _ in range(20)]
        assert all(session.selected_alpn_protocol() == "h2" for session in sessions)
        for i in range(8):
            for session in sessions:
                with suppress(OSError):  # it has been let go by then
                    session.sendall(preface[i : i + 1])
            during = honest.exchange()
        assert during["threads"] <= before["threads"] + 8
        assert during["bytes"] <= before["bytes"] + 60_000_000
        assert all(is_let_go(session) for session in sessions)
        wait_for(lambda: honest.exchange()["descriptors"] <= before["descriptors"] + 8)
    honest.end()


def test_nothing_that_a_member_packed_is_unpacked(honest: Honest) -> None:
    """No site packs anything; a kilobyte of a liar's would take the memory and the time of a megabyte."""
    process = multiprocessing.get_context("fork").Process(target=send_packed, args=(honest.charter, honest.liar))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    honest.exchange()
    honest.end()


def test_a_member_has_few_streams_however_many_connections_it_opens(honest: Honest) -> None:
    """Of each stream a site may hold a frame that is not whole: of all that connections could have, gigabytes."""
    process = multiprocessing.get_context("fork").Process(target=open_streams, args=(honest.charter, honest.liar))
    process.start()
    process.join(120)
    assert process.exitcode == 2 * MAX_STREAMS
    honest.exchange()
    honest.end()
