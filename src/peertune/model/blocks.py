"""A model's trained parameters, split into blocks: disjoint, in the order of the forward pass, covering all of them.

Found from the model itself: the transformer layers are the longest list of sub-modules; what comes before and after
them joins the first and last block, unless it is a token embedding or an output head, which are blocks of their own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from peertune.config import TrainEmbeddings
from peertune.errors import ModelError
from peertune.model.quantization import num_weights


@dataclass(frozen=True)
class Block:
    """A set of parameters that are trained and exchanged together."""

    index: int
    """Place in the forward pass, from 0."""
    name: str
    parameters: tuple[str, ...]
    """Names as in `model.named_parameters()`."""
    first_layer: int
    """The lowest transformer layer that a gradient must reach; the number of layers for a block above them all."""


def as_one(blocks: Iterable[Block]) -> Block:
    """All parameters of several blocks, in their order."""
    return Block(0, "all", tuple(name for block in blocks for name in block.parameters), 0)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The transformer layers of a model and their dotted name.

    Raises:
        ModelError: no list of sub-modules with parameters was found.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(True for _ in m.parameters()) for m in module)
    ]
    # Not those within another: a layer may itself hold lists, of experts for instance.
    outer = [item for item in lists if not any(item[0].startswith(name + ".") for name, _ in lists)]
    prefix, layers = max(outer, key=lambda item: (len(item[1]), -item[0].count(".")), default=("", nn.ModuleList()))
    if not len(layers):
        raise ModelError(
            f"{type(model).__name__}: no list of transformer layers found; expected a causal language model"
        )
    return prefix, layers


def is_tied(model: nn.Module) -> bool:
    """Whether the token embedding and the output head are one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return embedding is not None and head is not None and embedding.weight is head.weight


def partition_blocks(
    model: nn.Module,
    layers_per_block: int,
    train_embeddings: TrainEmbeddings = "untied",
    only: Container[str] | None = None,
) -> list[Block]:
    """Split a causal language model's trained parameters into blocks, in the order of the forward pass.

    Args:
        layers_per_block: consecutive transformer layers a block; 0: everything that is trained is one block.
        train_embeddings: token embedding and output head are trained where they are two tensors ("untied"), always
            ("all": tied ones with the head, in the last block's place), or never ("none").
        only: names of the parameters that may be trained, an adapter's; None: all of the model.
    Raises:
        ModelError: the model has no transformer layers.
    """
    prefix, layers = find_layers(model)
    tied, size = is_tied(model), layers_per_block or len(layers)
    train = train_embeddings == "all" or (train_embeddings == "untied" and not tied)
    vocabulary = {
        id(p)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        if module is not None
        for p in module.parameters()
    }
    before: list[str] = []
    after: list[str] = []
    embedding: list[str] = []
    head: list[str] = []
    groups: list[list[str]] = [[] for _ in range(0, len(layers), size)]
    seen_layers = False
    for name, parameter in model.named_parameters():
        seen_layers = seen_layers or name.startswith(prefix + ".")
        if only is not None and name not in only:
            continue
        if name.startswith(prefix + "."):
            groups[int(name[len(prefix) + 1 :].split(".")[0]) // size].append(name)
        elif only is None and id(parameter) in vocabulary:
            if train:
                (head if seen_layers or tied else embedding).append(name)
        else:
            (after if seen_layers else before).append(name)

    pieces: list[tuple[str, list[str], int]] = []
    if embedding:
        pieces.append(("embedding", before + embedding, 0))
    else:
        groups[0] = before + groups[0]
    for first, names in zip(range(0, len(layers), size), groups, strict=True):
        last = min(first + size, len(layers)) - 1
        pieces.append((f"layer {first}" if first == last else f"layers {first}-{last}", names, first))
    if head:
        # A tied head is also the embedding: its gradient goes all the way down.
        pieces.append(("head", after + head, 0 if tied else len(layers)))
    else:
        groups[-1].extend(after)
    pieces = [piece for piece in pieces if piece[1]]
    blocks = [Block(i, name, tuple(names), first) for i, (name, names, first) in enumerate(pieces)]
    return blocks if layers_per_block else [as_one(blocks)]


def frozen_names(model: nn.Module, blocks: Iterable[Block]) -> list[str]:
    """Names of the parameters that no block trains."""
    trained = {name for block in blocks for name in block.parameters}
    return [name for name, _ in model.named_parameters() if name not in trained]


def block_table(model: nn.Module, blocks: Sequence[Block]) -> str:
    """The partition as text, a line a block: index, name, tensors, parameters, share of what is trained."""
    sizes = {name: num_weights(p) for name, p in model.named_parameters()}
    totals = [sum(sizes[name] for name in block.parameters) for block in blocks]
    width = max(len(block.name) for block in blocks)
    lines = [
        f"{block.index:>3}  {block.name:<{width}}  {len(block.parameters):>4} tensors"
        f"  {n:>13,} parameters  {n / sum(totals):>6.1%}"
        for block, n in zip(blocks, totals, strict=True)
    ]
    frozen = frozen_names(model, blocks)
    if frozen:
        shown = ", ".join(frozen[:4]) + (f" and {len(frozen) - 4} more" if len(frozen) > 4 else "")
        lines.append(f"frozen: {shown} ({sum(sizes[n] for n in frozen):,} parameters)")
    return "\n".join(lines)
