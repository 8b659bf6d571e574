"""How good the line between two sites is: one asks for and sends some bytes, the other answers; members only.

Both begin with HELLO (the parts of the charter, and what each is doing). Then the one who dialled leads:

    PING                    answered by PONG time, the clock of the one who answers
    CHUNK bytes             counted and dropped
    COUNT 0                 answered by COUNT bytes, so many have come
    FETCH bytes             answered by CHUNKs
    REPORT rtt, up, down    what was found, in the words of the one who leads, for a site that cannot dial itself

Nothing is kept of what is sent, so a running site answers beside its work, each member a part of the time. A site
takes part in one probe at a time, its own included: two at once would measure each other.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import grpc

from peertune.charter import Charter, Member, difference, piece_hashes
from peertune.errors import IdentityError
from peertune.identity import certificate_id
from peertune.runtimes.frames import Frames, ProtocolError
from peertune.runtimes.message import CHUNK_SIZE
from peertune.runtimes.proxy import THE_PROXY, Proxy, ProxyError, proxy_for

PROBE = "/peertune.Peer/Probe"
LIMIT = 8 << 20
"""Bytes each way in a probe at most."""
SMALLEST = 64 << 10
"""Bytes of the first trial; each has twice as many as the one before, so that a fast line has time to get going."""
ENOUGH_S = 1.0
"""Seconds of a trial after which there is no other."""
DEADLINE_S = 60.0
"""Seconds of a whole probe at most."""
CONNECT_S = 5.0
"""Seconds a neighbour has to take a connection."""
SHARE = 0.2
"""Of the time in which a member is answered, in the long run, so that nobody takes a running site's line."""
NUM_PINGS = 5
MAX_FRAMES = 1024
MAX_HELLO = 64 << 10
BUSY, TOO_OFTEN = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION
DOINGS = ("join", "doctor")
LARGE = "large packets are lost on the way (a smaller MTU here tells)"
"""As on a tunnel whose ends learn of no limit: small packets pass, TLS and messages do not."""
MAX_S = 1e10
"""More seconds than any clock is wrong by."""


class Kind(IntEnum):
    HELLO, PING, PONG, CHUNK, COUNT, FETCH, REPORT = range(1, 8)


FRAMES = Frames(
    Kind,
    {Kind.PONG: "d", Kind.COUNT: "Q", Kind.FETCH: "Q", Kind.REPORT: "dddd"},
    open_ended=(Kind.HELLO, Kind.CHUNK),
)
_pack = FRAMES.pack


@dataclass(frozen=True)
class LineQuality:
    """What a probe found, as seen from this site."""

    rtt_s: float
    up: float
    """Bytes a second to the neighbour."""
    down: float
    """Bytes a second from it."""
    clock_s: float
    """Its clock minus this site's, seconds."""
    doing: str
    """What the neighbour runs, of `DOINGS`."""
    differs: str
    """Parts in which its charter is another; empty: none."""


def _plausible(found: LineQuality) -> LineQuality:
    """What was measured, part of which is the other's word. Raises ProtocolError where it can be no measurement."""
    is_sane = (
        0 < found.rtt_s < MAX_S and abs(found.clock_s) < MAX_S and all(1 < r < 1e15 for r in (found.up, found.down))
    )
    if not is_sane:  # NaN is in no range
        raise ProtocolError("reported what cannot be")
    return found


