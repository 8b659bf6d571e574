"""Dec-Adapter: Dec-LoRA with bottleneck adapters; a baseline of the DECA paper (arXiv 2606.03209)."""

from peertune.algorithms.dec_lora import DecLora, DecLoraConfig
from peertune.config import Adapter


class DecAdapterConfig(DecLoraConfig):
    adapter: Adapter = "bottleneck"
    """What is trained and exchanged."""


class DecAdapter(DecLora):
    Config = DecAdapterConfig
