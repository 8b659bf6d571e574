"""Load a base model and its tokenizer from a folder or a hub, and refuse what cannot be trained."""

from __future__ import annotations

import copy
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peertune.config import ModelSection
from peertune.errors import InputError, ModelError
from peertune.model import products
from peertune.model.adapters import peft_is_quiet
from peertune.model.attention import choose_attention
from peertune.model.quantization import is_finite, loading_options, quantization_states, quiet, settle

TINY = "tiny"
"""The name of the base model that ships with the package."""


def resolve_path(path: str, base: Path | None = None) -> str:
    """A local folder (tried from the working directory, then from `base`), the packaged model, or the name as given."""
    if path == TINY:
        return str(resources.files("peertune") / "tiny")
    for folder in (Path(path).expanduser(), base / path if base else None):
        if folder is not None and folder.is_dir():
            return str(folder.resolve())  # an exported adapter names it, and is loaded from elsewhere
    return path


def load_tokenizer(config: ModelSection, base: Path | None = None) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config, base)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path: the tokenizer of {config.path!r} has no end-of-sequence token; set one and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelSection, device: torch.device, base: Path | None = None, *, seed: int = 0) -> nn.Module:
    """The base model on `device` in the recipe's dtype, or quantised as the recipe says, every parameter frozen.

    Args:
        seed: of random weights, where the recipe asks for those.
    Raises:
        ModelError: it cannot be loaded, is no causal language model, is too short for max_length, lacks weights, holds
            NaN, or is stored quantised where the recipe wants full precision.
    """
    quiet()
    if config.dtype == "bfloat16" and device.type == "cpu" and not products.are_native():
        products.widen()
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype],
        "attn_implementation": None if config.attention == "auto" else config.attention,
    }
    model: Any
    if config.init == "random":
        if config.quantization != "none":
            raise ModelError(
                'model.init: got "random" with model.quantization, expected "pretrained" weights to quantise'
            )
        shape = _from_pretrained(AutoConfig, config, base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code, **options)
    else:
        if config.quantization != "none":
            options |= loading_options(config, _from_pretrained(AutoConfig, config, base), device)
        model, info = _from_pretrained(AutoModelForCausalLM, config, base, output_loading_info=True, **options)
        if config.quantization == "none" and getattr(model.config, "quantization_config", None) is not None:
            raise ModelError(
                f'model.path: {config.path!r} is stored quantised, but model.quantization is "none"; name the'
                ' full-precision model, or set model.quantization = "4bit" under a method that trains an adapter'
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"model.path: {config.path!r} lacks {len(missing)} weights, such as {missing[0]}, which would be"
                " random; name a model that has them all"
            )
        if any("bottleneck" in name for name in info["unexpected_keys"]):
            raise ModelError(
                f"model.path: {config.path!r} holds bottleneck adapters, which its own code puts in place; set"
                " model.trust_remote_code = true (`export` and `eval`: --trust-remote-code) to let that run"
            )
    model = model.to(device)
    choose_attention(model, config, device)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < config.max_length:
        raise ModelError(
            f"model.max_length: got {config.max_length}, but {config.path!r} has {positions} positions; lower it"
            " (`eval`: --max-length)"
        )
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise ModelError(
                f"model.path: {name} of {config.path!r} holds NaN or infinity: the base model is damaged; get it anew"
            )
        parameter.requires_grad_(False)
        parameter.data = parameter.data.contiguous()
    settle(model, config.path)
    model.config.use_cache = False
    return model.train()  # type: ignore[no-any-return]


def load_trained(config: ModelSection, device: torch.device) -> nn.Module:
    """As `load_model`, but the folder may also be an adapter's, as peft writes it; its base is loaded in the same way.

    Raises:
        ModelError: as `load_model`, of the base; or the adapter does not fit it.
    """
    folder = resolve_path(config.path)
    if not (Path(folder) / "adapter_config.json").exists():
        return load_model(config, device)
    quiet()
    from peft import PeftConfig, PeftModel

    try:
        base_path = PeftConfig.from_pretrained(folder).base_model_name_or_path
        base = load_model(config.model_copy(update={"path": base_path}), device)
        with peft_is_quiet():
            return PeftModel.from_pretrained(base, folder).to(device)  # type: ignore[no-any-return]
    except InputError:
        raise  # of the base, which says what is wrong with it
    except Exception as error:  # peft raises many kinds for a damaged adapter or another base
        raise ModelError(
            f"model.path: the adapter in {config.path!r} does not load on its base: {_reason(error)}"
        ) from error


def load_full_model(config: ModelSection, device: torch.device, base: Path | None = None) -> nn.Module:
    """The base model in full precision, also where the recipe quantises it: what a trained adapter is merged into.

    Merging into 4-bit weights would round the sum to 4 bits again, and lose most of what the adapter learned.

    Raises:
        ModelError: as `load_model`; also where the base is to be had in 4 bits only.
    """
    return load_model(config.model_copy(update={"quantization": "none"}), device, base)


def clone_model(model: nn.Module, own: set[str]) -> nn.Module:
    """A second instance that shares all parameters with the first but those named in `own`, which it copies.

    The scales of quantised parameters are shared too.
    """
    shared: dict[int, Any] = {id(p): p for name, p in model.named_parameters() if name not in own}
    shared |= {id(state): state for state in quantization_states(model)}
    return copy.deepcopy(model, memo=shared)


def _from_pretrained(kind: Any, config: ModelSection, base: Path | None, **options: Any) -> Any:
    source = resolve_path(config.path, base)
    try:
        return kind.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # transformers raises many kinds for a bad folder or a missing hub entry
        if "attn_implementation" in str(error):
            raise ModelError(
                f'model.attention: got "{config.attention}", which the architecture of {config.path!r} does not have,'
                ' expected "auto" or "eager"; set one of them'
            ) from error
        what = {"AutoTokenizer": "tokenizer", "AutoConfig": "model's config.json"}.get(
            kind.__name__, "causal language model"
        )
        reason = _reason(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with code of its own; set model.trust_remote_code = true (`export` and `eval`:"
                " --trust-remote-code) to let that run"
            )
        place = "this folder" if Path(source).is_dir() else "no such local folder, and the hub did not give it"
        if Path(source).is_file():
            place, reason = "this is a file", "name the folder of a model as `save_pretrained` writes it"
        if (told := _what_a_run_has(Path(source))) is not None:
            reason = told
        needed = [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin", ".json", ".model")]
        if any(path.is_file() and _is_pointer(path) for path in needed):
            reason = "it holds pointers of Git LFS where files should be; fetch those with `git lfs pull`"
        raise ModelError(
            f"model.path: got {config.path!r}, expected a folder or hub name of a {what}; {place}: {reason}"
        ) from error


def _what_a_run_has(path: Path) -> str | None:
    """What to name instead of a run's folder, or of one that it does not have; None where that is not so."""
    run = next((folder for folder in (path, path.parent) if (folder / "events.jsonl").exists()), None)
    if run is None or (run != path and path.exists()):
        return None
    has = [str(run / name) for name in ("model", "adapter") if (run / name).is_dir()]
    return f"a run's folder has its model once it is finished; here {' and '.join(has) or 'is none yet'}"


def _is_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves of a large one; not where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(23) == b"version https://git-lfs"
    return False


def _reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
