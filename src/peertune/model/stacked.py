"""Several peers' models with LoRA on one frozen base, run as one: a batch of each, one pass through the base for all.

Small batches leave a processor waiting for the next call; a batch as many times as large costs less than as many
batches. Gradients are those of one model after the other, up to the rounding of products of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peertune.data.batches import Batch
from peertune.errors import ConfigError, ModelError
from peertune.flat import FlatParameters
from peertune.model.language_model import LanguageModel
from peertune.model.lora import factors_of, is_plain, plain_layers, stacked
from peertune.model.packing import pack


class StackedModels:
    """Models with one base and plain LoRA layers of their own, on all of which the same happens.

    Args:
        models: instances that `clone_model` made of one.
    Raises:
        ConfigError: they cannot run as one.
        ModelError: a LoRA layer is not called with all tokens.
    """

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        self.models = list(models)
        self._layers = [plain_layers(model.module) for model in models]
        first = models[0]
        plain = {id(p) for layer in self._layers[0] if is_plain(layer) for p in layer.parameters()}
        other = [n for n, p in first.module.named_parameters() if p.requires_grad and id(p) not in plain]
        if other or not plain:
            raise ConfigError(
                "run.batched_peers: expected LoRA without dropout on linear layers to be all that is"
                f" trained, got {other[0] if other else 'none'}; name other algorithm.target_modules, or set"
                " run.batched_peers = 1"
            )
        if first.no_packing:
            raise ConfigError(
                f"run.batched_peers: this model's sequences cannot be packed: {first.no_packing}; set"
                " run.batched_peers = 1"
            )
        names = {id(p): name for name, p in first.module.named_parameters()}
        self._names = [tuple(names[id(p)] for p in factors_of(layer)) for layer in self._layers[0]]
        self._flat: FlatParameters | None = None
        """What one of the models trains; all train the same."""
        self._data = self._gradients = torch.empty(0)
        """[models, size]: what they train, and its gradients."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        trial = Batch(ids, torch.ones_like(ids), ids.bool(), (0,))
        members = range(len(models))
        with torch.no_grad(), stacked(self._layers[0], self._factors(members, {})):
            first.hidden_before_targets(pack([trial] * len(models), first.device))

    def lay_out(self, trained: Mapping[int, FlatParameters]) -> None:
        """Move what models train to the rows of one matrix, so that no step has to put it together.

        Args:
            trained: by index of a model, what it trains from now on; of all that will take steps, and alike.
        """
        first = next(iter(trained.values()))
        if self._flat is None or self._flat.shapes != first.shapes:
            self._flat, self._data = first, first.data.new_empty(len(self.models), first.data.numel())
            self._gradients = torch.empty_like(self._data)
        for i, flat in trained.items():
            flat.move_to(self._data[i])
            flat.begin_gradients(self._gradients[i])

    def _factors(self, members: Sequence[int], rows: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """By layer, the members' A and B, each as one tensor: of `rows`, or put together here."""

        def whole(layer: int, factor: int) -> Tensor:
            if (found := rows.get(self._names[layer][factor])) is not None:
                return found
            return torch.stack([factors_of(self._layers[i][layer])[factor] for i in members])

        return [(whole(layer, 0), whole(layer, 1)) for layer in range(len(self._names))]

    def backward(self, members: Sequence[int], batches: Sequence[Batch], num_targets: Sequence[int]) -> list[Tensor]:
        """As each member's `LanguageModel.backward`, for one batch of each.

        Args:
            members: indices of the models, none twice.
            batches, num_targets: by member.
        Returns:
            By member, a float32 scalar without gradient.
        """
        first = self.models[members[0]]
        if not all(first.packs(batch) for batch in batches):
            raise ModelError(
                "run.batched_peers: got sequences longer than the window of some of the model's layers; lower"
                " model.max_length, or set run.batched_peers = 1"
            )
        first.stack.begin_batch(None)
        tokens = pack(batches, first.device)
        rows: Mapping[str, Tensor] = {}
        if self._flat is not None:
            is_all = len(members) == len(self.models)
            leaf = (self._data if is_all else self._data[members]).detach().requires_grad_()
            leaf.grad = self._gradients if is_all else self._gradients[members]
            rows = self._flat.rows(leaf)
        with stacked(self._layers[members[0]], self._factors(members, rows)):
            hidden = first.hidden_before_targets(tokens)
        losses = []
        for own, ids, is_target, number in zip(hidden, tokens.input_ids, tokens.targets, num_targets, strict=True):
            losses.append(first.head_loss(own, ids[is_target]) / max(1, number))
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        if self._flat is not None and not is_all:
            self._gradients[members] = leaf.grad  # type: ignore[assignment]
        return [loss.detach() for loss in losses]
