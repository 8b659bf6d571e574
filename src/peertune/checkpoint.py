"""Atomic checkpoints: one folder a peer, safetensors and JSON, two generations; never pickle.

    DIR/checkpoints/peer-000/round-00000048/{block-000.safetensors, ..., rest.safetensors, state.json}

A file that would be the same as in the generation that goes when the new one is there is not written again: it is taken
over by a hard link. A method that trains block by block so writes the blocks of its last two turns. Each generation is
complete, and can be deleted or copied by itself; the two that are kept share no file, so damage in one leaves the other
whole. What changed is known by the hashes of what is in memory, which the check at loading needs anyway.

A peer of several ranks has a folder of its own for the shard of each, DIR/checkpoints/peer-000/shard-1/round-00000048.

Each generation is written aside, synced and renamed, so it is whole or absent. A kill between two peers' writes leaves
them at different rounds; `newest_common` is the newest round that every peer has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peertune.errors import CheckpointError, StorageError
from peertune.storage import refusal, share_weights

GENERATIONS = 2
OLDER = "; delete this folder to use an older one"
NO_OLDER = "; there is no older one: start anew in another folder"
"""End the message of a damaged checkpoint."""


class CheckpointStore:
    """The checkpoints of a run's peers.

    Args:
        num_shards: ranks of a peer, each of which has a checkpoint.
        shard: whose are written and read here.
    """

    def __init__(self, folder: Path, num_shards: int = 1, shard: int = 0) -> None:
        self.folder, self.num_shards, self.shard = folder, num_shards, shard
        self._sound: defaultdict[int, dict[int, dict[str, str]]] = defaultdict(dict)
        """Peer -> round -> file -> hash, of generations that this process wrote or read: damage is not passed on."""

    def save(self, peer: int, round: int, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
        """Write one peer's state after `round` rounds.

        Args:
            files: file -> its tensors by name; what changes together belongs into one file.
        Raises:
            StorageError: the disk is full or refused the write; earlier generations are intact.
        """
        home = self._home(peer, self.shard)
        final, aside = home / f"round-{round:08d}", home / f".round-{round:08d}.partial"
        replaced = home / f".round-{round:08d}.replaced"
        self._sound[peer].pop(round, None)
        with _threads() as pool:
            hashes = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            goes = self._leaving(peer, round)
            known = self._sound[peer].get(goes, {})
            for name, tensors in files.items():
                path = aside / f"{name}.safetensors"
                if hashes[name] != known.get(name) or not _link(home / f"round-{goes:08d}" / path.name, path):
                    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
            state = {"peer": peer, "round": round, "files": hashes, "state": plain}
            (aside / "state.json").write_text(json.dumps({**state, "hash": _hash(state)}), encoding="utf-8")
            share_weights(aside, aside / "state.json")
            for path in (*aside.iterdir(), aside):
                _sync(path)
            if final.exists():  # of the same round once before: never without one of the two for as long as it takes
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            aside.rename(final)
            _sync(home)
            shutil.rmtree(replaced, ignore_errors=True)
            self._sound[peer][round] = hashes
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise StorageError(
                f"{final}: cannot write the checkpoint, earlier ones are intact: {refusal(error)}"
            ) from error

    def prune(self, peer: int) -> None:
        """Keep a peer's last two generations, and nothing that a kill left half done. Called when all have one."""
        home = self._home(peer, self.shard)
        for left in (*home.glob(".round-*.partial"), *home.glob(".round-*.replaced")):
            shutil.rmtree(left, ignore_errors=True)
        for round in self._rounds(peer, self.shard)[:-GENERATIONS]:
            self._sound[peer].pop(round, None)
            shutil.rmtree(home / f"round-{round:08d}", ignore_errors=True)

    def rounds(self, peer: int) -> list[int]:
        """Rounds of a peer's generations, ascending: those that all its shards have."""
        return sorted(set.intersection(*(set(self._rounds(peer, shard)) for shard in range(self.num_shards))))

    def load(self, peer: int, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read one peer's state.

        Raises:
            CheckpointError: it is missing, damaged or another peer's.
        """
        return self._load(peer, round, self.shard)

    def load_whole(self, peer: int, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `load`, the tensors put together from all shards, and the rest of the first."""
        loaded = [self._load(peer, round, shard) for shard in range(self.num_shards)]
        if len(loaded) == 1:
            return loaded[0]
        names = loaded[0][0]
        return {name: torch.cat([tensors[name] for tensors, _ in loaded]) for name in names}, loaded[0][1]

    def _rounds(self, peer: int, shard: int) -> list[int]:
        found = [path.name.removeprefix("round-") for path in self._home(peer, shard).glob("round-*")]
        return sorted(int(name) for name in found if name.isdecimal())  # others somebody has put aside

    def _leaving(self, peer: int, round: int) -> int:
        """The newest generation that `prune` removes once there is one of `round`; -1 where there is none."""
        return max(sorted({*self._rounds(peer, self.shard), round})[:-GENERATIONS], default=-1)

    def _load(self, peer: int, round: int, shard: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        folder = self._home(peer, shard) / f"round-{round:08d}"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if (state["peer"], state["round"]) != (peer, round):
                raise CheckpointError(
                    f"{folder}: holds peer {state['peer']}, round {state['round']}; expected peer {peer}, round {round}"
                )
            if state.pop("hash") != _hash(state):
                raise ValueError("state.json is not what was written")
            hashes = dict(state["files"])
            tensors: dict[str, Tensor] = {}
            with _threads() as pool:
                for part in pool.map(_read, (folder / f"{name}.safetensors" for name in hashes), hashes.values()):
                    tensors |= part
            if shard == self.shard:
                self._sound[peer][round] = hashes
            return tensors, dict(state["state"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            is_first = min(self._rounds(peer, shard), default=round) >= round
            raise CheckpointError(f"{folder}: damaged: {error}{NO_OLDER if is_first else OLDER}") from error

    def _home(self, peer: int, shard: int) -> Path:
        home = self.folder / f"peer-{peer:03d}"
        return home / f"shard-{shard}" if self.num_shards > 1 else home


def newest_common(rounds: Sequence[Sequence[int] | None]) -> int | None:
    """The newest round that all peers have a generation of, None where there is none; unknown peers do not count."""
    return max(set.intersection(*(set(own) for own in rounds if own is not None)), default=None)


def _threads() -> ThreadPoolExecutor:
    """For hashes, which Python works out on several threads at once."""
    return ThreadPoolExecutor(torch.get_num_threads(), "checkpoint")


def _hash(state: Mapping[str, Any]) -> str:
    """Of what is written as JSON, and of the same when it has been read."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every bit; on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    """A file's tensors. Raises ValueError where they are not those of the hash; OSError."""
    tensors: dict[str, Tensor] = {}
    with suppress(SafetensorError):
        tensors = load_file(path)
    if _sha256(tensors) != sha256:
        raise ValueError(f"{path.name} is not what was written")
    return tensors


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system has no such links, or the file is gone."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    """Make a file's or folder's content durable before a rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
