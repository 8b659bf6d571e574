"""A site's end of its connections: gRPC with mutual TLS, in a thread of its own, and nobody answered but members.

An edge is dialled by one of its ends and both directions use that connection, so a site behind a firewall needs no open
port. Here streams are opened, by dialling and by answering, and handed to the `neighbor` at their other end; what is
said over them is `edge`'s. Nothing here knows of methods or rounds of training.
"""

from __future__ import annotations

import asyncio
import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import grpc
from pydantic import ValidationError

from peertune.charter import SAME_FILE, Charter, difference, piece_hashes
from peertune.ejection import Ejection, holds
from peertune.errors import CharterError, IdentityError
from peertune.identity import Identity, certificate_id
from peertune.logfields import text
from peertune.memory import keep_freed
from peertune.runtimes.edge_frames import MAX_FRAME
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.limited_log import LimitedLog
from peertune.runtimes.neighbor import MAX_REASON, Neighbor
from peertune.runtimes.port import check_port
from peertune.runtimes.presence import Presence
from peertune.runtimes.probe import BUSY, PROBE, Probe, diagnose
from peertune.runtimes.proxy import take_upper_case
from peertune.runtimes.strangers import Strangers

T = TypeVar("T")
SERVICE = "peertune.Peer"
METHOD, EJECTION = f"/{SERVICE}/Link", f"/{SERVICE}/Ejection"
CHARTER_KEY, PIECES_KEY = "peertune-charter", "peertune-charter-pieces"
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a kilobyte would be a megabyte to be unpacked
]
HANDSHAKE_S = 10.0
"""Seconds after which one who dialled and has not shown a member's key is let go of; gRPC's own choice is 120. After
twice as many one who has made no member's call is taken for a stranger."""
EJECTED, TWICE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.ALREADY_EXISTS
"""How a stream ends whose member takes part no more, or whose process is a second one."""
MAX_CONNECTIONS = 1024
"""Connections that others may have open at once: at most so many, and no more than half of the process's descriptors,
as the run needs some for its files."""
MAX_STREAMS = 8
"""Streams that a member may have open, over one connection and over all: a talk, a probe, and those just ending."""
EXPLAIN = 1 / 6
"""Of `stall_s`, after which it is looked what keeps a neighbour from being reached."""
ATTEMPT_S = 10.0
"""Seconds of an attempt to reach one at least: where a firewall drops all, that look takes most of them."""
RECONNECT_S = 2.0
"""Seconds between gRPC's own attempts at most, as long as one attempt here goes on."""
REDIAL_S = (0.2, 10.0)
"""Seconds between attempts to reach a neighbour: first, also after a stream over which something came, and at most;
doubled in between."""


