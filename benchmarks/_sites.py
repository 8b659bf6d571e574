"""Sites for benchmarks: a process each, on loopback, with keys, data and folders of their own.

Processes are forked from one that has everything imported, so a site starts in a second. What a benchmark does to a
site's process, it does through `Fault`: a piece of code that the process runs on itself when it has reached a place.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tomli_w
import torch
from _harness import free_port

from peertune import checkpoint
from peertune.algorithms import ALGORITHMS
from peertune.charter import Member, write_charter
from peertune.cli import main as peertune
from peertune.consortium import new_charter
from peertune.data.stdlib import load_stdlib
from peertune.exchange import Hop, Payload
from peertune.identity import load_identity, make_identity
from peertune.runtimes import edge
from peertune.runtimes.edge_frames import Key, Kind
from peertune.runtimes.network import NetworkExchange

FORK = multiprocessing.get_context("fork")
PHASES = ("training", "sending", "receiving", "checkpoint", "agreement")


@dataclass(frozen=True)
class Fault:
    """What a site's process does to itself on reaching a place of a round."""

    phase: str
    round: int
    act: Callable[[], None]

    def arm(self, method: str) -> None:
        """Have it happen once, in this process."""
        acted = False

        def reached(round: int) -> None:
            nonlocal acted
            if round >= self.round and not acted:
                acted = True
                self.act()

        if self.phase == "training":
            local = ALGORITHMS[method].local

            def train(algorithm: Any, round: int) -> Any:
                reached(round)
                return local(algorithm, round)

            ALGORITHMS[method].local = train  # type: ignore[method-assign]
        elif self.phase == "sending":
            chunks = edge.Edge._chunks

            def send(one: edge.Edge, key: Key, cut: Iterator[Any]) -> Iterator[bytes]:
                for frame in chunks(one, key, cut):
                    reached(key[0])
                    yield frame

            edge.Edge._chunks = send  # type: ignore[method-assign]
        elif self.phase == "receiving":
            receive = edge.Edge.receive

            def take(one: edge.Edge, frame: bytes) -> Any:
                if frame[:1] == bytes([Kind.CHUNK]):
                    reached(one.round)
                return receive(one, frame)

            edge.Edge.receive = take  # type: ignore[method-assign]
        elif self.phase == "agreement":
            start = NetworkExchange.start

            def agree(one: NetworkExchange, round: int, hop: Hop, out: Payload | None) -> None:
                start(one, round, hop, out)
                if hop.name == "agree":
                    reached(round)

            NetworkExchange.start = agree  # type: ignore[method-assign]
        else:
            save_file = checkpoint.save_file

            def save(tensors: Any, path: Path) -> None:
                save_file(tensors, path)  # written, and not yet under its name
                reached(int(path.parent.name.split("-")[1].split(".")[0]))

            checkpoint.save_file = save


