"""Checkpoints on disk: what is written again, what two generations share, what damage reaches."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peertune import checkpoint, run_folder
from peertune.checkpoint import CheckpointStore
from peertune.errors import CheckpointError, StorageError
from peertune.run_folder import RunFolder

KEPT = torch.arange(6.0)


def files(round: int) -> dict[str, dict[str, Tensor]]:
    """One file that never changes and one that always does."""
    return {"kept": {"weights/a": KEPT}, "new": {"weights/b": torch.full((3,), float(round))}}


def save(store: CheckpointStore, *rounds: int) -> None:
    for round in rounds:
        store.save(0, round, files(round), {"at": round})
        store.prune(0)


def is_whole(store: CheckpointStore, round: int) -> bool:
    tensors, plain = store.load(0, round)
    expected = {name: tensor for part in files(round).values() for name, tensor in part.items()}
    assert tensors.keys() == expected.keys() and plain == {"at": round}
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


def inode(folder: Path, round: int, name: str = "kept") -> int:
    return (folder / "peer-000" / f"round-{round:08d}" / f"{name}.safetensors").stat().st_ino


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are written, not shared."""
    names: list[str] = []
    write = checkpoint.save_file

    def noted(tensors: Any, path: Path) -> None:
        names.append(path.stem)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", noted)
    return names


def test_what_did_not_change_is_shared_with_the_generation_that_goes(tmp_path: Path, written: list[str]) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    assert written == ["kept", "new"] * 2
    first = inode(tmp_path, 1)
    for round in (3, 4, 5):
        save(store, round)
    assert written == ["kept", "new"] * 2 + ["new"] * 3
    assert inode(tmp_path, 5) == first and inode(tmp_path, 4) != first
    assert store.rounds(0) == [4, 5] and is_whole(store, 4) and is_whole(store, 5)


def test_generations_kept_share_nothing_so_damage_in_one_leaves_the_other(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2, 3, 4)
    damage(tmp_path / "peer-000" / "round-00000004" / "kept.safetensors")
    with pytest.raises(CheckpointError, match=r"round-00000004: damaged: kept\.safetensors is not what was written"):
        store.load(0, 4)
    assert is_whole(store, 3)


@pytest.mark.parametrize("damage", [("2", "3"), ('"at"', '"et"')])
def test_damage_in_what_is_no_tensor_is_noticed_too(damage: tuple[str, str], tmp_path: Path) -> None:
    store, file = CheckpointStore(tmp_path), tmp_path / "peer-000" / "round-00000012" / "state.json"
    plain = {"at": 2.5, "of": [1e-9, None, {"7": [float("inf"), "\u00e9"]}]}
    store.save(0, 12, files(12), plain)
    assert store.load(0, 12)[1] == plain
    text = file.read_text()
    start = text.index('"state"')
    file.write_text(text[:start] + text[start:].replace(*damage, 1))
    with pytest.raises(CheckpointError, match=r"round-00000012: damaged: .*; there is no older one: start anew"):
        store.load(0, 12)
    save(store, 11)
    with pytest.raises(CheckpointError, match=r"round-00000012: damaged: .*; delete this folder to use an older one"):
        store.load(0, 12)


def test_damage_is_not_handed_on_by_one_who_goes_on_from_the_older_generation(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1, 2, 3, 4)
    damage(tmp_path / "peer-000" / "round-00000004" / "kept.safetensors")
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError):
        store.load(0, 4)
    assert is_whole(store, 3)
    save(store, 5, 6)
    assert store.rounds(0) == [5, 6] and is_whole(store, 5) and is_whole(store, 6)


def test_one_who_goes_on_shares_with_what_it_has_read(tmp_path: Path, written: list[str]) -> None:
    save(CheckpointStore(tmp_path), 1, 2)
    store = CheckpointStore(tmp_path)
    assert is_whole(store, 2)
    written.clear()
    save(store, 3, 4)  # in place of 1, which it has not read, and of 2
    assert written == ["kept", "new", "new"]
    assert is_whole(store, 3) and is_whole(store, 4)


def test_a_killed_process_that_left_three_generations_goes_on(tmp_path: Path) -> None:
    """It was killed before it could prune, so the first and the last share a file."""
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    store.save(0, 3, files(3), {"at": 3})
    assert store.rounds(0) == [1, 2, 3] and inode(tmp_path, 1) == inode(tmp_path, 3)
    again = CheckpointStore(tmp_path)
    assert is_whole(again, 3)
    save(again, 4)
    assert again.rounds(0) == [3, 4] and inode(tmp_path, 3) != inode(tmp_path, 4)
    assert is_whole(again, 3) and is_whole(again, 4)


