"""Architectures with something unusual, against transformers by itself: a row at a time, no cache, no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peertune.algorithms import METHODS
from peertune.config import AlgorithmConfig, ModelSection
from peertune.data.batches import collate
from peertune.data.render import Sample
from peertune.errors import ModelError
from peertune.evaluation.generation import generate
from peertune.evaluation.label_scores import cache_is_exact, label_scores, label_scores_plainly
from peertune.evaluation.likelihood import evaluate
from peertune.model.adapters import add_adapter
from peertune.model.attention import choose_attention
from peertune.model.blocks import partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.load import load_model, load_trained
from peertune.model.lora import plain_layers
from peertune.recipe import from_dict
from peertune.run_folder import save_trained

CPU = torch.device("cpu")
VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
UNUSUAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 4, "sliding_window": 8},  # its cache forgets what the window has passed
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 4, "sliding_window": 8},  # a capped head
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 8},  # a window of 0 tokens: none
    "mixtral": {"num_local_experts": 2},
    "phimoe": {"num_local_experts": 2},
    "doge": {},  # makes its own mask
    "rembert": {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24},  # two widths
    "llama4_text": {"head_dim": 4, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 24},
    "mamba": {},  # no attention
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8},  # norms that take a gate
}


class Tokenizer:
    """Of numbers."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def save_pretrained(self, folder: Path) -> None: ...

    def decode(self, tokens: list[int], **_options: Any) -> str:
        return " ".join(map(str, tokens))


