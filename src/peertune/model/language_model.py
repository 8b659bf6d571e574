"""One peer's causal language model: loss of a batch, which block has gradients, per-layer behaviour."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peertune.config import ModelSection
from peertune.data.batches import Batch
from peertune.errors import ModelError
from peertune.model import attention, lora, norm
from peertune.model.adapters import core_of, is_peft
from peertune.model.blocks import Block, find_layers
from peertune.model.layers import LayerStack, draws_in_training, lowest_layers
from peertune.model.loss import chunked_cross_entropy
from peertune.model.packing import Packing, is_worth_packing, pack, packed


class LanguageModel:
    """Wraps a transformers model, with or without an adapter; it takes over the forward passes of its layers.

    Sequences are right-padded and attention is causal, so no mask is passed: padding comes after everything it could
    disturb, and the fast causal attention applies. Where the model allows it, padding is left out (`packing`).
    """

    def __init__(self, module: nn.Module, config: ModelSection, *, like: LanguageModel | None = None) -> None:
        """
        Args:
            module: the model.
            like: another instance of the same model, which knows what has to be tried out.
        """
        self.module: Any = module
        lora.take_over(module)
        if not config.compile:  # which makes one kernel of a norm, forward and backward
            norm.take_over(module)
        self.core = core_of(module)
        """The transformers model itself."""
        self._decoder = _decoder_of(self.core, config.path)
        # What transformers calls keys and values, from 5.24 on and before.
        known = inspect.signature(self._decoder.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"
        adapter = module.peft_config["default"] if is_peft(module) else None  # type: ignore[index]
        self.num_virtual: int = getattr(adapter, "num_virtual_tokens", 0)
        if like is None:
            self._try_out(config.path)
        draws = draws_in_training(module)
        if draws and config.prefix_cache:
            raise ModelError(
                f"model.prefix_cache: got true, but {config.path!r} has dropout or jitter, drawn anew at each visit;"
                " set it to 0 in its config.json, or leave the cache off"
            )
        layers = find_layers(self.core)[1]
        self._lowest: dict[str, int] = {}
        if config.prefix_cache:
            self._lowest = self._lowest_layers(layers) if like is None else like._lowest
        self.stack = LayerStack(
            layers,
            activation_budget=config.activation_budget_mb * 1_000_000,
            prefix_cache=config.prefix_cache,
            compile=config.compile,
            draws=draws,
        )
        if config.prefix_cache and like is None:
            self._try_cache(config.path, len(layers))
        self.has_plain_head: bool = self._check_plain_head() if like is None else like.has_plain_head
        self._keeps_places: bool = self._check_places() if like is None else like._keeps_places
        self.no_packing: str = self._try_packing(config) if like is None else like.no_packing
        """Why batches of this model cannot run without padding; empty: they can."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    @property
    def vocabulary(self) -> int:
        """Tokens that the output head tells apart."""
        return int(self.core.get_output_embeddings().weight.shape[0])

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, mixed and stored of each parameter here, by name: all of it."""
        return dict(self.module.named_parameters())

    def activate(self, block: Block) -> dict[str, nn.Parameter]:
        """Make exactly one block's parameters require gradients and return them by name, as `parameters` does."""
        wanted = set(block.parameters)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad != (name in wanted):
                parameter.requires_grad_(name in wanted)
        active = {}
        for name, parameter in self.parameters().items():
            if name in wanted:
                active[name] = parameter
            else:
                parameter.grad = None
        self.stack.begin_turn(min([block.first_layer, *(self._lowest.get(n, block.first_layer) for n in wanted)]))
        return active

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """Add to `.grad` of `parameters` the gradient of a batch's summed loss over `num_targets`.

        Args:
            num_targets: target tokens of all batches of the step, of which this is one.
        Returns:
            What was derived: nats, a float32 scalar without gradient; over a step's batches it sums to their mean loss.
        """
        loss = self.loss_sum(batch, remember=True)[0] / max(1, num_targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts: no dropout, no gradients, and nothing served from or kept in the prefix cache of training."""
        mode = self.module.training
        self.module.eval()
        self.stack.begin_batch(None)
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(mode)

    def forget(self) -> None:
        """Weights were replaced from outside: drop what was computed with the old ones."""
        self.stack.forget()

    def loss_sum(self, batch: Batch, *, remember: bool = False) -> tuple[Tensor, int]:
        """Summed cross entropy of a batch's target tokens, and their number.

        Args:
            batch: input_ids [batch, length]; targets are the tokens under its loss_mask, each predicted from the left.
            remember: let the prefix cache, where there is one, serve and store these samples.
        """
        self.stack.begin_batch(batch.sample_ids if remember else None)
        if self.packs(batch) and is_worth_packing(batch):
            tokens = pack([batch], self.device)
            targets = tokens.input_ids[tokens.targets]
            return self.head_loss(self.hidden_before_targets(tokens)[0], targets), targets.numel()
        rows = batch.loss_mask[:, 1:].to(self.device)
        input_ids = batch.input_ids.to(self.device)
        targets = input_ids[:, 1:][rows]
        if self.has_plain_head:
            loss = self.head_loss(self.hidden(input_ids)[0][:, :-1][rows], targets)
        else:
            places = rows.any(0).nonzero()[:, 0]
            logits = self.logits_at(input_ids, places)[rows[:, places]]
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return loss, targets.numel()

    def packs(self, batch: Batch) -> bool:
        """Whether a batch can run without padding: no layer's window may be shorter than a sequence."""
        return not self.no_packing and batch.input_ids.shape[1] <= self.window()

    def hidden_before_targets(self, tokens: Packing) -> list[Tensor]:
        """Last hidden states at the places before the targets: by row of `tokens`, [its targets, hidden]."""
        with packed(tokens):
            out = self._decoder(input_ids=tokens.input_ids, position_ids=tokens.positions, use_cache=False)
        # A sequence's first token is never a target, so the place before is of the same sequence.
        return [own[:-1][is_target[1:]] for own, is_target in zip(out.last_hidden_state, tokens.targets, strict=True)]

    def hidden(
        self, input_ids: Tensor, mask: Tensor | None = None, *, use_cache: bool = False, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Last hidden states of tokens, behind the soft prompt or prefix where there is one.

        Args:
            input_ids: [batch, length]; with `past`, the tokens that go on from it.
            mask: with `past`, bool [batch, length, places so far + length]: which places each token sees, itself among
                them; as many come before it. None: every place up to it.
            use_cache: also return keys and values.
            past: keys and values of the tokens so far.
        Returns:
            [batch, length, hidden], and the keys and values or None.
        """
        options: dict[str, Any] = {"use_cache": use_cache}
        if mask is not None:
            mask = torch.cat([mask.new_ones(*mask.shape[:2], self.num_virtual), mask], 2)
            options["position_ids"] = mask.sum(2) - 1
            # As numbers to add to the scores: the form that every attention takes.
            added = torch.zeros_like(mask, dtype=self.core.get_input_embeddings().weight.dtype)
            options["attention_mask"] = added.masked_fill_(~mask, torch.finfo(added.dtype).min)[:, None]
        prompt = self.module.get_prompt(batch_size=len(input_ids)) if self.num_virtual and past is None else None
        if isinstance(prompt, Tensor):
            tokens = self.core.get_input_embeddings()(input_ids)
            options["inputs_embeds"] = torch.cat([prompt.to(tokens.dtype), tokens], 1)
        else:  # a prefix is keys and values, as `past` is
            options |= {"input_ids": input_ids, self._cache: past if prompt is None else prompt}
            options["use_cache"] = use_cache or prompt is not None
        out = self._decoder(**options)
        hidden = out.last_hidden_state[:, self.num_virtual :] if isinstance(prompt, Tensor) else out.last_hidden_state
        return hidden, getattr(out, self._cache) if use_cache else None

    def all_logits(self, input_ids: Tensor) -> Tensor:
        """The model's own output [batch, length, vocabulary] for tokens [batch, length]."""
        return self.module(input_ids=input_ids, use_cache=False).logits[:, -input_ids.shape[1] :]  # type: ignore[no-any-return]

    def logits_at(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """As `all_logits`, [batch, places, vocabulary], at some places [places] of the sequences; where the model
        allows it, no others are made."""
        if self._keeps_places:
            return self.module(input_ids=input_ids, use_cache=False, logits_to_keep=places).logits  # type: ignore[no-any-return]
        return self.all_logits(input_ids)[:, places]

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy of targets [rows] under the head's output for last hidden states [rows, hidden]."""
        head = self.core.get_output_embeddings()
        return chunked_cross_entropy(hidden, head.weight, getattr(head, "bias", None), targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's output [rows, vocabulary] for last hidden states [rows, hidden]."""
        return self.core.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def _check_plain_head(self) -> bool:
        """Whether logits are, bit by bit, the head applied to the last hidden state; some models scale or cap them."""
        head = self.core.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return False
        ids = self._few_tokens()
        with self.evaluating():
            hidden = self.hidden(ids)[0]
            fits = hidden.dtype == head.weight.dtype and hidden.shape[-1] == head.in_features
            return fits and torch.equal(head(hidden), self.all_logits(ids))

    def _check_places(self) -> bool:
        """Whether a model whose output has to be asked for as a whole makes it at some places only."""
        if self.has_plain_head or self.num_virtual:
            return False
        if "logits_to_keep" not in inspect.signature(self.core.forward).parameters:
            return False
        ids = self._few_tokens()
        places = torch.tensor([1, 3], device=self.device)
        tolerance = 1e-4 if next(self.module.parameters()).dtype == torch.float32 else 0.05
        with self.evaluating():
            expected = self.all_logits(ids)[:, places].float()
            try:
                found = self.module(input_ids=ids, use_cache=False, logits_to_keep=places).logits.float()
            except (IndexError, RuntimeError, TypeError, ValueError):  # one that takes a number of places
                return False
        return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())

    def _try_out(self, path: str) -> None:
        """Refuse a model that cannot be trained here, by the states of five tokens and their derivatives.

        Derivatives, as weights that are small yet let so little through that rounding hides it.

        Raises:
            ModelError: a pass fails; the states depend on what comes after them, or not on the adapter.
        """
        ids = self._few_tokens()
        seen: list[Tensor] = []

        def note(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1].clone()  # which the model may change in place

        trained = [p for p in self.module.parameters() if p.requires_grad]
        mode = self.module.training
        self.module.eval()
        hook = self.core.get_input_embeddings().register_forward_hook(note)
        try:
            with torch.enable_grad():
                hidden = self.hidden(ids)[0][:, :4].float()
                drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
                found = torch.autograd.grad((hidden * drawn).sum(), [*seen, *trained], allow_unused=True)
            of_tokens, of_adapter = found[: len(seen)], found[len(seen) :]
            with torch.no_grad():
                self.all_logits(ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code runs into
            what = "with this algorithm.adapter" if trained else f"in {next(self.module.parameters()).dtype}"
            raise ModelError(
                f"model.path: {path!r} ({type(self.core).__name__}) {what} fails on five tokens, expected to run:"
                f" {' '.join(str(error).split())[:200]}; take another"
                f" {'adapter, or other target_modules' if trained else 'model, or model.dtype'}"
            ) from error
        finally:
            hook.remove()
            self.module.train(mode)
        own = [g for g in of_tokens if g is not None and g.shape[:2] == ids.shape]
        if any(g[:, 4:].norm() > 1e-6 * g.norm() for g in own):  # through a mask nothing comes at all
            raise ModelError(
                f"model.path: in {path!r} tokens see those after them, expected a causal language model; a BERT needs"
                " is_decoder = true in its config.json, and weights that were trained so"
            )
        if trained and all(g is None for g in of_adapter):
            raise ModelError(
                f"algorithm.adapter: {type(self.core).__name__} makes no use of this kind, expected one that changes"
                " what it says; take another"
            )

    def _lowest_layers(self, layers: nn.ModuleList) -> dict[str, int]:
        """By parameter, as `lowest_layers`."""
        return lowest_layers(self.module, layers, lambda: self.hidden(self._few_tokens()))

    def _few_tokens(self) -> Tensor:
        """Token ids [1, 5]."""
        return torch.arange(1, 6, device=self.device)[None] % int(self.core.get_input_embeddings().weight.shape[0])

    def _try_cache(self, path: str, num_layers: int) -> None:
        """Refuse the prefix cache where the last layer alone does not give what all do. Raises ModelError."""
        self.stack.begin_turn(num_layers - 1)
        found: list[Tensor] = []
        with self.evaluating():
            try:
                for _visit in range(2):
                    self.stack.begin_batch((0,))
                    found.append(self.hidden(self._few_tokens())[0])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever a model's own code makes of a layer that was skipped
                found = found[:1]
        self.stack.begin_batch(None)
        self.stack.forget()
        self.stack.begin_turn(0)
        if len(found) < 2 or not torch.equal(*found):
            raise ModelError(
                f"model.prefix_cache: got true, but layers of {path!r} ({type(self.core).__name__}) hand on other"
                " than one state [batch, length, hidden]; leave the cache off"
            )

    def window(self) -> float:
        """How far back, in tokens, the layers that look back least do."""
        config = self.core.config.get_text_config()
        keys = ("sliding_window", "attention_chunk_size")
        return min((w for key in keys if (w := getattr(config, key, None))), default=math.inf)

    def _try_packing(self, config: ModelSection) -> str:
        """As `no_packing`: tries whether packed sequences come out as padded ones do, and none sees another."""
        for key in ("prefix_cache", "compile", "activation_budget_mb"):
            if getattr(config, key):
                return f"model.{key} is set"
        if self.num_virtual:
            return "it has virtual tokens"
        if not self.has_plain_head:
            return "its head scales or caps its output"
        if self.device.type != "cpu" or self.core.config._attn_implementation != attention.NAME:
            return "its attention is not ours, which is for CPUs, model.attention = 'auto' and models that can have it"
        ids = torch.arange(1, 15).view(2, 7) % self.core.get_input_embeddings().weight.shape[0]
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        batch = Batch(ids, mask, mask.bool() & (torch.arange(7) > 0), (0, 1))
        changed = Batch(torch.stack([ids[0].flip(0), ids[1]]), mask, batch.loss_mask, (0, 1))
        with self.evaluating():
            padded = self.hidden(ids)[0][:, :-1][batch.loss_mask[:, 1:]]
            try:
                [packed_], [beside_another] = (
                    self.hidden_before_targets(pack([b], self.device)) for b in (batch, changed)
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:  # RuntimeError: a mask of its own, of another size
                return f"it takes no positions, or makes its own mask: {error}"
        second = slice(3, None)  # the first has three targets
        if not torch.equal(packed_[second], beside_another[second]):
            return "its layers look from one sequence to the next"
        tolerance = 1e-4 if padded.dtype == torch.float32 else 0.05
        if (packed_ - padded).float().norm() > tolerance * padded.float().norm():
            return "packed sequences come out otherwise than padded ones"
        return ""


def _decoder_of(core: Any, path: str) -> Any:
    """A transformers model without its head. Raises ModelError where it cannot be had."""
    if core.base_model is not core:
        return core.base_model
    for found in (core.get_decoder(), getattr(core, "model", core)):
        if found is not core:
            return found
    raise ModelError(f"model.path: {path!r} ({type(core).__name__}) has no part that gives hidden states by itself")