class Node:
    """This site's end of all its edges, in a thread with an event loop.

    Args:
        charter: signed by all, and checked.
        identity: this site's; a member's.
        listen: HOST:PORT to open; empty: none.
        log: told what happens, for the audit log.
        doing: what this site runs, for those who probe it: one of `probe.DOINGS`.
    """

    def __init__(
        self,
        charter: Charter,
        identity: Identity,
        listen: str,
        log: Callable[..., None],
        doing: str = "join",
    ) -> None:
        self.charter, self.identity, self.listen, self.log = charter, identity, listen, LimitedLog(log)
        self.probe = Probe(charter, doing)
        self.index = charter.index_of(identity.id)
        self.presence = Presence(len(charter.members), self.index, charter.grace_s)
        self.neighbors: dict[int, Neighbor] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._tasks: list[asyncio.Task[None]] = []
        self._server: Any = None
        self._strangers = Strangers(self.log, 2 * HANDSHAKE_S)
        self._refusals: dict[tuple[str, int], str] = {}
        """(event, member) -> the reason that was logged last."""
        self._streams: Counter[int] = Counter()
        """By member, those that it has open here."""
        self._ejections: dict[int, Ejection] = {}
        """By member, what it is told in place of being dialled."""
        self._own_ejection = ""
        """Whom this site was ejected by; empty: it was not, for all that it was told."""
        self._is_stopping = False
        self.is_open = False
        """Whether its port is open."""

    def start(self, edges: Sequence[tuple[int, int]]) -> None:
        """Open the port and dial. Raises IdentityError where the port cannot be opened.

        Args:
            edges: pairs of members that exchange messages.
        """
        others = sorted({i + j - self.index for i, j in edges if self.index in (i, j)})
        self.neighbors = {i: Neighbor(i, self.charter, self.presence, self.log) for i in others}
        keep_freed(shared=True)
        take_upper_case()
        self._thread.start()
        self.call(self._start())

    def eject(self, index: int, ejection: Ejection | None = None) -> None:
        """Have nothing more to do with a member. In the network's thread.

        Args:
            ejection: what it is told, should this site be the one that dials.
        """
        self.presence.ejected.add(index)
        if ejection is not None:
            self._ejections[index] = ejection
        if neighbor := self.neighbors.get(index):
            neighbor.is_ejected = neighbor.was_seen = True
            neighbor.end()

    @property
    def turned_away(self) -> str:
        """Why the others take nothing from this site any more: enough of them signed it, whoever brings it; or all it
        dials say so, and the rest are out of reach.

        The rest have a grace for it: one neighbour who lies does not speak for them.
        """
        if self._own_ejection:
            return f"{self.charter.members[self.index].name} was ejected from this run by {self._own_ejection}"
        dialled = {index for index in self.neighbors if self.dials(index)}
        reasons = {self.neighbors[index].turns_away for index in dialled}
        rest = [neighbor for index, neighbor in self.neighbors.items() if index not in dialled]
        if not reasons or "" in reasons or not all(neighbor.is_out_of_reach for neighbor in rest):
            return ""
        return "; ".join(sorted(reasons))

    @property
    def present(self) -> list[str]:
        """Names of the members who are there, or have done their part."""
        return [self.charter.members[index].name for index in self.presence.present(time.monotonic())]

    @property
    def quorum(self) -> int:
        """Members who have to be there: as many as the charter says, and no more than are not ejected."""
        return min(self.charter.quorum, len(self.charter.members) - len(self.presence.ejected))

    @property
    def has_quorum(self) -> bool:
        return len(self.presence.present(time.monotonic())) >= self.quorum

    @property
    def has_quorum_without_the_lost(self) -> bool:
        """As `has_quorum`, but a neighbour out of reach counts only where another clearly hears it.

        Else a round would go on without the very one that makes up the quorum, while word of it is still about.
        """
        now = time.monotonic()
        lost = {
            index
            for index, neighbor in self.neighbors.items()
            if neighbor.is_out_of_reach and not self.presence.is_heard_elsewhere(index, neighbor.last_heard, now)
        }
        return len(set(self.presence.present(now)) - lost) >= self.quorum

    def stop(self, linger_s: float = 0.0, *, leaves: bool = False) -> None:
        """Close, after at most `linger_s` seconds in which neighbours may ask for what they still need, and the time
        that it takes to send it.

        Args:
            linger_s: 0: the run did not end, and this site will be back.
            leaves: tell the neighbours not to wait until then.
        """
        if not self._thread.is_alive():
            self._loop.close()
            return
        self.call(self._leave() if leaves else self._stop(linger_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the network's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def soon(self, work: Callable[[], None]) -> None:
        """Do something in the network's thread."""
        self._loop.call_soon_threadsafe(work)

    async def _start(self) -> None:
        for index in self.neighbors:
            if self.dials(index):
                self._tasks.append(asyncio.create_task(self._dial(index)))
        if not self.listen:
            return
        roots = b"".join(self.charter.certificate(index) for index in range(len(self.charter.members)))
        shown = grpc.ssl_server_certificate_configuration(
            [(self.identity.key_pem, self.identity.certificate_pem)], root_certificates=roots
        )
        credentials = grpc.dynamic_ssl_server_credentials(
            shown, self._strangers.knocked, require_client_authentication=True
        )
        patience = ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_S))
        streams = ("grpc.max_concurrent_streams", MAX_STREAMS)
        most = ("grpc.max_allowed_incoming_connections", _most_connections())
        self._server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", 0), patience, streams, most])
        serves = {METHOD: self._serve, PROBE: self._probed, EJECTION: self._told}
        handlers = {
            path.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(partial(self._answer, serve))
            for path, serve in serves.items()
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        try:
            self._strangers.port = self._server.add_secure_port(self.listen, credentials)
        except RuntimeError as error:
            check_port(self.listen)
            raise IdentityError(f"--listen: {self.listen} cannot be opened: {error}; name another port") from error
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._strangers.watch()))
        self.is_open = True

    async def _leave(self) -> None:
        """Stop, after the neighbours have what was made ready for them; at most as long as they would wait."""
        end = time.monotonic() + self.charter.grace_s
        for neighbor in self.neighbors.values():
            neighbor.say(neighbor.edge.leaving())
        while time.monotonic() < end and any(
            n.is_connected and n.edge.outbox.has_undelivered for n in self.neighbors.values()
        ):
            await asyncio.sleep(0.05)
        await self._stop(0.0)

    async def _stop(self, linger_s: float) -> None:
        if linger_s:
            self.presence.finished(self.index)
            for neighbor in self.neighbors.values():
                neighbor.say(neighbor.edge.finished())
        began = time.monotonic()
        while linger_s and any(neighbor.needs(began, linger_s) for neighbor in self.neighbors.values()):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)  # so that the last frames are out
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for index, neighbor in self.neighbors.items():
            if not self.dials(index):
                neighbor.end()  # else its handler is open as long as the other end likes
        if self._server is not None:
            await self._server.stop(0.5)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:  # gRPC's own among them: one that is pending when the loop stops is told of on stderr
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=1.0)

    def dials(self, index: int) -> bool:
        """Whether this end dials: the one that has to, else the lower index."""
        mine, theirs = (bool(self.charter.members[i].address) for i in (self.index, index))
        return theirs and (not mine or self.index < index)

    def channel(self, index: int) -> Any:
        """A channel to a member's address, that nobody else can answer."""
        member = self.charter.members[index]
        credentials = grpc.ssl_channel_credentials(
            self.charter.certificate(index), self.identity.key_pem, self.identity.certificate_pem
        )
        options = [*OPTIONS, ("grpc.ssl_target_name_override", member.id), ("grpc.enable_retries", 0)]
        options.append(("grpc.max_reconnect_backoff_ms", int(1000 * RECONNECT_S)))
        return grpc.aio.secure_channel(member.address, credentials, options=options)

    async def _dial(self, index: int) -> None:
        member, neighbor = self.charter.members[index], self.neighbors[index]
        metadata = ((CHARTER_KEY, json.dumps(self.charter.parts())), (PIECES_KEY, piece_hashes(self.charter)))
        wait = REDIAL_S[0]
        while not (neighbor.is_ejected or self._is_stopping):
            async with self.channel(index) as channel:
                try:
                    await self._ready(channel, index)
                    call = channel.stream_stream(METHOD)(metadata=metadata)
                    began = time.monotonic()
                    await neighbor.talk(call.read, call.write)
                    code = await call.code() if call.done() else None
                    if code in (EJECTED, TWICE, grpc.StatusCode.FAILED_PRECONDITION):
                        reason = text(await call.details(), MAX_REASON)
                        self._log_refusal("refused_by", index, reason)
                        neighbor.turns_away = "" if code is grpc.StatusCode.FAILED_PRECONDITION else reason
                    else:
                        self._refusals.pop(("refused_by", index), None)
                        if neighbor.last_got > began or time.monotonic() - began > REDIAL_S[1]:
                            wait = REDIAL_S[0]
                except (TimeoutError, grpc.RpcError):
                    pass
                except Exception as error:  # whatever it was, the edge is dialled again
                    self.log("failed", peer=member.name, reason=f"{type(error).__name__}: {error}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, REDIAL_S[1])
        if index in self._ejections:
            await self._tell(index, self._ejections[index])

    async def _tell(self, index: int, ejection: Ejection) -> None:
        """Tell a member that it was ejected, over and over: it may be started again, and only this end can dial."""
        said = json.dumps(ejection.model_dump()).encode()
        while not self._is_stopping:
            with suppress(TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
                async with self.channel(index) as channel, asyncio.timeout(self.charter.stall_s):
                    await channel.channel_ready()
                    call = channel.stream_stream(EJECTION)()
                    await call.write(said)
                    await call.done_writing()
                    await call.read()
            await asyncio.sleep(REDIAL_S[1])

    async def _told(self, index: int, context: Any) -> None:
        """Hear that this site was ejected; what is not signed by enough is not believed, whoever says it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.charter.stall_s):
                frame = await context.read()
            if frame is not grpc.aio.EOF and not self.hear_ejection(frame):
                self._log_refusal("refused", index, "says that this site was ejected, without the signatures for it")

    def hear_ejection(self, said: bytes) -> bool:
        """Take in what another brings of this site's ejection. Returns whether it holds."""
        try:
            ejection = Ejection.model_validate_json(said)
        except ValidationError:
            return False
        is_own = ejection.member == self.charter.members[self.index].name
        if is_own and not self._own_ejection and holds(ejection, self.charter):
            self._own_ejection = ", ".join(ejection.signers(self.charter))
            self.log("ejected", peer=ejection.member, signed_by=self._own_ejection)
        return is_own and bool(self._own_ejection)

    async def _ready(self, channel: Any, index: int) -> None:
        """Wait for a neighbour's channel, and meanwhile find out what is in the way. Raises TimeoutError."""
        explains = asyncio.create_task(self._explain(index))
        try:
            await asyncio.wait_for(channel.channel_ready(), max(self.charter.stall_s, ATTEMPT_S))
            self._refusals.pop(("unreachable", index), None)
        finally:
            explains.cancel()

    async def _explain(self, index: int) -> None:
        await asyncio.sleep(EXPLAIN * self.charter.stall_s)
        reason = await diagnose(self.charter, index)
        await asyncio.sleep(RECONNECT_S)  # it may just have come
        self._log_refusal("unreachable", index, reason)

    async def _answer(self, serve: Callable[[int, Any], Awaitable[None]], _: Any, context: Any) -> None:
        """Take a stream that was dialled from outside, where it is a member's who has not too many open."""
        index = await self._member(context)
        self._streams[index] += 1
        try:
            if self._streams[index] > MAX_STREAMS:  # each may hold the memory of a frame
                await context.abort(BUSY, f"{self.charter.members[index].name} has {MAX_STREAMS} streams open already")
            await serve(index, context)
        finally:
            self._streams[index] -= 1

    async def _member(self, context: Any) -> int:
        """The member at the other end of a stream that was dialled from outside; a stranger's is ended."""
        (certificate,) = context.auth_context()["x509_pem_cert"]
        try:
            index = self.charter.index_of(certificate_id(certificate))
        except (CharterError, IdentityError):
            self.log("stranger", peer=context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no member")
            raise
        self._strangers.is_member(context.peer())
        if index in self.presence.ejected:
            await self._turn_away(index, context, EJECTED, "was ejected from this run")
        return index

    async def _turn_away(self, index: int, context: Any, code: grpc.StatusCode, reason: str) -> None:
        """End a member's stream."""
        self._log_refusal("turned_away", index, reason)
        await context.abort(code, f"{self.charter.members[index].name} {reason}")

    async def _probed(self, index: int, context: Any) -> None:
        """Let a member measure the line."""
        if refusal := self.probe.refusal(index):
            await context.abort(*refusal)
        received = sent = 0
        try:
            received, sent = await self.probe.answer(index, context)
        finally:
            self.log("probed", peer=self.charter.members[index].name, received=received, bytes=sent)

    async def _serve(self, index: int, context: Any) -> None:
        """Talk over a stream of a member's."""
        told = dict(context.invocation_metadata())
        try:
            differs = difference(self.charter, json.loads(told.get(CHARTER_KEY, "{}")), told.get(PIECES_KEY))
        except (ValueError, AttributeError, RecursionError):
            differs = "everything"
        if differs:
            reason = f"another charter than {self.charter.members[self.index].name}'s: {differs} differ; {SAME_FILE}"
            self._log_refusal("refused", index, reason)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        neighbor = self.neighbors.get(index)
        if neighbor is None:
            await self._turn_away(index, context, grpc.StatusCode.PERMISSION_DENIED, "is no neighbour of this site")
            return
        self._refusals.pop(("refused", index), None)
        try:
            async with asyncio.timeout(self.charter.stall_s):
                first = await context.read()
            if first is grpc.aio.EOF:
                return
            if neighbor.edge.is_second(first):
                await context.abort(TWICE, f"{neighbor.name} runs already, as another process")
        except (TimeoutError, ProtocolError) as error:
            self.log("refused", peer=neighbor.name, reason=str(error) or "said nothing")
            return
        frames = [first]

        async def read() -> Any:
            return frames.pop() if frames else await context.read()

        await neighbor.talk(read, context.write)

    def _log_refusal(self, event: str, index: int, reason: str) -> None:
        """Log it where the reason is another than the last time: who is refused comes back every few seconds."""
        if self._refusals.get((event, index)) != reason:
            self._refusals[event, index] = reason
            self.log(event, peer=self.charter.members[index].name, reason=reason)


def _most_connections() -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, descriptors // 2)
