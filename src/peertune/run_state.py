"""What a process keeps of a run between rounds, beside the messages under way: to a checkpoint, and back from one.

The members' own state is `Algorithm.state_dict`'s business, files are `checkpoint`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peertune.errors import CheckpointError
from peertune.evaluation import Measured
from peertune.link import Clock
from peertune.memory import peak_bytes
from peertune.model.blocks import Block
from peertune.runtimes import Member
from peertune.runtimes.rounds import Agreement


@dataclass(frozen=True, kw_only=True)
class Agreed(Agreement):
    """How the final agreement of a run ended."""

    is_reached: bool
    """Whether all that are not absent hold one model."""
    unheard: Sequence[int] = ()
    """Peers who are in it, though nothing was heard of them in the last round."""
    before: Sequence[Measured | None] = ()
    """Quality of each peer's own model before it."""


class RunState:
    """The hosted members and what is counted beside them.

    Args:
        data: hosted member -> fingerprint of the data it trains on.
        base: fingerprint of the parameters that are not trained.
        device: this process's.
        clock: simulated time, where links are simulated.
    """

    def __init__(
        self,
        members: Sequence[Member],
        data: Mapping[int, str],
        base: str,
        device: torch.device,
        clock: Clock | None,
    ) -> None:
        self._data, self._base, self._device, self._clock = data, base, device, clock
        self.cpu_s = {member.index: 0.0 for member in members}
        """Hosted member -> process CPU seconds of its local phases."""
        self.before = Measured({})
        """The base's quality."""
        self.agreed: Agreed | None = None
        """Once the final agreement is over."""
        self._peak_before = 0
        self._started = time.monotonic()

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the process, or of an earlier one of this run."""
        return max(self._peak_before, peak_bytes(self._device))

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, those of earlier processes included."""
        return time.monotonic() - self._started

    @property
    def simulated_s(self) -> float | None:
        return None if self._clock is None else self._clock.simulated_s

    def saved(self, member: Member, done: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file, and values of a member's checkpoint after `done` rounds."""
        tensors, plain = member.algorithm.state_dict(done)
        batches = member.algorithm.peer.batches
        return _by_file(tensors, member.algorithm.blocks), {
            "algorithm": plain,
            "batches": None if batches is None else batches.state_dict(),
            "exchange": member.exchange.state_dict(),
            "common": list(member.algorithm.common),
            "consensus": list(member.algorithm.consensus(done)),
            "data": self._data[member.index],
            "base": self._base,
            "before": asdict(self.before),
            "agreed": None if self.agreed is None else asdict(self.agreed),
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s[member.index],
            "simulated_s": self.simulated_s,
            "peak_memory_bytes": self.peak_bytes,
        }

    def take_up(
        self, member: Member, done: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], folder: Path
    ) -> None:
        """Go on from a member's checkpoint.

        Args:
            folder: the run's, for messages.
        Raises:
            CheckpointError: the member's data or the base have changed since.
        """
        for what, now in (("data", self._data[member.index]), ("base", self._base)):
            if plain[what] != now:
                raise CheckpointError(
                    f"{folder}: peer {member.index}'s {what} has"
                    " changed since this run began; bring the old one back, or start anew in another folder"
                )
        member.algorithm.load_state_dict(tensors, plain["algorithm"], done)
        if member.algorithm.peer.batches is not None:
            member.algorithm.peer.batches.load_state_dict(plain["batches"])
        member.exchange.load_state_dict(plain["exchange"])
        member.exchange.saved(done)
        self.before = Measured(**plain["before"])
        if agreed := plain.get("agreed"):
            before = [None if own is None else Measured(**own) for own in agreed["before"]]
            self.agreed = Agreed(**{**agreed, "before": before})
        self.cpu_s[member.index] = plain["cpu_s"]
        self._started = time.monotonic() - plain["wall_s"]
        self._peak_before = plain.get("peak_memory_bytes", 0)
        if self._clock is not None:
            self._clock.simulated_s = plain["simulated_s"] or 0.0  # under torchrun none was counted


def _by_file(tensors: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state_dict, a file for what belongs to the parameters of a block, and one for the rest."""
    file_of = {name: f"block-{block.index:03d}" for block in blocks for name in block.parameters}
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(file_of.get(name.partition("/")[2], "rest"), {})[name] = tensor
    return files
