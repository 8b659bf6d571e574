"""Products of bfloat16 matrices, and attention, on a CPU without instructions for them: in float32, rounded at the end.

There PyTorch multiplies number by number, fifty times slower than in float32. oneDNN, which does it where it can, also
sums in float32 and rounds once. It costs copies in float32 of what one product takes and gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

_PRODUCTS = tuple(f"{name}{form}" for name in ("mm", "bmm", "addmm", "baddbmm") for form in ("", ".out"))
_IN_PLACE = ("addmm_", "baddbmm_")
"""With these, what PyTorch makes of any product of matrices, in forward and backward passes."""
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
        The library that holds the change in place.
    """
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for names, wide in ((_PRODUCTS, _product), (_IN_PLACE, partial(_product, is_in_place=True)), (_ATTENTION, _attend)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            # The last that is asked before the CPU's own kernel, whose place is left to it.
            library.impl(name, _before(operator, wide), "BackendSelect", with_keyset=True)
    return library


def _before(operator: Any, wide: Callable[..., Any]) -> Callable[..., Any]:
    """What is asked before an operator's kernels: `wide`, which is given the one that follows, where that is the CPU's.

    While that runs, other threads do too, such as a site's network.
    """
    torch_c: Any = torch._C
    later = torch_c._dispatch_keyset_full_after(torch_c.DispatchKey.BackendSelect)

    def kernel(keys: Any, *operands: Any, **options: Any) -> Any:
        left = keys & later
        following = partial(operator.redispatch, left)
        is_cpu = left.highestPriorityTypeId() == torch_c.DispatchKey.CPU
        return wide(following, *operands, **options) if is_cpu else following(*operands, **options)

    return kernel


def _product(kernel: Callable[..., Any], *operands: Any, is_in_place: bool = False, **options: Any) -> Any:
    out: Any = operands[0] if is_in_place else options.get("out")
    a, b = operands[-2:]
    rows = min((*a.shape[-2:-1], *b.shape[-1:]), default=0)
    if rows < _MIN_ROWS or any(x.dtype != torch.bfloat16 for x in (*operands, *([] if out is None else [out]))):
        return kernel(*operands, **options)
    if "out" in options:
        options["out"] = torch.empty_like(out, dtype=torch.float32)
    found = kernel(*(x.float() for x in operands), **options)
    return found.bfloat16() if out is None else out.resize_(found.shape).copy_(found)


def _attend(kernel: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    if operands[0].dtype != torch.bfloat16:
        return kernel(*operands, **options)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bfloat16:
        options["attn_mask"] = mask.float()
    wide = (x.float() if isinstance(x, torch.Tensor) else x for x in operands)
    found = kernel(*wide, **options)
    return tuple(x.bfloat16() if x.ndim == 4 else x for x in found)  # the logarithms of sums are float32 anyway
