"""The block's Adam against torch's, and master weights bit by bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peertune import optim
from peertune.config import AlgorithmConfig
from peertune.optim import (
    MasterWeights,
    Moments,
    adam_step,
    clip_gradients,
    join_bfloat16,
    learning_rate,
    split_bfloat16,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(-30, 30))
def test_split_joins_back_bit_by_bit(seed: int, scale: float) -> None:
    master = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    high, low = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.int16)
    split_bfloat16(master, high, low)
    assert torch.equal(join_bfloat16(high, low), master)
    assert ((high.float() - master).abs() <= master.abs() * 2**-8).all()


def parameter_and_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], steps: int
) -> tuple[nn.Parameter, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(shape, generator=rng).to(dtype)), torch.randn((steps, *shape), generator=rng).to(
        dtype
    )


def train(parameter: nn.Parameter, grads: torch.Tensor, lr: float, weight_decay: float = 0.0) -> MasterWeights:
    masters = MasterWeights({"w": parameter})
    masters.activate("w")
    moments = Moments.zeros(parameter)
    for step, grad in enumerate(grads, 1):
        parameter.grad = grad
        take_step(masters, {"w": moments}, step, lr, weight_decay)
    return masters


def take_step(masters: MasterWeights, moments: dict[str, Moments], step: int, lr: float, weight_decay: float) -> None:
    corrections = (1 - 0.9**step, 1 - 0.999**step)
    adam_step(
        masters,
        moments,
        lr=lr,
        betas=(0.9, 0.999),
        corrections=corrections,
        eps=1e-8,
        weight_decay=weight_decay,
    )


@pytest.mark.parametrize("shape", [(7,), (300, 300)])  # the second spans several chunks
def test_equals_torch_adamw_bitwise_in_float32(shape: tuple[int, ...]) -> None:
    ours, grads = parameter_and_gradients(torch.float32, shape, 6)
    theirs = nn.Parameter(ours.detach().clone())
    decay = 0.1 if len(shape) > 1 else 0.0  # ours never decays vectors
    optimiser = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=decay, foreach=False)
    for grad in grads:
        theirs.grad = grad
        optimiser.step()
    train(ours, grads, 1e-3, weight_decay=0.1)
    assert torch.equal(ours, theirs)


def test_parameters_step_together_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and bfloat16, matrices and vectors, smaller than a chunk, as large, and larger."""
    monkeypatch.setattr(optim, "CHUNK_CPU", 100)
    kinds = [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in ((7,), (10, 10), (30, 11), (9,))]
    made = {f"p{i}": parameter_and_gradients(dtype, shape, 3) for i, (dtype, shape) in enumerate(kinds)}
    alone = {name: nn.Parameter(parameter.detach().clone()) for name, (parameter, _) in made.items()}
    masters = MasterWeights({name: parameter for name, (parameter, _) in made.items()})
    moments = {name: Moments.zeros(parameter) for name, (parameter, _) in made.items()}
    for name in masters:
        masters.activate(name)
    for step in range(3):
        for parameter, grads in made.values():
            parameter.grad = grads[step]
        take_step(masters, moments, step + 1, 1e-3, 0.1)
    for name, (_, grads) in made.items():
        expected = train(alone[name], grads, 1e-3, 0.1)
        assert torch.equal(masters.snapshot(name), expected.snapshot("w")), name


def test_bfloat16_keeps_float32_progress() -> None:
    """Steps far below half a unit in bfloat16's last place add up as they do in float32."""
    ours, grads = parameter_and_gradients(torch.bfloat16, (50, 50), 40)
    full = nn.Parameter(ours.detach().float())
    masters = train(ours, grads, 1e-6)
    train(full, grads.float(), 1e-6)
    assert torch.equal(masters.snapshot("w"), full.detach())
    assert not torch.equal(masters.snapshot("w"), ours.detach().float())


def test_remainder_survives_a_release() -> None:
    ours, grads = parameter_and_gradients(torch.bfloat16, (50,), 3)
    masters = train(ours, grads, 1e-6)
    before = masters.snapshot("w")
    masters.release("w")
    masters.activate("w")
    assert torch.equal(masters.snapshot("w"), before)


def test_write_then_snapshot_is_exact_in_both_types() -> None:
    value = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        masters = MasterWeights({"w": nn.Parameter(torch.zeros(4, 4, dtype=dtype))})
        masters.write("w", value)
        assert torch.equal(masters.snapshot("w"), value)


def test_learning_rate_schedules() -> None:
    config = AlgorithmConfig(lr=1.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(config, s, 8) for s in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    config = AlgorithmConfig(lr=2.0, schedule="cosine")
    assert learning_rate(config, 0, 10) == 2.0
    assert math.isclose(learning_rate(config, 5, 10), 1.0)
    assert learning_rate(AlgorithmConfig(lr=3.0), 9, 10) == 3.0


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
def test_gradients_are_clipped_as_torch_does(max_norm: float) -> None:
    """All together, long ones alone; 0 leaves them as they are."""
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=rng) for shape in ((4, 3), (7,))]
    ours, theirs = ({str(i): nn.Parameter(torch.zeros_like(grad)) for i, grad in enumerate(grads)} for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = grad.clone()
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.values(), max_norm or math.inf)
    torch.testing.assert_close(norm, expected)
    for mine, reference in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_the_norm_of_bfloat16_gradients_is_float32_and_missing_ones_are_zero() -> None:
    there, missing = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(2))
    there.grad = torch.tensor([3.0, 4.0, 1.0], dtype=torch.bfloat16)
    norm = clip_gradients({"there": there, "missing": missing}, 0.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(26**0.5, rel=1e-6)
    assert missing.grad is not None and missing.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000])  # a GPU's; a CPU's, of either sign
def test_nan_stays_nan_in_bfloat16(bits: int) -> None:
    master = torch.tensor([bits, 0x3F800000], dtype=torch.int32).view(torch.float32)
    high, low = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int16)
    split_bfloat16(master, high, low)
    assert high.isnan().tolist() == [True, False] == join_bfloat16(high, low).isnan().tolist()


def test_models_are_the_same_only_with_all_their_parameters() -> None:
    """Peers with personal parts share the others, and each is measured by itself."""
    ours, theirs = (MasterWeights({name: nn.Parameter(torch.zeros(2)) for name in ("body", "head")}) for _ in range(2))
    assert ours.same(theirs)
    with torch.no_grad():
        theirs.parameters["head"].add_(1)
    assert not ours.same(theirs)
