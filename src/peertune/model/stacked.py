"""Several peers' models with LoRA on one frozen base, run as one: a batch of each, one pass through the base for all.

Small batches leave a processor waiting for the next call; a batch as many times as large costs less than as many
batches. Gradients are those of one model after the other, up to the rounding of products of another shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peertune.data.batches import Batch
from peertune.errors import ConfigError, ModelError
from peertune.model.language_model import LanguageModel
from peertune.model.lora import is_plain, plain_layers, stacked
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
        ids = torch.zeros(1, 2, dtype=torch.int64)
        trial = Batch(ids, torch.ones_like(ids), ids.bool(), (0,))
        with torch.no_grad(), stacked(self._layers):
            first.hidden_before_targets(pack([trial] * len(models), first.device))

    def backward(self, members: Sequence[int], batches: Sequence[Batch], num_batches: int) -> list[Tensor]:
        """As each member's `LanguageModel.backward`, for one batch of each.

        Args:
            members: indices of the models, none twice.
            batches: by member.
        Returns:
            By member its mean loss a target token over `num_batches`, a float32 scalar without gradient.
        """
        first = self.models[members[0]]
        if not all(first.packs(batch) for batch in batches):
            raise ModelError(
                "run.batched_peers: got sequences longer than the window of some of the model's layers; lower"
                " model.max_length, or set run.batched_peers = 1"
            )
        first.stack.begin_batch(None)
        tokens = pack(batches, first.device)
        with stacked([self._layers[i] for i in members]):
            hidden = first.hidden_before_targets(tokens)
        losses = []
        for own, ids, is_target in zip(hidden, tokens.input_ids, tokens.targets, strict=True):
            loss = first.head_loss(own, ids[is_target])
            losses.append(loss / (max(1, len(own)) * num_batches))
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        return [loss.detach() for loss in losses]
