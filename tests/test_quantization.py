"""A 4-bit base under an adapter: its bits, its memory, gradients, sharing, hashing, refusals and the way back."""

import importlib.util
import json
import math
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, CLIPVisionConfig

from peertune.algorithms import ALGORITHMS
from peertune.config import ModelSection
from peertune.consortium import new_charter
from peertune.data.batches import Batch
from peertune.errors import ModelError
from peertune.model import quantization
from peertune.model.adapters import merge_adapter
from peertune.model.blocks import block_table, partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_full_model, load_model
from peertune.model.lora import plain_layers, take_over
from peertune.model.quantization import is_quantized, num_weights, quantization_states
from peertune.prepare import base_fingerprint
from peertune.run import run
from tests.recipes import recipe, tree
from tests.shapes import ARCHITECTURES, VOCABULARY, make_model

CPU = torch.device("cpu")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='needs the package bitsandbytes: pip install "peertune[quantization]"',
)


def section(path: Path, **keys: Any) -> ModelSection:
    return ModelSection(path=str(path), max_length=32, **{"quantization": "4bit", **keys})


def wide(name: str, **sizes: Any) -> Any:
    """A random model whose layers can be quantised; gemma's attention output alone is too narrow."""
    return make_model(name, **{"hidden": 64, "intermediate": 128, **sizes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wide("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapt(module: nn.Module, rank: int = 4) -> Any:
    """LoRA on all linear layers, by peft, with both factors random: an untrained one has no gradient in the first."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = peft.get_peft_model(module, settings)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return adapted


def ids(num: int = 3, length: int = 10, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(1, vocabulary, (num, length), generator=torch.Generator().manual_seed(0))


def step(adapted: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of a batch, by name."""
    adapted.zero_grad()
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and of what quantisation holds beside them."""
    tensors: dict[int, torch.Tensor] = {p.data_ptr(): p for p in module.parameters()}
    for state in quantization_states(module):
        for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
            tensors[tensor.data_ptr()] = tensor
    return sum(t.numel() * t.element_size() for t in tensors.values())


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_base_shrinks_and_still_speaks(dtype: Any, shared: Path, english: Any) -> None:
    path = shared / "models" / "english-4m"
    full, small = (load_model(section(path, dtype=dtype, quantization=q), CPU) for q in ("none", "4bit"))
    tokens = torch.tensor([english("The teacher opened the door and asked the children to sit down.")["input_ids"]])
    with torch.no_grad():
        losses = [float(m(input_ids=tokens, labels=tokens).loss) for m in (full, small)]
        unlearned = float(np.log(full.config.vocab_size))
    assert losses[0] < unlearned - 2, "the base has learned nothing; the comparison would say nothing"
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.25)

    layers = [sum(held_bytes(m.get_submodule(f"model.layers.{i}")) for i in range(8)) for m in (full, small)]
    bits = 8 * layers[1] / sum(num_weights(p) for p in small.model.layers.parameters())
    # 4 for the weight, 8/64 for its group's scale, the rest for tables, which a large model does not notice.
    assert 4.1 < bits < 5.5
    assert small.model.embed_tokens.weight.dtype == full.model.embed_tokens.weight.dtype


@needs_package
def test_the_weights_are_nf4(folder: Path) -> None:
    """Against NumPy: the nearest of 16 values, times the largest weight of a group of 64."""
    from bitsandbytes.functional import dequantize_4bit

    # QLoRA, appendix E.
    values = np.array(
        [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
         0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    )  # fmt: skip
    full, small = load_full_model(section(folder), CPU), load_model(section(folder), CPU)
    originals = dict(full.named_parameters())
    checked = 0
    for name, parameter in small.named_parameters():
        if not is_quantized(parameter):
            assert torch.equal(parameter, originals[name])
            continue
        got = dequantize_4bit(parameter.data, parameter.quant_state).numpy().reshape(-1)  # type: ignore[attr-defined]
        groups = np.split(originals[name].detach().numpy().reshape(-1), range(64, originals[name].numel(), 64))
        expected = [
            values[np.abs(g[:, None] / np.abs(g).max() - values).argmin(1)] * np.abs(g).max() for g in groups if len(g)
        ]
        # The groups' scales are themselves rounded to 8 bits.
        np.testing.assert_allclose(got, np.concatenate(expected), rtol=0.02, atol=2e-3)
        checked += 1
    assert checked == 4 * 7


@needs_package
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_the_adapter_and_nothing_else(name: str, tmp_path: Path) -> None:
    wide(name).save_pretrained(tmp_path)
    module = load_model(section(tmp_path), CPU)
    matrices = [p for n, p in module.named_parameters() if ".layers." in n or ".h." in n]
    narrow = 4 if name == "gemma" else 0
    assert sum(map(is_quantized, matrices)) == sum(p.ndim == 2 for p in wide(name).parameters()) - 2 - narrow - (
        name == "gpt2"  # its table of positions
    )
    adapted = adapt(module)
    found = step(adapted, ids())
    assert found.keys() - {"loss"} == {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())

    before = float(found["loss"])
    for _ in range(5):
        with torch.no_grad():
            for n, p in adapted.named_parameters():
                if n in found:
                    p -= 0.05 * found[n]
        found = step(adapted, ids())
    assert float(found["loss"]) < before - 0.05


@needs_package
@pytest.mark.parametrize("is_ours", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_dequantised_base(dtype: Any, is_ours: bool, folder: Path) -> None:
    """By peft's layers, and by our arithmetic in them."""
    from bitsandbytes.functional import dequantize_4bit

    module = load_model(section(folder, dtype=dtype), CPU)
    plain = load_full_model(section(folder, dtype=dtype), CPU)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_quantized(parameter):
                value = dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]
                plain.get_parameter(name).copy_(value)
    adapted = adapt(module)
    if is_ours:
        take_over(adapted)
        quantized = [layer for layer in plain_layers(adapted) if is_quantized(layer.base_layer.weight)]
        assert len(quantized) == 28
        for layer in quantized:
            layer.base_layer.forward = None  # nobody else computes
    got, expected = step(adapted, ids()), step(adapt(plain), ids())
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = torch.linalg.vector_norm((got[name] - tensor).float())
        assert error <= {"float32": 1e-5, "bfloat16": 0.2}[dtype] * torch.linalg.vector_norm(tensor.float()), name


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_repeatable_and_an_evaluation_changes_no_bit(dtype: Any, shared: Path) -> None:
    """english-4m is wide enough for the layout that bitsandbytes rewrites weights to when a model is evaluated."""
    runs = []
    for evaluates in (False, True):
        module = load_model(section(shared / "models" / "english-4m", dtype=dtype), CPU)
        adapted = adapt(module)
        first, fingerprint_before = step(adapted, ids(vocabulary=4096)), base_fingerprint(module, set())
        if evaluates:
            with torch.no_grad():
                loss = module.eval()(input_ids=ids(vocabulary=4096), labels=ids(vocabulary=4096)).loss
            assert float(loss) == float(first["loss"])
            module.train()
            assert base_fingerprint(module, set()) == fingerprint_before
        runs.append((fingerprint_before, first, step(adapted, ids(vocabulary=4096))))
    (print_one, *steps_one), (print_two, *steps_two) = runs
    assert print_one == print_two
    for one, two in zip(steps_one, steps_two, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)


@needs_package
def test_clones_share_the_quantised_base_with_its_scales(folder: Path) -> None:
    adapted = adapt(load_model(section(folder), CPU))
    own = {n for n, _ in adapted.named_parameters() if "lora_" in n}
    clone = clone_model(adapted, own)
    originals = dict(adapted.named_parameters())
    for n, p in clone.named_parameters():
        assert (p.data_ptr() == originals[n].data_ptr()) == (n not in own), n
    for one, two in zip(quantization_states(adapted), quantization_states(clone), strict=True):
        assert one is two
    layers = [(m.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")) for m in (adapted, clone)]
    assert layers[0] is not layers[1]
    assert layers[0].quant_state is layers[1].quant_state

    before = step(adapted, ids())
    with torch.no_grad():
        for n, p in clone.named_parameters():
            if n in own:
                p.add_(0.1)
    assert not torch.equal(step(clone, ids())["loss"], before["loss"])
    assert torch.equal(step(adapted, ids())["loss"], before["loss"])


@needs_package
def test_the_fingerprint_of_a_base_sees_codes_scales_and_buffers(folder: Path) -> None:
    def changed(how: Any) -> bool:
        module: Any = load_model(section(folder), CPU)
        before = base_fingerprint(module, set())
        with torch.no_grad():
            how(module)
        return base_fingerprint(module, set()) != before

    def weight(module: Any) -> Any:
        return module.model.layers[2].mlp.up_proj.weight

    assert not changed(lambda module: None)
    assert changed(lambda module: weight(module).data[3].add_(1))
    assert changed(lambda module: weight(module).quant_state.absmax[1].add_(1))
    assert changed(lambda module: weight(module).quant_state.state2.absmax[0].mul_(1.5))
    assert changed(lambda module: weight(module).quant_state.offset.mul_(1.5))
    assert changed(lambda module: module.register_buffer("extra", torch.tensor(1.0)))


@needs_package
@pytest.mark.parametrize("name", [name for name, m in ALGORITHMS.items() if m.Config().adapter == "none"])
def test_methods_that_train_the_base_itself_refuse_it(name: str, tmp_path: Path, micro_model: Path) -> None:
    wide("llama", vocabulary=300).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(tmp_path / "wide")
    config = recipe(tmp_path, tmp_path / "wide", model={"quantization": "4bit"}, algorithm={"name": name})
    with pytest.raises(ModelError, match=r"model\.quantization.*needs an adapter"):
        run(config)
    assert not (tmp_path / "out").exists()


@needs_package
def test_no_charter_is_written_that_every_site_would_refuse(tmp_path: Path, micro_model: Path) -> None:
    wide("llama", vocabulary=300).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(tmp_path / "wide")
    toml, charter = tmp_path / "recipe.toml", tmp_path / "charter.toml"
    toml.write_text(tomli_w.dumps(tree(tmp_path, tmp_path / "wide", model={"quantization": "4bit"})))
    with pytest.raises(ModelError, match=r"model\.quantization.*needs an adapter"):
        new_charter(toml, [], [], date(2999, 1, 1), charter, 60.0)
    assert not charter.exists()


@needs_package
@pytest.mark.parametrize("name", ["dec_lora", "fedavg", "deca"])
def test_any_method_trains_an_adapter_on_it(name: str, tmp_path: Path, micro_model: Path) -> None:
    wide("llama", vocabulary=300).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(tmp_path / "wide")
    config = recipe(
        tmp_path,
        tmp_path / "wide",
        model={"quantization": "4bit"},
        algorithm={"name": name, "adapter": "lora", "rounds": 4, "local_steps": 3, "layers_per_block": 0},
    )
    metrics = run(config)["metrics"]
    assert metrics["average_model"]["loss"] < metrics["before"]["loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert getattr(merged.config, "quantization_config", None) is None
    assert not any(is_quantized(p) for p in merged.parameters())


@needs_package
def test_peers_on_it_are_batched(tmp_path: Path, micro_model: Path) -> None:
    wide("llama", vocabulary=300).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(tmp_path / "wide")
    found = []
    for size in (1, 3):
        config = recipe(
            tmp_path,
            tmp_path / "wide",
            run={"out": str(tmp_path / f"out-{size}"), "batched_peers": size},
            model={"quantization": "4bit"},
            algorithm={"name": "dec_lora", "rounds": 3, "local_steps": 2, "rank": 2},
        )
        run(config)
        found.append(load_file(tmp_path / f"out-{size}" / "adapter" / "adapter_model.safetensors"))
    moved = max(float(t.abs().max()) for n, t in found[0].items() if "lora_B" in n)  # from zero
    assert moved > 1e-2
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=0.02 * moved)


def test_a_missing_package_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro_model: Path
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'bitsandbytes; pip install "peertune\[quantization\]"') as error:
        run(recipe(tmp_path, micro_model, model={"quantization": "4bit"}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@needs_package
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_refused(value: float, tmp_path: Path) -> None:
    module = wide("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = value
    module.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"up_proj.*NaN"):
        load_model(section(tmp_path), CPU)


@needs_package
def test_a_stored_4_bit_model_loads_as_such_only(folder: Path, tmp_path: Path) -> None:
    module: Any = load_model(section(folder), CPU)
    module.save_pretrained(tmp_path / "small")
    again: Any = load_model(section(tmp_path / "small"), CPU)
    assert base_fingerprint(again, set()) == base_fingerprint(module, set())
    assert torch.equal(again(input_ids=ids()).logits, module(input_ids=ids()).logits)
    with pytest.raises(ModelError, match="is stored quantised"):
        load_full_model(section(tmp_path / "small"), CPU)


@needs_package
def test_a_model_stored_in_another_format_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"'gptq'.*full-precision model"):
        load_model(section(folder), CPU)


@needs_package
def test_widths_that_the_library_gets_wrong_are_never_quantised(tmp_path: Path) -> None:
    """bitsandbytes mixes up the scales of rows that are no whole number of groups wide, on some CPUs."""
    wide("llama", hidden=80).save_pretrained(tmp_path / "partly")
    module = load_model(section(tmp_path / "partly"), CPU)
    found = {n.split(".")[-2] for n, p in module.named_parameters() if is_quantized(p)}
    assert found == {"down_proj"}

    make_model("llama").save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="no linear layer with inputs a multiple of 64"):
        load_model(section(tmp_path / "narrow"), CPU)

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "narrow", quantization_config=settings, device_map={"": "cpu"}
    )
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match="16 wide in groups of 64"):
        load_model(section(tmp_path / "stored"), CPU)


@needs_package
def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal language model"):
        load_model(section(tmp_path), CPU)


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_into_the_full_precision_base(dtype: Any, folder: Path, tmp_path: Path) -> None:
    config = section(folder, dtype=dtype)
    adapted = adapt(load_model(config, CPU))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    random_state = torch.get_rng_state()
    merged: Any = merge_adapter(adapted, load_full_model(config, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters())

    full = load_full_model(config, CPU)
    for name, parameter in full.named_parameters():
        module, _, _ = name.rpartition(".")
        expected = parameter
        if f"base_model.model.{module}.lora_A.default.weight" in before:
            down, up = (before[f"base_model.model.{module}.lora_{x}.default.weight"] for x in "AB")
            expected = (parameter.float() + 2.0 * up.float() @ down.float()).to(parameter.dtype)
            assert not torch.equal(merged.get_parameter(name), parameter)
        torch.testing.assert_close(
            merged.get_parameter(name), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-6
        )

    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=merged.dtype)
    assert getattr(plain.config, "quantization_config", None) is None
    plain.set_attn_implementation(merged.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids()).logits, merged.eval()(input_ids=ids()).logits)


