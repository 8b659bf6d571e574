"""Bottleneck adapters, which peft lacks. Needs nothing but torch: an exported model takes a copy of this file along."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """h <- h + U gelu(D h), D [size, hidden], U [hidden, size] (Houlsby et al. 2019, arXiv 1902.00751, section 2.1).

    One stands behind each transformer layer; the paper's two a layer stand inside it. U starts at zero.
    """

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, size)
        self.up = nn.Linear(size, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def add_bottlenecks(layers: Iterable[nn.Module], hidden: int, size: int) -> None:
    """Put a `Bottleneck` behind each layer, on the CPU and in float32."""
    for layer in layers:
        layer.add_module("bottleneck", Bottleneck(hidden, size))
        layer.register_forward_hook(_through_bottleneck)


def _through_bottleneck(layer: Any, _inputs: Any, output: Any) -> Any:
    """A function of the module, not a closure, so that a deep copy of a layer uses the copy's own adapter."""
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])
    if isinstance(output, list):
        return [layer.bottleneck(output[0]), *output[1:]]
    return layer.bottleneck(output)
