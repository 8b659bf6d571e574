"""The block's Adam: pure update functions, and float32 master weights that cost two bytes beside a bfloat16 model.

Nothing here knows of peers or rounds. All updates work in place on the tensors given and keep no state of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peertune.config import AlgorithmConfig
from peertune.flat import contiguous_runs, split_like

CHUNK_CPU = 1 << 16
"""Elements updated at a time on a CPU: what is made on the way stays in the second-level cache."""
CHUNK_GPU = 1 << 25
"""Elements updated at a time on a GPU: bounds the temporaries, few launches."""


def learning_rate(config: AlgorithmConfig, step: int, num_steps: int) -> float:
    """Rate of local step `step` (from 0) of `num_steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, computed in float32 whatever their type: a float32 scalar.

    Where each of several ranks holds some rows of the parameters, which then name these `ranks`, it is the norm of all
    rows, and all ranks have to ask for it.
    """
    known = [(p, p.grad) for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([grad for _, grad in known], dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    ranks = getattr(known[0][0], "ranks", None)
    if ranks is None:
        return total
    square = total.square()
    dist.all_reduce(square, group=ranks)
    return square.sqrt()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros take the place of a missing one, as of an expert that no token was routed to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def clip_gradients(parameters: Mapping[str, nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their L2 norm is at most `max_norm`; 0: leave them. Missing ones become zero.

    Returns:
        The norm before, a float32 scalar.
    """
    grads = [gradient_of(parameter) for parameter in parameters.values()]
    norm = gradient_norm(parameters.values())
    if max_norm:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for _, (vector,) in contiguous_runs(grads):
            vector.mul_(scale)
    return norm


def adam_moments(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    betas: tuple[float, float],
    *,
    whole: bool = False,
) -> None:
    """m <- a1 m + (1 - a1) g, v <- a2 v + (1 - a2) g g (Kingma & Ba 2015, algorithm 1; DECA's half step r + 1/2).

    Args:
        whole: m <- a1 m + g.
    """
    if whole:
        torch._foreach_mul_(exp_avgs, betas[0])
        torch._foreach_add_(exp_avgs, grads)
    else:
        torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])


def adam_denominators(exp_avg_sqs: list[Tensor], correction: float, eps: float) -> tuple[Tensor, ...]:
    """sqrt(v / correction) + eps, with correction = 1 - a2^(r+1)."""
    found = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(found, math.sqrt(correction))
    torch._foreach_add_(found, eps)
    return found


def join_bfloat16(high: Tensor, low: Tensor) -> Tensor:
    """float32 master weights of a bfloat16 tensor and its 16 remainder bits (int16), both of one shape."""
    return high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)


def split_bfloat16(master: Tensor, high: Tensor, low: Tensor) -> None:
    """Write float32 `master` as the nearest bfloat16 `high` (ties up) and a remainder `low`; they join back exactly."""
    bits = master.view(torch.int32)
    # A GPU's NaN, 0x7fffffff, would be rounded up into a zero.
    top = bits.clamp(max=0x7FFF7FFF).add_(0x8000).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(top)
    low.copy_(bits - top.bitwise_left_shift_(16))


class MasterWeights:
    """Float32 access to a model's trained parameters, whatever type the model holds them in.

    A float32 parameter is its own master. A bfloat16 parameter is the upper half of its master; the lower half is an
    int16 tensor kept here, on the host while the block is not in turn, so no progress is lost between turns.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.remainders: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def activate(self, name: str) -> None:
        """Bring a parameter's remainder to its device: its block's turn begins."""
        parameter = self.parameters[name]
        if parameter.dtype == torch.bfloat16:
            low = self.remainders.get(name)
            device = parameter.device
            self.remainders[name] = (
                torch.zeros(parameter.shape, dtype=torch.int16, device=device) if low is None else low.to(device)
            )

    def release(self, name: str) -> None:
        """Take a parameter's remainder to the host: its block's turn is over."""
        if name in self.remainders:
            self.remainders[name] = self.remainders[name].cpu()

    def same(self, other: MasterWeights) -> bool:
        """Whether the models hold bitwise the same trained parameters."""
        return all(torch.equal(p, other.parameters[name]) for name, p in self.parameters.items())

    @torch.no_grad()
    def snapshot(self, name: str) -> Tensor:
        """A float32 copy of a parameter's master weights."""
        parameter = self.parameters[name]
        if parameter.dtype != torch.bfloat16:
            return parameter.detach().clone()
        low = self.remainders.get(name)
        return (
            parameter.detach().float() if low is None else join_bfloat16(parameter.detach(), low.to(parameter.device))
        )

    def snapshots(self, names: Sequence[str]) -> dict[str, Tensor]:
        """As `snapshot`, of several; copies of float32 parameters lie side by side."""
        parameters = [self.parameters[name].detach() for name in names]
        if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
            return {name: self.snapshot(name) for name in names}
        copies = torch.cat([parameter.reshape(-1) for parameter in parameters])
        return dict(zip(names, split_like(copies, parameters), strict=True))

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Replace a parameter's master weights by float32 `value` of its shape."""
        parameter = self.parameters[name]
        if parameter.dtype != torch.bfloat16:
            parameter.copy_(value)
            return
        if name not in self.remainders:
            self.remainders[name] = torch.zeros(parameter.shape, dtype=torch.int16)
        low = torch.empty(parameter.shape, dtype=torch.int16, device=parameter.device)
        split_bfloat16(value, parameter.detach(), low)
        self.remainders[name].copy_(low)

    def write_all(self, values: Mapping[str, Tensor]) -> None:
        """As `write`, of several."""
        parameters = [self.parameters[name].detach() for name in values]
        if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
            for name, value in values.items():
                self.write(name, value)
            return
        for _, (vector, value) in contiguous_runs(parameters, list(values.values())):
            vector.copy_(value)


@dataclass
class Moments:
    """Adam's state of one parameter; float32, of the parameter's shape, zero at the start of a turn."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    num_steps: int = 0
    """Steps that entered it; kept by those methods whose parameters do not all step together."""

    @classmethod
    def zeros(cls, like: Tensor) -> Moments:
        exp_avg, exp_avg_sq = (torch.zeros(like.shape, dtype=torch.float32, device=like.device) for _ in range(2))
        return cls(exp_avg, exp_avg_sq)

    @classmethod
    def side_by_side(cls, like: Mapping[str, Tensor]) -> dict[str, Moments]:
        """As `zeros`, of several on one device, by name."""
        tensors = list(like.values())
        if not tensors:
            return {}
        size = sum(tensor.numel() for tensor in tensors)
        columns = [torch.zeros(size, dtype=torch.float32, device=tensors[0].device) for _ in range(2)]
        return {
            name: cls(*both)
            for name, *both in zip(like, *(split_like(column, tensors) for column in columns), strict=True)
        }


class Piece(NamedTuple):
    """Of one parameter, or of some side by side, what is updated at a time; all of one shape."""

    theta: Tensor
    low: Tensor | None
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    is_matrix: bool


@torch.no_grad()
def adam_step(
    masters: MasterWeights,
    moments: Mapping[str, Moments],
    *,
    lr: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    eps: float,
    weight_decay: float,
    keep_moments: bool = True,
    whole: bool = False,
) -> None:
    """theta <- (1 - lr wd) theta - lr mhat / (sqrt(vhat) + eps), in the order of operations of torch's AdamW.

    Every parameter that has `moments` takes one step from its `.grad`; many small ones together, large ones a part at a
    time, so that calls are few and what is made on the way is small.

    Args:
        corrections: what m and v are divided by to undo their start at zero: 1 - a1^(r+1), 1 - a2^(r+1).
        weight_decay: decoupled; applied to matrices only, never to norms and biases.
        keep_moments: False takes the step with the half-step moments but leaves `moments` as they were.
        whole: as for `adam_moments`.
    """
    for pieces in _batches(masters, moments):
        exp_avgs, exp_avg_sqs = [piece.exp_avg for piece in pieces], [piece.exp_avg_sq for piece in pieces]
        if not keep_moments:
            exp_avgs, exp_avg_sqs = ([t.clone() for t in tensors] for tensors in (exp_avgs, exp_avg_sqs))
        adam_moments(exp_avgs, exp_avg_sqs, [piece.grad.float() for piece in pieces], betas, whole=whole)
        thetas = [p.theta if p.low is None else join_bfloat16(p.theta, p.low) for p in pieces]
        matrices = [theta for theta, piece in zip(thetas, pieces, strict=True) if piece.is_matrix]
        if weight_decay and matrices:
            torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        denominators = adam_denominators(exp_avg_sqs, corrections[1], eps)
        torch._foreach_addcdiv_(thetas, exp_avgs, denominators, -lr / corrections[0])
        for theta, piece in zip(thetas, pieces, strict=True):
            if piece.low is not None:
                split_bfloat16(theta, piece.theta, piece.low)


def _batches(masters: MasterWeights, moments: Mapping[str, Moments]) -> Iterator[list[Piece]]:
    """The parameters in pieces; those of a list have at most a chunk's elements together."""
    batch: list[Piece] = []
    held = 0
    for whole in _joined(masters, moments):
        chunk = CHUNK_CPU if whole.theta.device.type == "cpu" else CHUNK_GPU
        for piece in [whole] if whole.theta.numel() <= chunk else _split(whole, chunk):
            if batch and held + piece.theta.numel() > chunk:
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += piece.theta.numel()
    if batch:
        yield batch


def _joined(masters: MasterWeights, moments: Mapping[str, Moments]) -> Iterator[Piece]:
    """The parameters whole, those that lie side by side with all that belongs to them as one."""
    wholes = []
    for name, state in moments.items():
        parameter = masters.parameters[name]
        assert parameter.grad is not None
        low = masters.remainders[name] if parameter.dtype == torch.bfloat16 else None
        is_matrix = parameter.ndim > 1
        wholes.append(Piece(parameter.detach(), low, parameter.grad, state.exp_avg, state.exp_avg_sq, is_matrix))
    for (is_split, is_matrix), alike in groupby(wholes, key=lambda whole: (whole.low is not None, whole.is_matrix)):
        if is_split:
            yield from alike
            continue
        columns = zip(*((p.theta, p.grad, p.exp_avg, p.exp_avg_sq) for p in alike), strict=True)
        for _, (theta, grad, exp_avg, exp_avg_sq) in contiguous_runs(*columns):
            yield Piece(theta, None, grad, exp_avg, exp_avg_sq, is_matrix)


def _split(whole: Piece, size: int) -> Iterator[Piece]:
    flat = [whole.theta.view(-1), whole.grad.reshape(-1), whole.exp_avg.view(-1), whole.exp_avg_sq.view(-1)]
    low = repeat(None) if whole.low is None else torch.split(whole.low.view(-1), size)
    for theta, grad, exp_avg, exp_avg_sq, rest in zip(*(torch.split(t, size) for t in flat), low, strict=False):
        yield Piece(theta, rest, grad, exp_avg, exp_avg_sq, whole.is_matrix)