def test_what_a_kill_left_half_done_is_in_nobodys_way(tmp_path: Path) -> None:
    store, home = CheckpointStore(tmp_path), tmp_path / "peer-000"
    save(store, 3)
    expected = sorted(path.relative_to(home) for path in home.rglob("*"))
    for left in (".round-00000003.partial", ".round-00000003.replaced"):
        (home / left).mkdir()
        (home / left / "half").touch()
    store.save(0, 3, files(3), {"at": 3})
    assert is_whole(store, 3) and sorted(path.relative_to(home) for path in home.rglob("*")) == expected
    (home / ".round-00000002.replaced").mkdir()
    store.prune(0)
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == expected


def test_what_the_disk_does_not_take_when_synced_is_no_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though writing it went well. Folders need not be: some systems cannot."""
    store, sync = CheckpointStore(tmp_path), os.fsync
    save(store, 1)
    refused = stat.S_ISDIR

    def failing(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    save(store, 2)
    refused = stat.S_ISREG
    with pytest.raises(StorageError, match=r"round-00000003: cannot write the checkpoint, .*: Input/output error"):
        save(store, 3)
    assert store.rounds(0) == [1, 2] and is_whole(store, 2)


@pytest.mark.parametrize("reason", ["no links", "gone"])
def test_what_cannot_be_shared_is_written(
    reason: str, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    if reason == "gone":
        (tmp_path / "peer-000" / "round-00000001" / "kept.safetensors").unlink()
    else:
        monkeypatch.setattr(os, "link", refuse)
    save(store, 3)
    assert written == ["kept", "new"] * 3
    assert is_whole(store, 3)


def test_a_shared_file_of_another_user_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on with another's run may write beside his files, and not change them."""
    store, look, change = CheckpointStore(tmp_path), Path.stat, Path.chmod
    save(store, 1, 2)
    others = inode(tmp_path, 1)

    def told(path: Path, **options: Any) -> Any:
        found = look(path, **options)
        is_others = found.st_ino == others
        return SimpleNamespace(st_mode=found.st_mode, st_uid=-1, st_ino=found.st_ino) if is_others else found

    def refused(path: Path, mode: int) -> None:
        if look(path).st_ino == others:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        change(path, mode)

    monkeypatch.setattr(Path, "stat", told)
    monkeypatch.setattr(Path, "chmod", refused)
    before = os.umask(0o077)
    try:
        save(store, 3)
    finally:
        os.umask(before)
    assert inode(tmp_path, 3) == others and is_whole(store, 3)


def test_a_generation_whose_replacement_failed_is_shared_no_more(
    tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is not known then."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    sync: Callable[[Path], None] = checkpoint._sync

    def failing(path: Path) -> None:
        sync(path)
        if path == tmp_path / "peer-000":
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(checkpoint, "_sync", failing)
        store.save(0, 1, {"kept": {"weights/a": KEPT + 1}}, {})
    save(store, 2)
    written.clear()
    save(store, 3)
    assert written == ["kept", "new"] and is_whole(store, 3)


def test_every_bit_type_and_shape_tells_files_apart(tmp_path: Path, written: list[str]) -> None:
    """Also where the values compare as equal, or the bytes are the same."""
    store, zeros = CheckpointStore(tmp_path), torch.zeros(4, 2)
    changed = [-zeros, zeros.view(torch.int32), zeros.view(2, 4), torch.zeros(4, 2, dtype=torch.bfloat16), zeros[:, :0]]
    others = [zeros, torch.tensor(1.5), torch.tensor([True, False]), torch.full((2,), float("nan"))]
    for round in (1, 2):
        save_as(store, round, {f"{i}": tensor for i, tensor in enumerate([*[zeros] * len(changed), *others])})
    written.clear()
    save_as(store, 3, {f"{i}": tensor for i, tensor in enumerate([*changed, *others])})
    assert written == [f"{i}" for i in range(len(changed))]
    tensors, _ = store.load(0, 3)
    for i, tensor in enumerate([*changed, *others]):
        found = tensors[f"{i}"]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_shared_file_counts_once_against_the_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_bytes(b"x" * 1000)
    os.link(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    RunFolder(tmp_path).require_space(1000)
    with pytest.raises(CheckpointError, match="0 MB free"):
        RunFolder(tmp_path).require_space(1001)


def save_as(store: CheckpointStore, round: int, tensors: dict[str, Tensor]) -> None:
    """A file a tensor."""
    store.save(0, round, {name: {name: tensor} for name, tensor in tensors.items()}, {})
    store.prune(0)


def damage(path: Path) -> None:
    """Turn a bit of a file where it lies: also under its other names."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def refuse(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")
