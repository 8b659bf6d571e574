"""What a comparison's cells are computed from: a folder's cells, done now or weeks ago, are all of the same files.

They may be of other versions, which is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from peertune.compare.contestants import Contestant
from peertune.config import RunConfig
from peertune.data.load import locate
from peertune.errors import CheckpointError, ConfigError
from peertune.logfields import mapping
from peertune.model.load import resolve_path
from peertune.records import versions
from peertune.run_folder import RunFolder
from peertune.storage import storage_errors

INPUTS = "inputs.json"


def fingerprints(config: RunConfig, base: Path) -> dict[str, str]:
    """SHA-256 of the contents of data and base, by their names in the recipe; what is not a local file has none."""
    found = {}
    for source in (config.data.train, config.data.test):
        for name in [source] if isinstance(source, str) else source:
            place = locate(name, base) if name else None
            if place is not None:
                found[name] = _hash(place[0])
    folder = Path(resolve_path(config.model.path, base))
    if folder.is_dir():
        found[config.model.path] = _hash(folder)
    return found


def check_inputs(out: Path, found: dict[str, str]) -> None:
    """Refuse a folder whose cells were computed from other files. Raises ConfigError."""
    try:
        known = json.loads((out / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing was begun, or by a version that did not write it
    changed = [name for name in found if isinstance(known, dict) and known.get(name, found[name]) != found[name]]
    if changed:
        raise ConfigError(
            f"--out: {out} holds cells from when {', '.join(changed)} had other contents, and they would not compare;"
            " bring the old contents back, or name another folder"
        )


def write_inputs(out: Path, found: dict[str, str]) -> None:
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / INPUTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def version_notes(out: Path, contestants: Sequence[Contestant]) -> list[str]:
    """Whose runs in a folder were begun with other versions than those of now: a sentence for each difference."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for contestant in contestants:
        now = versions(contestant.config.algorithm.name)
        for kind in ("tune", "probe", "cells"):
            for recipe in sorted((out / kind / contestant.slug).rglob("recipe.json")):
                with suppress(CheckpointError):  # refused where it is needed
                    then = mapping(RunFolder(recipe.parent).read_recipe().get("versions"))
                    if changed := [key for key in now if then.get(key) != now[key]]:
                        texts = [", ".join(f"{key} {of.get(key, '?')}" for key in changed) for of in (then, now)]
                        found.setdefault((texts[0], texts[1]), {})[contestant.name] = None
    return [
        f"{', '.join(names)}: has cells of {then}, now it is {now}: they are taken as they are, and may not compare"
        " with others; to have them anew, name another folder with --out."
        for (then, now), names in found.items()
    ]


def _hash(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    files: Iterable[Path] = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for each in files:
        with each.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{each.relative_to(path)} {own}\n".encode())
    return digest.hexdigest()
