"""What a runtime is: a group of processes, the members it hosts, and what the runtimes' groups and exchanges share.

How a payload travels is each runtime's own (`simulation`, `distributed`, `network`); what a round does with one is in
`rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from peertune.algorithms.base import Algorithm
from peertune.config import ExchangeSection
from peertune.exchange import Exchange
from peertune.link import Clock
from peertune.wire import Traffic

T = TypeVar("T")


class Group(Protocol):
    """The processes of a run: which members each plays, and what they tell each other beside the method's messages.

    Every process calls `gather` and `mean` in the same order. What has a body is as it is where all members stop and go
    on together.
    """

    hosted: Sequence[int]
    """Members this process plays, ascending."""
    is_recorder: bool
    """Whether this process's member works out what is common to the run: events, summary, report, the exported model.
    Of several processes that play it, the first writes."""
    ranks: DeviceMesh | None = None
    """The processes that play this one's member together; None: it does so alone."""
    clock: Clock | None = None
    """Simulated time, where links are simulated."""
    survives_loss: bool = False
    """Whether the run goes on, and ends, without a member that is gone."""

    @property
    def is_leaving(self) -> bool:
        """Whether this process was asked to leave the run before its end."""
        return False

    def exchange(self, member: int) -> Exchange:
        """What carries a hosted member's payloads."""

    def open(self, algorithm: Algorithm) -> None:
        """Connect the hosted members to those with whom the method has them exchange messages: its `edges`."""
        return

    def catch_up(self, round: int, algorithm: Algorithm) -> int:
        """Called between rounds: help others who are behind, and come back where this process is.

        Returns:
            The round to go on with.
        """
        return round

    def take_late(self, algorithm: Algorithm) -> None:
        """Add to what the method holds the messages that came after their rounds, as far as it can."""
        return

    def gather(self, values: Sequence[T], combine: Callable[[Sequence[T]], T] | None = None) -> list[T | None]:
        """Values that JSON can hold, one for each hosted member -> one for each of all; None for what stays unknown.

        Args:
            combine: makes a member's value of those of its processes; None: the first stands for all.
        """

    def mean(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor | None:
        """sum_i w_i x_i over the peers, to the bit the same in all runtimes; None where it is not to be had.

        Args:
            tensors: float32, of one shape, one for each hosted member, or this process's rows of it; a hub's is left
                out.
            weights: by peer.
        """


@dataclass(frozen=True)
class Member:
    """One peer hosted by this process."""

    algorithm: Algorithm
    exchange: Exchange
    rule: ExchangeSection = field(default_factory=ExchangeSection)
    """What it makes of a round's messages."""

    @property
    def index(self) -> int:
        return self.algorithm.peer.index

    @property
    def is_hub(self) -> bool:
        """Whether it is the server beside the peers."""
        return self.algorithm.peer.batches is None


class Lockstep:
    """What exchanges have in common whose peers all stop and go on together: nobody is ever left out."""

    left_out: Sequence[int] = ()

    def __init__(self, peer: int) -> None:
        self._peer = peer
        self.sent = Traffic()
        self.rounds_without: Mapping[int, int] = {}

    def saved(self, round: int) -> None:
        pass  # nobody asks for a message twice

    def state_dict(self) -> dict[str, Any]:
        return {"sent": self.sent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sent.load_state_dict(state["sent"])


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in the order given: float32, a new tensor. Tensors beyond the weights are left out."""
    each = iter(tensors)
    first, *rest = weights
    total = next(each) * first
    for weight in rest:
        total.add_(next(each), alpha=weight)
    return total