@needs_package
def test_a_peers_model_runs_on_it(folder: Path) -> None:
    """The layer wrapper, the chunked loss and recomputation take a quantised base as any other."""
    module: Any = load_model(section(folder), CPU)
    assert num_weights(module.model.layers[0].mlp.up_proj.weight) == 64 * 128
    total = sum(p.numel() for p in wide("llama").parameters())
    blocks = partition_blocks(module, 2, "none")
    assert sum(num_weights(p) for p in module.parameters()) == total
    table = block_table(module, blocks)
    assert f"{sum(p.numel() for p in wide('llama').model.layers[:2].parameters()):,} parameters" in table

    adapted = adapt(module)
    tokens = ids()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, mask.long(), mask, tuple(range(len(tokens))))
    model = LanguageModel(module, section(folder))
    assert model.has_plain_head
    found = []
    for budget in (0, 1):
        model.stack._budget = budget  # one byte: every layer is recomputed
        adapted.zero_grad()
        total_loss, count = model.loss_sum(batch)
        (total_loss / count).backward()  # type: ignore[no-untyped-call]
        found.append({n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {n for n, _ in adapted.named_parameters() if "lora_" in n}
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(dtype: torch.dtype, bad: float | None) -> None:
    weights = torch.randn(7, 5).to(dtype)
    if bad is not None:
        weights[3, 2] = bad
    assert quantization.is_finite(weights) == (bad is None)
    assert quantization.is_finite(weights[:0])
