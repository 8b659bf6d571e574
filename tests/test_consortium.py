"""Sites as processes of their own on loopback: bitwise the simulation's weights, also over a kill -9."""

import json
import multiprocessing
import os
import signal
import socket
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peertune.algorithms import METHODS
from peertune.charter import Charter, Member, parse_member, read_charter, write_charter
from peertune.cli import main
from peertune.config import from_dict
from peertune.errors import CharterError, IdentityError
from peertune.identity import load_identity, make_identity
from peertune.run import run
from tests.recipes import tree, write_rows

NAMES = ["north", "east", "south", "west"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Consortium:
    """Four sites with keys, data and folders of their own, and a charter all have signed."""

    def __init__(self, folder: Path, model: Path, algorithm: dict[str, Any], grace: float = 60.0, **sections: Any) -> None:
        self.folder, self.model = folder, model
        self.names = [*NAMES, "server"] if sections.get("topology", {}).get("kind") == "star" else NAMES
        self.data = [write_rows(folder / f"{name}.jsonl", 40 + 4 * i) for i, name in enumerate(NAMES)]
        recipe = tree(folder, model, **{"algorithm": {"name": "deca", "lr": 1e-2, **algorithm}, **sections})
        recipe["data"] |= {"train": [str(path) for path in self.data], "partition": {"kind": "files"}}
        recipe["run"]["out"] = str(folder / "simulated")
        self.config = from_dict(recipe, METHODS)[0]
        self.recipe = folder / "recipe.toml"
        import tomli_w

        self.recipe.write_text(tomli_w.dumps(recipe))
        self.charter = folder / "charter.toml"
        # North and south open a port; east and west, who are no neighbours on the ring, only dial out.
        ports = dict(zip(("north", "south", "server"), free_ports(3), strict=True))
        members = []
        for i, name in enumerate(self.names):
            id = make_identity(folder / name / "key").id
            where = f"@127.0.0.1:{ports[name]}" if name in ports else ""
            members.append(f"--member={name}={id}{where}#{40 + 4 * i}")
        arguments = ["charter", "new", str(self.recipe), *members, "--expires", "2999-01-01", "--to", str(self.charter)]
        assert main([*arguments, "--grace", str(grace)]) == 0
        for name in self.names:
            assert main(["charter", "sign", str(self.charter), "--identity", str(folder / name / "key")]) == 0

    def site(self, name: str) -> Any:
        """Start one site's process."""
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=self._join, args=(name,))
        process.start()
        return process

    def _join(self, name: str) -> None:
        torch.set_num_threads(1)
        data = ["--data", str(self.folder / f"{name}.jsonl")] if name in NAMES else []
        base = self.folder / name
        with (base / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = main(
                [
                    *("join", str(self.charter), *data, "--test", str(self.folder / "test.jsonl")),
                    *("--identity", str(base / "key"), "--out", str(base / "run"), "--model", str(self.model)),
                ]
            )
        os._exit(code)

    def events(self, name: str, kind: str, file: str = "audit.jsonl") -> list[dict[str, Any]]:
        path = self.folder / name / "run" / file
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def same_model(self, name: str) -> bool:
        files = [
            load_file(next((folder / "model").glob("*.safetensors")))
            for folder in (self.folder / "simulated", self.folder / name / "run")
        ]
        return files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])

    def ended(self, processes: dict[str, Any]) -> None:
        for name, process in processes.items():
            process.join(120)
            assert process.exitcode == 0, (self.folder / name / "log").read_text()


STAR = {"topology": {"kind": "star", "weights": "samples"}}
TRIED: dict[str, dict[str, Any]] = {
    "deca": {"algorithm": {}},
    "dec_lora": {"algorithm": {"name": "dec_lora", "rounds": 3, "local_steps": 2, "rank": 2}},
    "fedavg": {"algorithm": {"name": "fedavg", "rounds": 2, "local_steps": 2}, **STAR},
}


@pytest.mark.parametrize("name", TRIED)
def test_sites_end_with_bitwise_the_weights_of_the_simulation(name: str, tmp_path: Path, micro_model: Path) -> None:
    consortium = Consortium(tmp_path, micro_model, **TRIED[name])
    summary = run(consortium.config)
    consortium.ended({site: consortium.site(site) for site in consortium.names})
    for index, site in enumerate(consortium.names):
        assert consortium.same_model(site)
        if site in NAMES:
            told = json.loads((tmp_path / site / "run" / "summary.json").read_text())
            assert told["bytes_sent_per_peer"][index] == summary["bytes_sent_per_peer"][index]
            assert told["metrics"]["peers"][index] == summary["metrics"]["peers"][index]
            assert told["metrics"]["average_model"] == summary["metrics"]["average_model"]
            sent = sum(event["bytes"] for event in consortium.events(site, "sent"))
            assert sent == told["bytes_sent_per_peer"][index] + told["header_bytes_sent_per_peer"][index]
        assert (tmp_path / site / "run" / "report.html").exists()


def test_a_killed_site_comes_back_and_nothing_is_lost(tmp_path: Path, micro_model: Path) -> None:
    """kill -9 in mid-run; the same command again: all sites end with the bits of an undisturbed run."""
    section = {"num_peers": 4, "threads": 1, "checkpoint_every": 2}
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 16}, run=section)
    run(consortium.config)
    processes = {site: consortium.site(site) for site in NAMES}
    victim = processes["east"]
    end = time.monotonic() + 60
    while len(consortium.events("east", "round", "events.jsonl")) < 7 and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert not (tmp_path / "east" / "run" / "summary.json").exists()
    processes["east"] = consortium.site("east")
    consortium.ended(processes)
    assert consortium.events("east", "resume", "events.jsonl")
    for site in NAMES:
        assert consortium.same_model(site)
        assert not consortium.events(site, "left_out")