class Probe:
    """One site's part in probes: it answers those of members, and makes its own.

    Args:
        doing: what this site runs, of `DOINGS`.
    """

    def __init__(self, charter: Charter, doing: str) -> None:
        self.charter, self.doing = charter, doing
        self.slot = asyncio.Lock()
        self.visits: dict[int, LineQuality] = {}
        """Member -> what it reported when it last probed this site."""
        self._left: dict[int, tuple[float, float]] = {}
        """Member -> seconds that its probes might still take, and when that was."""

    def refusal(self, index: int) -> tuple[grpc.StatusCode, str] | None:
        """Why a member is not answered now; None: it is."""
        if self.slot.locked():
            return BUSY, "one probe at a time"
        left = self._allowance(index)
        if left <= 0:
            return TOO_OFTEN, f"it was measured too often; ask again in {math.ceil(-left / SHARE) + 1} s"
        return None

    def _allowance(self, index: int) -> float:
        """Seconds that a member's probes may take: at first and at most as long as one has."""
        left, since = self._left.get(index, (DEADLINE_S, 0.0))
        return min(DEADLINE_S, left + SHARE * (time.monotonic() - since))

    async def answer(self, index: int, context: Any) -> tuple[int, int]:
        """Answer a member's probe, where there is no `refusal`. Returns the bytes it sent, and those it was given."""
        async with self.slot:
            left, began = self._allowance(index), time.monotonic()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    return await self._answer(index, context)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"a probe has {DEADLINE_S:g} s")
            except ProtocolError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            finally:
                now = time.monotonic()
                self._left[index] = (left - (now - began), now)
        raise AssertionError("abort raises")

    async def _answer(self, index: int, context: Any) -> tuple[int, int]:
        await context.write(self._hello())
        doing, differs = self._met(await context.read())
        taken = given = 0
        for _ in range(MAX_FRAMES):
            frame = await context.read()
            if frame is grpc.aio.EOF:
                return taken, given
            kind, fields, rest = FRAMES.unpack(frame)
            if kind is Kind.PING:
                await context.write(_pack(Kind.PONG, time.time()))
            elif kind is Kind.CHUNK:
                taken += len(rest)
            elif kind is Kind.COUNT:
                await context.write(_pack(Kind.COUNT, taken))
            elif kind is Kind.FETCH:
                given += fields[0]
                if given <= LIMIT:
                    for chunk in _chunks(fields[0]):
                        await context.write(chunk)
            elif kind is Kind.REPORT:
                rtt_s, up, down, clock_s = fields
                self.visits[index] = _plausible(LineQuality(rtt_s, down, up, -clock_s, doing, differs))
            if max(taken, given) > LIMIT:
                raise ProtocolError(f"a probe has {LIMIT} bytes each way")
        raise ProtocolError(f"a probe has {MAX_FRAMES} frames")

    async def measure(self, channel: Any) -> LineQuality:
        """Probe whoever is at the other end of a channel.

        Raises:
            ProtocolError: it sent what no peertune sends.
            grpc.RpcError: it is busy, refuses, or is gone.
        """
        async with self.slot:
            call = channel.stream_stream(PROBE)(timeout=DEADLINE_S)
            try:
                return await self._measure(call)
            except asyncio.InvalidStateError:  # a write after the other end closed the stream; its code says why
                await _next(call)
                raise ProtocolError("closed the stream") from None
            finally:
                call.cancel()

    async def _measure(self, call: Any) -> LineQuality:
        doing, differs = self._met(await _next(call))
        await call.write(self._hello())
        trips = []
        for _ in range(NUM_PINGS):
            began, asked = time.perf_counter(), time.time()
            await call.write(_pack(Kind.PING))
            (told,) = await _expect(call, Kind.PONG)
            trips.append((time.perf_counter() - began, told - (asked + time.time()) / 2))
        rtt_s, clock_s = min(trips)
        up = down = 0.0
        sent, size, took = 0, SMALLEST, 0.0
        while sent + size <= LIMIT and took < ENOUGH_S:
            began = time.perf_counter()
            for chunk in _chunks(size):
                await call.write(chunk)
            await call.write(_pack(Kind.COUNT, 0))
            sent += size
            if await _expect(call, Kind.COUNT) != (sent,):
                raise ProtocolError("miscounted what it was sent")
            took = time.perf_counter() - began
            up, size = size / max(took - rtt_s, took / 2), 2 * size
        fetched, size, took = 0, SMALLEST, 0.0
        while fetched + size <= LIMIT and took < ENOUGH_S:
            began, got = time.perf_counter(), 0
            await call.write(_pack(Kind.FETCH, size))
            while got < size:
                kind, _, rest = FRAMES.unpack(await _next(call))
                got += len(rest)
                if kind is not Kind.CHUNK or not rest or got > size:
                    raise ProtocolError("sent something else than it was asked for")
            fetched += size
            took = time.perf_counter() - began
            down, size = size / max(took - rtt_s, took / 2), 2 * size
        await call.write(_pack(Kind.REPORT, rtt_s, up, down, clock_s))
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF:
            raise ProtocolError("sent more than it was asked for")
        return _plausible(LineQuality(rtt_s, up, down, clock_s, doing, differs))

    def _hello(self) -> bytes:
        told = {"doing": self.doing, "charter": self.charter.parts(), "pieces": piece_hashes(self.charter)}
        return _pack(Kind.HELLO) + json.dumps(told).encode()

    def _met(self, frame: Any) -> tuple[str, str]:
        """What another's HELLO says: what it is doing, and in what its charter differs. Raises ProtocolError."""
        if frame is grpc.aio.EOF or len(frame) > MAX_HELLO or FRAMES.unpack(frame)[0] is not Kind.HELLO:
            raise ProtocolError("did not begin with HELLO")
        try:
            told = json.loads(frame[1:])
            doing, parts = told["doing"], told["charter"]
            if doing not in DOINGS or not isinstance(parts, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ProtocolError("said a HELLO that cannot be read") from None
        known = self.charter.parts()  # a new part comes with another version
        return doing, difference(self.charter, {key: parts[key] for key in known if key in parts}, told.get("pieces"))


async def diagnose(charter: Charter, index: int) -> str:
    """Why a member could not be talked to, as far as an attempt without any trust shows; it goes where gRPC does."""
    member, address = charter.members[index], charter.members[index].address
    proxy = proxy_for(address)
    if proxy is None:
        return await _diagnose(charter, member, None)
    found = await _diagnose(charter, member, proxy)
    return found if found.startswith(THE_PROXY) else f"through {THE_PROXY}{proxy}: {found}"


async def _diagnose(charter: Charter, member: Member, proxy: Proxy | None) -> str:
    host, _, port = member.address.rpartition(":")
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(CONNECT_S):
            opening = proxy.open(member.address) if proxy else asyncio.open_connection(host.strip("[]"), int(port))
            _, writer = await opening
            await writer.start_tls(anyone, server_hostname=member.id)
    except ProxyError as error:
        return str(error)
    except TimeoutError:
        if writer is not None:
            return f"a connection opens, but nothing comes over it within {CONNECT_S:g} s: it is frozen, or {LARGE}"
        if proxy is not None:
            return f"{THE_PROXY}{proxy} lets nothing through within {CONNECT_S:g} s"
        return f"no answer within {CONNECT_S:g} s; a firewall may drop what is sent there"
    except ssl.SSLError:
        return "something answers there that is no peertune"
    except ConnectionResetError:
        return (
            "a connection opens and is closed at once, as by what is no peertune, by a relay or container port with no"
            " peertune behind it, or by a site that has as many open as it takes"
        )
    except OSError as error:
        return _reason(error)
    try:
        id = certificate_id(ssl.DER_cert_to_PEM_cert(writer.get_extra_info("ssl_object").getpeercert(True)).encode())
    except IdentityError:
        return "a key of another kind answers there"
    finally:
        writer.transport.abort()
    if id == member.id:
        return (
            "it answers with its own key, but not to this site: it may have another charter, or another version, or"
            f" {LARGE}"
        )
    names = [other.name for other in charter.members if other.id == id]
    return f"the key of {names[0]} answers there" if names else "a key answers there that is no member's"


def _reason(error: OSError) -> str:
    """Why no connection could be made: asyncio tells addresses in place of it, those of several in one text."""
    numbers = [error.errno] if error.errno else [int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))]
    if errno.ECONNREFUSED in numbers:
        return "nothing listens there"
    return ", ".join({os.strerror(number): None for number in numbers if number > 0}) or str(error.strerror or error)


async def _next(call: Any) -> bytes:
    frame = await call.read()
    if frame is grpc.aio.EOF:
        raise ProtocolError("ended the probe")
    return bytes(frame)


async def _expect(call: Any, kind: Kind) -> tuple[Any, ...]:
    found, fields, _ = FRAMES.unpack(await _next(call))
    if found is not kind:
        raise ProtocolError(f"sent {found.name}, expected {kind.name}")
    return fields


def _chunks(size: int) -> Iterator[bytes]:
    """Frames of `size` random bytes together, which no line on the way can make smaller."""
    noise = _pack(Kind.CHUNK) + os.urandom(min(size, CHUNK_SIZE))
    for start in range(0, size, CHUNK_SIZE):
        yield noise[: 1 + min(CHUNK_SIZE, size - start)]
