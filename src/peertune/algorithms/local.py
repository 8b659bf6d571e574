"""Every peer alone: DECA with W = I. The floor that collaboration must beat."""

from collections.abc import Sequence

from peertune.algorithms.deca import Deca
from peertune.algorithms.turns import BlockwiseConfig
from peertune.exchange import Hop


class Local(Deca):
    Config = BlockwiseConfig
    agrees = False
    mixes = False

    def hops(self, round: int) -> Sequence[Hop]:
        return ()
