"""A model that several ranks hold between them, a part of the rows of each parameter each: torch's FSDP2.

All of them run every layer, whose whole parameters FSDP2 gathers for as long as it runs, on different sequences of a
batch; it then sums the gradients and leaves each rank those of its own rows. What trains the model is given these rows
as parameters of their own, in the same memory, and does with them what it would do with whole ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peertune.config import ModelSection
from peertune.data.batches import Batch
from peertune.errors import ConfigError, ModelError
from peertune.model.adapters import core_of
from peertune.model.blocks import find_layers, is_tied
from peertune.model.language_model import LanguageModel
from peertune.model.layers import draws_in_training
from peertune.model.loss import chunked_cross_entropy


class ShardedModel(LanguageModel):
    """A `LanguageModel` of one peer on several ranks; all of them make the same calls in the same order.

    `backward` splits a batch among them. Everything else each does with whole batches, to the same result.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModelSection,
        mesh: DeviceMesh,
        trained: Collection[str],
        *,
        like: ShardedModel | None = None,
    ) -> None:
        """
        Args:
            module: the whole model, on any device; changed in place, and moved to the mesh's.
            mesh: the peer's ranks, of one dimension.
            trained: names of the parameters that are trained.
            like: as for `LanguageModel`; it shares with this one what is not trained and can be split evenly.
        Raises:
            ConfigError, ModelError: as `check_shardable`; also where a trained parameter stands outside of the layers,
                the embedding and the head.
        """
        check_shardable(module, trained)
        _own_frozen(module, trained)
        _shard(module, mesh)
        own = dict(module.named_parameters())
        if missed := [name for name in trained if not isinstance(own[name], DTensor)]:
            raise ModelError(
                f"run.ranks_per_peer: got {mesh.size()}, but {missed[0]} of {config.path!r} stands outside of what can"
                " be split among ranks; set run.ranks_per_peer = 1"
            )
        if like is not None:
            others = like.module.named_parameters()
            module.load_state_dict({n: p.detach() for n, p in others if n not in trained}, strict=False, assign=True)
        super().__init__(module, config, like=like)
        if self.has_plain_head:
            head = self.core.get_output_embeddings()
            head.forward = _with_loss(head, head.forward)
        self.ranks: dist.ProcessGroup = mesh.get_group()
        self._place = mesh.get_local_rank(), mesh.size()
        self._rows = {name: _rows(parameter, self.ranks) for name, parameter in module.named_parameters()}

    def _try_out(self, path: str) -> None:
        # Of tokens alone: FSDP2 gives the derivatives of parameters to its shards, not to whoever asks for them.
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            super()._try_out(path)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _lowest_layers(self, layers: nn.ModuleList) -> dict[str, int]:
        return {}  # what stands outside of the layers, the embedding and the head is refused

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's rows of each parameter, by name; a whole one where it is not split. `.ranks` are all ranks."""
        return self._rows

    def whole(self, name: str) -> Tensor:
        """A parameter, put together from all ranks' rows."""
        parameter = self.module.get_parameter(name).detach()
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """As for `LanguageModel`: gradient and loss are those of the whole batch, of which a rank runs its part."""
        loss = self.loss_sum(batch.part(*self._place), remember=True)[0] / max(1, num_targets)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                grad: Any = parameter.grad
                mine, rows = grad.to_local(), self._rows[name]
                rows.grad = mine if rows.grad is None else rows.grad.add_(mine)
                parameter.grad = None
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.ranks)
        return total

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        # A call of the head itself, which alone makes FSDP2 gather its parameters.
        return self.core.get_output_embeddings()(hidden, targets)  # type: ignore[no-any-return]


def check_shardable(module: nn.Module, trained: Collection[str]) -> None:
    """Refuse a model whose training would be another one on several ranks.

    Raises:
        ConfigError: it has dropout, or trains an embedding that is also the head; or torch is too old.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"run.ranks_per_peer: got torch {torch.__version__}, expected 2.13 or newer, whose FSDP2 knows"
            " set_reduce_scatter_unused_params; install that, or set run.ranks_per_peer = 1"
        )
    if draws_in_training(module) or draws_in_training(core_of(module)):
        raise ConfigError(
            "run.ranks_per_peer: got a model with dropout, whose draws on several ranks would not be those of one; set"
            " its dropout (algorithm.lora_dropout, or that in its config.json) to 0, or run.ranks_per_peer = 1"
        )
    core = core_of(module)
    tied = core.get_output_embeddings().weight if is_tied(core) else None
    if any(parameter is tied for name, parameter in module.named_parameters() if name in trained):
        raise ConfigError(
            'run.ranks_per_peer: got model.train_embeddings = "all" for a model whose token embedding and output head'
            ' are one tensor, expected "untied" or "none"; or set run.ranks_per_peer = 1'
        )


def _own_frozen(module: nn.Module, trained: Collection[str]) -> None:
    """Give a model parameter objects of its own for what is not trained; their memory stays that of the others.

    FSDP2 moves what it is given to the GPU in place: shared objects would take the whole base there for all instances.
    """
    kept = {id(parameter) for name, parameter in module.named_parameters() if name in trained}
    own: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in kept:
                mine = own.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                setattr(part, name, mine)  # tied ones stay tied


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split layers, embedding, head and what stands between them; an embedding that is also the head stays whole."""
    core = core_of(module)
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()
    tied = {embedding.weight} if is_tied(core) else set()
    parts = [*find_layers(core)[1], *(() if tied else (embedding, head)), core.base_model]
    # It warns of a model whose output is a view; nobody here writes to that in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for part in parts:
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=tied)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        # Else ranks none of whose tokens came to an expert would not take part in the sum of its gradients.
        sharded.set_reduce_scatter_unused_params(True, recurse=False)
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(mesh.device_type)


def _rows(parameter: nn.Parameter, ranks: dist.ProcessGroup) -> nn.Parameter:
    """A rank's rows of a parameter, as one of its own in the same memory; a whole parameter itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    whole: Any = parameter.detach()
    rows = nn.Parameter(whole.to_local(), requires_grad=False)
    rows.ranks = ranks  # type: ignore[attr-defined]
    return rows


def _with_loss(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The head's `forward`, which with targets gives their summed cross entropy."""

    def run(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return forward(hidden)
        weight: Any = head.weight
        return chunked_cross_entropy(hidden, weight, getattr(head, "bias", None), targets)

    return run
