"""A block over bare streams, to compare with: TCP and TLS by asyncio, TLS by blocking sockets, and gRPC.

It goes into a tensor that is there already.

Each maker returns the two ends, a sender and a receiver for two processes; the receiver returns seconds.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from peertune.identity import CERTIFICATE, KEY, load_identity
from peertune.memory import keep_freed
from peertune.runtimes.message import CHUNK_SIZE
from peertune.runtimes.node import OPTIONS

Ends = tuple[Callable[[Connection, int, int], None], Callable[[Connection, int, int], float]]


def stream_ends(homes: tuple[Path, Path] | None = None) -> Ends:
    """TCP; with the folders of two identities, mutual TLS over it."""

    def context(index: int) -> ssl.SSLContext | None:
        return None if homes is None else _mutual(homes, index)

    def send(ready: Connection, port: int, size: int) -> None:
        data = _ones(size)

        async def serve() -> None:
            done = asyncio.Event()

            async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                for start in range(0, size, CHUNK_SIZE):
                    writer.write(data[start : start + CHUNK_SIZE])
                    await writer.drain()
                await reader.read()  # until the other end has it all and closes; else what TLS still holds may be lost
                writer.close()
                done.set()

            async with await asyncio.start_server(handle, "127.0.0.1", port, ssl=context(0)):
                ready.send(None)
                await done.wait()

        asyncio.run(serve())

    def receive(ready: Connection, port: int, size: int) -> float:
        view = _zeros(size)
        ready.recv()

        async def fetch() -> float:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK_SIZE, ssl=context(1))
            start, offset = time.perf_counter(), 0
            while offset < size:
                data = await reader.read(CHUNK_SIZE)
                assert data, f"the stream ended after {offset} of {size} bytes"
                view[offset : offset + len(data)] = data
                offset += len(data)
            writer.close()
            return time.perf_counter() - start

        return asyncio.run(fetch())

    return send, receive


def socket_ends(homes: tuple[Path, Path]) -> Ends:
    """Mutual TLS by blocking sockets, which copy least of what Python has: the fastest that it can be."""

    def send(ready: Connection, port: int, size: int) -> None:
        data = _ones(size)
        with socket.create_server(("127.0.0.1", port)) as server:
            ready.send(None)
            accepted, _ = server.accept()
        with _mutual(homes, 0).wrap_socket(accepted, server_side=True) as stream:
            for start in range(0, size, CHUNK_SIZE):
                stream.sendall(data[start : start + CHUNK_SIZE])
            stream.recv(1)  # until the other end has it all

    def receive(ready: Connection, port: int, size: int) -> float:
        view = _zeros(size)
        ready.recv()
        with _mutual(homes, 1).wrap_socket(socket.create_connection(("127.0.0.1", port))) as stream:
            start, offset = time.perf_counter(), 0
            while offset < size:
                offset += stream.recv_into(view[offset : offset + CHUNK_SIZE])
            seconds = time.perf_counter() - start
            stream.sendall(b"!")
            return seconds

    return send, receive


def grpc_ends(homes: tuple[Path, Path]) -> Ends:
    """A gRPC stream with mutual TLS and a run's settings, in messages as large as a run's."""
    identities = [load_identity(home) for home in homes]

    def send(ready: Connection, port: int, size: int) -> None:
        data, done = _ones(size), asyncio.Event()
        keep_freed()

        async def handle(_: Any, context: Any) -> None:
            await context.read()
            for start in range(0, size, CHUNK_SIZE):
                await context.write(bytes(data[start : start + CHUNK_SIZE]))
            await context.read()
            done.set()

        async def serve() -> None:
            pair = [(identities[0].key_pem, identities[0].certificate_pem)]
            server = grpc.aio.server(options=OPTIONS)
            methods = {"Fetch": grpc.stream_stream_rpc_method_handler(handle)}
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bare", methods)])
            server.add_secure_port(
                f"127.0.0.1:{port}", grpc.ssl_server_credentials(pair, identities[1].certificate_pem, True)
            )
            await server.start()
            ready.send(None)
            await done.wait()
            await server.stop(0.1)

        asyncio.run(serve())

    def receive(ready: Connection, port: int, size: int) -> float:
        view = _zeros(size)
        keep_freed()
        ready.recv()

        async def fetch() -> float:
            credentials = grpc.ssl_channel_credentials(
                identities[0].certificate_pem, identities[1].key_pem, identities[1].certificate_pem
            )
            options = [*OPTIONS, ("grpc.ssl_target_name_override", identities[0].id)]
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
                await channel.channel_ready()
                call = channel.stream_stream("/Bare/Fetch")()
                start, offset = time.perf_counter(), 0
                await call.write(b"begin")
                while offset < size:
                    data = await call.read()
                    view[offset : offset + len(data)] = data
                    offset += len(data)
                seconds = time.perf_counter() - start
                await call.write(b"end")
                await call.done_writing()
                await call.code()
                return seconds

        return asyncio.run(fetch())

    return send, receive


def _mutual(homes: tuple[Path, Path], index: int) -> ssl.SSLContext:
    """Of the accepting (0) or the dialling end (1) of a connection between two identities' folders."""
    made = ssl.SSLContext((ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)[index])
    made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
    made.load_cert_chain(homes[index] / CERTIFICATE, homes[index] / KEY)
    made.load_verify_locations(homes[1 - index] / CERTIFICATE)
    return made


def _ones(size: int) -> memoryview:
    return memoryview(torch.ones(size // 4).numpy()).cast("B")


def _zeros(size: int) -> memoryview:
    return memoryview(torch.zeros(size // 4).numpy()).cast("B")
