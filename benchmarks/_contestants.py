"""The ways of training that `block_step.py` compares, behind one small interface.

BAdam's own checkpointing callback crashes on transformers 5. Its authors' policy is emulated instead: every layer from
the active block upwards is recomputed, here non-reentrant, which spares BAdam the input gradient of its active layer.
"""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from peertune.algorithms.deca import Deca, DecaConfig
from peertune.config import ModelSection
from peertune.data.batches import Batch, Batches
from peertune.model.attention import choose_attention
from peertune.model.blocks import partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.peer import Peer
from peertune.seeds import derive_seed
from peertune.topology import Topology

LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8
# float32 logits that the hand-written limit holds at a time
LOGITS_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}


@dataclass(frozen=True)
class Shape:
    """A Llama, untied, and the batch it is fed."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    batch: int
    length: int


@dataclass(frozen=True)
class Options:
    """What may be switched on. `compile` and `cache` are known to `Limit` and `Peertune` only."""

    checkpointing: bool = False
    compile: bool = False
    cache: bool = False


class Contestant(ABC):
    """One way of training, on a model of its own. Made cheap; `setup` builds, `teardown` frees."""

    block_wise: ClassVar[bool] = True
    needs: ClassVar[str] = ""
    """A package beyond peertune's own dependencies."""

    def __init__(self, shape: Shape, device: torch.device, options: Options) -> None:
        self.shape, self.device, self.options = shape, device, options
        self.model: Any

    @abstractmethod
    def setup(self) -> None:
        """Build the model and the optimiser."""

    def set_block(self, block: int) -> None:
        """Train transformer layer `block` from now on; a turn begins, with moments at zero."""
        self.block = block

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """One update on one batch. Returns its mean loss before the update, nats a token."""

    def teardown(self) -> None:
        """Free everything that `setup` built."""
        for name in vars(self).keys() - {"shape", "device", "options"}:
            delattr(self, name)
        gc.collect()

    def build(self) -> None:
        """The same random bfloat16 model for every contestant."""
        s = self.shape
        config = LlamaConfig(
            hidden_size=s.hidden,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            intermediate_size=s.intermediate,
            vocab_size=s.vocabulary,
            max_position_embeddings=s.length,
            tie_word_embeddings=False,
            use_cache=False,
        )
        with torch.random.fork_rng(), self.device:  # a billion random numbers take a GPU no time
            torch.manual_seed(derive_seed(0, "model"))
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()

    def recompute_from(self, first: int) -> None:
        """Checkpoint the layers from `first` upwards, non-reentrant, if the options say so."""
        for index, layer in enumerate(self.model.model.layers):
            layer.gradient_checkpointing = self.options.checkpointing and index >= first
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def backward(self, batch: Batch) -> Tensor:
        """Gradients by way of transformers' own loss, which holds all logits in float32."""
        loss = self.model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]


class FullAdamW(Contestant):
    """torch.optim.AdamW on float32 masters of every parameter of a bfloat16 model."""

    block_wise = False

    def setup(self) -> None:
        self.build()
        self.recompute_from(0)
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(self, batch: Batch) -> Tensor:
        loss = self.backward(batch)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data.copy_(master.data)
        self.optimizer.zero_grad()
        return loss


