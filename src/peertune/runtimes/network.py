"""One process a site, over the internet: gRPC with mutual TLS, and nobody answered who is not in the charter.

An edge is dialled by one of its ends and both directions use that connection, so a site behind a firewall needs no open
port. All input and output runs in a thread of its own, beside training; the protocol is `edge`'s. A neighbour out of
reach is waited for `grace_s`; then the round goes on without him, his weight on this site's own message, until he is
back. A connection on which nothing comes for `stall_s` is given up and dialled anew, however long a transfer may take.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc
from torch import Tensor

from peertune.algorithms.base import Algorithm
from peertune.charter import Charter, check_members, difference
from peertune.errors import CharterError, IdentityError, PeerLostError
from peertune.exchange import Hop, Inbox, Payload
from peertune.identity import Identity, certificate_id
from peertune.link import Clock
from peertune.runtimes import edges
from peertune.runtimes.edge import MAX_FRAME, MAX_OFFERS, STATE, Edge, Key, ProtocolError
from peertune.wire import Traffic

T = TypeVar("T")
METHOD = "/peertune.Peer/Link"
CHARTER_KEY = "peertune-charter"
OPTIONS = [("grpc.max_receive_message_length", MAX_FRAME), ("grpc.max_send_message_length", MAX_FRAME)]
POLL_S = 0.05
"""Seconds between looks at whether a neighbour is still worth waiting for."""
WAITING_S = 5.0
"""Seconds after which one is told whom a round waits for."""
BEAT_S = 1.0
"""Seconds after which a silent connection says that it is alive."""
REDIAL_S = (0.2, 10.0)
"""Seconds between attempts to reach a neighbour: first, and at most; doubled in between."""


class Neighbor:
    """One edge's connection: streams come and go, `edge` stays."""

    def __init__(self, name: str, charter: Charter, log: Callable[..., None]) -> None:
        self.edge, self.name, self.charter, self.log = Edge(self._fetched), name, charter, log
        self.last_heard = self.last_heard_on_stream = time.monotonic()
        self.is_connected = self.was_seen = False
        self._queue: asyncio.Queue[Iterable[bytes]] = asyncio.Queue()
        self._talk: asyncio.Task[Any] | None = None
        self._ended: asyncio.Task[Any] | None = None

    def _fetched(self, key: Key, size: int) -> None:
        self.log("fetched", peer=self.name, round=key[0], hop="state" if key[1] == STATE else key[1], bytes=size)

    def say(self, frames: Iterable[bytes]) -> None:
        if self._talk is not None:
            self._queue.put_nowait(frames)

    def try_to_say(self, frames: Callable[[], Iterable[bytes]]) -> None:
        """Say what a call of the edge gives; end the stream where the edge finds the neighbour's messages wrong."""
        try:
            self.say(frames())
        except ProtocolError as error:
            self.log("refused", peer=self.name, reason=str(error))
            self.end()

    def end(self) -> None:
        """End the stream that is open, if any; it is dialled anew."""
        if self._talk is not None:
            self._ended = self._talk
            self._talk.cancel()

    @property
    def is_out_of_reach(self) -> bool:
        """For the grace, or since it was left out for that."""
        late = time.monotonic() - self.last_heard > self.charter.grace_s
        return not self.is_connected and (late or self.edge.peer_is_away)

    def is_gone(self, round: int) -> bool:
        """Whether to go on with a round without it: out of reach for the grace, or still behind after that."""
        behind = self.edge.peer_round < round - 1
        away = self.is_out_of_reach or (self.edge.peer_is_away and behind)
        self.edge.peer_is_away = away
        return away

    def post(self, key: Key, payload: Payload) -> None:
        self.edge.peer_is_away |= self.is_out_of_reach
        self.say(self.edge.post(key, payload))

    def ask(self, like: Payload, done: Callable[[int, Payload | None], None]) -> None:
        self.try_to_say(partial(self.edge.ask, like, done))

    def expect(self, key: Key, like: Payload, done: Callable[[Payload | None], None]) -> None:
        self.try_to_say(partial(self.edge.expect, key, like, done))

    def checkpointed(self, round: int) -> None:
        self.say(self.edge.checkpointed(round))

    def skip_to(self, round: int) -> None:
        self.edge.skip_to(round)
        self.edge.round = round
        self.say([self.edge.beat()])

    async def talk(self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Carry the edge over one stream until it ends, or the next one begins."""
        if self._talk is not None:
            self._talk.cancel()  # the other end is back before this one saw it go
        self._talk = this = asyncio.current_task()
        self._queue = asyncio.Queue()
        self._queue.put_nowait(self.edge.connected())
        self.last_heard_on_stream = time.monotonic()
        writer = asyncio.create_task(self._write(write, self._queue))
        watch = asyncio.create_task(self._watch(this))
        try:
            while (frame := await read()) is not grpc.aio.EOF:
                self.last_heard = self.last_heard_on_stream = time.monotonic()
                if not self.is_connected:  # only now: a refused stream opens too
                    self.is_connected = self.was_seen = True
                    self.log("connected", peer=self.name)
                self.say(self.edge.receive(frame))
                if self._queue.qsize() > MAX_OFFERS:
                    raise ProtocolError("asks for more than it reads")
        except asyncio.CancelledError:
            if self._ended is not this:
                raise
        except ProtocolError as error:
            self.log("refused", peer=self.name, reason=str(error))
        except grpc.RpcError:
            pass  # it is gone; whoever dials tries again
        finally:
            writer.cancel()
            watch.cancel()
            if self._talk is this:
                self._talk = None
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

    async def _write(self, write: Callable[[bytes], Awaitable[None]], queue: asyncio.Queue[Iterable[bytes]]) -> None:
        try:
            while True:
                try:
                    frames = await asyncio.wait_for(queue.get(), BEAT_S)
                except TimeoutError:
                    frames = [self.edge.beat()]
                for frame in frames:
                    await write(frame)
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the reader sees it too
        except Exception as error:
            self.log("failed", peer=self.name, reason=f"{type(error).__name__}: {error}")
            self.end()


class Node:
    """This site's end of all its edges, in a thread with an event loop.

    Args:
        charter: signed by all, and checked.
        identity: this site's; a member's.
        listen: HOST:PORT to open; empty: none.
        log: told what happens, for the audit log.
    """

    def __init__(
        self,
        charter: Charter,
        identity: Identity,
        listen: str,
        log: Callable[..., None],
    ) -> None:
        self.charter, self.identity, self.listen, self.log = charter, identity, listen, log
        self.index = charter.index_of(identity.id)
        self.neighbors: dict[int, Neighbor] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._tasks: list[asyncio.Task[None]] = []
        self._server: Any = None

    def start(self, edges: Sequence[tuple[int, int]]) -> None:
        """Open the port and dial. Raises IdentityError where the port cannot be opened.

        Args:
            edges: pairs of members that exchange messages.
        """
        others = sorted({i + j - self.index for i, j in edges if self.index in (i, j)})
        self.neighbors = {i: Neighbor(self.charter.members[i].name, self.charter, self.log) for i in others}
        self._thread.start()
        self.call(self._start())

    def stop(self, linger_s: float) -> None:
        """Close, after at most `linger_s` seconds in which neighbours may still fetch what they need.

        Args:
            linger_s: 0: the run did not end, and this site will be back.
        """
        if not self._thread.is_alive():
            return
        self.call(self._stop(linger_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the network's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def soon(self, work: Callable[[], None]) -> None:
        """Do something in the network's thread."""
        self._loop.call_soon_threadsafe(work)

    async def _start(self) -> None:
        for index in self.neighbors:
            if self._dials(index):
                self._tasks.append(asyncio.create_task(self._dial(index)))
        if not self.listen:
            return
        roots = b"".join(self.charter.certificate(index) for index in range(len(self.charter.members)))
        pair = [(self.identity.key_pem, self.identity.certificate_pem)]
        credentials = grpc.ssl_server_credentials(pair, roots, require_client_auth=True)
        self._server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers([_Handler(self._serve)])
        try:
            self._server.add_secure_port(self.listen, credentials)
        except RuntimeError as error:
            raise IdentityError(f"--listen: {self.listen} cannot be opened: {error}; name another port") from error
        await self._server.start()

    async def _stop(self, linger_s: float) -> None:
        if linger_s:
            for neighbor in self.neighbors.values():
                neighbor.say(neighbor.edge.finished())
        end = time.monotonic() + linger_s
        while time.monotonic() < end and any(
            not n.edge.peer_is_finished and not n.is_out_of_reach for n in self.neighbors.values()
        ):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)  # so that the last frames are out
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0.5)

    def _dials(self, index: int) -> bool:
        """Whether this end dials: the one that has to, else the lower index."""
        mine, theirs = (bool(self.charter.members[i].address) for i in (self.index, index))
        return theirs and (not mine or self.index < index)

    async def _dial(self, index: int) -> None:
        member, neighbor = self.charter.members[index], self.neighbors[index]
        credentials = grpc.ssl_channel_credentials(
            self.charter.certificate(index), self.identity.key_pem, self.identity.certificate_pem
        )
        options = [*OPTIONS, ("grpc.ssl_target_name_override", member.id), ("grpc.enable_retries", 0)]
        metadata = ((CHARTER_KEY, json.dumps(self.charter.parts())),)
        wait = REDIAL_S[0]
        while True:
            async with grpc.aio.secure_channel(member.address, credentials, options=options) as channel:
                try:
                    await asyncio.wait_for(channel.channel_ready(), self.charter.stall_s)
                    call = channel.stream_stream(METHOD)(metadata=metadata)
                    began = time.monotonic()
                    await neighbor.talk(call.read, call.write)
                    if call.done() and await call.code() is grpc.StatusCode.FAILED_PRECONDITION:
                        self.log("refused_by", peer=member.name, reason=await call.details())
                    elif time.monotonic() - began > REDIAL_S[1]:
                        wait = REDIAL_S[0]
                except (TimeoutError, grpc.RpcError):
                    pass
                except Exception as error:  # whatever it was, the edge is dialled again
                    self.log("failed", peer=member.name, reason=f"{type(error).__name__}: {error}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, REDIAL_S[1])

    async def _serve(self, _: Any, context: Any) -> None:
        """Take a stream that was dialled from outside."""
        (certificate,) = context.auth_context()["x509_pem_cert"]
        try:
            index = self.charter.index_of(certificate_id(certificate))
        except (CharterError, IdentityError):
            self.log("stranger", peer=context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no member")
        neighbor = self.neighbors.get(index)
        if neighbor is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no neighbour")
            return
        told = dict(context.invocation_metadata()).get(CHARTER_KEY, "{}")
        try:
            differs = difference(self.charter, json.loads(told))
        except (ValueError, AttributeError):
            differs = "everything"
        if differs:
            reason = f"another charter than {self.charter.members[self.index].name}'s: {differs} differ"
            self.log("refused", peer=self.charter.members[index].name, reason=reason)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        await neighbor.talk(context.read, context.write)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, serve: Callable[[Any, Any], Awaitable[None]]) -> None:
        self._serve = serve

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._serve) if details.method == METHOD else None


