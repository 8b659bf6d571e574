"""Our attention for short sequences: exact enough, gradients included, and only where it applies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from peertune.config import ModelSection
from peertune.model import attention
from peertune.model.attention import NAME, choose_attention
from tests.shapes import ARCHITECTURES, VOCABULARY, make_model

CPU = torch.device("cpu")


class Site(torch.nn.Module):
    """Stands in for a model's attention module."""

    is_causal = True
    num_key_value_groups = 1


def inputs(key_heads: int = 4, length: int = 17, value_size: int = 8) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 4, length, 8), (3, key_heads, length, 8), (3, key_heads, length, value_size)]
    return [torch.randn(s, generator=rng).bfloat16().requires_grad_() for s in shapes]


@pytest.mark.parametrize("chunk", [1 << 20, 1])
@pytest.mark.parametrize(("key_heads", "length", "value_size"), [(4, 17, 8), (2, 17, 8), (1, 17, 6), (4, 32, 8)])
def test_it_is_causal_attention_and_its_gradient(
    key_heads: int, length: int, value_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES_BYTES", chunk)
    q, k, v = inputs(key_heads, length, value_size)
    out, _ = attention.attention_forward(Site(), q, k, v, None, scaling=0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide = [exact[0], *(x.repeat_interleave(4 // key_heads, 1) for x in exact[1:])]
    reference = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out.double(), reference, rtol=0.03, atol=0.03)
    for mine, theirs in zip(found, torch.autograd.grad(reference, exact, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", ["mask", "float32", "long", "dropout", "one query"])
def test_what_is_not_plain_and_short_goes_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*_: Any) -> None:
        raise AssertionError("taken by our own")

    monkeypatch.setattr(attention._ShortAttention, "apply", ours)
    monkeypatch.setattr(attention, "MAX_LENGTH", 20)
    q, k, v = inputs(length=21 if case == "long" else 17)
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool) if case == "mask" else None
    if case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    if case == "one query":
        q = q[:, :, :1]
    out, _ = attention.attention_forward(Site(), q, k, v, mask, dropout=0.5 if case == "dropout" else 0.0)
    assert out.shape[1] == q.shape[2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_in_bfloat16_on_a_cpu_use_it(name: str) -> None:
    """Loss and gradients are those of transformers' own attention, to bfloat16's accuracy."""
    ids = torch.randint(0, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))
    losses, grads = [], []
    for ours in (False, True):
        model = make_model(name).bfloat16()
        if ours:
            choose_attention(model, ModelSection(dtype="bfloat16"), CPU)
            assert model.config._attn_implementation == NAME
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert F.cosine_similarity(grads[0], grads[1], 0) > 0.99


def test_a_recipes_own_choice_and_other_devices_are_left_alone() -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    choose_attention(model, ModelSection(), torch.device("cuda"))
    choose_attention(model, ModelSection(attention="sdpa"), CPU)
    assert model.config._attn_implementation == before != NAME


def test_in_float32_it_is_transformers_own_bitwise() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))
    model, ours = make_model("llama"), make_model("llama")
    choose_attention(ours, ModelSection(), CPU)
    assert ours.config._attn_implementation == NAME
    assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_that_need_more_than_plain_attention_get_theirs(name: str) -> None:
    """Gemma 2 caps its scores and GPT-OSS has sinks; both would take any attention that is offered."""
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, intermediate_size=24, num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (2, 15))
    before = model(input_ids=ids).logits
    choose_attention(model, ModelSection(dtype="bfloat16"), CPU)
    assert torch.equal(model(input_ids=ids).logits, before)
