"""One peer a process: bitwise the weights of the simulation, and a clear end where a rank is lost."""

import contextvars
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from peertune import run as runs
from peertune import runtimes
from peertune.algorithms import METHODS
from peertune.assemble import make_parts
from peertune.checkpoint import CheckpointStore
from peertune.config import RunConfig
from peertune.errors import ConfigError, DivergedError, PeerLostError, PeertuneError
from peertune.launch import launch
from peertune.progress import Silent
from peertune.recipe import from_dict
from peertune.run import run
from peertune.run_folder import RunFolder
from peertune.runtimes import distributed
from peertune.runtimes.distributed import _meeting_place, is_launched, local_device, process_group
from peertune.workload import foreseen_bytes
from tests.recipes import recipe, tree
from tests.test_consortium import PATIENCE_S, free_ports

STAR = {"kind": "star", "weights": "samples"}
METHODS_TRIED: dict[str, dict[str, Any]] = {
    "deca": {},
    "dec_lora": {"algorithm": {"name": "dec_lora", "lr": 1e-2, "rounds": 3, "local_steps": 2, "rank": 2}},
    "fedavg": {"algorithm": {"name": "fedavg", "lr": 1e-2, "rounds": 2, "local_steps": 2}, "topology": STAR},
    "choco": {"algorithm": {"name": "choco", "lr": 1e-2, "rounds": 4, "local_steps": 2, "refresh_every": 3}},
    "scaffold": {
        "algorithm": {"name": "scaffold", "lr": 1e-2, "rounds": 3, "local_steps": 2, "participation": 0.5},
        "topology": STAR,
    },
    "ditto": {
        "algorithm": {"name": "ditto", "lr": 1e-2, "rounds": 3, "local_steps": 2, "participation": 0.5},
        "topology": STAR,
    },
    "noloco": {"algorithm": {"name": "noloco", "lr": 1e-2, "rounds": 3, "local_steps": 2}},
    "rw_lora": {"algorithm": {"name": "rw_lora", "lr": 1e-2, "rounds": 4, "local_steps": 2, "rank": 2}},
    "local": {"algorithm": {"name": "local", "lr": 1e-2, "outer_rounds": 1, "inner_steps": 4}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "clip": {"exchange": {"robust": "clip"}, "topology": {"kind": "complete"}},
    "bfloat16 messages": {"exchange": {"codec": "bfloat16"}},
    "bfloat16 messages to a server": {
        "algorithm": {"name": "fedavg", "lr": 1e-2, "rounds": 2, "local_steps": 2},
        "exchange": {"codec": "bfloat16"},
        "topology": STAR,
    },
    "trimmed_mean": {"exchange": {"robust": "trimmed_mean"}, "topology": {"kind": "complete"}},
}
DIED = 9
"""Exit code of a rank that is made to die."""


def play(config: RunConfig, rank: int, ranks: int, port: int, failures: Any, options: dict[str, Any]) -> None:
    """One rank, as torchrun would start it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    dies, in_round = options.pop("dies", (None, None))

    def play_round(round: int, *rest: Any) -> Any:
        return os._exit(DIED) if (rank, round) == (dies, in_round) else runtimes.play_round(round, *rest)

    runs.play_round = play_round  # type: ignore[assignment]
    if rank == options.pop("other_base", None):
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": "tiny"})})
    try:
        launch(config, progress=Silent(), **options)
    except PeertuneError as error:
        failures.put((rank, type(error).__name__, str(error)))


def play_all(config: RunConfig, ranks: int, **options: Any) -> list[tuple[int, str, str]]:
    """Run a recipe with a process a rank; returns what failed: rank, kind and message."""
    fork = multiprocessing.get_context("fork")
    failures = fork.Queue()
    (port,) = free_ports(1)
    processes = [fork.Process(target=play, args=(config, r, ranks, port, failures, options)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode in (0, DIED)
    return sorted(failures.get() for _ in range(failures.qsize()))


def torchrun(ranks: int, folder: Path, sets: list[str]) -> None:
    """`peertune run` of an empty recipe with options, as one types it; it ends well and says so once."""
    (folder / "recipe.toml").write_text("")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "peertune", "run", str(folder / "recipe.toml"), "--out", str(folder / "out"), *sets),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("load it with") == 1


def config_of(folder: Path, model: Path, name: str, out: str, **sections: Any) -> RunConfig:
    merged = tree(folder, model, **{"eval": {"points": 2}, **METHODS_TRIED[name], **sections})
    merged["run"]["out"] = str(folder / out)
    return from_dict(merged, METHODS)[0]


def same_model(one: Path, other: Path) -> bool:
    files = [load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one, other)]
    return files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_ranks_end_with_bitwise_the_weights_of_the_simulation(name: str, tmp_path: Path, micro_model: Path) -> None:
    simulated = run(config_of(tmp_path, micro_model, name, "simulated"))
    ranks = 4 + (METHODS_TRIED[name].get("topology") is STAR)
    assert play_all(config_of(tmp_path, micro_model, name, "ranks"), ranks) == []
    told = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert same_model(tmp_path / "simulated", tmp_path / "ranks")
    for key in ("metrics", "bytes_sent_per_peer", "bytes_by_edge", "bytes_sent_by_hub", "rounds", "lambda2"):
        assert told[key] == simulated[key], key
    assert told["simulated_s"] is None
    events = {}
    for folder in ("simulated", "ranks"):
        lines = map(json.loads, (tmp_path / folder / "events.jsonl").read_text().splitlines())
        changing = {"time", "wall_s", "cpu_s", "simulated_s", "config", "peak_memory_bytes"}
        events[folder] = [{k: v for k, v in line.items() if k not in changing} for line in lines]
    assert events["ranks"] == events["simulated"]
    assert (tmp_path / "ranks" / "report.html").exists()


def test_a_lost_rank_ends_the_group_and_resume_goes_on(tmp_path: Path, micro_model: Path) -> None:
    section = {"num_peers": 4, "threads": 1, "checkpoint_every": 2}
    run(config_of(tmp_path, micro_model, "deca", "whole", run=section))
    config = config_of(tmp_path, micro_model, "deca", "ranks", run=section)
    failures = play_all(config, 4, dies=(2, 5))
    assert {path.name for path in (tmp_path / "ranks" / "checkpoints").glob("*/*")} == {
        "round-00000002",
        "round-00000004",
    }
    assert [(rank, kind) for rank, kind, _ in failures] == [(r, "PeerLostError") for r in (0, 1, 3)]
    assert all("--resume" in message for _, _, message in failures)
    assert play_all(config, 4, resume=True) == []
    assert same_model(tmp_path / "whole", tmp_path / "ranks")


def test_as_many_processes_as_members_are_asked_for(tmp_path: Path, micro_model: Path) -> None:
    failures = play_all(recipe(tmp_path, micro_model), 3)
    assert {kind for _, kind, _ in failures} == {"ConfigError"} and len(failures) == 3
    assert "got 3 processes for a recipe of 4 members" in failures[0][2]
    assert not (tmp_path / "out").exists()


def test_a_rank_with_another_base_is_refused(tmp_path: Path, micro_model: Path) -> None:
    failures = play_all(recipe(tmp_path, micro_model, run={"num_peers": 2}), 2, other_base=1)
    assert [kind for _, kind, _ in failures] == ["ModelError"] * 2
    assert "is not the same base for member 1 as for member 0" in failures[0][2]
    assert not (tmp_path / "out").exists()


def test_pooled_training_is_refused(tmp_path: Path, micro_model: Path) -> None:
    failures = play_all(recipe(tmp_path, micro_model, algorithm={"name": "pooled"}), 2)
    assert len(failures) == 2 and "algorithm.name: got 'pooled' under torchrun" in failures[0][2]


def test_torchrun_carries_out_a_recipe(tmp_path: Path, micro_model: Path) -> None:
    """The command as one types it, in two processes."""
    config = recipe(tmp_path, micro_model, run={"num_peers": 2, "threads": 1, "out": str(tmp_path / "out")})
    sets = [f"--set={key}={value}" for key, value in {
        "run.num_peers": 2, "run.threads": 1, "model.path": config.model.path, "model.max_length": 40,
        "data.train": config.data.train, "data.test": config.data.test, "data.task": "classification",
        "topology.kind": "ring", "algorithm.outer_rounds": 1, "algorithm.inner_steps": 2,
    }.items()]  # fmt: skip
    torchrun(2, tmp_path, sets)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"] > 0


def test_ranks_that_torchrun_restarts_do_not_dial_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose addresses are still in the store that it keeps; rank 0 is the first to come back, and finds them."""
    kept = dist.HashStore()
    rank = contextvars.ContextVar("rank", default=0)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(kept, rank.get(), 3)]))

    def meet(own: int) -> Any:
        rank.set(own)
        return _meeting_place()["store"]

    with ThreadPoolExecutor(3) as threads:
        for is_first in (True, False):
            before = b"" if is_first else kept.get("called")
            stores = [threads.submit(meet, 0)]
            while not is_first and kept.get("called") == before:
                time.sleep(0.001)
            first, *others = [
                future.result(PATIENCE_S) for future in stores + [threads.submit(meet, r) for r in (1, 2)]
            ]
            assert not first.check(["address"])
            first.set("address", "of a rank that will die")
            assert all(other.get("address") == b"of a rank that will die" for other in others)


