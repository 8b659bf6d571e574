"""The calendar of block-wise methods: outer round t, block k, inner steps r, all a pure function of the round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from peertune.config import AlgorithmConfig, Decays, Epsilon, NonNegative, Positive
from peertune.seeds import numpy_rng


class BlockwiseConfig(AlgorithmConfig):
    """Keys of every method that trains block by block with Adam."""

    outer_rounds: Positive = 4
    """T: sweeps over the blocks. Default: DECA's."""
    inner_steps: Positive = 48
    """R: local steps of a block's turn. Default: DECA's."""
    layers_per_block: NonNegative = 2
    """Transformer layers in a block; 0: everything is one block. Default: DECA's."""
    block_order: Literal["ascending", "descending", "random"] = "ascending"
    """Order of the blocks in a sweep; "random" is drawn anew for each. Default: DECA's k = 1..B."""
    gossip_every: Positive = 1
    """H: local steps of a round. Default: DECA's."""
    betas: Decays = (0.9, 0.999)
    """Adam's decay rates a1, a2. Default: DECA's."""
    eps: Epsilon = 1e-8
    """Adam's epsilon. Not in the paper as we have it: Adam's own."""

    def num_steps(self, num_blocks: int) -> int:
        """T x B x R, also where all blocks are trained at once."""
        return self.outer_rounds * num_blocks * self.inner_steps

    def with_steps(self, steps: int, num_blocks: int) -> Self:
        """T stays and R takes what fits; with too few steps for T sweeps, fewer of one step a block; one at least."""
        sweeps = max(1, min(self.outer_rounds, steps // num_blocks))
        inner = max(1, steps // (sweeps * num_blocks))
        return self.model_copy(update={"outer_rounds": sweeps, "inner_steps": inner})


@dataclass(frozen=True)
class Turn:
    """Where a round lies."""

    outer_round: int
    """t, from 0."""
    block: int
    """Index of the active block."""
    first_step: int
    """r of the round's first local step, from 0."""
    num_steps: int
    """Local steps of this round: H, or fewer at the end of a turn."""
    is_first: bool
    """Whether the block's turn begins with this round."""
    is_last: bool
    """Whether the block's turn ends with this round."""
    global_step: int
    """Local steps since the run began."""


@dataclass(frozen=True)
class Calendar:
    """Maps rounds to turns. A turn has ceil(R / H) rounds."""

    config: BlockwiseConfig
    num_blocks: int
    seed: int

    @property
    def rounds_per_turn(self) -> int:
        return -(-self.config.inner_steps // self.config.gossip_every)

    @property
    def num_rounds(self) -> int:
        return self.config.outer_rounds * self.num_blocks * self.rounds_per_turn

    def at(self, round: int) -> Turn:
        """The place of a round."""
        turn, within = divmod(round, self.rounds_per_turn)
        outer, place = divmod(turn, self.num_blocks)
        first = within * self.config.gossip_every
        return Turn(
            outer_round=outer,
            block=self._block(outer, place),
            first_step=first,
            num_steps=min(self.config.gossip_every, self.config.inner_steps - first),
            is_first=within == 0,
            is_last=within == self.rounds_per_turn - 1,
            global_step=turn * self.config.inner_steps + first,
        )

    def _block(self, outer: int, place: int) -> int:
        if self.config.block_order == "random":
            return int(numpy_rng(self.seed, "block order", outer).permutation(self.num_blocks)[place])
        return place if self.config.block_order == "ascending" else self.num_blocks - 1 - place
