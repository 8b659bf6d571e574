"""Our RMSNorm stands in for transformers' own where it computes the same, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from peertune.model import norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_and_gradients_close(kind: type[torch.nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = kind(48).to(dtype)
    theirs.weight.data.uniform_(0.5, 1.5)
    ours = copy.deepcopy(theirs)
    norm.take_over(ours)
    assert "forward" in vars(ours)
    x, g = torch.randn(3, 7, 48).to(dtype) * 3, torch.randn(3, 7, 48).to(dtype)
    found = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        y = module(own)
        y.backward(g)
        found.append((y, own.grad, module.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    close = 1e-6 if dtype == torch.float32 else 5e-3
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() < close * a.norm()


def test_the_gradient_is_that_of_the_formula() -> None:
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    found = norm._RMSNorm.apply(x.float(), weight.float(), 1e-6)  # type: ignore[no-untyped-call]
    exact = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    g = torch.randn(2, 5)
    for a, b in zip(
        torch.autograd.grad(found, [x, weight], g), torch.autograd.grad(exact, [x, weight], g.double()), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    gemma = Gemma2RMSNorm(16)  # y = (1 + w) x / r
    norm.take_over(gemma)
    assert "forward" not in vars(gemma)

    class Centred(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))
            return found

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            found: torch.Tensor = super().forward(hidden_states)
            return found if gate is None else found * gate

    class OfItsInputsType(LlamaRMSNorm):  # which its weight may be wider than
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(hidden_states)
            return found.to(hidden_states.dtype)

    of_its_inputs_type = OfItsInputsType(16)
    norm.take_over(of_its_inputs_type)
    assert "forward" not in vars(of_its_inputs_type)

    gated = Gated(16)
    norm.take_over(gated)
    assert "forward" not in vars(gated)

    centred = Centred(16)
    norm.take_over(torch.nn.ModuleList([LlamaRMSNorm(16), centred]))
    assert "forward" not in vars(centred)


def test_a_copy_computes_with_its_own_weight() -> None:
    first = LlamaRMSNorm(16)
    norm.take_over(first)
    second = copy.deepcopy(first)
    second.weight.data.mul_(2)
    x = torch.randn(4, 16)
    assert torch.equal(second(x), 2 * first(x))
