"""One peer a process inside one trusted cluster, started by torchrun: torch.distributed, point to point.

Rank i plays member i of the recipe. With S ranks a peer it holds shard i % S of member i // S, and exchanges messages
with the same shard of others: all that a method sends is mixed element by element. Gloo carries tensors of CPUs, NCCL
those of GPUs. There is no way back from a lost rank: the group ends with an error, and torchrun's restart of all ranks,
or the user's, goes on with --resume.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from peertune.config import LinkSection
from peertune.errors import ConfigError, PeerLostError
from peertune.exchange import Hop, Inbox, Payload
from peertune.runtimes.group import Group, Lockstep, weighted_mean
from peertune.wire import parts_of

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for another, which may evaluate, export or train on far more rows. One that dies is noticed at
once, by its connection that closes or by torchrun; torch's own limits, 10 and 30 minutes, would end healthy runs."""
LAUNCHED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets beside WORLD_SIZE, which others set too."""


def is_launched() -> bool:
    """Whether torchrun started this process as one of several. Raises ConfigError where only a part of it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return False
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise ConfigError(
            f"torchrun: got WORLD_SIZE = {os.environ['WORLD_SIZE']} in the environment, but no {', '.join(missing)};"
            " start this command with torchrun, which sets them all, or unset WORLD_SIZE"
        )
    return True


def is_first_rank() -> bool:
    return os.environ["RANK"] == "0"


def local_device(name: str) -> str:
    """The device of this rank for the recipe's run.device: of "auto" or "cuda", the GPU of its number on this machine.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks, or the recipe names one for all.
    """
    if name.startswith("cuda:") and int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        raise ConfigError(
            f"run.device: got {name!r} with {os.environ['LOCAL_WORLD_SIZE']} ranks on this machine, expected 'cuda',"
            " which gives each a GPU of its own"
        )
    if name not in ("auto", "cuda") or (name == "auto" and not torch.cuda.is_available()):
        return name
    rank, ranks, gpus = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if ranks > gpus:
        raise ConfigError(
            f"run.device: got {name!r} with {ranks} ranks on a machine of {gpus} GPUs, expected one GPU a rank; start"
            " fewer ranks here, or set run.device = 'cpu'"
        )
    return f"cuda:{rank}"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The processes torchrun started, connected while the context lasts.

    Args:
        device: as `local_device` gives it.
    """
    with _no_rank_lost("at the start"):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=torch.device(device), timeout=PATIENCE, **_meeting_place())
        else:
            dist.init_process_group("gloo", timeout=PATIENCE, **_meeting_place())
    try:
        yield
    except RuntimeError as error:  # FSDP2's own messages between the ranks of a peer
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            raise _lost("in a local phase or an evaluation", error) from error
        raise
    finally:
        dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Where the ranks tell each other their addresses: of torchrun's store the part that is this start's alone."""
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    own = dist.PrefixStore(_name_of_start(store, rank, size), store)  # type: ignore[attr-defined]
    return {"store": own, "rank": rank, "world_size": size}


def _name_of_start(store: Any, rank: int, size: int) -> str:
    """A name that all ranks of this start come to, and those of no start before.

    torchrun keeps one store over its restarts, with the addresses of the ranks before; its own counts of restarts
    differ between machines. So each process brings a number of its own, rank 0 calls the list that it finds, with some
    of the dead at first, and the start is named by the list that each rank has said yes to: nobody does for the dead.
    """
    mine = secrets.token_hex(8)
    store.set(f"here-{rank}", mine)
    while True:
        if rank == 0:
            store.set("called", " ".join(store.get(f"here-{r}").decode() for r in range(size)))
        called = store.get("called")
        if mine in called.decode().split():
            name = hashlib.sha256(called).hexdigest()
            store.set(f"{name}-{rank}", "yes")
            if store.check([f"{name}-{r}" for r in range(size)]):
                return name
        time.sleep(0.05)


