"""What a resumed run takes up: generations, a process's counts, and the events of the rounds that are done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peertune import run_folder, run_state
from peertune.algorithms import METHODS
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.algorithms.rw_lora import RwLora, RwLoraConfig
from peertune.checkpoint import CheckpointStore, newest_common
from peertune.config import LinkSection
from peertune.data.batches import Batches
from peertune.data.render import Sample
from peertune.errors import CheckpointError, StorageError
from peertune.evaluation import Measured
from peertune.link import Clock
from peertune.recipe import from_dict
from peertune.run_folder import RunFolder
from peertune.run_state import Agreed, RunState
from peertune.runtimes import Member
from tests.quadratic import simulate
from tests.test_methods import SHORT, graph, server

CPU = torch.device("cpu")


def store_of(folder: Path, generations: dict[int, list[int]], shards: int = 1) -> CheckpointStore:
    """A store in which each peer's shards have generations of some rounds, each tensor holding round and shard."""
    for shard in range(shards):
        store = CheckpointStore(folder, shards, shard)
        for peer, rounds in generations.items():
            for round in rounds:
                store.save(peer, round, {"rest": {"w": torch.tensor([[round, shard]])}}, {"of": peer})
    return CheckpointStore(folder, shards)


def test_the_newest_round_is_the_last_that_all_peers_have(tmp_path: Path) -> None:
    store = store_of(tmp_path, {0: [8, 16, 24], 1: [8, 16], 2: [16, 8, 100_000_000]})
    assert [store.rounds(peer) for peer in range(3)] == [[8, 16, 24], [8, 16], [8, 16, 100_000_000]]
    for peers, newest in ((range(3), 16), ([0], 24), ([0, 2], 16)):
        assert newest_common([store.rounds(peer) for peer in peers]) == newest
    assert newest_common([[1, 2], None, [2, 3, 4], [2, 4]]) == 2, "who is not known does not count"
    assert newest_common([[1], [2]]) is None
    tensors, plain = store.load(1, 16)
    assert (tensors["w"].tolist(), plain) == ([[16, 0]], {"of": 1})
    for peer in range(3):
        store.prune(peer)
    assert [store.rounds(peer) for peer in range(3)] == [[16, 24], [8, 16], [16, 100_000_000]]


def test_a_peer_of_two_shards_has_what_both_have(tmp_path: Path) -> None:
    store = store_of(tmp_path, {0: [4, 8]}, shards=2)
    assert store.load_whole(0, 8)[0]["w"].tolist() == [[8, 0], [8, 1]]
    shutil.rmtree(tmp_path / "peer-000" / "shard-1" / "round-00000008")
    assert store.rounds(0) == [4]


@pytest.mark.parametrize("what", ["weights", "peer", "round"])
def test_what_was_not_written_there_is_refused(what: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, {0: [4, 8], 1: [8]})
    home = tmp_path / "peer-000" / "round-00000008"
    if what == "weights":
        shutil.copy(tmp_path / "peer-000" / "round-00000004" / "rest.safetensors", home)
    else:
        shutil.rmtree(home)
        shutil.copytree(tmp_path / ("peer-000/round-00000004" if what == "round" else "peer-001/round-00000008"), home)
    with pytest.raises(
        CheckpointError, match="is not what was written" if what == "weights" else "; expected peer 0, "
    ):
        store.load(0, 8)


def state_of(member: Member, base: str = "base", data: str = "data") -> RunState:
    return RunState([member], {member.index: data}, base, CPU, Clock(LinkSection()))


@pytest.fixture
def members() -> Callable[[], Member]:
    """Makes peer 1 of a run of federated averaging after two rounds, with data of its own."""

    def make() -> Member:
        member = simulate(Fedavg, FedavgConfig(**SHORT), server(), 2)[1]
        samples: Any = [Sample(torch.arange(3).int().numpy(), torch.ones(3).bool().numpy()) for _ in range(5)]
        member.algorithm.peer.batches = Batches(samples, 2, seed=3, pad_id=0)
        return member

    return make


