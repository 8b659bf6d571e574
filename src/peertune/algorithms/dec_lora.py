"""Dec-LoRA (arXiv 2501.15361): K local steps on LoRA's factors, then gossip of A and B, each averaged by itself.

    A_{i,t+1} = sum_j w_ij A_{j,t+K}        B_{i,t+1} = sum_j w_ij B_{j,t+K}

All peers start from one base and one adapter initialisation; W is symmetric and doubly stochastic. The paper does not
state the optimiser; AdamW, whose moments stay at home, is ours.
"""

from typing import ClassVar, Literal

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import Adapter, AlgorithmConfig, LearningRate
from peertune.errors import ConfigError
from peertune.peer import Peer
from peertune.topology import Topology


class DecLoraConfig(LocalStepsConfig):
    lr: LearningRate = 1e-3
    """Peak learning rate. Default: Dec-LoRA's."""
    adapter: Adapter = "lora"
    """What is trained and exchanged."""


class TwoFactorConfig(DecLoraConfig):
    """For methods that treat LoRA's two factors differently."""

    adapter: Literal["lora"] = "lora"
    """What is trained and exchanged: LoRA only."""


class DecLora(LocalSteps):
    Config: ClassVar[type[AlgorithmConfig]] = DecLoraConfig


class TwoFactor(DecLora):
    """What methods that treat LoRA's two factors differently have in common."""

    Config = TwoFactorConfig

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        if embeddings := [name for name in self.masters if "lora_embedding" in name]:
            raise ConfigError(
                f"algorithm.target_modules: got an embedding ({embeddings[0]}), expected linear layers alone, as"
                f" {config.name} treats LoRA's two factors differently, and an embedding's begin the other way round;"
                " leave it out, or take algorithm.name = 'dec_lora'"
            )
