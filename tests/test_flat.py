"""Tensors side by side are dealt with as one, and nobody can tell from what comes out."""

from __future__ import annotations

import torch
from torch import nn

from peertune.exchange import Inbox
from peertune.flat import FlatParameters, contiguous_runs, split_like
from peertune.optim import MasterWeights, Moments, adam_step

SHAPES = [(3, 5), (7,), (2, 2, 2), (1, 33)]


def separate(seed: int) -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return {str(n): nn.Parameter(torch.randn(shape, generator=draws)) for n, shape in enumerate(SHAPES)}


def parts_of(vector: torch.Tensor) -> list[torch.Tensor]:
    return split_like(vector, [torch.empty(shape) for shape in SHAPES])


def runs(*columns: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run, _ in contiguous_runs(*columns)]


def test_what_lies_side_by_side_in_all_columns_is_one_run() -> None:
    size = sum(torch.Size(shape).numel() for shape in SHAPES)
    one, other = parts_of(torch.arange(size)), parts_of(torch.arange(size) + 1)
    assert runs(one, other) == [(0, 4)]
    ((_, (vector, _)),) = contiguous_runs(one, other)
    vector += 1
    assert torch.equal(one[3].flatten(), torch.arange(size)[-33:] + 1)  # the same memory
    assert runs(one, [*other[:2], other[2].clone(), other[3]]) == [(0, 2), (2, 3), (3, 4)]
    assert runs(one, [other[1], other[0], *other[2:]]) == [(0, 1), (1, 2), (2, 4)]
    assert runs([]) == []


def test_neighbours_of_other_types_or_with_gaps_are_no_run() -> None:
    memory = torch.zeros(64)
    halves = memory[:8], memory[8:16].view(torch.int32)
    assert runs(list(halves)) == [(0, 1), (1, 2)]
    square = memory[:16].view(4, 4)
    assert runs([square[:, :2], memory[8:10]]) == [(0, 1), (1, 2)]
    assert runs([memory[:4], memory[5:8]]) == [(0, 1), (1, 2)]


def test_flat_parameters_keep_values_identity_and_take_gradients() -> None:
    before, after = separate(0), separate(0)
    flat = FlatParameters(after)
    size = flat.data.numel()
    flat.begin_gradients(torch.ones(size))
    x = torch.linspace(-1, 1, 33)
    for parameters in (before, after):
        loss = sum((p * x[: p.shape[-1]]).square().sum() for p in parameters.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[name].grad)
    assert flat.gradient is not None
    assert torch.equal(flat.gradient, torch.cat([p.grad.flatten() for p in before.values()]))
    after["1"].grad = torch.ones(7)  # someone's own
    flat.zero_gradients()
    assert not after["1"].grad.any()
    assert after["1"].grad.data_ptr() == flat.gradient[15:].data_ptr()
    flat.end_gradients()
    assert all(parameter.grad is None for parameter in after.values())


def test_flat_parameters_move_with_their_values() -> None:
    parameters = separate(0)
    flat = FlatParameters(parameters)
    data, gradients = torch.empty(2, flat.data.numel()), torch.ones(2, flat.data.numel())
    flat.move_to(data[1])
    flat.begin_gradients(gradients[1])
    assert all(torch.equal(p, before) for p, before in zip(parameters.values(), separate(0).values(), strict=True))
    assert not gradients[1].any()
    rows = flat.rows(data)
    data[1] += 1
    for name, parameter in parameters.items():
        assert torch.equal(rows[name][1], parameter)


def test_adam_takes_the_same_step_wherever_tensors_lie() -> None:
    found = []
    for is_flat in (False, True):
        parameters, gradients = separate(0), separate(1)
        moments = {name: Moments.zeros(p) for name, p in parameters.items()}
        if is_flat:
            FlatParameters(parameters).begin_gradients(torch.empty(sum(p.numel() for p in parameters.values())))
            moments = Moments.side_by_side(parameters)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].detach().clone() if parameter.grad is None else parameter.grad
            parameter.grad.copy_(gradients[name].detach())
        for step in (1, 2):
            corrections = 1 - 0.9**step, 1 - 0.999**step
            masters = MasterWeights(parameters)
            adam_step(masters, moments, lr=0.1, betas=(0.9, 0.999), corrections=corrections, eps=1e-8, weight_decay=0.1)
        found.append([p.detach() for p in parameters.values()] + [m.exp_avg_sq for m in moments.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], separate(0)["0"])


def test_means_are_the_same_wherever_payloads_lie() -> None:
    names = [str(n) for n in range(len(SHAPES))]
    loose = {source: {n: p.detach() for n, p in separate(source).items()} for source in range(3)}
    flat = {source: MasterWeights(separate(source)).snapshots(names) for source in range(3)}
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    whole, *rest = Inbox(weights, flat).means(names)
    assert not rest
    assert list(whole) == names
    for found in Inbox(weights, loose).means(names):
        for name, mean in found.items():
            assert torch.equal(mean, whole[name])
            assert torch.equal(mean, Inbox(weights, loose).mean(name))
    target = MasterWeights(separate(9))
    target.write_all(whole)
    assert all(torch.equal(target.parameters[name], whole[name]) for name in names)


def test_bfloat16_parameters_are_copied_and_written_with_their_remainders() -> None:
    parameters = {name: nn.Parameter(p.detach().bfloat16()) for name, p in separate(0).items()}
    masters, values = MasterWeights(parameters), {name: p.detach() for name, p in separate(1).items()}
    masters.write_all(values)
    assert all(torch.equal(value, values[name]) for name, value in masters.snapshots(list(values)).items())
