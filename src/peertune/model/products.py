"""Products of bfloat16 matrices, and attention, on a CPU without instructions for them: in float32, rounded at the end.

There PyTorch multiplies number by number, fifty times slower than in float32. oneDNN, which does it where it can, also
sums in float32 and rounds once. It costs copies in float32 of what one product takes and gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
"""What PyTorch makes of any product of matrices, in forward and backward passes."""
_ATTENTION = tuple(f"_scaled_dot_product_flash_attention_for_cpu{direction}" for direction in ("", "_backward"))
"""PyTorch's fused kernels, which have products within."""
_MIN_ROWS = 8
"""For fewer, as where a text is generated, copying the other operand takes longer than the product does as it is."""


def are_native() -> bool:
    """Whether PyTorch has products of bfloat16 matrices made for this CPU."""
    there: Any = torch.backends.mkldnn
    return there.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def widen() -> Any:
    """From now on, multiply bfloat16 matrices on the CPU as float32, in the whole process.

    Returns:
        The library that holds the change in place; None where PyTorch is too old to have it, and stays slow.
    """
    if not hasattr(torch.library, "get_kernel"):
        return None
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name in _PRODUCTS:
            for overload in (name, f"{name}.out"):
                kernel = torch.library.get_kernel(f"aten::{overload}", "CPU")
                library.impl(overload, _widened(kernel), "CPU", with_keyset=True)
        for name in _ATTENTION:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _widened_attention(kernel), "CPU", with_keyset=True)
    return library


def _widened(kernel: Any) -> Callable[..., Any]:
    def product(keys: Any, *operands: Any, **options: Any) -> Any:
        a, b = operands[-2:]
        rows = min((*a.shape[-2:-1], *b.shape[-1:]), default=0)
        if rows < _MIN_ROWS or any(x.dtype != torch.bfloat16 for x in operands):
            return kernel.call_boxed(keys, *operands, **options)
        out = options.get("out")
        if out is not None:
            options["out"] = torch.empty_like(out, dtype=torch.float32)
        found = kernel.call_boxed(keys, *(x.float() for x in operands), **options)
        return found.bfloat16() if out is None else out.copy_(found)

    return product


def _widened_attention(kernel: Any) -> Callable[..., Any]:
    def attention(keys: Any, *operands: Any, **options: Any) -> Any:
        if operands[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keys, *operands, **options)
        mask = options.get("attn_mask")
        if mask is not None and mask.dtype == torch.bfloat16:
            options["attn_mask"] = mask.float()
        wide = (x.float() if isinstance(x, torch.Tensor) else x for x in operands)
        found = kernel.call_boxed(keys, *wide, **options)
        return tuple(x.bfloat16() if x.ndim == 4 else x for x in found)  # the logarithms of sums are float32 anyway

    return attention