def test_a_process_takes_up_all_that_another_one_kept(
    members: Callable[[], Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, other = members(), members()
    now = [1000.0]
    monkeypatch.setattr(run_state, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(run_state, "peak_bytes", lambda device: 70)
    state = state_of(member)
    before, own = Measured({"loss": 3.0}, {"x": {"loss": 2.0}}), Measured({"loss": 1.0})
    state.before, state.cpu_s[1] = before, 12.5
    state.agreed = Agreed(is_reached=True, hops=4, absent=[2], unheard=[3], before=[own, None])
    assert state._clock is not None
    state._clock.simulated_s = 80.0
    [*_, drawn] = [member.algorithm.peer.batches.draw() for _ in range(3)]  # type: ignore[union-attr]
    now[0] += 60
    files, plain = state.saved(member, 2)
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    plain = json.loads(json.dumps(plain))
    assert plain["consensus"] == pytest.approx([3 / 15, 1 / 15, 4 / 15, 2 / 15, 5 / 15])
    assert plain["common"] == ["a", "b"]

    now[0] = 5.0
    monkeypatch.setattr(run_state, "peak_bytes", lambda device: 50)
    taken = state_of(other)
    noted: list[int] = []
    monkeypatch.setattr(type(other.exchange), "saved", lambda self, round: noted.append(round))
    other.exchange.sent.count([5], {"a": torch.zeros(100)})
    taken.take_up(other, 2, {name: tensor.clone() for name, tensor in tensors.items()}, plain, tmp_path)
    now[0] += 7
    assert (taken.before, taken.cpu_s, taken.wall_s, taken.simulated_s) == (before, {1: 12.5}, 67.0, 80.0)
    assert taken.agreed is not None and asdict(taken.agreed) == asdict(state.agreed)
    assert taken.agreed.before[0] == own
    assert taken.peak_bytes == 70 and noted == [2]
    assert other.exchange.sent.by_target() == member.exchange.sent.by_target()
    assert other.algorithm.peer.batches.draw() == member.algorithm.peer.batches.draw() != drawn  # type: ignore[union-attr]


def test_a_checkpoint_says_whose_weights_count_after_its_rounds() -> None:
    """An export of it averages by that: of a walk it is the adapter's holder."""
    member = simulate(RwLora, RwLoraConfig(**{**SHORT, "rounds": 9}), graph())[0]
    member.algorithm.peer.batches = None
    walk: list[int] = member.algorithm.walk  # type: ignore[attr-defined]
    told = [state_of(member).saved(member, done)[1]["consensus"].index(1.0) for done in range(10)]
    assert told == walk and len(set(walk)) > 2


@pytest.mark.parametrize("what", ["data", "base"])
def test_what_was_trained_on_may_not_change(what: str, members: Callable[[], Member], tmp_path: Path) -> None:
    member = members()
    _, plain = state_of(member).saved(member, 2)
    with pytest.raises(CheckpointError, match=f"peer 1's {what} has changed since this run began"):
        state_of(member, **{what: "another"}).take_up(member, 2, {}, plain, tmp_path)


NO_EVENTS = [b"\0" * 8, b"\xff\xfe", b"[1]", b"null", b'{"event": "round", "round": "1"}', b'{"round": 1}']
"""What a damaged disk may make of lines."""


def test_events_of_what_is_done_again_are_dropped(tmp_path: Path) -> None:
    """Those of a round stand before the checkpoint after it; what a finished run told of its end is told anew."""
    folder = RunFolder(tmp_path)
    kept: list[tuple[str, dict[str, Any]]] = [
        ("start", {}), ("eval", {"round": 0, "peers": None}), ("round", {"round": 0}), ("round", {"round": 1}),
        ("eval", {"round": 2, "peers": None}), ("checkpoint", {"round": 2}), ("resume", {"round": 2}),
    ]  # fmt: skip
    again: list[tuple[str, dict[str, Any]]] = [
        ("round", {"round": 2}), ("eval", {"round": 3, "peers": None}), ("checkpoint", {"round": 3}),
        ("agreement", {}), ("eval", {"round": 2, "peers": [1]}), ("end", {}),
    ]  # fmt: skip
    for name, fields in [*kept, *again]:
        folder.event(name, **fields)
    with folder.events.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in NO_EVENTS) + b'{"event": "rou')
    assert folder.rewind(2)
    lines = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [(line.pop("event"), line) for line in lines if line.pop("time")] == kept
    assert not folder.rewind(0)
    assert folder.events.read_text() == ""


def test_a_disk_that_refuses_events_is_told_of_once_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, told = RunFolder(tmp_path), []

    def refuse(path: Path, line: str) -> None:
        raise OSError("full")

    folder.refused = told.append
    for is_full in (True, True, False, True):
        with monkeypatch.context() as patch:
            if is_full:
                patch.setattr(run_folder, "append_line", refuse)
            folder.event("round")
    assert len(told) == 2
    folder.refused = None
    monkeypatch.setattr(run_folder, "append_line", refuse)
    with pytest.raises(StorageError):
        folder.event("round")


def test_a_resumed_recipe_may_differ_in_what_computes_nothing_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    recipe = {"run": {"seed": 0, "log_every": 1}, "algorithm": {"lr": 0.1}}
    folder.check(recipe, resume=False)
    folder.create({"config": recipe})
    folder.check({**recipe, "run": {"seed": 0, "log_every": 9}}, resume=True)
    for other in (
        {**recipe, "run": {"seed": 1, "log_every": 1}},
        {**recipe, "algorithm": {"lr": 0.1, "eps": 1.0}},
        {"run": recipe["run"]},
    ):
        with pytest.raises(CheckpointError, match="resume with the same recipe"):
            folder.check(other, resume=True)


def test_a_key_that_is_newer_than_a_run_does_not_keep_it_from_going_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = from_dict({}, METHODS)[0].to_dict()
    older = {**config, "topology": {key: value for key, value in config["topology"].items() if key != "matrix"}}
    folder.create({"config": older})
    folder.check(config, resume=True)
    with pytest.raises(CheckpointError, match=r"topology.matrix = \[\], got \[\[1.0\]\]"):
        folder.check({**config, "topology": {**config["topology"], "matrix": [[1.0]]}}, resume=True)


def test_a_run_that_begins_anew_leaves_nothing_of_an_earlier_start(tmp_path: Path) -> None:
    """Its checkpoints, of which no round was complete, would be taken up together with those to come."""
    folder = RunFolder(tmp_path)
    store_of(folder.checkpoints, {0: [4, 8], 1: [4]})
    folder.create({"config": {}})
    assert not folder.checkpoints.exists() and folder.read_recipe() == {"config": {}}


def test_what_a_run_has_written_counts_as_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation takes the place of an older one."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_bytes(b"x" * 500)
    RunFolder(tmp_path).require_space(1500)
    with pytest.raises(CheckpointError, match="free some space"):
        RunFolder(tmp_path).require_space(1501)