def kill() -> None:
    """What a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Sites:
    """A consortium in a folder; `start` starts a site, again and again.

    Args:
        names: of the sites. Each second one opens a port, and behind it `proxies` may stand.
        recipe: sections of the recipe beside run.num_peers, the data and the model.
        proxied: names of sites that are reached through a `Proxy`.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        recipe: dict[str, Any],
        *,
        grace_s: float,
        stall_s: float,
        proxied: str = "",
    ) -> None:
        self.folder, self.names, self.recipe = folder, names, recipe
        self.folder.mkdir(parents=True)
        self.ports = {name: free_port() for name in names[::2]}
        self.proxy = Proxy(self.ports[proxied]) if proxied else None
        write_rows(folder, names)
        tree = {**recipe, "run": {"num_peers": len(names), "threads": 1, **recipe.get("run", {})}}
        path = folder / "recipe.toml"
        path.write_text(tomli_w.dumps(tree), encoding="utf-8")
        members = []
        for name in names:
            seen = self.proxy.port if self.proxy and name == proxied else self.ports.get(name)
            address = f"127.0.0.1:{seen}" if seen else ""
            members.append(Member(name=name, id=make_identity(folder / name / "key").id, address=address))
        charter = new_charter(path, [], members, date(2999, 12, 31), folder / "unsigned.toml", grace_s)
        charter = charter.model_copy(update={"stall_s": stall_s})
        for name in names:
            charter = charter.signed(load_identity(folder / name / "key"))
        write_charter(charter, folder / "charter.toml")
        self.processes: dict[str, Any] = {}

    def start(self, name: str, fault: Fault | None = None) -> None:
        process = FORK.Process(target=self._play, args=(name, fault), daemon=True)
        process.start()
        self.processes[name] = process

    def start_under(self, name: str, environment: dict[str, str]) -> None:
        """Start a site by the command that a user types, with more in its environment; slower than a fork."""
        self.processes[name] = FORK.Process(target=self._type, args=(name, environment), daemon=True)
        self.processes[name].start()

    def _type(self, name: str, environment: dict[str, str]) -> None:
        with (self.folder / name / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.execve(sys.executable, [sys.executable, "-m", "peertune", *self._command(name)], os.environ | environment)

    def _command(self, name: str) -> list[str]:
        home = self.folder / name
        return [
            *("join", str(self.folder / "charter.toml"), "--identity", str(home / "key")),
            *("--data", str(home / "train.jsonl"), "--test", str(home / "test.jsonl")),
            *("--out", str(home / "run")),
            *(("--listen", f"127.0.0.1:{self.ports[name]}") if name in self.ports else ()),
        ]

    def _play(self, name: str, fault: Fault | None) -> None:
        torch.set_num_threads(1)
        if fault is not None:
            fault.arm(self.recipe["algorithm"]["name"])
        home = self.folder / name
        code = 70
        with (home / "log").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            try:
                code = peertune(self._command(name))
            except BaseException:
                traceback.print_exc()
        os._exit(code)

    def wait(self, name: str, limit_s: float) -> int | None:
        """A site's exit code; None where it still runs after so many seconds."""
        self.processes[name].join(limit_s)
        return self.processes[name].exitcode  # type: ignore[no-any-return]

    def events(self, name: str, kind: str, file: str = "audit.jsonl") -> list[dict[str, Any]]:
        path = self.folder / name / "run" / file
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # half of a line: its writer was killed
        return [event for event in found if event["event"] == kind]

    def round(self, name: str) -> int:
        """Rounds that a site has finished."""
        done = self.events(name, "round", "events.jsonl")
        return done[-1]["round"] + 1 if done else 0

    def summary(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name / "run" / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def end(self) -> None:
        for process in self.processes.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        if self.proxy is not None:
            self.proxy.close()


def write_rows(folder: Path, names: list[str], limit: int = 200) -> None:
    """To each site the rows of its own package groups of Python's standard library; held-out rows are the same."""
    for split in ("train", "test"):
        rows, group = load_stdlib(split)
        for number, name in enumerate(names):
            (folder / name).mkdir(exist_ok=True)
            mine = [row for row, g in zip(rows, group, strict=True) if split == "test" or g % len(names) == number]
            lines = [
                json.dumps({"text": row["text"]}) + "\n" for row in mine[:limit] or rows[number :: len(names)][:limit]
            ]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


class Proxy:
    """A TCP line to a local port, in a thread of its own, that can be cut, held, and made slow."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.bytes_per_s = float("inf")
        self._passes = threading.Event()
        self._passes.set()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.port = int(server.result().sockets[0].getsockname()[1])

    def cut(self, is_cut: bool) -> None:
        """Close what is open and refuse what comes, or let it through again."""
        self._is_cut = is_cut
        self._loop.call_soon_threadsafe(self._close)

    def hold(self, is_held: bool) -> None:
        """Leave connections open and carry nothing, as a line does whose other end has lost its power."""
        self._passes.clear() if is_held else self._passes.set()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                while not self._passes.is_set():
                    await asyncio.sleep(0.05)
                await asyncio.sleep(len(data) / self.bytes_per_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            self._writers.discard(writer)


def until(happened: Callable[[], bool], limit_s: float) -> bool:
    """Whether it happened before so many seconds were over."""
    end = time.monotonic() + limit_s
    for _ in itertools.count():
        if happened():
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    raise AssertionError


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
