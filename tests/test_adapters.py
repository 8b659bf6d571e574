"""Adapters on every architecture: they learn, share the base, start the same on every peer, and are exported."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peertune.config import AlgorithmConfig, EvalSection, ModelSection
from peertune.data.batches import Batch, Batches
from peertune.errors import ConfigError, ModelError
from peertune.evaluation.label_scores import label_scores, label_scores_plainly
from peertune.evaluation.likelihood import evaluate
from peertune.export import export
from peertune.formatting import number
from peertune.measure_files import evaluate_model
from peertune.model.adapters import adapter_names, add_adapter, merge_adapter, peft_is_quiet
from peertune.model.blocks import partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_model, load_trained
from peertune.model.lora import take_over
from peertune.prepare import prepare_data, prepare_model
from peertune.run import run
from peertune.seeds import derive_seed
from tests.recipes import recipe
from tests.shapes import ARCHITECTURES, VOCABULARY, make_model

KINDS: list[Any] = ["lora", "bottleneck", "prompt", "prefix"]


def batch() -> Batch:
    ids = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return Batch(ids, mask, mask.bool(), (0, 1, 2))


def frozen(name: str) -> Any:
    return make_model(name).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_learns_and_leaves_the_base_as_it_is(name: str, kind: Any) -> None:
    module = add_adapter(frozen(name), AlgorithmConfig(adapter=kind, rank=2), seed=0)
    names = adapter_names(module)
    clone = clone_model(module, names)
    mine, theirs = dict(clone.named_parameters()), dict(module.named_parameters())
    assert all((mine[n] is theirs[n]) == (n not in names) for n in mine), "only the adapter is a copy"
    model = LanguageModel(clone, ModelSection())
    assert model.has_plain_head
    [block] = partition_blocks(clone, 0, only=names)
    assert set(block.parameters) == names
    active = model.activate(block)
    optimizer = torch.optim.SGD(active.values(), lr=0.1)
    before = {n: p.detach().clone() for n, p in mine.items()}
    losses = []
    for _ in range(8):
        loss, count = model.loss_sum(batch())
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count)
    assert losses[-1] < losses[0]
    moved = {n for n, p in mine.items() if not torch.equal(p, before[n])}
    assert moved == names
    plain = torch.nn.functional.cross_entropy(
        model.all_logits(batch().input_ids)[:, :-1].flatten(0, 1), batch().input_ids[:, 1:].flatten()
    )
    assert model.loss_sum(batch())[0].item() / 33 == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapter_starts_as_the_identity(kind: Any) -> None:
    base = LanguageModel(frozen("llama"), ModelSection()).loss_sum(batch())[0]
    adapted = LanguageModel(add_adapter(frozen("llama"), AlgorithmConfig(adapter=kind), 0), ModelSection())
    assert torch.equal(adapted.loss_sum(batch())[0], base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_makes_an_adapters_first_weights(kind: Any) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)  # the global state is of no consequence
        module = add_adapter(frozen("llama"), AlgorithmConfig(adapter=kind), seed)
        return {n: p for n, p in module.named_parameters() if p.requires_grad}

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_merging_gives_the_adapted_models_output() -> None:
    module = add_adapter(frozen("llama"), AlgorithmConfig(adapter="lora", rank=2), 0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = LanguageModel(copy.deepcopy(module), ModelSection()).all_logits(batch().input_ids)
    merged: Any = merge_adapter(module, frozen("llama"))
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    torch.testing.assert_close(merged(input_ids=batch().input_ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_end_of_a_tied_model_is_merged_at_that_end_alone(end: str, tmp_path: Path) -> None:
    def tied() -> Any:
        return make_model("llama", tied=True).requires_grad_(False)

    settings = AlgorithmConfig(adapter="lora", rank=2, target_modules=["q_proj", end])
    module = add_adapter(tied(), settings, 0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = LanguageModel(copy.deepcopy(module), ModelSection()).all_logits(batch().input_ids)
    merged: Any = merge_adapter(module, tied())
    torch.testing.assert_close(merged(input_ids=batch().input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(input_ids=batch().input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    tied().save_pretrained(tmp_path / "base")
    alone: Any = module
    alone.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with peft_is_quiet():
        alone.save_pretrained(tmp_path / "adapter")
    section = ModelSection(path=str(tmp_path / "adapter"), max_length=40)
    loaded = load_trained(section, torch.device("cpu")).eval()
    torch.testing.assert_close(loaded(input_ids=batch().input_ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_taking_over_a_lora_layer_changes_nothing_but_rounding(name: str) -> None:
    exact = add_adapter(frozen(name), AlgorithmConfig(adapter="lora", rank=4, lora_alpha=12.0), 0)
    for parameter in exact.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
        else:  # a base that bfloat16 holds exactly, so that only the arithmetic differs
            parameter.data = parameter.data.bfloat16().float()
    next(p for n, p in exact.named_parameters() if "lora_A" in n).requires_grad_(False)

    def gradients(dtype: torch.dtype, ours: bool) -> torch.Tensor:
        module = copy.deepcopy(exact)
        for n, p in module.named_parameters():
            if "lora_" not in n:
                p.data = p.data.to(dtype)
        if ours:
            take_over(module)
        module(input_ids=batch().input_ids, labels=batch().input_ids).loss.backward()
        found = [p.grad for p in module.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 for g in found)
        return torch.cat([g.flatten() for g in found if g is not None])

    expected = gradients(torch.float32, ours=False)
    torch.testing.assert_close(gradients(torch.float32, ours=True), expected, rtol=1e-4, atol=1e-5)
    error, theirs = ((gradients(torch.bfloat16, ours) - expected).norm() for ours in (True, False))
    assert error <= 1.5 * theirs <= 0.3 * expected.norm()


@pytest.mark.parametrize("change", ["dropout", "disabled", "merged"])
def test_a_lora_layer_that_is_not_plain_is_left_to_peft(change: str) -> None:
    settings = AlgorithmConfig(adapter="lora", rank=2, lora_dropout=0.5 if change == "dropout" else 0.0)
    module: Any = add_adapter(frozen("llama"), settings, 0)
    for n, p in module.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p)
    if change == "disabled":
        module.base_model.disable_adapter_layers()
    if change == "merged":
        module.merge_adapter()
    ours = copy.deepcopy(module)
    take_over(ours)
    outputs = []
    for model in (module, ours):
        torch.manual_seed(0)
        outputs.append(model(input_ids=batch().input_ids).logits)
    assert torch.equal(*outputs)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.target_modules: got \['nowhere'\]"):
        add_adapter(frozen("llama"), AlgorithmConfig(adapter="lora", target_modules=["nowhere"]), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_label_scores_go_through_the_adapter(kind: Any, tmp_path: Path, micro_model: Path) -> None:
    """Prompts run once and labels that go on from them give what running both together gives."""
    config = recipe(tmp_path, micro_model, algorithm={"name": "dec_lora", "adapter": kind})
    data = prepare_data(config, None)
    module = prepare_model(config, torch.device("cpu"), None)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model = LanguageModel(module, config.model)
    samples = sorted(data.test.samples, key=lambda s: s.prompt_length)
    with model.evaluating():
        fast = label_scores(model, samples, data.tokenizer.pad_token_id, data.test.labels)
        plain = label_scores_plainly(model, samples, data.tokenizer.pad_token_id, data.test.labels)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_what_was_measured(kind: Any, tmp_path: Path, micro_model: Path) -> None:
    config = recipe(
        tmp_path,
        micro_model,
        algorithm={"name": "fedavg", "adapter": kind, "rounds": 3, "local_steps": 3, "lr": 3e-2},
    )
    measured = run(config)["metrics"]["average_model"]
    out = tmp_path / "out"
    if kind in ("prompt", "prefix"):
        from peft import AutoPeftModelForCausalLM

        assert not (out / "model").exists()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            module: Any = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    else:
        module = AutoModelForCausalLM.from_pretrained(out / "model", trust_remote_code=kind == "bottleneck")
    assert AutoTokenizer.from_pretrained(out / ("model" if (out / "model").exists() else "adapter")).pad_token_id == 0
    data = prepare_data(config, None)
    again = evaluate(LanguageModel(module, config.model), data.test.samples, 0, labels=data.test.labels)
    assert again == pytest.approx(measured, rel=1e-4)
    export(out, tmp_path / "copy")
    [line] = evaluate_model(
        str(tmp_path / "copy"),
        [str(config.data.test)],
        "classification",
        EvalSection(max_samples=0),
        max_length=config.model.max_length,
        trust_remote_code=kind == "bottleneck",
    )
    assert {key: line[key] for key in measured} == pytest.approx(measured, rel=1e-4)
    if kind == "bottleneck":
        with pytest.raises(ConfigError, match="expected lora, prompt, prefix; leave it out"):
            export(out, tmp_path / "alone", adapter=True)
        return
    export(out, tmp_path / "alone", adapter=True)
    (out / "summary.json").unlink()  # as if it had been killed after the last checkpoint
    export(out, tmp_path / "checkpoint", adapter=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "checkpoint"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_does_not_fit_or_whose_base_is_gone_is_refused(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model, algorithm={"name": "dec_lora", "rounds": 1, "local_steps": 1, "rank": 2}))
    adapter = tmp_path / "out" / "adapter"
    section = ModelSection(path=str(adapter), max_length=4096)
    with pytest.raises(ModelError, match=r"model.max_length: got 4096, but .* has 96 positions"):
        load_trained(section, torch.device("cpu"))
    section = ModelSection(path=str(adapter), max_length=40)
    load_trained(section, torch.device("cpu"))
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"the adapter in .* does not load on its base"):
        load_trained(section, torch.device("cpu"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "no/such-base"}))
    with pytest.raises(ModelError, match="got 'no/such-base', expected a folder or hub name"):
        load_trained(section, torch.device("cpu"))


def test_bottlenecks_are_not_left_out_in_silence(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model, algorithm={"name": "dec_adapter", "rounds": 1}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(ModelSection(path=str(tmp_path / "out" / "model"), max_length=40), torch.device("cpu"))


def test_one_peer_of_dec_lora_is_pefts_lora_with_adamw(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(
        tmp_path,
        micro_model,
        run={"num_peers": 1},
        algorithm={
            "name": "dec_lora",
            "rounds": 4,
            "local_steps": 3,
            "lr": 3e-3,
            "rank": 3,
            "lora_alpha": 3.0,
            "eps": 1e-4,
        },
    )
    run(config)
    data = prepare_data(config, None)
    module: Any = prepare_model(config, torch.device("cpu"), None)
    batches = Batches(data.train[0].samples, 4, seed=derive_seed(0, 0, "batches"), pad_id=0)
    trained = [p for p in module.parameters() if p.requires_grad]
    # Adam divides rounding noise by eps, so a larger one than its own is taken.
    optimizer = torch.optim.AdamW(trained, lr=3e-3, eps=1e-4, weight_decay=0.0)
    for _ in range(12):
        drawn = batches.next()
        labels = drawn.input_ids.masked_fill(~drawn.loss_mask, -100)
        module(input_ids=drawn.input_ids, attention_mask=drawn.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    expected = {n.replace(".default", ""): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 2 * 3 * 7
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_only_the_adapter_is_sent_and_checkpointed(tmp_path: Path, micro_model: Path) -> None:
    summary = run(recipe(tmp_path, micro_model, algorithm={"name": "fedavg", "adapter": "prompt", "rounds": 2}))
    prompt = 8 * 12 * 4  # virtual tokens x hidden x float32
    assert summary["bytes_sent_per_peer"] == [2 * prompt] * 4 and summary["bytes_sent_by_hub"] == 8 * prompt
    held = sum(f.stat().st_size for f in (tmp_path / "out" / "checkpoints").rglob("*.safetensors"))
    assert held < 2 * 5 * (3 * prompt + 1000)  # two generations of four peers and the hub: weights, two moments, header


def test_personal_parts_stay_and_are_reported(tmp_path: Path, micro_model: Path) -> None:
    summary = run(
        recipe(
            tmp_path,
            micro_model,
            algorithm={"name": "fedavg", "local_modules": ["lm_head"], "rounds": 6, "local_steps": 4},
        )
    )
    metrics = summary["metrics"]
    assert len(metrics["personal"]) == 4
    assert len({m["loss"] for m in metrics["personal"]}) == 4, "each has a head of its own"
    page = (tmp_path / "out" / "report.html").read_text()
    losses = [m["loss"] for m in metrics["personal"]]
    for label, value in (("lowest", min(losses)), ("highest", max(losses))):
        assert re.search(rf"{label} personal model</td>.*?<td>{number(value)}</td>", page)
    trained = json.loads((tmp_path / "out" / "events.jsonl").read_text().splitlines()[0])["model"]["trained"]
    head = 261 * 12
    assert summary["bytes_sent_per_peer"][0] <= 6 * 4 * (trained - head)
