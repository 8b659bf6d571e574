"""A trained adapter into its base, as one plain model that `from_pretrained` loads."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peertune.config import ModelSection
from peertune.model.load import load_full_model


def merge_adapter(adapted: Any, config: ModelSection, base: Path | None = None) -> nn.Module:
    """The base in full precision, read anew, with the adapter of `adapted` merged into it.

    Args:
        adapted: what `peft.get_peft_model` made of the base, quantised or not; it is left as it is.
        config: the recipe's model section, by which the base was loaded.
        base: folder of the recipe.
    Returns:
        A model without adapter, on the device and in the recipe's dtype.
    Raises:
        ModelError: as `load_full_model`.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    name = adapted.active_adapter
    shape = copy.deepcopy(adapted.peft_config[name])
    if hasattr(shape, "init_lora_weights"):
        # Some ways to start an adapter change the base with it; this one's values come from `adapted`.
        shape.init_lora_weights = True
    device = next(adapted.parameters()).device
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # peft still asks transformers for a property under its former name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        full: Any = get_peft_model(load_full_model(config, device, base), shape, adapter_name=name)
    set_peft_model_state_dict(full, get_peft_model_state_dict(adapted, adapter_name=name), adapter_name=name)
    merged: nn.Module = full.merge_and_unload()
    return merged
