"""A block between two sites: speed against raw TCP, memory at the receiver, and what it costs the training beside it.

    python benchmarks/exchange.py [--megabytes 256] [--repeats 5]

Two processes on loopback. `raw` is asyncio TCP into a tensor that is there already, without encryption or checks; `tls`
the same with mutual TLS 1.3; `socket_tls` that by blocking sockets; `grpc_tls` a bare gRPC stream with mutual TLS, of
chunks as large as ours; ours is what a run uses: that stream, hashed chunks, shapes checked, NaN refused. They take
turns. Then one process trains (matrix products on one thread) with and without a block arriving every `--every`
seconds.

The bare ones' tensor has been written to before. Ours is new in the first round, which takes as long as the system
needs to find the memory; later rounds' blocks come into the same pages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _bare import grpc_ends, socket_ends, stream_ends
from _harness import RESULTS, finish, free_port

import peertune
from peertune.charter import Charter, Member
from peertune.exchange import Hop
from peertune.identity import make_identity
from peertune.memory import peak_bytes, release, reset_peak
from peertune.runtimes.network import NetworkExchange
from peertune.runtimes.node import Node

HOP = Hop("gossip", {(0, 1): 0.5, (1, 1): 0.5})
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
ROUNDS = 4
"""That two sites play, to be timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between blocks while training")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    size = options.megabytes * 1_000_000 // 4 * 4
    with tempfile.TemporaryDirectory() as folder:
        homes = Path(folder) / "bare-0", Path(folder) / "bare-1"
        for home in homes:
            make_identity(home)
        bare = {"raw": stream_ends(), "tls": stream_ends(homes)}
        bare |= {"socket_tls": socket_ends(homes), "grpc_tls": grpc_ends(homes)}
        times: dict[str, list[float]] = {name: [] for name in [*bare, "peertune", "first_round"]}
        for _ in range(options.repeats):
            for name, both in bare.items():
                times[name].append(pair(*both, size))
            first, *later = pair(*ends(Path(folder)), size)["seconds"]
            times["first_round"].append(first)
            times["peertune"].append(statistics.median(later))
        extra = pair(*ends(Path(folder)), size)["extra_bytes"]
        training = pair(*ends(Path(folder), options.every), size)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    finish(
        "exchange",
        {
            "bytes": size,
            "repeats": options.repeats,
            "mb_per_s": {name: size / 1e6 / found for name, found in seconds.items()},
            "bare_tls_over_raw": seconds["raw"] / seconds["tls"],
            "bare_socket_tls_over_raw": seconds["raw"] / seconds["socket_tls"],
            "bare_grpc_tls_over_raw": seconds["raw"] / seconds["grpc_tls"],
            "peertune_over_raw": seconds["raw"] / seconds["peertune"],
            "first_round_over_raw": seconds["raw"] / seconds["first_round"],
            "receiver_extra_bytes_beyond_the_block": extra,
            "training": training,
        },
        options.results,
    )


def pair(send: Callable[..., Any], receive: Callable[..., Any], size: int) -> Any:
    """What the receiving process found out."""
    near, far = FORK.Pipe()
    port = free_port()
    sender = FORK.Process(target=send, args=(near, port, size))
    sender.start()
    result, own = FORK.Pipe(False)
    receiver = FORK.Process(target=_report, args=(receive, own, far, port, size))
    receiver.start()
    found = result.recv()
    receiver.join()
    sender.join()
    return found


def _report(receive: Callable[..., Any], result: Connection, *arguments: Any) -> None:
    result.send(receive(*arguments))


def ends(folder: Path, every: float = 0.0) -> tuple[Callable[..., None], Callable[..., dict[str, Any]]]:
    """The two sites; with `every`, the receiver trains, and a block comes every so many seconds."""
    identities = []
    for i in range(2):
        home = folder / f"{time.monotonic_ns()}-{i}"
        identities.append(make_identity(home))

    def node(index: int, port: int) -> Node:
        charter = Charter(
            version=peertune.__version__,
            expires=date(2999, 1, 1),
            base="",
            tokenizer="",
            recipe={},
            members=[
                Member(name=f"site{i}", id=identity.id, address=f"127.0.0.1:{port}" if i == 0 else "")
                for i, identity in enumerate(identities)
            ],
        )
        for identity in identities:
            charter = charter.signed(identity)
        made = Node(charter, identities[index], f"127.0.0.1:{port}" if index == 0 else "", lambda *_, **__: None)
        made.start([(0, 1)])
        return made

    def send(ready: Connection, port: int, size: int) -> None:
        made = node(0, port)
        exchange, payload = NetworkExchange(made), {"block": torch.ones(size // 4)}
        round = 0
        while ready.recv():
            exchange.start(round, HOP, payload)
            ready.send(None)
            round += 1
        made.stop(5.0)

    def receive(ready: Connection, port: int, size: int) -> dict[str, Any]:
        made = node(1, port)
        exchange, own = NetworkExchange(made), {"block": torch.zeros(size // 4)}
        rounds = iter(range(1000))
        while not made.neighbors[0].is_connected:  # sites connect before they train
            time.sleep(0.01)

        def fetch() -> float:
            round = next(rounds)
            ready.send(True)
            ready.recv()
            exchange.start(round, HOP, own)
            start = time.perf_counter()
            inbox = exchange.finish(round, HOP, lambda: own)
            assert inbox is not None and float(inbox.payloads[0]["block"][-1]) == 1.0
            exchange.saved(round + 1)
            return time.perf_counter() - start

        if every:
            found = beside_training(fetch, every)
        else:
            release()
            reset_peak(CPU)
            before = peak_bytes(CPU)
            seconds = [fetch() for _ in range(ROUNDS)]
            found = {"seconds": seconds, "extra_bytes": peak_bytes(CPU) - before - size}
        ready.send(False)
        made.stop(5.0)
        return found

    return send, receive


def beside_training(fetch: Callable[[], float], every: float) -> dict[str, float]:
    """Steps a second of a training loop, alone and with transfers, in turn."""
    torch.set_num_threads(1)
    weights, batch = torch.randn(1024, 1024), torch.randn(256, 1024)

    def steps(seconds: float) -> float:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                batch @ weights
            count += 1
        return count / seconds

    alone, beside = [], []
    for _ in range(3):
        alone.append(steps(every))
        transfer = threading.Thread(target=fetch)
        transfer.start()
        beside.append(steps(every))
        transfer.join()
    return {
        "seconds_between_blocks": every,
        "steps_per_s_alone": statistics.median(alone),
        "steps_per_s_beside": statistics.median(beside),
        "slowdown": statistics.median([1 - b / a for a, b in zip(alone, beside, strict=True)]),
    }


if __name__ == "__main__":
    main()
