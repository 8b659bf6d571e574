"""A 4-bit base under an adapter (QLoRA, arXiv 2305.14314): NF4 with doubly quantised scales, by bitsandbytes.

bitsandbytes runs on CPUs too. A quantised weight is a `Params4bit`: uint8 [weights / 2, 1], with a `quant_state` that
holds its scales. What this module knows of them it reads from that attribute, so the package is imported only where a
recipe asks for 4 bits.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peertune.config import ModelSection
from peertune.errors import ModelError

GROUP = 64
"""Weights that share a scale."""


def quiet() -> None:
    """Spare users a line on stderr in which the package regrets, at its import, a kernel that nothing here uses.

    peft imports it too, wherever it is installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def loading_options(config: ModelSection, settings: Any, device: torch.device) -> dict[str, Any]:
    """Options with which `from_pretrained` quantises the linear layers, one by one as it reads them.

    Token embedding and output head keep the recipe's dtype, in which everything is also computed; so do layers whose
    inputs are no multiple of GROUP wide, and experts that a model holds as one tensor.

    Args:
        settings: the model's own configuration, as `AutoConfig` reads it.
        device: what the weights are quantised on. The file is read into host memory, a tensor at a time.
    Raises:
        ModelError: the package is missing, the model is stored in another quantised format, or no layer of it can be
            quantised.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            'model.quantization: got "4bit", which needs the package bitsandbytes;'
            ' pip install "peertune[quantization]", or set it to "none"'
        )
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": {"": device}}
    stored = getattr(settings, "quantization_config", None)
    if stored is not None:
        _require_four_bits(config.path, stored)
        return options
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=_kept(config, settings),  # of 4 bits too, whatever its name says
    )
    return options


def _require_four_bits(path: str, stored: Any) -> None:
    """Raises ModelError where a model's stored `quantization_config` is not 4 bits of bitsandbytes."""
    fields = stored if isinstance(stored, dict) else vars(stored)
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    if method != "bitsandbytes" or not (fields.get("load_in_4bit") or fields.get("_load_in_4bit")):
        raise ModelError(
            f"model.path: {path!r} is stored quantised by {method!r}, expected full precision or 4 bits of"
            " bitsandbytes; name the full-precision model"
        )


def _kept(config: ModelSection, settings: Any) -> list[str]:
    """Names of the linear layers that are not quantised, found on a model without weights.

    On CPUs with AVX-512, bitsandbytes 0.50 restores layers of other widths with the scales of wrong groups; that they
    are kept on every device gives every device the same base.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    except ValueError as error:  # a configuration of something else
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model.path: {config.path!r} is no causal language model: {reason}") from error
    head = model.get_output_embeddings()
    kept, quantized = [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            if module is head or width % GROUP:
                kept.append(name)
            else:
                quantized += 1
    if not quantized:
        raise ModelError(
            f'model.quantization: got "4bit", but {config.path!r} has no linear layer with inputs a multiple of {GROUP}'
            ' wide, which 4 bits need; set it to "none"'
        )
    return kept


def settle(model: nn.Module, path: str) -> None:
    """See to it that a loaded model's quantised weights are restored right, and that nothing rewrites them.

    In eval mode on CPUs with AVX512-BF16, bitsandbytes rewrites a layer's weights in place, with scales rounded to
    bfloat16: an evaluation in the middle of a run would change the training after it, and a resumed run's base.

    Raises:
        ModelError: the model was stored in 4 bits, with a layer of a width that bitsandbytes restores wrong (`_kept`).
    """
    for state in quantization_states(model):
        if state.shape[-1] % state.blocksize:
            raise ModelError(
                f"model.path: {path!r} is stored in 4 bits with inputs {state.shape[-1]} wide in groups of"
                f" {state.blocksize}, expected a multiple; name the full-precision model, which is quantised as it is"
                " loaded"
            )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds 4-bit codes; such a one cannot be trained."""
    return getattr(parameter, "quant_state", None) is not None


def weight_dtype(weight: Tensor) -> torch.dtype:
    """The type that a layer's weight has, or has once it is restored."""
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else state.dtype


def restored(weight: Tensor) -> Tensor:
    """A layer's weight, [outputs, inputs]: itself, or made of its 4 bits anew at each call, so that none is kept."""
    if not is_quantized(weight):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return,attr-defined]


def num_weights(parameter: Tensor) -> int:
    """How many weights a parameter stands for: two a byte where it is quantised."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def quantization_states(model: nn.Module) -> Iterator[Any]:
    """The `quant_state` of each quantised parameter: scales and tables, which modules hold beside their parameters."""
    for parameter in model.parameters():
        if is_quantized(parameter):
            yield parameter.quant_state  # type: ignore[attr-defined]


def is_finite(parameter: Tensor) -> bool:
    """Whether all weights are finite. NaN and infinity in what was quantised end up in its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return _holds_finite(parameter)
    scales = [state.absmax] if state.state2 is None else [state.offset, state.state2.absmax]
    return all(_holds_finite(scale) for scale in scales)


def _holds_finite(tensor: Tensor) -> bool:
    """As torch.isfinite(tensor).all(), but without what that makes on the way: several tensors of this size."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))


def refuse_quantized(model: nn.Module, trained: Collection[str]) -> None:
    """Refuse to train 4-bit weights themselves.

    Args:
        trained: names of the parameters that are to be trained.
    Raises:
        ModelError: one of them is quantised.
    """
    for name, parameter in model.named_parameters():
        if name in trained and is_quantized(parameter):
            raise ModelError(
                f'model.quantization: got "4bit", but the method trains {name} itself; a 4-bit base needs an adapter:'
                ' take a method that trains one, or set model.quantization to "none"'
            )