def made(name: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **UNUSUAL.get(name, {}), **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def samples() -> list[Sample]:
    """Prompts of 5 and 12 tokens, with a label each."""
    found = []
    for row, length in enumerate((5, 12, 9)):
        ids = np.random.default_rng(row).integers(1, VOCABULARY, length + 2).astype(np.int32)
        mask = np.zeros(len(ids), bool)
        mask[length:] = True
        found.append(Sample(input_ids=ids, loss_mask=mask, prompt_length=length, label=row % 2, row=row))
    return found


@pytest.mark.parametrize("name", UNUSUAL)
def test_loss_and_label_scores_are_those_of_the_model_itself(name: str) -> None:
    module = made(name)
    rows, labels = samples(), [[3, 4], [5]]
    losses, best = [], []
    for sample in rows:
        log_p = module(torch.tensor(sample.input_ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        places = np.flatnonzero(sample.loss_mask)
        losses += [-log_p[p - 1, int(sample.input_ids[p])].item() for p in places]
        scores = []
        for label in labels:
            ids = [*sample.input_ids[: sample.prompt_length].tolist(), *label]
            log_p = module(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[sample.prompt_length - 1 + t, token].item() for t, token in enumerate(label)))
        best.append(scores)
    choose_attention(module, ModelSection(), CPU)
    model = LanguageModel(module, ModelSection())
    assert evaluate(model, rows, 0)["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    found = evaluate(model, rows, 0, labels=labels)
    truth = [sample.label for sample in rows]
    assert found["accuracy"] == np.mean(np.argmax(best, 1) == truth)
    with model.evaluating():
        plain = label_scores_plainly(model, rows, 0, labels)
    assert torch.allclose(plain, torch.tensor(best, dtype=torch.float64), atol=1e-4)
    short = [[5], [7]]  # for which no trial is made
    with model.evaluating():
        own = label_scores_plainly(model, rows, 0, short)[torch.arange(len(rows)), torch.tensor(truth)]
    assert evaluate(model, rows, 0, labels=short)["loss"] == pytest.approx(-own.mean().item(), rel=1e-4)


def test_labels_keep_within_an_attention_window() -> None:
    """Together they would outgrow it; behind a prompt that leaves a single one no room, none is held."""
    model = LanguageModel(made("mistral", sliding_window=20), ModelSection())
    labels = [[first, *range(10, 14)] for first in range(1, 8)]
    with model.evaluating():
        assert cache_is_exact(model, samples(), 0, labels)
        fast, plain = (score(model, samples(), 0, labels) for score in (label_scores, label_scores_plainly))
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
        assert not cache_is_exact(model, samples(), 0, [[*label, *range(20, 30)] for label in labels])


def test_a_state_of_another_type_than_the_heads_is_the_models_own_business() -> None:
    model = LanguageModel(made("mamba", torch.bfloat16), ModelSection(dtype="bfloat16"))
    assert not model.has_plain_head and torch.isfinite(model.all_logits(torch.ones(1, 4, dtype=torch.long))).all()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft's own patterns for Mixtral
@pytest.mark.parametrize("name", ["mixtral", "phimoe", "llama4_text"])  # the others' routers are linear, but give pairs
def test_lora_passes_over_experts_and_routers_that_are_no_linear_layers(name: str) -> None:
    settings = from_dict({"algorithm": {"name": "dec_lora"}}, METHODS)[0].algorithm
    model = LanguageModel(add_adapter(made(name), settings, 0), ModelSection())
    assert torch.isfinite(model.all_logits(torch.ones(1, 4, dtype=torch.long))).all()


def test_lora_where_a_model_adds_to_a_layers_output_in_place() -> None:
    settings = from_dict({"algorithm": {"name": "dec_lora"}}, METHODS)[0].algorithm
    module = add_adapter(made("gemma3n_text", **PER_LAYER), settings, 0)
    trained = {name: p for name, p in module.named_parameters() if "lora_B" in name}
    model = LanguageModel(module, ModelSection())
    model.backward(collate(samples(), 0), 1)
    ours = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    for layer in plain_layers(module):
        del layer.forward  # peft's own
    module.zero_grad()
    model.backward(collate(samples(), 0), 1)
    theirs = {name: p.grad for name, p in trained.items() if p.grad is not None}
    assert any("laurel" in name for name in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bottlenecks_have_the_layers_width_not_the_embeddings() -> None:
    config = AutoConfig.for_model(
        "opt", vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=8, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    settings = from_dict({"algorithm": {"name": "dec_adapter"}}, METHODS)[0].algorithm
    model = LanguageModel(add_adapter(module.requires_grad_(False), settings, 0), ModelSection())
    assert model.all_logits(torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, VOCABULARY)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "openai-gpt"])  # two of a format older than their classes
def test_bottlenecks_are_exported_and_come_back(name: str, tmp_path: Path) -> None:
    sizes = {"tie_word_embeddings": False, "n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 64}
    base = made(name, **(sizes if name == "openai-gpt" else {}))
    module = add_adapter(base, AlgorithmConfig(adapter="bottleneck"), 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    LanguageModel(module, ModelSection())
    ids = torch.arange(1, 9)[None]
    expected = module.eval()(input_ids=ids).logits
    save_trained(tmp_path / "model", module, Tokenizer(), None)
    again = load_trained(ModelSection(path=str(tmp_path / "model"), trust_remote_code=True, max_length=32), CPU).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


PER_LAYER = {
    "head_dim": 4, "num_kv_shared_layers": 0, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4, "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bart", {"d_model": 16, "decoder_layers": 2, "decoder_ffn_dim": 24, "dropout": 0.0}),  # a norm before them
        ("rwkv", {"num_key_value_heads": None}),  # gives three things a layer
        ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}),
    ],
    ids=["bart", "rwkv", "bamba"],
)
def test_the_prefix_cache_goes_by_what_reaches_a_layer(name: str, sizes: dict[str, Any]) -> None:
    batch = collate(samples(), 0)
    grads: list[list[dict[str, torch.Tensor]]] = []
    for cached in (False, True):
        module = made(name, **sizes)
        for parameter in module.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 10)
        model = LanguageModel(module, ModelSection(prefix_cache=cached))
        grads.append([])
        for block in [*partition_blocks(module, 1)] * 2:
            active = model.activate(block)
            for _visit in range(2):
                for parameter in active.values():
                    parameter.grad = None
                model.backward(batch, batch.num_targets)
                grads[-1].append({n: p.grad.clone() for n, p in active.items() if p.grad is not None})
            for parameter in active.values():
                parameter.data.add_(0.01)
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["xlm", "gemma3n_text"])  # residuals outside; four states
def test_the_prefix_cache_is_refused_where_layers_hand_on_something_else(name: str) -> None:
    xlm = {"emb_dim": 16, "n_layers": 2, "n_heads": 4, "causal": True, "dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"vocab_size": VOCABULARY, **xlm} if name == "xlm" else {**SIZES, **PER_LAYER}
    config = AutoConfig.for_model(name, **sizes)
    with pytest.raises(ModelError, match=r"hand on other than one state.*leave the cache off"):
        LanguageModel(AutoModelForCausalLM.from_config(config).requires_grad_(False), ModelSection(prefix_cache=True))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft lets the model count them
def test_prompts_that_cannot_be_padded_together_are_answered_one_by_one() -> None:
    sizes = {"head_dim": 4, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}
    settings = AlgorithmConfig(adapter="prompt", num_virtual_tokens=3)
    model = LanguageModel(add_adapter(made("minimax", **sizes), settings, 0), ModelSection())
    rows: Any = [sample.input_ids for sample in samples()]
    tokenizer: Any = Tokenizer()
    alone = [generate(model, tokenizer, [row], max_new_tokens=3)[0] for row in rows]
    assert generate(model, tokenizer, rows, max_new_tokens=3) == alone


OTHER_NAMES: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2},
}
"""Of heads and widths; OPT-350M has an embedding narrower than its layers."""


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in OTHER_NAMES for kind in ("prompt", "prefix")][:-1])
def test_prompts_and_prefixes_come_back(name: str, kind: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **OTHER_NAMES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    settings = ModelSection(path=str(base), max_length=32)
    module = add_adapter(load_model(settings, CPU), AlgorithmConfig(adapter=kind), 0)
    LanguageModel(module, settings)
    save_trained(tmp_path / "model", module, Tokenizer(), None)
    again = load_trained(ModelSection(path=str(tmp_path / "model"), max_length=32), CPU)
    found, expected = (m.eval()(input_ids=torch.arange(1, 9)[None]).logits for m in (again, module))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.2, 0.02], ids=["trained", "random"])  # with 0.02 they hardly look
def test_a_model_that_looks_ahead_is_refused(scale: float, dtype: Any) -> None:
    sizes = {**SIZES, "is_decoder": False, "initializer_range": scale, "dtype": getattr(torch, dtype)}
    settings = ModelSection(path="some-bert", dtype=dtype)
    with pytest.raises(ModelError, match="tokens see those after them"):
        LanguageModel(made("bert", **sizes), settings)
    LanguageModel(made("bert", **{**sizes, "is_decoder": True}), settings)


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("falcon", {}, r"fails on five tokens, .*Sizes of tensors must match.*; take another adapter"),  # one key head
        ("mamba2", {}, "makes no use of this kind"),
        (
            "whisper",
            {"decoder_layers": 2, "decoder_attention_heads": 4, "pad_token_id": 0},
            "fails on five tokens",
        ),  # its head's own pass
    ],
)
def test_an_adapter_that_an_architecture_cannot_have_is_refused(name: str, sizes: dict[str, Any], reason: str) -> None:
    settings = AlgorithmConfig(adapter="prefix", num_virtual_tokens=3)
    module = add_adapter(made(name, **sizes), settings, 0)
    with pytest.raises(ModelError, match=reason):
        LanguageModel(module, ModelSection())
