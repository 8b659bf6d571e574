"""Small recipes and data that the run tests share, and how a run is killed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peertune.algorithms import METHODS
from peertune.checkpoint import CheckpointStore
from peertune.config import RunConfig
from peertune.recipe import from_dict

WORDS = {"red": "apple cherry brick rose", "blue": "sky sea ink ice", "green": "grass leaf lime moss"}


def write_rows(path: Path, num_rows: int = 60) -> Path:
    """Classification rows: a few words of a colour, labelled by the colour; no two alike."""
    with path.open("w") as file:
        for i in range(num_rows):
            label = list(WORDS)[i % 3]
            words = WORDS[label].split()
            file.write(json.dumps({"text": f"{words[i % 4]} {i} {words[i // 4 % 4]}", "label": label}) + "\n")
    return path


def tree(folder: Path, base_model: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe of four peers that runs in a second, as nested dicts; `sections` are merged in."""
    base: dict[str, dict[str, Any]] = {
        "run": {"num_peers": 4, "out": str(folder / "out"), "threads": 1},
        "model": {"path": str(base_model), "max_length": 40},
        "data": {
            "train": str(write_rows(folder / "train.jsonl")),
            "test": str(write_rows(folder / "test.jsonl", 12)),
            "task": "classification",
            "batch_size": 4,
        },
        "topology": {"kind": "ring"},
        "algorithm": {"lr": 1e-2, "outer_rounds": 1, "inner_steps": 4, "layers_per_block": 2},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return base


def recipe(folder: Path, base_model: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """The same, checked."""
    return from_dict(tree(folder, base_model, **sections), METHODS)[0]


class Killed(BaseException):
    """Ends a run as a signal would: nothing in the code catches it."""


@contextmanager
def killed_after(round: int, of: str = "") -> Iterator[None]:
    """Context whose run dies after the checkpoint of some round, where `of` stands in its folder's name."""
    prune = CheckpointStore.prune  # called when all peers have one

    def dying(self: CheckpointStore, peer: int) -> None:
        prune(self, peer)
        if of in str(self.folder) and self.rounds(peer)[-1] == round:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CheckpointStore, "prune", dying)
        yield
