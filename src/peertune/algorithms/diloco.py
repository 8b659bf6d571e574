"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): many local AdamW steps, then Nesterov on the mean change.

FedAvg whose server holds the outer optimiser; peers keep their inner optimiser's moments and weigh the same.
"""

from collections.abc import Sequence
from typing import Literal

from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.config import LearningRate, Positive


class DilocoConfig(FedavgConfig):
    rounds: Positive = 100
    """T: outer steps."""
    local_steps: Positive = 500
    """H: inner steps of a round. Default: DiLoCo's."""
    lr: LearningRate = 4e-4
    """Peak inner learning rate. Default: DiLoCo's."""
    reset_moments: bool = False
    """Inner moments live as long as the run. Default: DiLoCo's."""
    server_optimizer: Literal["average", "adam", "nesterov"] = "nesterov"
    """The outer optimiser. Default: DiLoCo's."""
    server_lr: LearningRate | None = 0.7
    """Outer learning rate. Default: DiLoCo's."""


class Diloco(Fedavg):
    Config = DilocoConfig

    def consensus(self, round: int) -> Sequence[float]:
        return [1 / self.topology.num_peers] * self.topology.num_peers
