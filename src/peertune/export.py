"""A run's average model, or a peer's personal one, as a folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from peertune.algorithms import ALGORITHMS, METHODS
from peertune.checkpoint import CheckpointStore, newest_common
from peertune.config import RunConfig
from peertune.errors import CheckpointError, ConfigError
from peertune.model.load import load_full_model
from peertune.optim import join_bfloat16
from peertune.prepare import prepare_model, prepare_tokenizer
from peertune.recipe import from_dict
from peertune.run_folder import RunFolder, save_trained
from peertune.storage import check_writable, storage_errors

PEFT_KINDS = ("lora", "prompt", "prefix")
"""Adapters that peft loads by themselves."""


def export(
    run: Path, to: Path, peer: int | None = None, *, adapter: bool = False, trust_remote_code: bool = False
) -> int | None:
    """Write a run's average model to a folder: the finished one, else that of the newest complete checkpoint.

    Of a consortium's run that did not finish, a site has its own checkpoints alone, and gives its own model.

    Args:
        peer: whose personal parts or model go on top of the average, from that checkpoint; None: none.
        adapter: the adapter as peft loads it, not merged into the base.
        trust_remote_code: let code run that comes with the base. What the run's recipe says of that does not count: the
            folder may have come from anybody, and names the base.
    Returns:
        The number of rounds that the checkpoint has behind it; None: it is the finished model.
    Raises:
        ConfigError: there is no such peer, or the run has nothing personal, or no adapter of peft's.
        CheckpointError: there is no run, no checkpoint, or `to` exists already.
    """
    folder = RunFolder(run)
    if not folder.holds_run:
        raise CheckpointError(f"{run}: holds no run; expected a folder that `peertune run` wrote")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"--to: {to} exists already; name a new folder")
    check_writable(to, "--to")
    recipe = folder.read_recipe()
    site = recipe.get("site")
    kind = recipe["config"]["algorithm"].get("adapter", "none")
    if adapter and kind not in PEFT_KINDS:
        raise ConfigError(
            f"--adapter: got it for a run with algorithm.adapter = {kind!r}, expected {', '.join(PEFT_KINDS)}; leave"
            " it out"
        )
    kept = (folder.adapter,) if adapter else (folder.model, folder.adapter)
    finished = [path for path in kept if path.exists() and not path.is_symlink() and folder.summary.exists()]
    if finished and peer is None:
        with storage_errors(to):
            shutil.copytree(finished[0], to, dirs_exist_ok=True, ignore=_links)
        return None
    config, _ = from_dict(recipe["config"], METHODS)
    if peer is not None:
        _check_peer(config, peer, site)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"trust_remote_code": trust_remote_code})}
    )
    store = CheckpointStore(folder.checkpoints, config.run.ranks_per_peer)
    members = range(recipe["members"]) if site is None else [site]
    done = newest_common([store.rounds(member) for member in members])
    if done is None:
        lacks = "neither model nor checkpoints any more" if folder.summary.exists() else "no complete checkpoint yet"
        raise CheckpointError(f"{run}: the run has {lacks}; expected one of them to export")
    base, cpu = Path(recipe["base"]), torch.device("cpu")
    module = prepare_model(config, cpu, base)
    while True:
        try:
            trained = _trained(store, done, members, peer, is_alone=site is not None)
            break
        except CheckpointError:  # a run that goes on may have put newer ones in its place meanwhile
            newer = newest_common([store.rounds(member) for member in members])
            if newer is None or newer <= done:
                raise
            done = newer
    own = dict(module.named_parameters())
    for name, value in trained.items():
        own[name].data.copy_(value)
    tokenizer, labels = prepare_tokenizer(config, base), recipe.get("labels", ())
    load_base = None if adapter else partial(load_full_model, config.model, cpu, base)
    save_trained(to, module, tokenizer, load_base, labels=labels)
    return done


def _trained(
    store: CheckpointStore, done: int, members: Sequence[int], peer: int | None, *, is_alone: bool
) -> dict[str, torch.Tensor]:
    """The peers' average after `done` rounds, and the personal parts of one of them.

    Args:
        is_alone: there is only one member's checkpoint, which is all of the average.
    """
    average: dict[str, torch.Tensor] = {}
    personal: dict[str, torch.Tensor] = {}
    for index in members:
        tensors, state = store.load_whole(index, done)
        if index >= len(state["consensus"]) and not is_alone:
            break  # the hub, which has no weight in the average
        weight = 1.0 if is_alone else state["consensus"][index]
        for name in state["common"]:
            high, low = tensors[f"weights/{name}"], tensors.get(f"remainder/{name}")
            master = high.float() if low is None else join_bfloat16(high, low)
            average[name] = average[name].add_(master, alpha=weight) if name in average else master * weight
        if index == peer:
            held = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
            personal = {name: value for name, value in held.items() if name not in state["common"]}
            personal |= {n.removeprefix("personal/"): t for n, t in tensors.items() if n.startswith("personal/")}
    return average | personal


def _links(folder: str, names: list[str]) -> list[str]:
    """Of a folder's files those that are links: no run makes one, and what one leads to may be no model's."""
    return [name for name in names if (Path(folder) / name).is_symlink()]


def _check_peer(config: RunConfig, peer: int, site: int | None) -> None:
    """Refuse a peer without personal parts, or with parts that another site has. Raises ConfigError."""
    num_peers, method = config.run.num_peers, config.algorithm
    if not method.local_modules and not ALGORITHMS[method.name].keeps_own:
        raise ConfigError(
            f"--peer: got {peer} for a run without algorithm.local_modules, where all end with one model; leave it out"
        )
    if not 0 <= peer < num_peers:
        raise ConfigError(f"--peer: got {peer}, expected a peer of this run, 0 to {num_peers - 1}")
    if site not in (None, peer):
        own = f"expected {site}, this site's own" if site in range(num_peers) else "and a server has none; leave it out"
        raise ConfigError(f"--peer: got {peer}, whose personal parts never leave its site, {own}")
