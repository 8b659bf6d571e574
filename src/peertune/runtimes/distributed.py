"""One peer a process inside one trusted cluster, started by torchrun: torch.distributed, point to point.

Rank i plays member i of the recipe. Gloo carries tensors of CPUs, NCCL those of GPUs. There is no way back from a lost
rank: the group ends with an error, and torchrun's restart of all ranks, or the user's, goes on with --resume.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from peertune.algorithms.base import Algorithm
from peertune.config import LinkSection
from peertune.errors import ConfigError, PeerLostError
from peertune.exchange import Hop, Inbox, Payload
from peertune.link import Clock
from peertune.runtimes import Lockstep, weighted_mean

T = TypeVar("T")


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_rank() -> bool:
    return os.environ["RANK"] == "0"


def local_device(name: str) -> str:
    """The device of this rank for the recipe's run.device: of "auto" or "cuda", the GPU of its number on this machine.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
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
            dist.init_process_group("nccl", device_id=torch.device(device))
        else:
            dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class DistributedGroup:
    """Implements `peertune.runtimes.Group` inside a `process_group`.

    Args:
        num_members: N, or N + 1 with a hub.
        link: not simulated here.
    Raises:
        ConfigError: there are more or fewer processes than members.
    """

    def __init__(self, num_members: int, link: LinkSection) -> None:
        self.rank, world = dist.get_rank(), dist.get_world_size()
        if world != num_members:
            raise ConfigError(
                f"torchrun: got {world} processes for a recipe of {num_members} members (run.num_peers, and a server"
                f" where the method has one); start {num_members}"
            )
        self.hosted: Sequence[int] = [self.rank]
        self.is_recorder = self.rank == 0
        self.clock: Clock | None = None
        self.survives_loss = self.is_leaving = False

    def exchange(self, member: int) -> DistributedExchange:
        return DistributedExchange(member)

    def open(self, algorithm: Algorithm) -> None:
        pass  # they are

    def catch_up(self, round: int, algorithm: Algorithm) -> int:
        return round  # nobody is ever behind

    def gather(self, values: Sequence[T]) -> list[T | None]:
        (value,) = values
        told: list[T | None] = [None] * dist.get_world_size()
        with _no_rank_lost("between rounds"):
            dist.all_gather_object(told, value)
        return told

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
        (mine,) = tensors
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        with _no_rank_lost("between rounds"):
            dist.all_gather(every, mine.contiguous())
        return weighted_mean(every, weights)


class DistributedExchange(Lockstep):
    """Implements `peertune.exchange.Exchange`: a message is one flat tensor, its parts in the order of their names."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
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
        operations = [dist.P2POp(dist.isend, flat, target) for target in targets]
        operations += [dist.P2POp(dist.irecv, buffer, source) for source, buffer in buffers.items()]
        if operations:
            with _no_rank_lost(f"in round {round}, hop {hop.name!r}"):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        if not weights:
            return None
        payloads: dict[int, Payload] = {source: _parts(buffer, shapes) for source, buffer in buffers.items()}
        if self._peer in weights:
            payloads[self._peer] = shapes
        return Inbox(weights, payloads)


def _parts(flat: Tensor, shapes: Payload) -> Payload:
    """A message's tensors, views of it."""
    names = sorted(shapes)
    parts = torch.split(flat, [shapes[name].numel() for name in names])
    return {name: part.view(shapes[name].shape) for name, part in zip(names, parts, strict=True)}


@contextmanager
def _no_rank_lost(when: str) -> Iterator[None]:
    """Context in which an error of torch.distributed means that a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise PeerLostError(
            f"lost contact with another rank {when}: {reason}; see that rank's own message, then start all again with"
            " --resume"
        ) from error