class Lora(Contestant):
    """peft's LoRA of rank 16 on all linear layers but the head, adapters in bfloat16, torch.optim.AdamW on them."""

    block_wise = False

    def setup(self) -> None:
        from peft import LoraConfig, get_peft_model

        self.build()
        self.recompute_from(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers by a name that is on its way out.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            torch.manual_seed(derive_seed(0, "adapters"))
            self.model = get_peft_model(self.model, config, autocast_adapter_dtype=False)
        adapters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(adapters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(self, batch: Batch) -> Tensor:
        loss = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class BAdam(Contestant):
    """badam's BlockOptimizer around torch.optim.AdamW: a block is a layer, its float32 copy is made at each switch."""

    needs = "badam"

    def setup(self) -> None:
        from badam import BlockOptimizer  # type: ignore[import-untyped, import-not-found, unused-ignore]

        self.build()
        base = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = BlockOptimizer(
                base_optimizer=base,
                named_parameters_list=list(self.model.named_parameters()),
                switch_block_every=sys.maxsize,
                switch_mode="ascending",
                verbose=0,
            )

    def set_block(self, block: int) -> None:
        # Its own counter gives the first block one step too few; switching by hand gives every block the same.
        self.optimizer.current_block_idx = block
        self.optimizer.switch_trainable_params(verbose=0)
        self.recompute_from(block)

    def step(self, batch: Batch) -> Tensor:
        loss = self.backward(batch)
        self.optimizer.step()
        return loss


class Limit(Contestant):
    """Hand-written for this shape: what block-wise training costs with nothing around it.

    Layers below the block build no graph; the loss holds a few rows of logits; the master is bfloat16 + 16 bits.
    """

    def setup(self) -> None:
        self.build()
        self.layers: list[Any] = list(self.model.model.layers)
        self.model.requires_grad_(False)
        self.remainders: dict[str, Tensor] = {}
        self.prefixes: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        if self.options.compile:
            for layer in self.layers:
                layer.compile(dynamic=False)

    def set_block(self, block: int) -> None:
        self.block, self.t = block, 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.prefixes = {key: entry for key, entry in self.prefixes.items() if entry[0] <= block}
        for index, layer in enumerate(self.layers):
            layer.requires_grad_(index == block)
        self.recompute_from(block)

    def step(self, batch: Batch) -> Tensor:
        decoder, depth = self.model.model, 0
        positions = torch.arange(batch.input_ids.shape[1], device=self.device)[None]
        with torch.no_grad():
            if self.options.cache and batch.sample_ids in self.prefixes:
                depth, hidden = self.prefixes[batch.sample_ids]
                hidden = hidden.to(self.device)
            else:
                hidden = decoder.embed_tokens(batch.input_ids)
            rotary = decoder.rotary_emb(hidden, position_ids=positions)
            hidden = self.run(depth, self.block, hidden, rotary)
            if self.options.cache:
                self.prefixes[batch.sample_ids] = (self.block, hidden.to("cpu"))
        hidden = decoder.norm(self.run(self.block, len(self.layers), hidden, rotary))
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = batch.input_ids[:, 1:].reshape(-1)
        loss: Tensor = FrozenHeadLoss.apply(rows, self.model.lm_head.weight, targets)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]
        self.update()
        return loss.detach()

    def run(self, start: int, stop: int, hidden: Tensor, rotary: Any) -> Tensor:
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return hidden

    @torch.no_grad()
    def update(self) -> None:
        """Adam (Kingma & Ba 2015, algorithm 1) on w = (hi << 16) + lo, read as float32."""
        self.t += 1
        for name, p in self.layers[self.block].named_parameters():
            key = f"{self.block}.{name}"
            if key not in self.remainders:
                self.remainders[key] = torch.zeros_like(p, dtype=torch.int16)
            if key not in self.moments:
                zeros = partial(torch.zeros_like, p, dtype=torch.float32)
                self.moments[key] = (zeros(), zeros())
            low, (m, v) = self.remainders[key], self.moments[key]
            assert p.grad is not None
            gradient, p.grad = p.grad.float(), None
            m.lerp_(gradient, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            denominator = v.sqrt().div_((1 - BETAS[1] ** self.t) ** 0.5).add_(EPS)
            master = ((p.data.view(torch.int16).int() << 16) + low).view(torch.float32)
            bits = master.addcdiv_(m, denominator, value=-LR / (1 - BETAS[0] ** self.t)).view(torch.int32)
            high = (bits + 0x8000) >> 16
            p.data.view(torch.int16).copy_(high)
            low.copy_(bits - (high << 16))


class FrozenHeadLoss(torch.autograd.Function):
    """Mean cross entropy behind a frozen head, whose gradient is made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden [rows, hidden], weight [vocabulary, hidden], targets [rows]. Returns a float32 scalar."""
        gradient, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        chunk = max(1, LOGITS_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        for h, y, out in zip(*(t.split(chunk) for t in (hidden, targets, gradient)), strict=True):  # type: ignore[no-untyped-call]
            logits = F.linear(h, weight).float()
            total += F.cross_entropy(logits, y, reduction="sum")
            logits.copy_(logits.softmax(-1)).scatter_add_(1, y[:, None], logits.new_full((len(y), 1), -1.0))
            out.copy_((logits / len(targets)).to(weight.dtype) @ weight)
        ctx.save_for_backward(gradient)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0].to(ctx.saved_tensors[0].dtype), None, None


class Queue(Batches):
    """Hands a peer the batch it is given, and then no other."""

    def __init__(self) -> None:
        self.batch: Batch

    def next(self) -> Batch:
        return self.batch


class Peertune(Contestant):
    """The package's own training step, as a run takes it: `Deca` on one peer, without the exchange."""

    def setup(self) -> None:
        self.build()
        section = ModelSection(
            dtype="bfloat16",
            train_embeddings="none",
            # A budget that holds no layer: everything from the block upwards is recomputed.
            activation_budget_mb=int(self.options.checkpointing),
            prefix_cache=self.options.cache,
            compile=self.options.compile,
        )
        blocks = partition_blocks(self.model, 1, section.train_embeddings)
        choose_attention(self.model, section, self.device)
        self.queue = Queue()
        self.peer = Peer(index=0, model=LanguageModel(self.model, section), blocks=blocks, batches=self.queue, seed=0)
        config = DecaConfig(lr=LR, betas=BETAS, eps=EPS, layers_per_block=1, discrepancy="none")
        self.algorithm = Deca(self.peer, config, Topology("alone", 1, np.ones((1, 1))))

    def set_block(self, block: int) -> None:
        self.t = 0
        self.algorithm.begin_turn(block)

    def step(self, batch: Batch) -> Tensor:
        self.queue.batch = batch
        loss = self.peer.backward(self.t, 1)
        self.algorithm.step(self.t, LR)
        self.t += 1
        return loss


CONTESTANTS: dict[str, tuple[type[Contestant], Options]] = {
    "full": (FullAdamW, Options()),
    "lora": (Lora, Options()),
    "badam": (BAdam, Options()),
    "limit": (Limit, Options()),
    "limit-compile": (Limit, Options(compile=True)),
    "limit-cache": (Limit, Options(cache=True)),
    "limit-compile-cache": (Limit, Options(compile=True, cache=True)),
    "peertune": (Peertune, Options()),
    "peertune-compile": (Peertune, Options(compile=True)),
    "peertune-cache": (Peertune, Options(cache=True)),
    "peertune-compile-cache": (Peertune, Options(compile=True, cache=True)),
}