class DistributedGroup(Group):
    """One process plays a member, or a shard of it, inside a `process_group`.

    Args:
        num_members: N, or N + 1 with a hub.
        link: not simulated here.
        ranks_per_peer: S, processes that play a member together.
    Raises:
        ConfigError: there are more or fewer processes than S a member.
    """

    def __init__(self, num_members: int, link: LinkSection, ranks_per_peer: int = 1) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        if world != num_members * ranks_per_peer:
            each = f", {ranks_per_peer} each (run.ranks_per_peer)" if ranks_per_peer > 1 else ""
            raise ConfigError(
                f"torchrun: got {world} processes for a recipe of {num_members} members (run.num_peers, and a server"
                f" where the method has one){each}; start {num_members * ranks_per_peer}"
            )
        self.num_members, self.num_shards = num_members, ranks_per_peer
        member, self.shard = divmod(rank, ranks_per_peer)
        self.hosted: Sequence[int] = [member]
        self.is_recorder = member == 0
        self._alike: dist.ProcessGroup | None = None
        """The same shard of all members; None: all ranks."""
        if ranks_per_peer > 1:
            kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
            mesh = init_device_mesh(kind, (num_members, ranks_per_peer), mesh_dim_names=("member", "shard"))
            self.ranks, self._alike = mesh["shard"], mesh["member"].get_group()
            for group in (self._alike, self.ranks.get_group()):
                distributed_c10d._set_pg_timeout(PATIENCE, group)

    def exchange(self, member: int) -> DistributedExchange:
        return DistributedExchange(member, lambda other: other * self.num_shards + self.shard)

    def gather(self, values: Sequence[T], combine: Callable[[Sequence[T]], T] | None = None) -> list[T | None]:
        (value,) = values
        told: list[T] = [value] * dist.get_world_size()
        with _no_rank_lost("between rounds"):
            dist.all_gather_object(told, value)
        by_member = [told[i : i + self.num_shards] for i in range(0, len(told), self.num_shards)]
        return [each[0] if combine is None else combine(each) for each in by_member]

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
        (mine,) = tensors
        every = [torch.empty_like(mine) for _ in range(self.num_members)]
        with _no_rank_lost("between rounds"):
            dist.all_gather(every, mine.contiguous(), group=self._alike)
        return weighted_mean(every, weights)


class DistributedExchange(Lockstep):
    """Implements `peertune.exchange.Exchange`: a message is one flat tensor, its parts in the order of their names.

    Args:
        rank_of: the rank that a member's messages come from and go to.
    """

    def __init__(self, peer: int, rank_of: Callable[[int], int]) -> None:
        super().__init__(peer)
        self._rank_of = rank_of
        self._out: Payload | None = None

    def start(self, round: int, hop: Hop, out: Payload | None) -> None:
        self._out = out
        if out is not None:
            self.sent.count(hop.targets(self._peer), out)

    def finish(self, round: int, hop: Hop, like: Callable[[], Payload]) -> Inbox | None:
        out, self._out = self._out, None
        weights, targets = hop.sources(self._peer), hop.targets(self._peer)
        remote = [source for source in weights if source != self._peer]
        if not weights and not targets:
            return None
        shapes = like() if out is None else out
        flat = torch.cat([shapes[name].reshape(-1) for name in sorted(shapes)])
        buffers = {source: torch.empty_like(flat) for source in remote}
        operations = [dist.P2POp(dist.isend, flat, self._rank_of(target)) for target in targets]
        operations += [dist.P2POp(dist.irecv, buffer, self._rank_of(source)) for source, buffer in buffers.items()]
        if operations:
            with _no_rank_lost(f"in round {round}, hop {hop.name!r}"):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        if not weights:
            return None
        payloads: dict[int, Payload] = {source: parts_of(buffer, shapes) for source, buffer in buffers.items()}
        if self._peer in weights:
            payloads[self._peer] = shapes
        return Inbox(weights, payloads)


@contextmanager
def _no_rank_lost(when: str) -> Iterator[None]:
    """Context in which an error of torch.distributed means that a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(when, error) from error


def _lost(when: str, error: RuntimeError) -> PeerLostError:
    first, *_ = str(error).strip().splitlines()
    reason, *_ = re.sub(r"\[\S+\.cc:\d+\] ", "", first).split(". ")  # without places in sources and general advice
    if "timed out connecting" in reason:
        reason += (
            " (where that is no address of the other machine, set GLOO_SOCKET_IFNAME on each to the interface by which"
            " they reach each other, such as eth0)"
        )
    return PeerLostError(
        f"lost contact with another rank {when}: {reason}; see that rank's own message, then start all again with"
        " --resume"
    )
