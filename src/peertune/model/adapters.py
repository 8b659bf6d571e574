"""Adapters on a frozen base: peft's LoRA, soft prompts and prefixes, and a bottleneck adapter, which peft lacks.

An adapter starts as the identity (LoRA, bottleneck) or from a draw of the run's seed (prompts), the same on every peer.
Its weights are float32 whatever the base is held in.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peertune.config import AlgorithmConfig
from peertune.errors import ConfigError, ModelError
from peertune.model import bottleneck
from peertune.model.blocks import find_layers, is_tied
from peertune.model.bottleneck import add_bottlenecks
from peertune.model.quantization import is_quantized

CODE = "modeling_with_bottlenecks"
"""Name of the module that an exported model with bottlenecks brings along."""


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
    return module.get_base_model() if is_peft(module) else module  # type: ignore[operator]


def merge_adapter(module: nn.Module, base: nn.Module) -> nn.Module | None:
    """`base` with a LoRA adapter's products added to its weights; None where an adapter cannot be merged.

    Where the token embedding is also the output head and one of the two has an adapter, they are two tensors in it.

    Args:
        module: the base with the adapter.
        base: the same base, unquantised; changed in place.
    """
    if not (is_peft(module) and module.peft_type == "LORA"):
        return None
    weights = {name: p.detach() for name, p in module.named_parameters() if "lora_" in name}
    with torch.random.fork_rng(devices=[]):
        merged = _wrap(base, copy.deepcopy(module.peft_config["default"]))  # type: ignore[index]
    own = dict(merged.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    _untie_adapted(merged.get_base_model())  # type: ignore[operator]
    return merged.merge_and_unload()  # type: ignore[no-any-return, operator]


def _untie_adapted(model: Any) -> None:
    """Give the head a tensor of its own where what it shares with the embedding is about to change at one end only."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_tied(model) or not any(hasattr(end, "base_layer") for end in ends):
        return
    head = getattr(ends[1], "base_layer", ends[1])
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def bottleneck_code(module: nn.Module) -> Mapping[str, str]:
    """Files that let `from_pretrained(..., trust_remote_code=True)` rebuild a model with bottlenecks, by name.

    Also notes in the model's config which of them to run. Empty for a model without bottlenecks.
    """
    prefix, layers = find_layers(module)
    first: Any = layers[0]
    if not hasattr(first, "bottleneck"):
        return {}
    base, size = type(module).__name__, first.bottleneck.down.out_features
    hidden = first.bottleneck.down.in_features
    module.config.auto_map = {"AutoModelForCausalLM": f"{CODE}.{base}"}  # type: ignore[union-attr]
    stub = (
        f"import transformers\n\nfrom .bottleneck import add_bottlenecks\n\n\nclass {base}(transformers.{base}):\n"
        f"    def __init__(self, config):\n        super().__init__(config)\n"
        f"        add_bottlenecks(self.get_submodule({prefix!r}), {hidden}, {size})\n"
    )
    return {f"{CODE}.py": stub, "bottleneck.py": inspect.getsource(bottleneck)}


def _add_peft(module: nn.Module, settings: AlgorithmConfig) -> nn.Module:
    import peft

    task, tokens = peft.TaskType.CAUSAL_LM, settings.num_virtual_tokens
    text: Any = module.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(text, "num_attention_heads", None)  # peft looks for it by a few names only
    config: Any
    if settings.adapter == "lora":
        config = peft.LoraConfig(
            task_type=task,
            r=settings.rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
            exclude_modules=_no_tensor_givers(module) if settings.target_modules == "all-linear" else None,
        )
    elif settings.adapter == "prompt":
        # Lester et al. 2021 (arXiv 2104.08691, section 3.2): embeddings of sampled tokens train better than noise.
        config = peft.PromptTuningConfig(
            task_type=task,
            num_virtual_tokens=tokens,
            prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
            token_dim=module.get_input_embeddings().weight.shape[1],  # type: ignore[operator]
            num_attention_heads=heads or 1,  # which a prompt has no use for
        )
    else:
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens, num_attention_heads=heads)
    try:
        return _wrap(module, config)
    except (AttributeError, ValueError) as error:
        if settings.adapter == "lora":
            raise ConfigError(
                f"algorithm.target_modules: got {settings.target_modules!r}, expected names of linear layers of"
                f" {type(module).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        raise ModelError(
            f"algorithm.adapter: {settings.adapter!r} does not fit {type(module).__name__}: {error}"
        ) from error


def _no_tensor_givers(module: nn.Module) -> list[str] | None:
    """Names of linear layers that give something else than a tensor, as some routers do: LoRA cannot be around them."""
    special = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear and not is_quantized(layer.weight)
    }
    found: list[str] = []

    def note(_layer: nn.Module, _inputs: Any, output: Any, name: str) -> None:
        if not isinstance(output, Tensor):
            found.append(name)

    hooks = [layer.register_forward_hook(partial(note, name=name)) for name, layer in special.items()]
    mode = module.training
    module.eval()
    # A model that does not run says so where it is tried out as a whole.
    with torch.no_grad(), suppress(Exception):
        if special:
            module(input_ids=torch.ones(1, 4, dtype=torch.int64, device=next(module.parameters()).device))
    for hook in hooks:
        hook.remove()
    module.train(mode)
    return found or None


@contextmanager
def peft_is_quiet() -> Iterator[None]:
    """Context in which peft makes, loads and saves without warnings that no user can do anything about."""
    with warnings.catch_warnings():
        # It asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # GPT-2's layers hold their weights transposed; peft sees that and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        # What it warns of is taken care of where an adapter is merged.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        # The embedding's own weights go into the file with an adapter on them.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", category=UserWarning)
        yield


def _wrap(module: nn.Module, config: Any) -> nn.Module:
    import peft

    with peft_is_quiet():
        wrapped = peft.get_peft_model(module, config)
    wrapped.train()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().contiguous()
    return wrapped  # type: ignore[no-any-return]


def _add_bottlenecks(module: nn.Module, size: int) -> nn.Module:
    embeddings = module.get_input_embeddings().weight  # type: ignore[operator]
    width = module.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    add_bottlenecks(find_layers(module)[1], width, size)
    return module.to(embeddings.device)


def is_peft(module: nn.Module) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")
