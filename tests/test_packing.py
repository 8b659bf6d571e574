"""Batches without padding, and several peers' batches in one pass: losses and gradients are those of the plain way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from peertune.config import AlgorithmConfig, ModelSection
from peertune.data.batches import Batch
from peertune.errors import ConfigError, ModelError
from peertune.flat import FlatParameters
from peertune.model import packing
from peertune.model.adapters import adapter_names, add_adapter
from peertune.model.attention import choose_attention
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model
from peertune.model.stacked import StackedModels
from peertune.peer import Peer
from peertune.progress import Silent
from peertune.run import run
from tests.recipes import recipe
from tests.shapes import ARCHITECTURES, VOCABULARY, make_model

CPU = torch.device("cpu")
LENGTHS = (9, 4, 1, 6)
DTYPES = [torch.float32, torch.bfloat16]


def ragged(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Sequences of some lengths, half of whose tokens are targets."""
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(1, VOCABULARY, shape, generator=rng)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    targets = mask.bool() & (torch.rand(shape, generator=rng) < 0.5)
    targets[0, 1] = True
    return Batch(ids * mask, mask, targets, tuple(range(len(lengths))))


def ours(module: Any) -> LanguageModel:
    choose_attention(module, ModelSection(), CPU)
    return LanguageModel(module.requires_grad_(True), ModelSection())


def shapes_seen(model: LanguageModel) -> list[tuple[int, ...]]:
    """A list to which the model's forward passes add the shapes of their input."""
    seen: list[tuple[int, ...]] = []
    model.core.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def gradient(model: LanguageModel, batch: Batch, num_targets: int = 0) -> tuple[float, torch.Tensor]:
    for p in model.module.parameters():
        p.grad = None
    loss = model.backward(batch, num_targets or batch.num_targets)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_batch_has_the_loss_and_gradient_of_the_padded_one(name: str, dtype: torch.dtype) -> None:
    model = ours(make_model(name).to(dtype))
    assert not model.no_packing and model.packs(ragged())
    seen = shapes_seen(model)
    packed = gradient(model, ragged())
    model.no_packing = "to compare"
    padded = gradient(model, ragged())
    assert seen == [(1, packing.PLACES), (len(LENGTHS), max(LENGTHS))]  # filled up
    close = 1e-5 if dtype == torch.float32 else 0.01
    assert packed[0] == pytest.approx(padded[0], rel=close)
    assert (packed[1] - padded[1]).float().norm() < 10 * close * padded[1].float().norm()


