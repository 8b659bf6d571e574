"""Alternating LoRA (ADF-LoRA, arXiv 2511.18291; TAD-LoRA, arXiv 2602.00451): one factor trained at a time, both mixed.

All peers train B for a phase of rounds, then A for as many, and so on; every round both factors are gossiped, so the
one at rest goes on agreeing. That removes the cross term: while A is common, mean(B A) = mean(B) A.

The papers' rule for the phase's length was not available to us. Ours: ceil(1 / sqrt(1 - lambda_2)) rounds, the time in
which gossip on this graph shrinks disagreement by a constant factor; `phase_rounds` overrides it.
"""

import math

from peertune.algorithms.dec_lora import TwoFactor, TwoFactorConfig
from peertune.config import NonNegative


class AlternatingLoraConfig(TwoFactorConfig):
    phase_rounds: NonNegative = 0
    """Rounds for which one factor is trained; 0: by the graph's spectral gap."""


class AlternatingLora(TwoFactor):
    Config = AlternatingLoraConfig
    config: AlternatingLoraConfig

    @property
    def phase_rounds(self) -> int:
        gap = max(1e-6, self.topology.spectral_gap)
        # Rounded first: sites whose linear algebra differs in the last bit would train different factors.
        return self.config.phase_rounds or math.ceil(round(1 / math.sqrt(gap), 6))

    def trains(self, name: str, round: int) -> bool:
        resting = "lora_A" if round // self.phase_rounds % 2 == 0 else "lora_B"
        return resting not in name
