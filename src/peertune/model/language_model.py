"""One peer's causal language model: loss of a batch, which block has gradients, per-layer behaviour."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.config import ModelSection
from peertune.data.batches import Batch
from peertune.errors import ModelError
from peertune.model.blocks import Block, find_layers
from peertune.model.layers import LayerStack, has_dropout
from peertune.model.loss import chunked_cross_entropy


class LanguageModel:
    """Wraps a transformers model; it takes over the forward passes of that instance's layers.

    Sequences are right-padded and attention is causal, so no mask is passed: padding comes after everything it could
    disturb, and the fast causal attention applies.
    """

    def __init__(self, module: nn.Module, config: ModelSection) -> None:
        self.module: Any = module
        dropout = has_dropout(module)
        if dropout and config.prefix_cache:
            raise ModelError(
                f"model.prefix_cache: got true, but {config.path!r} has dropout, which draws anew at each visit;"
                " set its dropout to 0 in its config.json, or leave the cache off"
            )
        self.stack = LayerStack(
            find_layers(module)[1],
            activation_budget=config.activation_budget_mb * 1_000_000,
            prefix_cache=config.prefix_cache,
            compile=config.compile,
            has_dropout=dropout,
        )
        self.has_plain_head = self._check_plain_head()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    def activate(self, block: Block) -> dict[str, nn.Parameter]:
        """Make exactly one block's parameters require gradients and return them by name."""
        wanted = set(block.parameters)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad != (name in wanted):
                parameter.requires_grad_(name in wanted)
            if name not in wanted:
                parameter.grad = None
        self.stack.begin_turn(block.first_layer)
        return {name: p for name, p in self.module.named_parameters() if name in wanted}

    def loss_sum(self, batch: Batch, *, remember: bool = False) -> tuple[Tensor, int]:
        """Summed cross entropy of a batch's target tokens, and their number.

        Args:
            batch: input_ids [batch, length]; targets are the tokens under its loss_mask, each predicted from the left.
            remember: let the prefix cache, where there is one, serve and store these samples.
        """
        self.stack.begin_batch(batch.sample_ids if remember else None)
        rows = batch.loss_mask[:, 1:].to(self.device)
        input_ids = batch.input_ids.to(self.device)
        targets = input_ids[:, 1:][rows]
        if self.has_plain_head:
            hidden = self.module.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            head = self.module.get_output_embeddings()
            loss = chunked_cross_entropy(hidden[:, :-1][rows], head.weight, getattr(head, "bias", None), targets)
        else:
            logits = self.module(input_ids=input_ids, use_cache=False).logits[:, :-1][rows]
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return loss, targets.numel()

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's output [rows, vocabulary] for last hidden states [rows, hidden]."""
        return self.module.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _check_plain_head(self) -> bool:
        """Whether logits are, bit by bit, the head applied to the last hidden state; some models scale or cap them."""
        head = self.module.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return False
        mode = self.module.training
        self.module.eval()
        ids = torch.arange(1, 6, device=self.device)[None] % head.weight.shape[0]
        hidden = self.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.module(input_ids=ids, use_cache=False).logits
        self.module.train(mode)
        return torch.equal(head(hidden), logits)