class NetworkGroup:
    """Implements `peertune.runtimes.Group` for one site: what others measured stays with them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.hosted: Sequence[int] = [node.index]
        self.is_recorder = self.survives_loss = True
        self.clock: Clock | None = None
        self._exchange = NetworkExchange(node)
        self._asked: Neighbor | None = None
        self._states: SimpleQueue[tuple[int, Payload | None]] = SimpleQueue()

    def catch_up(self, round: int, algorithm: Algorithm) -> int:
        """Give neighbours who are behind the state, where the method lets them join; take it where this site is."""
        state: Payload | None = None
        for index, neighbor in self.node.neighbors.items():
            if neighbor.edge.peer_asks and algorithm.can_join(round):
                # It is waited for again, or it would fall behind anew.
                neighbor.edge.peer_asks, neighbor.edge.peer_round, neighbor.edge.peer_is_away = False, round, False
                state = state or _state(algorithm)
                self._exchange.post(index, (round, STATE), state, "state")
        ahead = max(self.node.neighbors.values(), key=lambda n: n.edge.peer_round, default=None)
        if self._asked is not None and self._asked.is_out_of_reach:
            self.node.soon(self._asked.edge.no_state)
        missed = bool(self._exchange.left_out)
        if missed and ahead is not None and ahead.edge.peer_round > round + 1 and self._asked is None:
            self._asked = ahead
            self.node.log("asked", peer=ahead.name, round=round, behind=ahead.edge.peer_round - round)
            self.node.soon(partial(ahead.ask, _state(algorithm), self._arrived))
        if self._states.empty():
            return round
        self._asked = None
        then, found = self._states.get()
        if found is None or not round < then < algorithm.num_rounds or not algorithm.can_join(then):
            return round
        for name, value in found.items():
            algorithm.set_shared(name, value.to(algorithm.peer.model.device))
        algorithm.joined(then)
        for neighbor in self.node.neighbors.values():
            self.node.soon(partial(neighbor.skip_to, then))
        self.node.log("joined", round=then, missed=then - round)
        return then

    def _arrived(self, round: int, state: Payload | None) -> None:
        self._states.put((round, state))

    def exchange(self, member: int) -> NetworkExchange:
        return self._exchange

    def open(self, algorithm: Algorithm) -> None:
        pairs, topology = edges(algorithm), algorithm.topology
        check_members(self.node.charter.members, topology.num_peers + topology.has_hub, pairs)
        self.node.start(pairs)

    def gather(self, values: Sequence[T]) -> list[T | None]:
        told: list[T | None] = [None] * len(self.node.charter.members)
        (told[self.node.index],) = values
        return told

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> None:
        return None


class NetworkExchange:
    """Implements `peertune.exchange.Exchange` for one site."""

    def __init__(self, node: Node) -> None:
        self._node, self._peer = node, node.index
        self._key: Key = (-1, 0)
        self._out: Payload | None = None
        self.sent = Traffic()
        self.left_out: Sequence[int] = []
        self.rounds_without: Counter[int] = Counter()
        self._has_begun = False

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        if self._key[0] != round:
            self._key, self.left_out = (round, -1), []
            for neighbor in self._node.neighbors.values():
                neighbor.edge.round = round
        self._key = (round, self._key[1] + 1)
        self._out = out
        if out is None:
            return
        for target in hop.targets(self._peer):
            self.post(target, self._key, out, hop.name)

    def post(self, target: int, key: Key, payload: Payload, what: str) -> None:
        """Make a message ready for a neighbour, and write it down."""
        neighbor, size = self._node.neighbors[target], self.sent.count([target], payload)
        self._node.soon(partial(neighbor.post, key, payload))
        self._node.log("sent", peer=neighbor.name, round=key[0], hop=what, tensors=len(payload), bytes=size)

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        out, self._out = self._out, None
        weights = hop.sources(self._peer)
        if not weights:
            return None
        remote = [source for source in weights if source != self._peer]
        shapes = like() if out is None else out
        arrivals = {source: self._expect(source, shapes) for source in remote}
        payloads: dict[int, Payload] = {} if self._peer not in weights else {self._peer: shapes}
        missing = []
        for source, arrival in arrivals.items():
            payload = self._wait(source, arrival)
            if payload is None:
                missing.append(source)
            else:
                payloads[source] = {name: tensor.to(shapes[name].device) for name, tensor in payload.items()}
        self._has_begun |= bool(arrivals)
        if missing:
            names = ", ".join(self._node.neighbors[source].name for source in missing)
            self._node.log("left_out", peers=names, round=round, hop=hop.name)
            self.rounds_without.update(set(missing).difference(self.left_out))
            self.left_out = [*self.left_out, *missing]
            if hop.name == "agree":
                raise PeerLostError(f"the final agreement went without {names}, so it is none")
            weights = without(weights, missing, self._peer)
        return Inbox(weights, payloads) if weights else None

    def _expect(self, source: int, like: Payload) -> Future[Payload | None]:
        arrival: Future[Payload | None] = Future()
        self._node.soon(partial(self._node.neighbors[source].expect, self._key, like, arrival.set_result))
        return arrival

    def _wait(self, source: int, arrival: Future[Payload | None]) -> Payload | None:
        """The payload; None where the neighbour has been out of reach for the grace."""
        neighbor, began, told = self._node.neighbors[source], time.monotonic(), False
        while True:
            if not told and not neighbor.is_connected and time.monotonic() - began > WAITING_S:
                told = True
                self._node.log("waiting", peer=neighbor.name, round=self._key[0])
            if not arrival.done() and not self._begins(neighbor) and neighbor.is_gone(self._key[0]):
                self._node.soon(partial(neighbor.edge.give_up, self._key))
            with suppress(TimeoutError):
                return arrival.result(timeout=POLL_S)

    def _begins(self, neighbor: Neighbor) -> bool:
        """Whether the run has not begun, for all this site knows, and waits until everyone is there."""
        others = self._node.neighbors.values()
        return not self._has_begun and not neighbor.was_seen and all(other.edge.peer_round <= 1 for other in others)

    def saved(self, round: int) -> None:
        for neighbor in self._node.neighbors.values():
            self._node.soon(partial(neighbor.checkpointed, round))

    def state_dict(self) -> dict[str, Any]:
        return {"sent": self.sent.state_dict(), "rounds_without": list(self.rounds_without.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sent.load_state_dict(state["sent"])
        self.rounds_without = Counter(dict(state["rounds_without"]))
        self._has_begun = True


def _state(algorithm: Algorithm) -> Payload:
    """What a peer who joins needs: all that the peers have in common."""
    return {name: algorithm.shared(name) for name in algorithm.shared_names()}


def without(weights: Mapping[int, float], missing: Sequence[int], peer: int) -> dict[int, float]:
    """A row of weights when some sources are missing: their share goes to the peer's own message.

    A receiver who sends nothing himself, as a server, spreads it over the others alike; empty where nobody is left.
    """
    lost = sum(weights[source] for source in missing)
    left = {source: weight for source, weight in weights.items() if source not in missing}
    if peer in left:
        return left | {peer: left[peer] + lost}
    total = sum(left.values())
    return {source: weight * (total + lost) / total for source, weight in left.items()}