def test_a_batch_with_hardly_any_padding_stays_as_it_is() -> None:
    """Or whose tokens, filled up, are as many places."""
    model, batches = ours(make_model("llama")), [ragged(lengths=(5, 5)), ragged(lengths=(9, 9, 9, 6))]
    seen = shapes_seen(model)
    for batch in batches:
        assert model.loss_sum(batch)[1] == int(batch.loss_mask[:, 1:].sum())
    assert seen == [(2, 5), (4, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rows_go_through_attention_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed texts are such: two groups, each of sequences of one length that leave no place empty."""
    batches = [ragged(seed, (packing.PLACES // 2,) * 2) for seed in (0, 1)]
    tokens = packing.pack(batches, CPU)
    assert tokens.is_full and not packing.pack([ragged()], CPU).is_full
    model = ours(make_model("llama").to(dtype))
    moved = [packed_gradient(model, tokens)]
    with monkeypatch.context() as patch:
        patch.setattr(packing.Packing, "is_full", False)
        moved.append(packed_gradient(model, tokens))
    assert torch.equal(*moved)


def packed_gradient(model: LanguageModel, tokens: packing.Packing) -> torch.Tensor:
    hidden = torch.cat(model.hidden_before_targets(tokens))
    found = torch.autograd.grad(hidden.float().square().sum(), list(model.core.base_model.parameters()))
    return torch.cat([grad.float().flatten() for grad in found])


def test_batches_of_many_sizes_have_few_shapes() -> None:
    """For each, oneDNN would make and keep code of its own."""
    batches = [ragged(seed, (30, 20 + seed, 1, 1)) for seed in range(10)]
    assert len({packing.pack([batch], CPU).input_ids.shape for batch in batches}) == 1
    assert packing.pack(batches[:2], CPU).input_ids.shape == (2, 64)


def test_a_sequence_does_not_see_its_neighbors() -> None:
    model = ours(make_model("llama"))
    batch = ragged()
    other = Batch(batch.input_ids.clone(), batch.attention_mask, batch.loss_mask, batch.sample_ids)
    other.input_ids[0] = other.input_ids[0].roll(1)
    with torch.no_grad():
        [one], [two] = (model.hidden_before_targets(packing.pack([b], CPU)) for b in (batch, other))
    of_first = int(batch.loss_mask[0, 1:].sum())
    assert not torch.equal(one[:of_first], two[:of_first])
    assert torch.equal(one[of_first:], two[of_first:])


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"activation_budget_mb": 1}, "model.activation_budget_mb is set"),
        ({"prefix_cache": True}, "model.prefix_cache is set"),
        ({"attention": "sdpa"}, "its attention is not ours"),
    ],
)
def test_what_needs_the_padded_form_keeps_it(section: dict[str, Any], why: str) -> None:
    module = make_model("llama")
    choose_attention(module, ModelSection(**section), CPU)
    assert why in LanguageModel(module, ModelSection(**section)).no_packing


@pytest.mark.parametrize("nested", [False, True])
def test_sequences_longer_than_a_window_keep_the_padded_form(nested: bool) -> None:
    """Gemma 3 with images keeps its window in a config of its own."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "sliding_window": 8,
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("mistral", **sizes)
    if nested:
        config = AutoConfig.for_model("gemma3", text_config=sizes, vision_config=vision)
    model = ours(AutoModelForCausalLM.from_config(config))
    assert not model.no_packing
    assert model.packs(ragged(lengths=(8, 3, 3))) and not model.packs(ragged(lengths=(9, 3, 3)))


@pytest.mark.parametrize("share", [1.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_look_across_sequences_are_found_out(share: float, dtype: torch.dtype) -> None:
    """A layer that mixes neighbouring places, as a convolution does, would carry over from one sequence to the next."""
    module = make_model("llama").to(dtype)
    module.model.layers[1].register_forward_hook(lambda _, __, out: out + share * F.pad(out[:, :-1], (0, 0, 1, 0)))
    assert ours(module).no_packing == "its layers look from one sequence to the next"


def test_models_that_need_what_ours_has_not_keep_their_attention() -> None:
    sparse = make_model("llama")
    sparse.config.index_topk = 4  # a model that chooses which tokens to look at
    choose_attention(sparse, ModelSection(), CPU)
    compiled = make_model("llama")
    choose_attention(compiled, ModelSection(compile=True), CPU)
    assert sparse.config._attn_implementation == compiled.config._attn_implementation == "sdpa"


def adapted(name: str, num_models: int, dtype: torch.dtype = torch.float32) -> list[LanguageModel]:
    """Models with adapters of their own on one base."""
    base = make_model(name).to(dtype).requires_grad_(False)
    choose_attention(base, ModelSection(), CPU)
    module = add_adapter(base, AlgorithmConfig(adapter="lora", rank=2), seed=0)
    own = adapter_names(module)
    models: list[LanguageModel] = []
    for i in range(num_models):
        model = LanguageModel(clone_model(module, own), ModelSection(), like=models[0] if models else None)
        for p in (p for n, p in model.module.named_parameters() if n in own):
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        models.append(model)
    return models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_stacked_models_have_the_gradients_of_each_alone(name: str, dtype: torch.dtype) -> None:
    models = adapted(name, 3, dtype)
    close = 2e-4 if dtype == torch.float32 else 0.1
    batches = [ragged(0), ragged(1, (5, 5, 5)), ragged(2, (3, 12))]
    alone = [gradient(model, batch, 2 * batch.num_targets) for model, batch in zip(models, batches, strict=True)]
    for model in models:
        model.module.zero_grad()
    losses = StackedModels(models).backward(
        [2, 0], [batches[2], batches[0]], [2 * batches[i].num_targets for i in (2, 0)]
    )
    for i, loss in zip((2, 0), losses, strict=True):
        found = torch.cat([p.grad.flatten() for p in models[i].module.parameters() if p.grad is not None])
        assert loss.item() == pytest.approx(alone[i][0], rel=close / 10)
        assert (found - alone[i][1]).norm() < close * found.norm()
    assert all(p.grad is None for p in models[1].module.parameters())
    assert gradient(models[2], batches[2], 2 * batches[2].num_targets)[0] == alone[2][0]  # on its own again


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]])
def test_gradients_of_models_that_are_laid_out_add_up_in_rows_of_their_own(members: list[int]) -> None:
    models, batches, flats = adapted("llama", 3), [ragged(i) for i in range(3)], {}
    for i, model in enumerate(models):
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_("lora_A" in name)  # B is put together as it stands
        flats[i] = FlatParameters({n: p for n, p in model.module.named_parameters() if p.requires_grad})
    alone = [gradient(model, batch)[1] for model, batch in zip(models, batches, strict=True)]
    stack = StackedModels(models)
    stack.lay_out(flats)
    for _ in range(2):
        stack.backward(members, [batches[i] for i in members], [batches[i].num_targets for i in members])
    for i, flat in flats.items():
        expected = 2 * alone[i] if i in members else torch.zeros_like(alone[i])
        assert flat.gradient is not None
        assert (flat.gradient - expected).norm() <= 2e-4 * expected.norm()


def test_a_lora_layer_that_sees_some_of_the_tokens_only_is_refused() -> None:
    models = adapted("llama", 2)
    for model in models:
        layer = model.core.model.layers[1].mlp
        layer.forward = lambda x, whole=layer.forward: torch.cat([whole(x[:, :1]), whole(x[:, 1:])], 1)
    with pytest.raises(ModelError, match="not called with all tokens of a batch"):
        StackedModels(models)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def rounds(out: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "dec_lora", "grad_accumulation": 2},
        {"name": "alternating_lora", "phase_rounds": 1},
        {"name": "fedavg", "adapter": "lora", "participation": 0.5, "local_epochs": 1, "proximal": 0.1},
        {"name": "noloco", "adapter": "lora"},
    ],
    ids=lambda keys: keys["name"],
)
def test_batched_peers_end_with_the_weights_of_peers_in_turn(
    keys: dict[str, Any], tmp_path: Path, micro_model: Path
) -> None:
    for out, size in (("in turn", 1), ("batched", 3)):
        section = {"out": str(tmp_path / out), "batched_peers": size}
        algorithm = {"rounds": 3, "local_steps": 2, "rank": 2, "max_grad_norm": 0.5, **keys}
        run(recipe(tmp_path, micro_model, run=section, algorithm=algorithm, eval={"max_samples": 4}))
    one, other = weights(tmp_path / "in turn"), weights(tmp_path / "batched")
    moved = max(float(t.abs().max()) for n, t in one.items() if "lora_B" in n)  # from zero
    assert moved > 1e-2
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0.02 * moved)
    for mine, theirs in zip(rounds(tmp_path / "in turn"), rounds(tmp_path / "batched"), strict=True):
        for key in ("loss", "grad_norm"):
            assert [v is None for v in mine[key]] == [v is None for v in theirs[key]]
            known = [(a, b) for a, b in zip(mine[key], theirs[key], strict=True) if a is not None]
            assert all(b == pytest.approx(a, rel=2e-3) for a, b in known), key
        assert mine["lr"] == theirs["lr"]


