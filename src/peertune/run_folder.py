"""A run's folder: who may use it, its events, its summary. Everything a run leaves behind is named here.

DIR/recipe.json      the resolved recipe, versions
DIR/events.jsonl     one line an event, readable while the run goes on
DIR/lock             while a process works on it; see lock.py
DIR/checkpoints/     see checkpoint.py
DIR/summary.json     written last
DIR/model/           the exported model, an adapter merged into it
DIR/adapter/         the adapter alone, where one was trained
DIR/report.html      see report/
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from peertune.algorithms import METHODS
from peertune.errors import CheckpointError, ConfigError, StorageError
from peertune.lock import FolderLock
from peertune.logfields import parse_line, whole
from peertune.model.adapters import bottleneck_code, core_of, merge_adapter, peft_is_quiet
from peertune.recipe import flatten, from_dict
from peertune.storage import (
    append_line,
    check_writable,
    nearest_existing,
    share_weights,
    storage_errors,
    write_atomically,
)

FREE_KEYS = {
    *("run.out", "run.log_every", "run.checkpoint_every", "eval.every", "eval.points"),
    *("link.bandwidth_mbit", "link.latency_ms"),
}
"""Keys that a resumed run may change: they do not touch what is computed."""
SITE_FREE_KEYS = FREE_KEYS | {"run.device", "run.threads", "model.path", "data.train", "data.test"}
"""At a site of a consortium, which may go on on another machine: what lies at those places is known by its hash."""
LABELS = "labels.json"
"""Beside a model that tells classes: their names, in the order of their numbers."""


class RunFolder:
    """Paths and small files of one run. Creates nothing until `create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe, self.events, self.summary = path / "recipe.json", path / "events.jsonl", path / "summary.json"
        self.checkpoints, self.model, self.adapter = path / "checkpoints", path / "model", path / "adapter"
        self.lock = FolderLock(path)
        self.is_written = True
        """False: another process of the run writes what this one is given too."""
        self.refused: Callable[[StorageError], None] | None = None
        """Told when the disk refuses an event, once for several in a row; None: that ends the run."""
        self._refuses = False

    @property
    def holds_run(self) -> bool:
        return any(path.exists() for path in (self.recipe, self.events, self.summary, self.checkpoints))

    def check(
        self, config: Mapping[str, Any], resume: bool, site: int | None = None, *, free: Set[str] | None = None
    ) -> None:
        """Refuse a folder that cannot be used, before anything is loaded.

        Args:
            site: whose run it is to be, by its place among a consortium's members; None: no site's.
            free: keys that may have changed; None: those of a site, or of a run elsewhere.
        Raises:
            CheckpointError: it lies under a file, is not writable, holds a run and `resume` is False, or holds a run of
                another recipe or site.
        """
        check_writable(self.path, "run.out")
        if not self.holds_run:
            return
        if not resume:
            raise CheckpointError(
                f"run.out: {self.path} already holds a run; go on with --resume, or name another folder with --out"
            )
        recipe = self.read_recipe()
        if (holder := recipe.get("site")) != site:
            raise CheckpointError(
                f"{self.path}: holds {_whose(holder)}, got {_whose(site)}; name the folder of its own with --out, or"
                " at a site the key of the one whose folder it is with --identity"
            )
        then, now = recipe["config"], flatten(config)
        free = (FREE_KEYS if site is None else SITE_FREE_KEYS) if free is None else free
        before = {key: value for key, value in _defaults(then).items() if key in now} | flatten(then)
        for key in sorted((before.keys() | now.keys()) - free):
            if before.get(key) != now.get(key):
                raise CheckpointError(
                    f"{self.path}: holds a run with {key} = {json.dumps(before.get(key))},"
                    f" got {json.dumps(now.get(key))}; resume with the same recipe, or name another folder with --out"
                )

    def require_unfinished(self) -> None:
        """Raises CheckpointError where the run's summary is there, so that its model is not written over."""
        if self.summary.exists():
            raise CheckpointError(
                f"{self.path}: another process has finished this run while this one was starting; its model was left"
                " as it is: look at it there, or name another folder with --out"
            )

    def require_space(self, num_bytes: int) -> None:
        """Raises CheckpointError where the disk cannot hold `num_bytes`, what the run has written already included."""
        free = shutil.disk_usage(nearest_existing(self.path)).free
        held = [path.stat() for path in self.path.rglob("*") if path.is_file()]
        free += sum({(file.st_dev, file.st_ino): file.st_size for file in held}.values())  # checkpoints share some
        if free < num_bytes:
            raise CheckpointError(
                f"run.out: {self.path} has {free / 1e6:.0f} MB free, the run's checkpoints and model need about"
                f" {num_bytes / 1e6:.0f} MB; free some space or name another folder with --out"
            )

    def create(self, recipe: Mapping[str, Any]) -> None:
        """Make the folder, with the resolved recipe in it and nothing of an earlier start."""
        if not self.is_written:
            return
        with storage_errors(self.path):
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe, json.dumps(recipe, indent=1))

    def require_seen(self, patience_s: float = 60.0) -> None:
        """Wait until what one process of the run has created is here too, as a network file system may be late.

        Raises:
            CheckpointError: it does not come.
        """
        until = time.monotonic() + patience_s
        while not self.recipe.exists():
            if time.monotonic() > until:
                raise CheckpointError(
                    f"run.out: {self.path} was created by rank 0, and is not seen on {socket.gethostname()}; all ranks"
                    " have to see one folder: name one, with --out, that all machines have mounted"
                )
            time.sleep(0.2)
            with suppress(OSError):
                os.listdir(self.path.parent)  # whereupon NFS looks again for what it knows not to be there

    def rewind(self, round: int) -> bool:
        """Drop the events of what will be done again, all but those of the first `round` rounds, and what is no event.

        Returns:
            Whether the run's start is still among them.
        """
        if not self.is_written or not self.events.exists():
            return False
        kept: list[Mapping[str, Any]] = []
        with storage_errors(self.path):
            for line in self.events.read_bytes().splitlines():
                event = parse_line(line) or {}  # half of one, of a run that was killed, or what a disk made of it
                kind, at = event.get("event"), whole(event.get("round", 0))
                final = kind in ("agreement", "end") or (kind == "eval" and event.get("peers") is not None)
                if kind is None or at is None or at > round or (kind == "round" and at == round) or final or not round:
                    continue
                kept.append(event)
            write_atomically(self.events, "".join(json.dumps(event) + "\n" for event in kept))
        return any(event["event"] == "start" for event in kept)

    def event(self, event: str, **fields: Any) -> None:
        """Append one event. Raises StorageError, where `refused` is None."""
        if not self.is_written:
            return
        try:
            with storage_errors(self.path):
                append_line(self.events, json.dumps({"event": event, "time": round(time.time(), 3), **fields}))
            self._refuses = False
        except StorageError as error:
            if self.refused is None:
                raise
            if not self._refuses:
                self.refused(error)
            self._refuses = True

    def moved(self, **fields: Any) -> None:
        """Put right where the recipe says that things lie, on the machine on which the run goes on."""
        if self.is_written and (recipe := self.read_recipe()) != recipe | fields:
            with storage_errors(self.path):
                write_atomically(self.recipe, json.dumps(recipe | fields, indent=1))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        with storage_errors(self.path):
            write_atomically(self.summary, json.dumps(summary, indent=1))

    def read_recipe(self) -> dict[str, Any]:
        """What `create` wrote. Raises CheckpointError where it is damaged or missing."""
        try:
            recipe = json.loads(self.recipe.read_text(encoding="utf-8"))
            if not isinstance(recipe["config"], dict):
                raise TypeError("config is no object")
            return dict(recipe)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.recipe}: damaged or missing: {error}; start anew in another folder with --out"
            ) from error

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote. Raises CheckpointError where it is damaged."""
        try:
            return dict(json.loads(self.summary.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.summary}: damaged: {error}; delete it and go on with --resume, which makes it anew"
            ) from error


def _whose(site: int | None) -> str:
    return "a run that is no site's" if site is None else f"the run of the charter's member {site} (the first is 0)"


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """By dotted key, what a run's recipe says without saying it: keys may be newer than the recipe."""
    with suppress(ConfigError):
        return flatten(from_dict(config, METHODS)[0].to_dict())
    return {}


def save_trained(
    folder: Path,
    module: Any,
    tokenizer: Any,
    load_base: Callable[[], Any] | None,
    adapter: Path | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Export what was trained as a whole model, an adapter merged into it; one that cannot be merged by itself.

    Args:
        folder: where the model goes, or an adapter that cannot be merged if `adapter` is None.
        module: the trained model.
        load_base: loads the base once more, to merge an adapter into; None: an adapter is kept as one.
        adapter: where the adapter alone goes too.
        labels: names of the classes it was trained to tell, kept beside it.
    """
    merged = module if core_of(module) is module else None if load_base is None else merge_adapter(module, load_base())
    if merged is not None:
        save_model(folder, merged, tokenizer)
    alone = adapter or folder
    if merged is not module and (adapter is not None or merged is None):
        with storage_errors(alone), peft_is_quiet():
            module.save_pretrained(alone)
            share_weights(alone, alone / "adapter_config.json")
            tokenizer.save_pretrained(alone)
    for written in {folder, alone} if labels else set():
        if written.exists():
            with storage_errors(written):
                (written / LABELS).write_text(json.dumps(list(labels), ensure_ascii=False), encoding="utf-8")


def read_labels(folder: Path) -> list[str]:
    """Names of the classes that a model in a folder was trained to tell; none where it does not say."""
    try:
        found = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def save_model(folder: Path, module: Any, tokenizer: Any) -> None:
    """Write a model and its tokenizer in the format that `from_pretrained` loads; bottlenecks bring their code."""
    with storage_errors(folder):
        module.config.use_cache = True
        code = bottleneck_code(module)
        # transformers renames and joins weights of older formats for its own classes only.
        module.save_pretrained(folder, save_original_format=not code)
        share_weights(folder, folder / "config.json")
        for name, text in code.items():
            (folder / name).write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(folder)
