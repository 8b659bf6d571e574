"""Adapters on a frozen base: peft's LoRA, soft prompts and prefixes, and a bottleneck adapter, which peft lacks.

An adapter starts as the identity (LoRA, bottleneck) or from a draw of the run's seed (prompts), the same on every peer.
Its weights are float32 whatever the base is held in.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.config import AlgorithmConfig
from peertune.errors import ConfigError, ModelError
from peertune.model.blocks import find_layers


class Bottleneck(nn.Module):
    """h <- h + U gelu(D h), D [size, hidden], U [hidden, size] (Houlsby et al. 2019, arXiv 1902.00751, section 2.1).

    One stands behind each transformer layer; the paper's two a layer stand inside it. U starts at zero.
    """

    def __init__(self, hidden: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, size, device=device)
        self.up = nn.Linear(size, hidden, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.gelu(self.down(hidden.to(self.down.weight.dtype)))
        added: Tensor = self.up(inner)
        return hidden + added.to(hidden.dtype)


def add_adapter(module: nn.Module, settings: AlgorithmConfig, seed: int) -> nn.Module:
    """Put an adapter on a frozen base model.

    Args:
        module: a causal language model, no parameter of which requires a gradient; changed in place.
        settings: which adapter.
        seed: of the adapter's first weights.
    Returns:
        The model with the adapter, whose parameters alone require gradients; `module` itself for kind "none".
    Raises:
        ConfigError: algorithm.target_modules names no layer of this model.
        ModelError: the adapter does not fit the architecture.
    """
    if settings.adapter == "none":
        return module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.adapter == "bottleneck":
            return _add_bottlenecks(module, settings.bottleneck_size)
        return _add_peft(module, settings)


def adapter_names(module: nn.Module) -> set[str]:
    """Names of an adapter's parameters on a frozen base: those that require gradients."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def core_of(module: nn.Module) -> Any:
    """The transformers model inside whatever wraps it."""
    return module.get_base_model() if _is_peft(module) else module  # type: ignore[operator]


def merge_adapter(module: nn.Module, base: nn.Module) -> nn.Module | None:
    """`base` with a LoRA adapter's products added to its weights; None where an adapter cannot be merged.

    Args:
        module: the base with the adapter.
        base: the same base, unquantised; changed in place.
    """
    if not (_is_peft(module) and module.peft_type == "LORA"):
        return None
    weights = {name: p.detach() for name, p in module.named_parameters() if "lora_" in name}
    merged = _wrap(base, copy.deepcopy(module.peft_config["default"]))  # type: ignore[index]
    own = dict(merged.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    return merged.merge_and_unload()  # type: ignore[no-any-return, operator]


def _add_peft(module: nn.Module, settings: AlgorithmConfig) -> nn.Module:
    import peft

    task, tokens = peft.TaskType.CAUSAL_LM, settings.num_virtual_tokens
    config: Any
    if settings.adapter == "lora":
        config = peft.LoraConfig(
            task_type=task,
            r=settings.rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
        )
    elif settings.adapter == "prompt":
        # Lester et al. 2021 (arXiv 2104.08691, section 3.2): embeddings of sampled tokens train better than noise.
        config = peft.PromptTuningConfig(
            task_type=task, num_virtual_tokens=tokens, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB
        )
    else:
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens)
    try:
        return _wrap(module, config)
    except ValueError as error:
        if settings.adapter == "lora":
            raise ConfigError(
                f"algorithm.target_modules: got {settings.target_modules!r}, expected names of linear layers of"
                f" {type(module).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        raise ModelError(
            f"algorithm.adapter: {settings.adapter!r} does not fit {type(module).__name__}: {error}"
        ) from error


def _wrap(module: nn.Module, config: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        # peft asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        wrapped = peft.get_peft_model(module, config)
    wrapped.train()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().contiguous()
    return wrapped  # type: ignore[no-any-return]


def _add_bottlenecks(module: nn.Module, size: int) -> nn.Module:
    hidden = module.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    for layer in find_layers(module)[1]:
        device = next(layer.parameters()).device
        layer.add_module("bottleneck", Bottleneck(hidden, size, device))
        layer.register_forward_hook(_through_bottleneck)
    return module


def _through_bottleneck(layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """A function of the module, not a closure, so that a deep copy of a layer uses the copy's own adapter."""
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])  # type: ignore[operator]
    return layer.bottleneck(output)  # type: ignore[operator]


def _is_peft(module: nn.Module) -> bool:
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")
