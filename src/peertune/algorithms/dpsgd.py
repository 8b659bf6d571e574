"""D-PSGD with Adam: DECA on all blocks at once, without moment correction (Lian et al. 2017, arXiv 1705.09056).

x_{i,t+1} = sum_j w_ij (x_j - lr adam(grad F_j(x_j)))_t; the paper mixes first, then adds the step made at x_i.
As many local steps as DECA takes with the same keys, T x B x R, each of all parameters: about B times the updates, the
traffic and the optimiser memory.
"""

from peertune.algorithms.deca import Deca
from peertune.algorithms.turns import BlockwiseConfig, Calendar
from peertune.model.blocks import Block, as_one


class Dpsgd(Deca):
    Config = BlockwiseConfig

    def arrange(self, blocks: list[Block]) -> list[Block]:
        return [as_one(blocks)]

    def make_calendar(self, config: BlockwiseConfig) -> Calendar:
        """One turn of T x B x R steps: the moments are never set back."""
        steps = config.num_steps(len(self.peer.blocks))
        return super().make_calendar(config.model_copy(update={"outer_rounds": 1, "inner_steps": steps}))

    def can_join(self, round: int) -> bool:
        return True

    def is_boundary(self, round: int) -> bool:
        """As often as DECA with the same keys."""
        rounds = -(-self.config.inner_steps // self.config.gossip_every)
        return (round + 1) % rounds == 0 or round + 1 == self.num_rounds
