"""What one forward pass does with each transformer layer: run, recompute later, skip from a cache, or run compiled.

A layer's `forward` is wrapped on the instance, so any architecture of transformers works without its own code. The
wrapper goes by the layer's place in the stack and by `active`, the lowest layer a gradient must reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class PrefixCache:
    """Hidden states below the active block, on the host, by sample.

    An entry is the input of layer `depth`. It stays exact while no layer below `depth` changes, so `invalidate` at the
    start of a block's turn drops the deeper ones; shallower ones are carried up by running only the layers between.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, Tensor]] = {}

    def invalidate(self, first_layer: int) -> None:
        """Forget what lies above `first_layer`, which is about to change."""
        self._entries = {k: e for k, e in self._entries.items() if e[0] <= first_layer}

    def depth(self, sample_ids: Sequence[int]) -> int:
        """The layer at which a forward pass of these samples can start; 0 where one of them is unknown."""
        depths = {self._entries[i][0] if i in self._entries else 0 for i in sample_ids}
        return depths.pop() if len(depths) == 1 else 0

    def get(self, sample_ids: Sequence[int], like: Tensor) -> Tensor:
        return torch.stack([self._entries[i][1] for i in sample_ids]).to(like.device)

    def put(self, sample_ids: Sequence[int], depth: int, hidden: Tensor) -> None:
        """Store hidden [batch, length, hidden] as the input of layer `depth`."""
        for i, row in zip(sample_ids, hidden.detach(), strict=True):
            self._entries[i] = (depth, row.to("cpu", copy=True))


class LayerStack:
    """Takes over the layers of one model instance."""

    def __init__(
        self,
        layers: nn.ModuleList,
        *,
        activation_budget: int = 0,
        prefix_cache: bool = False,
        compile: bool = False,
        draws: bool = False,
    ) -> None:
        """
        Args:
            activation_budget: bytes that saved activations of the layers may take; 0: no recomputation.
            prefix_cache: keep a `PrefixCache`. Batches must then all have one length.
            compile: run each layer through torch.compile while training: three graphs, below, in and above the block.
            draws: it draws random numbers in training; recomputing a layer must then draw the same numbers again.
        """
        self.active = 0
        self.cache = PrefixCache() if prefix_cache else None
        self._budget = activation_budget
        self._measured = (0, 0)
        self._samples: Sequence[int] | None = None
        self._start = 0
        self._returns: tuple[type, int] | None = None
        """Of what a layer gives: tuple or list, and how long; None: the hidden states by themselves."""
        self._draws = draws
        self._layers = list(layers)
        for index, layer in enumerate(layers):
            layer.forward = self._wrap(index, layer.forward, compile)

    def begin_turn(self, first_layer: int) -> None:
        """The block whose lowest layer is `first_layer` is trained from now on."""
        self.active = first_layer
        if self.cache is not None:
            self.cache.invalidate(first_layer)

    def forget(self) -> None:
        """Weights have changed that no turn of this model's changed."""
        if self.cache is not None:
            self.cache = PrefixCache()

    def begin_batch(self, sample_ids: Sequence[int] | None) -> None:
        """The next forward pass is of these samples; None: of samples that are not to be remembered."""
        self._samples, self._start = None, 0
        if self.cache is not None and sample_ids is not None and self.active > 0:
            self._samples, self._start = sample_ids, self.cache.depth(sample_ids)

    def _wrap(self, index: int, forward: Callable[..., Any], compile: bool) -> Callable[..., Any]:
        compiled = torch.compile(forward, dynamic=False) if compile else forward

        def run(*args: Any, **kwargs: Any) -> Any:
            named = "hidden_states" in kwargs
            hidden = kwargs["hidden_states"] if named else args[0]
            if index < self._start:
                kind, length = self._returns or (None, 1)
                return hidden if kind is None else kind([hidden, *[None] * (length - 1)])
            if self._samples is not None and self.cache is not None and index in (self._start, self.active):
                if index == self._start and self._start > 0:
                    hidden = self.cache.get(self._samples, hidden)
                    kwargs, args = (
                        ({**kwargs, "hidden_states": hidden}, args) if named else (kwargs, (hidden, *args[1:]))
                    )
                if index == self.active and self._start < self.active:
                    self.cache.put(self._samples, index, hidden)
            if not torch.is_grad_enabled():
                out = forward(*args, **kwargs)
            elif self._budget and index >= self.active:
                out = self._within_budget(index, compiled, hidden, args, kwargs)
            else:
                out = compiled(*args, **kwargs)
            self._returns = (type(out), len(out)) if isinstance(out, (tuple, list)) else None
            return out

        return run

    def _within_budget(
        self, index: int, forward: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Keep the activations of as many upper layers as the budget holds, recompute those of the others.

        What a layer saves is measured at the active layer, which saves most, whenever a larger batch than any before
        comes by; smaller ones are taken to need as much.
        """
        if hidden.numel() > self._measured[0]:
            self._measured = (hidden.numel(), self._saved_bytes(index, forward, args, kwargs))
        keep = self._budget // max(1, self._measured[1])
        if index >= len(self._layers) - keep:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=self._draws, **kwargs)

    def _saved_bytes(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        """Bytes a layer keeps for its backward pass, beside its weights; runs it once for nothing else."""
        weights = {p.untyped_storage().data_ptr() for p in self._layers[index].parameters()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_cuda}
        with torch.random.fork_rng(devices), saved_tensors_hooks(note, lambda tensor: tensor):
            forward(*args, **kwargs)
        return sum(saved.values())


def lowest_layers(module: nn.Module, layers: nn.ModuleList, forward: Callable[[], object]) -> dict[str, int]:
    """For each parameter the highest layer up to whose input nothing depends on it, as found in a forward pass.

    It is not always where its name stands: a norm behind the embedding may be listed behind the layers.

    Args:
        layers: the module's, not yet taken over.
        forward: runs the module on a few tokens.
    Returns:
        By name; 0 for what comes before the layers, their number for the last one and what comes behind it.
    """
    inputs: list[tuple[int, Any]] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        inputs.append((index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

    hooks = [
        layer.register_forward_pre_hook(partial(note, index=index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            forward()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    names = {id(p): name for name, p in module.named_parameters()}
    found = {name: len(layers) for name in names.values()}
    visited: set[Any] = set()
    for index, hidden in sorted(inputs, key=lambda pair: pair[0]):
        waiting = [hidden.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if (name := names.get(id(getattr(node, "variable", None)))) is not None:
                found[name] = max(0, index - 1)
            waiting.extend(below for below, _ in node.next_functions)
    return found


def draws_in_training(module: nn.Module) -> bool:
    """Whether a model draws random numbers in training, by its dropout modules and by what its config says."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        return True
    settings = vars(getattr(module, "config", None) or object).items()
    return any(
        isinstance(v, float) and v > 0 and k.endswith(("dropout", "pdrop", "dropout_prob", "jitter_noise"))
        for k, v in settings
        if not k.startswith(("summary", "classifier"))  # of heads that a language model does not have
    )
