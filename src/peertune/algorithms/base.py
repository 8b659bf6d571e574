"""What a method is: one class, told its peer, the graph and its own keys; it knows neither runtime nor other peers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from peertune.config import AlgorithmConfig, TopologySection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox, Payload, agreement, gossip
from peertune.model.blocks import Block
from peertune.optim import MasterWeights
from peertune.peer import Peer
from peertune.topology import Topology


@dataclass(frozen=True)
class LocalReport:
    """What a local phase tells the run's log."""

    loss: Tensor
    """Mean over the phase's steps, nats a target token; float32 scalar."""
    grad_norm: Tensor
    """Mean L2 norm of the gradient before clipping; float32 scalar."""
    lr: float
    """Rate of the last step."""
    cpu_s: float = 0.0
    """Process CPU seconds of the phase; the runtime measures them."""
    wall_s: float = 0.0
    """Seconds that it takes a peer with this machine to itself; the runtime measures them."""


class Algorithm(ABC):
    """One method on one peer. All state that outlives a round is in `state_dict`, so every round can be resumed."""

    Config: ClassVar[type[AlgorithmConfig]]
    """The class of the method's [algorithm] keys."""
    pools_data: ClassVar[bool] = False
    """True for a bound that is allowed to see all data: one model, whose batch is the union of the peers' batches."""
    agrees: ClassVar[bool] = True
    """Whether all peers hold one model in the end."""
    keeps_own: ClassVar[bool] = False
    """Whether each peer ends with a model of its own beside the common one: it holds `personal`."""
    elementwise: ClassVar[bool] = True
    """Whether what it does with a weight depends on no other weight but through the gradient and its clipping; then a
    peer may be several ranks, each with some rows of every tensor."""
    averages: ClassVar[bool] = True
    """Whether it takes nothing but means from its inboxes, which a recipe's exchange.robust can then replace and
    whose messages its exchange.codec can round."""
    mixes: ClassVar[bool] = True
    """Whether peers' messages are weighed by W; else its second eigenvalue says nothing of how peers come together."""
    kept_per_weight: ClassVar[int] = 0
    """Float32 numbers a trained weight that checkpoints hold beside its master and moments."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Parameters of an adapter whose name holds one of these texts are not trained."""

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        self.peer, self.topology = peer, topology
        self.blocks = self.arrange(peer.blocks)
        parameters = peer.model.parameters()
        if config.local_modules and not self.agrees:
            raise ConfigError(
                f"algorithm.local_modules: got {config.local_modules} with algorithm.name = {config.name!r}, where"
                " nothing travels, expected an empty list; leave it out, in a comparison by"
                f" {config.name}:local_modules=[]"
            )
        self.masters = MasterWeights({n: parameters[n] for block in peer.blocks for n in block.parameters})
        _require_matches(config.local_modules, list(self.masters))
        self.common = tuple(n for n in self.masters if not any(text in n for text in config.local_modules))
        """Names of what the peers share; the rest, `local_modules`, never leaves its peer."""
        self.personal: dict[str, Tensor] = {}
        """Float32 weights, by name, with which this peer's own model differs from the common one; they never travel."""
        if not self.common:
            raise ConfigError(
                f"algorithm.local_modules: got {config.local_modules}, which keeps everything that is trained local;"
                " leave something to share, or take algorithm.name = 'local'"
            )

    @classmethod
    def graph(cls, section: TopologySection) -> TopologySection:
        """The graph this method runs on, of the one a recipe asks for."""
        return section

    @classmethod
    def has_hub(cls, section: TopologySection) -> bool:
        """Whether, on a graph as `graph` gives it, a server takes part: a peer beside the N, without data."""
        return False

    def arrange(self, blocks: list[Block]) -> list[Block]:
        """The blocks this method trains in turn, made of the model's partition."""
        return blocks

    @property
    @abstractmethod
    def num_rounds(self) -> int:
        """Rounds of a whole run."""

    def hops(self, round: int) -> Sequence[Hop]:
        """The round's hops, the same on every peer; by default one of gossip."""
        return (gossip(self.topology),)

    @abstractmethod
    def local(self, round: int) -> LocalReport | None:
        """Train on the peer's own data; None where this peer has no part in the round. Not called on a hub."""

    @abstractmethod
    def outgoing(self, hop: Hop) -> Payload:
        """What this peer sends along a hop of its own `hops`: float32 copies, or uint8 where nothing `averages` it.

        Names and shapes are the same on all peers, and the call changes nothing: one that only receives is asked too.
        """

    @abstractmethod
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        """Take in what the hop brought."""

    def consensus(self, round: int) -> Sequence[float]:
        """Weights of the peers in the model they have in common after `round` rounds; they sum to 1."""
        return [float(p) for p in self.topology.stationary]

    def agreement(self, pairs: Collection[tuple[int, int]] | None = None) -> Sequence[Hop]:
        """Hops after the last round that leave every peer with the bitwise same model.

        Args:
            pairs: peers (i, j), i < j, who still hear each other, where some do not; None: all do.
        """
        return agreement(self.topology, self.consensus(self.num_rounds), pairs) if self.agrees else ()

    def can_join(self, round: int) -> bool:
        """Whether one who was away may come back at the beginning of a round, with what another peer `handed_on`."""
        return True

    def handed_on(self) -> Payload:
        """Float32 copies of all that the peers have in common between rounds; names and shapes are the same on all."""
        return {name: self.shared(name) for name in self.shared_names()}

    def join(self, round: int, common: Payload) -> None:
        """Take up what a peer `handed_on` after `round` rounds, and forget what belonged to the old weights."""
        for name in self.shared_names():
            self.set_shared(name, common[name])

    @abstractmethod
    def position(self, round: int) -> Mapping[str, int]:
        """Where in the method's schedule a round lies, for the log; has at least "outer_round" and "block"."""

    def is_boundary(self, round: int) -> bool:
        """Whether the end of a round is a cheap place for a checkpoint (DECA: the end of a block's turn)."""
        return True

    def shared_names(self, round: int | None = None) -> Sequence[str]:
        """Tensors the peers have in common; with a round, those that this round trains."""
        return self.common

    def shared(self, name: str) -> Tensor:
        """A float32 copy of a shared tensor: for agreement, evaluation and export."""
        return self.masters.snapshot(name)

    def set_shared(self, name: str, value: Tensor) -> None:
        """Replace a shared tensor by float32 `value` of its shape."""
        self.masters.write(name, value)

    @contextmanager
    def in_person(self) -> Iterator[Mapping[str, Tensor]]:
        """Context in which the peer's model holds what is `personal`, to be trained or measured.

        Yields:
            What it holds in the same places otherwise, float32, by name.
        """
        common = {name: self.masters.snapshot(name) for name in self.personal}
        self.masters.write_all(self.personal)
        yield common
        self.masters.write_all(common)

    def take_late(self, change: Payload) -> bool:
        """Add to what this peer holds what a late message would have brought.

        Args:
            change: w_ij (what j sent - what this peer sent), by the names of `outgoing`.
        Returns:
            False, with nothing changed, where that belongs to what is no longer there.
        """
        if not change.keys() <= set(self.shared_names()):
            return False
        for name, value in change.items():
            held = self.shared(name)
            self.set_shared(name, held.add_(value.to(held.device)))
        return True

    def state_dict(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data of a checkpoint after `round` rounds: weights, and what outlives a round."""
        tensors = {f"weights/{n}": p.detach() for n, p in self.masters.parameters.items()}
        tensors |= {f"remainder/{n}": t for n, t in self.masters.remainders.items()}
        tensors |= {f"personal/{n}": t for n, t in self.personal.items()}
        return tensors, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], round: int) -> None:
        """Take up a `state_dict` written after `round` rounds."""
        for name, parameter in self.masters.parameters.items():
            parameter.data.copy_(tensors[f"weights/{name}"])
        self.masters.remainders = {
            n: tensors[f"remainder/{n}"].clone() for n in self.masters if f"remainder/{n}" in tensors
        }
        device = self.peer.model.device
        self.personal = {
            n: tensors[f"personal/{n}"].to(device, copy=True) for n in self.masters if f"personal/{n}" in tensors
        }


def _require_matches(local_modules: Sequence[str], trained: Sequence[str]) -> None:
    """Refuse a text of local_modules that no trained parameter's name holds: what it means would travel."""
    for text in local_modules:
        if not text or not any(text in name for name in trained):
            some = ", ".join([*trained[:: max(1, len(trained) // 5)][:5], *trained[-1:]])
            raise ConfigError(
                f"algorithm.local_modules: got {text!r}, which is in no name of the {len(trained)} parameters that are"
                f" trained, expected a part of one, such as of {some}; correct it or leave it out"
            )
