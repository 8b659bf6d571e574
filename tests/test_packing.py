"""Batches without padding, and several peers' batches in one pass: losses and gradients are those of the plain way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from peertune.config import AlgorithmConfig, ModelSection
from peertune.data.batches import Batch
from peertune.errors import ConfigError
from peertune.model import packing
from peertune.model.adapters import adapter_names, add_adapter
from peertune.model.attention import choose_attention
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model
from peertune.model.stacked import StackedModels
from peertune.run import run
from tests.recipes import recipe
from tests.shapes import ARCHITECTURES, VOCABULARY, make_model

CPU = torch.device("cpu")
LENGTHS = (9, 4, 1, 6)


def ragged(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Sequences of some lengths, half of whose tokens are targets."""
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(1, VOCABULARY, shape, generator=rng)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    targets = mask.bool() & (torch.rand(shape, generator=rng) < 0.5)
    targets[0, 1] = True
    return Batch(ids * mask, mask, targets, tuple(range(len(lengths))))


def ours(module: Any, **section: Any) -> LanguageModel:
    choose_attention(module, ModelSection(), CPU)
    return LanguageModel(module.requires_grad_(True), ModelSection(**{"max_length": 32, **section}))


def gradient(model: LanguageModel, batch: Batch) -> tuple[float, torch.Tensor]:
    for p in model.module.parameters():
        p.grad = None
    loss = model.backward(batch, 1)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_batch_has_the_loss_and_gradient_of_the_padded_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(make_model(name))
    assert model.packs
    packed, moved = gradient(model, ragged()), []
    model.packs = False
    padded = gradient(model, ragged())
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-5)
    model.packs = True
    monkeypatch.setattr(packing.Packing, "unpack", lambda self, x: moved.append(x))
    with torch.no_grad(), pytest.raises(AttributeError):  # so the above did go through it
        model.loss_sum(ragged())
    full = ragged(lengths=(5, 5))
    assert not packing.is_worth_packing(full) and model.loss_sum(full)[1] == int(full.loss_mask[:, 1:].sum())
    assert len(moved) > 0


def test_a_sequence_does_not_see_its_neighbors() -> None:
    model = ours(make_model("llama"))
    batch = ragged()
    other = Batch(batch.input_ids.clone(), batch.attention_mask, batch.loss_mask, batch.sample_ids)
    other.input_ids[0] = other.input_ids[0].roll(1)
    tokens = [packing.pack([b], CPU) for b in (batch, other)]
    with torch.no_grad():
        [one], [two] = (model.hidden_before_targets(t) for t in tokens)
    of_first = int(batch.loss_mask[0, 1:].sum())
    assert not torch.equal(one[:of_first], two[:of_first])
    torch.testing.assert_close(one[of_first:], two[of_first:])


@pytest.mark.parametrize("section", [{"activation_budget_mb": 1}, {"prefix_cache": True}, {"attention": "sdpa"}])
def test_what_needs_the_padded_form_keeps_it(section: dict[str, Any]) -> None:
    module = make_model("llama")
    choose_attention(module, ModelSection(**section), CPU)
    assert not LanguageModel(module, ModelSection(**section)).packs


def test_a_window_shorter_than_a_sequence_keeps_the_padded_form() -> None:
    config = AutoConfig.for_model(
        "mistral", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, sliding_window=8,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    assert ours(module, max_length=8).packs
    assert not ours(AutoModelForCausalLM.from_config(config), max_length=9).packs


def test_layers_that_look_across_sequences_are_found_out() -> None:
    """A layer that mixes neighbouring places, as a convolution does, would carry over from one sequence to the next."""
    module = make_model("llama")
    module.model.layers[1].register_forward_hook(lambda _, __, out: out + out.roll(1, 1))
    assert not ours(module).packs


def adapted(name: str, num_models: int, **keys: Any) -> list[LanguageModel]:
    """Models with adapters of their own on one base."""
    base = make_model(name).requires_grad_(False)
    choose_attention(base, ModelSection(), CPU)
    module = add_adapter(base, AlgorithmConfig(adapter="lora", rank=2, **keys), seed=0)
    own = adapter_names(module)
    models: list[LanguageModel] = []
    for i in range(num_models):
        model = LanguageModel(clone_model(module, own), ModelSection(max_length=32), like=models[0] if models else None)
        for p in (p for n, p in model.module.named_parameters() if n in own):
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        models.append(model)
    return models


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_stacked_models_have_the_gradients_of_each_alone(name: str) -> None:
    models = adapted(name, 3)
    batches = [ragged(0), ragged(1, (5, 5, 5)), ragged(2, (3, 12))]
    alone = [gradient(model, batch) for model, batch in zip(models, batches, strict=True)]
    for model in models:
        model.module.zero_grad()
    losses = StackedModels(models).backward([2, 0], [batches[2], batches[0]], 1)
    for i, loss in zip((2, 0), losses, strict=True):
        found = torch.cat([p.grad.flatten() for p in models[i].module.parameters() if p.grad is not None])
        assert loss.item() == pytest.approx(alone[i][0], rel=1e-5)
        assert (found - alone[i][1]).norm() < 2e-4 * found.norm()
    assert all(p.grad is None for p in models[1].module.parameters())
    assert gradient(models[2], batches[2])[0] == pytest.approx(alone[2][0], rel=1e-6)  # on its own again


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "dec_lora", "grad_accumulation": 2},
        {"name": "alternating_lora", "phase_rounds": 1},
        {"name": "fedavg", "adapter": "lora", "participation": 0.5, "local_epochs": 1, "local_steps": 1},
        {"name": "noloco", "adapter": "lora"},
    ],
    ids=lambda keys: keys["name"],
)
def test_batched_peers_end_with_the_weights_of_peers_in_turn(
    keys: dict[str, Any], tmp_path: Path, micro_model: Path
) -> None:
    for out, size in (("in turn", 1), ("batched", 3)):
        section = {"out": str(tmp_path / out), "batched_peers": size}
        algorithm = {"rounds": 3, "local_steps": 2, "rank": 2, **keys}
        run(recipe(tmp_path, micro_model, run=section, algorithm=algorithm, eval={"max_samples": 4}))
    one, other = weights(tmp_path / "in turn"), weights(tmp_path / "batched")
    moved = max(float(t.abs().max()) for n, t in one.items() if "lora_B" in n)  # from zero
    assert moved > 1e-2
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0.02 * moved)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"algorithm": {"name": "deca"}}, "got 4 with a method that trains block by block"),
        ({"algorithm": {"name": "dpsgd"}}, "got 4 with a method that trains block by block"),
        ({"algorithm": {"name": "gt"}}, "expected plain LoRA without dropout"),
        ({"algorithm": {"name": "dec_adapter"}}, "expected plain LoRA without dropout"),
        ({"algorithm": {"name": "dec_lora", "lora_dropout": 0.1}}, "a model with dropout"),
        ({"algorithm": {"name": "dec_lora"}, "model": {"attention": "eager"}}, "sequences cannot be packed"),
    ],
)
def test_what_cannot_be_batched_is_refused(
    sections: dict[str, Any], said: str, tmp_path: Path, micro_model: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"run.batched_peers: .*{said}.*set\s+run.batched_peers = 1"):
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "out"), "batched_peers": 4}, **sections))
    assert not (tmp_path / "out").exists()
