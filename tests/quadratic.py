"""Peers with quadratic losses in place of a model and data: what a method does to them can be written in NumPy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peertune.model.blocks import Block
from peertune.runtimes import Member, play_round
from peertune.runtimes.simulation import Mailbox
from peertune.topology import Topology

NUM_PEERS, SIZE = 5, 6


def gradient(peer: int, step: int | None, theta: np.ndarray) -> np.ndarray:
    """Of peer i's loss 1/2 ||C_i theta - y_i||^2 with noise that depends on the step, if any; theta is [2 SIZE]."""
    rng = np.random.default_rng(100 + peer)
    c, y = rng.normal(size=(2 * SIZE, 2 * SIZE)) / 2, rng.normal(size=2 * SIZE)
    if step is None:
        return c.T @ (c @ theta - y)
    noise = np.random.default_rng(1000 * peer + step).normal(size=2 * SIZE) / 10
    return c.T @ (c @ theta - y) + noise


class QuadraticPeer:
    """Stands in for a `Peer` whose model has two blocks, "a" and "b", and the loss of `gradient`.

    Args:
        shape: of each block's one parameter, SIZE numbers.
        noise: whether gradients have that of their step.
    """

    def __init__(self, index: int, shape: tuple[int, ...] = (SIZE,), noise: bool = True) -> None:
        self.noise = noise
        start = torch.tensor(np.random.default_rng(7).normal(size=(2, SIZE)), dtype=torch.float32)
        self.index, self.seed, self.batches = index, 0, ()
        self.module = nn.ParameterDict({n: nn.Parameter(x.reshape(shape)) for n, x in zip("ab", start, strict=True)})
        self.blocks = [Block(0, "a", ("a",), 0), Block(1, "b", ("b",), 1)]
        self.model = SimpleNamespace(
            module=self.module, parameters=lambda: dict(self.module.items()), activate=self.activate,
            device=torch.device("cpu"),
        )  # fmt: skip

    def activate(self, block: Block) -> dict[str, nn.Parameter]:
        return {name: self.module[name] for name in block.parameters}

    def backward(self, step: int, num_batches: int) -> Tensor:
        theta = np.concatenate([self.module[n].detach().double().numpy().reshape(-1) for n in "ab"])
        grad = gradient(self.index, step if self.noise else None, theta)
        for name, part in zip("ab", np.split(grad, 2), strict=True):
            self.module[name].grad = torch.tensor(part, dtype=torch.float32).view_as(self.module[name])
        return torch.tensor(0.0)


def simulate(
    method: type,
    config: Any,
    topology: Topology,
    rounds: int | None = None,
    shape: tuple[int, ...] = (SIZE,),
    noise: bool = True,
) -> list[Member]:
    """Run a method on `QuadraticPeer`s; returns the members, the hub last where there is one."""
    mailbox = Mailbox()
    members = []
    for index in range(topology.num_members):
        peer: Any = QuadraticPeer(index, shape, noise)
        if index == topology.num_peers:
            peer.batches = None
        members.append(Member(method(peer, config, topology), mailbox.endpoint(index)))
    for round in range(rounds or members[0].algorithm.num_rounds):
        play_round(round, members)
    return members


def start() -> np.ndarray:
    """theta that all peers start from, float64 [2 SIZE]."""
    return np.random.default_rng(7).normal(size=(2, SIZE)).astype(np.float32).astype(float).reshape(-1)


def weights_of(members: list[Member]) -> np.ndarray:
    """theta of each member, float64 [members, 2 SIZE]."""
    held = ([m.algorithm.shared(n).double().numpy().reshape(-1) for n in "ab"] for m in members)
    return np.array([np.concatenate(parts) for parts in held])
