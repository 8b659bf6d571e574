"""What only a GPU can show. `PEERTUNE_TEST_GPU=1 scripts/test` also lets all other tests train on it."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from peertune.algorithms import ALGORITHMS
from peertune.exchange import Hop, Payload
from peertune.launch import launch
from peertune.progress import Silent
from peertune.run import run
from peertune.runtimes.simulation import Mailbox
from tests.recipes import recipe
from tests.test_distributed import same_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be seen; set PEERTUNE_TEST_GPU=1")
STAR = {"kind": "star", "weights": "samples"}


@pytest.mark.parametrize("name", [name for name, method in ALGORITHMS.items() if not method.pools_data])
def test_messages_lie_where_the_model_is_as_nccl_needs_them(
    name: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: set[str] = set()
    put = Mailbox.put

    def spy(self: Mailbox, peer: int, hop: Hop, payload: Payload, size: int) -> None:
        devices.update(tensor.device.type for tensor in payload.values())
        put(self, peer, hop, payload, size)

    monkeypatch.setattr(Mailbox, "put", spy)
    options: dict[str, Any] = {"algorithm": {"name": name, "rounds": 4, "local_steps": 2}}
    if name in ("fedavg", "scaffold", "ditto", "diloco"):
        options["topology"] = STAR
    summary = run(recipe(tmp_path, micro_model, **options))
    assert devices == ({"cuda"} if any(summary["bytes_sent_per_peer"]) else set())
    assert math.isfinite(summary["metrics"]["average_model"]["loss"])


@pytest.mark.parametrize("name", ["deca", "dec_lora", "dpsgd"])
def test_one_rank_over_nccl_is_the_simulation_of_one_peer(
    name: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that ranks say to all; messages between two need a second GPU."""
    monkeypatch.setattr("peertune.launch.is_launched", lambda: True)  # one process alone is else a simulation
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(key, str(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    backends = set()
    options: dict[str, Any] = {"algorithm": {"name": name, "rounds": 4, "local_steps": 2}}
    init = dist.init_process_group

    def spy(backend: str, **settings: Any) -> None:
        backends.add(backend)
        init(backend, **settings)

    monkeypatch.setattr(dist, "init_process_group", spy)
    found = []
    for way in (run, launch):
        config = recipe(tmp_path, micro_model, run={"num_peers": 1, "out": str(tmp_path / way.__name__)}, **options)
        found.append(way(config, progress=Silent()))
    assert found[0]["metrics"] == found[1]["metrics"] and same_model(tmp_path / "run", tmp_path / "launch")
    assert backends == {"nccl"}
