"""Dec-LoRA (arXiv 2501.15361): K local steps on LoRA's factors, then gossip of A and B, each averaged by itself.

    A_{i,t+1} = sum_j w_ij A_{j,t+K}        B_{i,t+1} = sum_j w_ij B_{j,t+K}

All peers start from one base and one adapter initialisation; W is symmetric and doubly stochastic. The paper does not
state the optimiser; AdamW, whose moments stay at home, is ours.
"""

from typing import ClassVar, Literal

from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.config import AlgorithmConfig, LearningRate


class DecLoraConfig(LocalStepsConfig):
    lr: LearningRate = 1e-3
    """Peak learning rate. Default: Dec-LoRA's."""
    adapter: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "lora"
    """What is trained and exchanged."""


class TwoFactorConfig(DecLoraConfig):
    """For methods that treat LoRA's two factors differently."""

    adapter: Literal["lora"] = "lora"
    """What is trained and exchanged: LoRA only."""


class DecLora(LocalSteps):
    Config: ClassVar[type[AlgorithmConfig]] = DecLoraConfig
