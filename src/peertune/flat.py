"""Tensors side by side in memory, so that what happens to all of them is one call instead of hundreds.

An adapter is many small tensors, and a call on one takes longer to begin than to carry out. `FlatParameters` lays those
that are trained together out in one vector; `contiguous_runs` finds, among any tensors, those that lie so. What is
computed element by element comes out bitwise the same wherever a tensor lies, so nobody has to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors


def contiguous_runs(*columns: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut columns of tensors into runs: as many next to each other as lie side by side, in order, in every column.

    Args:
        columns: of one length; the n-th tensors of all have as many elements.
    Yields:
        Which tensors a run is of, and of each column one vector that shares its memory; a lone tensor as it is.
    """
    breaks = {0, len(columns[0])}.union(*map(_breaks, columns))
    for start, end in pairwise(sorted(breaks)):
        firsts = [column[start] for column in columns]
        if end - start > 1:
            size = sum(tensor.numel() for tensor in columns[0][start:end])
            firsts = [first.as_strided((size,), (1,), first.storage_offset()) for first in firsts]
        yield slice(start, end), firsts


def split_like(vector: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Views of a vector with the shapes of `like`, one after the other."""
    return _unflatten_dense_tensors(vector.reshape(-1), like)  # type: ignore[no-any-return, no-untyped-call]


class FlatParameters:
    """Parameters of one type that are trained together, moved to one vector; while they are, their gradients too.

    Args:
        parameters: by name; they keep their identity, shapes and values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.gradient: Tensor | None = None
        self._gradients: Sequence[Tensor] = ()
        self.data = torch.empty(0)
        self.move_to(torch.cat([p.detach().reshape(-1) for p in self.parameters.values()]))

    def move_to(self, data: Tensor) -> None:
        """Live in another vector, with the values that are there now."""
        if data.data_ptr() == self.data.data_ptr():
            return
        if self.data.numel():
            data.copy_(self.data)
        self.data = data
        for parameter, part in zip(self.parameters.values(), self._cut(data), strict=True):
            parameter.data = part

    def begin_gradients(self, vector: Tensor) -> None:
        """Let gradients be added up in a vector, from zero."""
        if self.gradient is None or vector.data_ptr() != self.gradient.data_ptr():
            self.gradient, self._gradients = vector, self._cut(vector)
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Make ready for the next step's, also where someone has put gradients of his own in their place."""
        assert self.gradient is not None
        self.gradient.zero_()
        for parameter, part in zip(self.parameters.values(), self._gradients, strict=True):
            if parameter.grad is not part:
                parameter.grad = part

    def end_gradients(self) -> None:
        """Let go of them."""
        self.gradient, self._gradients = None, ()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _cut(self, vector: Tensor) -> Sequence[Tensor]:
        return split_like(vector, list(self.parameters.values()))

    def rows(self, matrix: Tensor) -> dict[str, Tensor]:
        """The rows of a matrix [rows, size], each a vector like `data`: by name, views [rows, ...]."""
        parts = torch.split(matrix, [shape.numel() for shape in self.shapes.values()], dim=1)
        return {n: part.view(-1, *shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}


def _breaks(tensors: Sequence[Tensor]) -> set[int]:
    """Places of the tensors that do not begin where the one before ends, in the same storage."""
    places, end, dtype, storage = set(), -1, None, 0
    for n, tensor in enumerate(tensors):
        start, size = tensor.data_ptr(), tensor.nbytes if tensor.is_contiguous() else -1
        if start != end or size < 0 or tensor.dtype != dtype or tensor.untyped_storage().data_ptr() != storage:
            places.add(n)
            dtype, storage = tensor.dtype, tensor.untyped_storage().data_ptr()
        end = start + size
    return places
