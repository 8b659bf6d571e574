"""Several peers' models with LoRA on one frozen base, run as one: a batch of each, one pass through the base for all.

Small batches leave a processor waiting for the next call; a batch as many times as large costs less than as many
batches. Gradients are those of one model after the other, up to the rounding of products of another shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peertune.data.batches import Batch
from peertune.errors import ConfigError
from peertune.model.language_model import LanguageModel
from peertune.model.lora import is_plain, plain_layers, stacked
from peertune.model.packing import pack


class StackedModels:
    """Models that share every parameter but the factors of plain LoRA layers.

    Raises:
        ConfigError: they are not of that kind.
    """

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        self.models = list(models)
        self._layers = [plain_layers(model.module) for model in models]
        first = models[0]
        factors = {id(p) for layer in self._layers[0] for n, p in layer.named_parameters() if "lora_" in n}
        adapter = {id(p) for n, p in first.module.named_parameters() if "lora_" in n}
        plain = all(is_plain(layer) for layer in self._layers[0])
        if not adapter or adapter != factors or not plain:
            raise ConfigError(
                "run.batched_peers: expected plain LoRA without dropout, on linear layers that are not quantised; set"
                " run.batched_peers = 1"
            )
        if not first.packs:
            raise ConfigError(
                "run.batched_peers: got a model, or keys of [model], with which sequences cannot be packed; it takes a"
                ' CPU, model.attention = "auto", causal attention of transformers\' own, and neither prefix_cache,'
                " compile nor activation_budget_mb; else set run.batched_peers = 1"
            )

    def backward(self, members: Sequence[int], batches: Sequence[Batch], num_batches: int) -> list[Tensor]:
        """As each member's `LanguageModel.backward`, for one batch of each.

        Args:
            members: indices of the models, none twice.
            batches: by member.
        Returns:
            By member its mean loss a target token over `num_batches`, a float32 scalar without gradient.
        """
        first = self.models[members[0]]
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