def test_ranks_that_do_not_see_one_folder_are_refused(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any round; in the end this one had said that a summary is damaged."""
    monkeypatch.setattr(runs.RunSetup, "record", lambda *_: None)  # as of a rank on a machine with a disk of its own
    monkeypatch.setattr(runs.Run, "_round", lambda *_: pytest.fail("a round"))
    monkeypatch.setattr(RunFolder.require_seen, "__defaults__", (0.0,))
    with pytest.raises(PeertuneError, match=r"created by rank 0, and is not seen on .*that all machines have mounted"):
        run(recipe(tmp_path, micro_model))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[/src/gloo/pair.cc:553] Connection closed by peer [10.0.0.1]:28326. This is typically caused by a crash.",
            r"in round 3: Connection closed by peer \[10.0.0.1\]:28326; see that rank's",
        ),
        (  # what it finds for a machine whose name stands for itself in its /etc/hosts, as Debian writes it
            "Gloo connectFullMesh failed with [/src/gloo/pair.cc:152] timed out connecting: remote=[127.0.1.1]:3990$1",
            r"remote=\[127.0.1.1\]:3990\$1 \(where that is no address of the other machine, set GLOO_SOCKET_IFNAME",
        ),
    ],
)
def test_of_a_lost_rank_the_reason_is_told_without_the_librarys_places_and_advice(said: str, told: str) -> None:
    with pytest.raises(PeerLostError, match=told), distributed._no_rank_lost("in round 3"):
        raise RuntimeError(said)


def test_half_an_environment_and_one_gpu_for_all_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a scheduler's
    with pytest.raises(ConfigError, match=r"no RANK, LOCAL_RANK, .*start this command with torchrun"):
        is_launched()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="got 'cuda:0' with 2 ranks on this machine, expected 'cuda'"):
        local_device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()


def test_ranks_wait_for_days_not_for_torchs_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may export a large model, or train on far more rows, while the others wait."""
    asked: list[Any] = []
    monkeypatch.setattr(distributed, "_meeting_place", dict)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: asked.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group("cpu"):
        assert asked[0].days == 7


def test_a_run_begun_under_torchrun_goes_on_in_simulation(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nobody counted simulated time."""
    config = recipe(tmp_path, micro_model)
    run(config)
    (tmp_path / "out" / "summary.json").unlink()
    original = CheckpointStore.load

    def load(self: CheckpointStore, peer: int, round: int) -> Any:
        tensors, plain = original(self, peer, round)
        return tensors, {**plain, "simulated_s": None}

    monkeypatch.setattr(CheckpointStore, "load", load)
    assert run(config, resume=True)["simulated_s"] >= 0.0


def test_a_process_with_the_hub_alone_has_no_steps_to_batch(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model, run={"batched_peers": 4}, algorithm={"name": "fedavg", "adapter": "lora"})
    assert make_parts(config, []) == []


def test_generations_that_were_put_aside_or_left_half_done(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for round in (4, 8):
        store.save(0, round, {"all": {"w": torch.ones(2)}}, {})
    home = tmp_path / "peer-000"
    (home / "round-00000008").rename(home / "round-00000008.damaged")
    (home / ".round-00000006.partial").mkdir()
    assert store.rounds(0) == [4]
    store.prune(0)
    assert sorted(path.name for path in home.iterdir()) == ["round-00000004", "round-00000008.damaged"]


@pytest.mark.parametrize("name", ["dec_lora", "gt", "noloco"])
def test_the_disk_that_checkpoints_take_is_foreseen(name: str, tmp_path: Path, micro_model: Path) -> None:
    """Generations and one being written; files' headers left out."""
    config = recipe(tmp_path, micro_model, algorithm={"name": name, "rounds": 4, "local_steps": 2})
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "foreseen_bytes", lambda *given: found.append(foreseen_bytes(*given)) or 0)
        run(config)
    held = [load_file(path) for path in (tmp_path / "out" / "checkpoints").rglob("*.safetensors")]
    tensors = sum(t.numel() * t.element_size() for file in held for t in file.values())
    assert found[0] >= tensors * 3 / 2


def test_decaf_that_diverges_says_so(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model, algorithm={"name": "decaf", "rounds": 6, "local_steps": 2, "lr": 1e20})
    with pytest.raises(DivergedError, match=r"lower algorithm\.lr"):
        run(config)
