"""Dec-Adapter: Dec-LoRA with bottleneck adapters; a baseline of the DECA paper (arXiv 2606.03209)."""

from typing import Literal

from peertune.algorithms.dec_lora import DecLora, DecLoraConfig


class DecAdapterConfig(DecLoraConfig):
    adapter: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "bottleneck"
    """What is trained and exchanged."""


class DecAdapter(DecLora):
    Config = DecAdapterConfig
