"""Next-token loss on label rows only, in chunks: the logits of all positions never stand in memory together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_BYTES_CPU = 1 << 22
LOGITS_BYTES_GPU = 1 << 28
"""Memory that one chunk of float32 logits may take."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W' + b)[y] over rows; gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, targets.numel(), rows):
            h, y = hidden[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(h, weight, bias).float()
            peak, picked = logits.amax(-1, keepdim=True), logits.gather(1, y)
            p = logits.sub_(peak).exp_()
            norm = p.sum(-1, keepdim=True)
            total += (norm.log() + peak - picked).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grad = p.div_(norm).scatter_add_(1, y, torch.full_like(norm, -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(h.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else hidden * scale,
            None if weight is None else (weight * scale).to(ctx.dtypes[0]),
            None if bias is None else (bias * scale).to(ctx.dtypes[1]),
            None,
            None,
        )


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over rows of the cross entropy between softmax(h W' + b) and the target.

    Args:
        hidden: [rows, hidden], the head's input at the positions that predict a target.
        weight: [vocabulary, hidden].
        bias: [vocabulary], or None.
        targets: [rows], int64.
    Returns:
        A float32 scalar, differentiable in the first three.
    """
    trains = weight.requires_grad and torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk_rows(weight, trains=trains))  # type: ignore[no-any-return, no-untyped-call]


def chunk_rows(weight: Tensor, *, trains: bool = False) -> int:
    """Rows of logits to make at a time with a head's weight [vocabulary, hidden].

    Args:
        trains: the weight gets a gradient, to which each chunk adds one of its whole size. That of a large vocabulary
            takes far more room than the budget, so there an eighth as much more, and fewer chunks.
    """
    budget = LOGITS_BYTES_CPU if weight.device.type == "cpu" else LOGITS_BYTES_GPU
    return max(16, budget // (4 * weight.shape[0]), weight.shape[1] // 8 if trains else 0)
