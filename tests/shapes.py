"""Tiny random models of the architectures that the tests go over."""

from typing import Any

import torch
from torch import nn

VOCABULARY, LAYERS = 61, 4


def make_model(
    name: str, tied: bool = False, *, hidden: int = 16, intermediate: int = 24, vocabulary: int = VOCABULARY
) -> Any:
    """A float32 model of an architecture with random weights: four layers, 64 positions."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": intermediate, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    }  # fmt: skip
    configs = {
        "llama": lambda: hf.LlamaConfig(**sizes, num_key_value_heads=2),
        "qwen2": lambda: hf.Qwen2Config(**sizes, num_key_value_heads=2),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=LAYERS, n_head=4, n_positions=64, tie_word_embeddings=tied,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**sizes),
        "gemma": lambda: hf.GemmaConfig(**sizes, num_key_value_heads=2, head_dim=4),
        "mistral": lambda: hf.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None),
    }  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32)
    for parameter in model.parameters():
        # Norms start at one and biases at zero; noise makes every parameter matter.
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(
            torch.randn_like(parameter) / 10
        )
    return model.train()


ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "mistral"]