def test_accumulated_batches_have_the_gradient_of_one_large_batch() -> None:
    """Of all target tokens alike, not of the batches alike."""
    model = ours(make_model("llama"))
    large = ragged(3, (9, 3, 2))
    small = iter([large.part(0, 2), large.part(1, 2)])
    counts = [large.part(i, 2).num_targets for i in (0, 1)]
    assert counts[0] > 2 * counts[1] > 0
    loss, expected = gradient(model, large)
    model.module.zero_grad()
    draws: Any = SimpleNamespace(next=lambda: next(small))
    told = Peer(0, model, [], draws, 0).backward(0, 2)
    found = torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])
    assert told.item() == pytest.approx(loss, rel=1e-5)
    assert (found - expected).norm() < 1e-5 * expected.norm()


class Stop(Silent):
    """Breaks a run off after its second round."""

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        if done == 2:
            raise KeyboardInterrupt


def test_batched_peers_are_resumed_and_run_in_threads_bitwise(tmp_path: Path, micro_model: Path) -> None:
    def start(out: str, progress: Silent | None = None, *, resume: bool = False, **section: int) -> None:
        settings = {"out": str(tmp_path / out), "batched_peers": 2, "checkpoint_every": 1, **section}
        algorithm = {"name": "dec_lora", "rounds": 3, "local_steps": 2, "rank": 2}
        config = recipe(tmp_path, micro_model, run=settings, algorithm=algorithm, eval={"max_samples": 4})
        run(config, resume=resume, progress=progress)

    start("whole")
    start("threads", parallel_peers=2)
    with pytest.raises(KeyboardInterrupt):
        start("stopped", Stop())
    start("stopped", resume=True)
    whole = weights(tmp_path / "whole")
    for out in ("threads", "stopped"):
        other = weights(tmp_path / out)
        assert all(torch.equal(whole[name], other[name]) for name in whole), out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"algorithm": {"name": "deca"}}, "got 8 with deca, which has no rounds of local AdamW steps"),
        ({"algorithm": {"name": "dpsgd"}}, "got 8 with dpsgd, which has no rounds of local AdamW steps"),
        ({"algorithm": {"name": "gt"}}, "expected LoRA .* got none"),
        ({"algorithm": {"name": "dec_adapter"}}, "expected LoRA .* got .*bottleneck"),
        ({"algorithm": {"name": "dec_lora", "lora_dropout": 0.1}}, "got 8 with a model with dropout"),
        ({"algorithm": {"name": "dec_lora"}, "model": {"attention": "eager"}}, "cannot be packed: its attention"),
    ],
)
def test_what_cannot_be_batched_is_refused(
    sections: dict[str, Any], said: str, tmp_path: Path, micro_model: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"run.batched_peers: .*{said}.*set run.batched_peers = 1"):
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "out"), "batched_peers": 8}, **sections))
    assert not (tmp_path / "out").exists()
