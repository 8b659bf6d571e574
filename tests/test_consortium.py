"""Sites as processes of their own on loopback: bitwise the simulation's weights, also over a kill -9."""

import asyncio
import base64
import errno
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from copy import copy
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from safetensors.torch import load_file

from peertune import __version__, ejection
from peertune.algorithms import METHODS
from peertune.algorithms.deca import Deca
from peertune.algorithms.fedavg import Fedavg
from peertune.audit import AuditLog
from peertune.charter import (
    Charter,
    Member,
    difference,
    parse_member,
    piece_hashes,
    read_charter,
    sample_counts,
    write_charter,
)
from peertune.checkpoint import CheckpointStore
from peertune.cli import main
from peertune.consortium import eject, join, leave
from peertune.ejection import Ejection, ejected, ejection_path, needed, sign_ejection
from peertune.errors import CharterError, CheckpointError, ConfigError, IdentityError, Left, TurnedAwayError
from peertune.exchange import Hop
from peertune.export import export
from peertune.identity import ALWAYS, Identity, certificate_id, load_identity, make_identity
from peertune.progress import Silent
from peertune.recipe import from_dict
from peertune.run import run
from peertune.runtimes import node as node_module
from peertune.runtimes import outbox
from peertune.runtimes import probe as probe_module
from peertune.runtimes.neighbor import Neighbor
from peertune.runtimes.network import NetworkExchange, without
from peertune.runtimes.node import Node
from peertune.runtimes.port import check_port
from peertune.runtimes.probe import diagnose
from peertune.runtimes.proxy import EXEMPTIONS, proxy_for, take_upper_case
from peertune.runtimes.proxy import NAMES as NAMES_OF_PROXIES
from peertune.runtimes.site_requests import Requests
from peertune.site import SiteOptions
from peertune.watch.logs import Links
from tests.recipes import tree, write_rows

NAMES = ["north", "east", "south", "west"]
PATIENCE_S = 300.0
"""Seconds in which whatever is waited for comes, however loaded the machine."""


def free_ports(count: int) -> list[int]:
    """Ports for those who listen with SO_REUSEADDR, as servers do; Linux gives them to nobody else from now on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:  # elsewhere nobody could listen beside one that stays open, and does not listen
        each.detach() if sys.platform == "linux" else each.close()
    return ports


GRACE_S = 6.0
"""Of sites of which none may be left out at the start: word of one goes round in seconds, and lines open one by one."""


class Consortium:
    """Four sites with keys, data and folders of their own, and a charter all have signed."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        algorithm: dict[str, Any],
        grace: float = 60.0,
        quorum: int = 1,
        doors: Sequence[str] = ("north", "south", "server"),
        **sections: Any,
    ) -> None:
        self.folder, self.model = folder, model
        self.names = [*NAMES, "server"] if sections.get("topology", {}).get("kind") == "star" else NAMES
        self.data = [write_rows(folder / f"{name}.jsonl", 40 + 4 * i) for i, name in enumerate(NAMES)]
        recipe = tree(folder, model, **{"algorithm": {"name": "deca", "lr": 1e-2, **algorithm}, **sections})
        recipe["data"] |= {"train": [str(path) for path in self.data], "partition": {"kind": "files"}}
        recipe["run"]["out"] = str(folder / "simulated" / "run")
        self.config = from_dict(recipe, METHODS)[0]
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(tomli_w.dumps(recipe))
        self.charter = folder / "charter.toml"
        # By default north and south open a port; east and west, who are no neighbours on the ring, only dial out.
        ports = dict(zip(doors, free_ports(len(doors)), strict=True))
        members = []
        for i, name in enumerate(self.names):
            id = make_identity(folder / name / "key").id
            where = f"@127.0.0.1:{ports[name]}" if name in ports else ""
            members.append(f"--member={name}={id}{where}#{40 + 4 * i}")
        arguments = ["charter", "new", str(self.recipe), *members, "--expires", "2999-01-01", "--to", str(self.charter)]
        assert main([*arguments, "--grace", str(grace), "--quorum", str(quorum)]) == 0
        for name in self.names:
            assert main(["charter", "sign", str(self.charter), "--identity", str(folder / name / "key")]) == 0

    def site(self, name: str, delay: float = 0.0) -> Any:
        """Start one site's process; with a delay, each local phase of its first rounds takes so much longer."""
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=self._join, args=(name, delay), daemon=True)
        process.start()
        return process

    def _join(self, name: str, delay: float) -> None:
        torch.set_num_threads(1)
        for method in (Deca, Fedavg) if delay else ():
            slowly(method, delay)
        data = ["--data", str(self.folder / f"{name}.jsonl")] if name in NAMES else []
        base = self.folder / name
        with (base / "log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            code = main(
                [
                    *("join", str(self.charter), *data, "--test", str(self.folder / "test.jsonl")),
                    *("--identity", str(base / "key"), "--out", str(base / "run"), "--model", str(self.model)),
                ]
            )
        os._exit(code)

    def events(self, name: str, kind: str, file: str = "audit.jsonl") -> list[dict[str, Any]]:
        path = self.folder / name / "run" / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (json.loads(line) for line in lines if line.endswith("\n"))  # the last is perhaps just being written
        return [event for event in whole if event["event"] == kind]

    def summary(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "run" / "summary.json").read_text()))

    def models(self, names: Iterable[str]) -> list[dict[str, torch.Tensor]]:
        """What the sites ended with; "simulated" is the simulation."""
        return [load_file(next((self.folder / name / "run" / "model").glob("*.safetensors"))) for name in names]

    def assert_agreed(self, names: Iterable[str] = NAMES) -> None:
        first, *others = self.models(names)
        for other in others:
            assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)

    def ended(self, processes: dict[str, Any]) -> None:
        for name, process in processes.items():
            process.join(PATIENCE_S)
            assert process.exitcode == 0, (self.folder / name / "log").read_text()


def slowly(method: Any, delay: float) -> None:
    """Have the local phases of a method's first 24 rounds take so many seconds longer."""
    local = method.local
    method.local = lambda self, round: [time.sleep(delay * (round < 24)), local(self, round)][1]


STAR = {"topology": {"kind": "star", "weights": "samples"}}
TRIED: dict[str, dict[str, Any]] = {
    "deca": {"algorithm": {}},
    "dec_lora": {"algorithm": {"name": "dec_lora", "rounds": 3, "local_steps": 2, "rank": 2}},
    "choco": {"algorithm": {"name": "choco", "rounds": 4, "local_steps": 2, "refresh_every": 3}},
    "scaffold": {"algorithm": {"name": "scaffold", "rounds": 3, "local_steps": 2, "participation": 0.5}, **STAR},
    "fedavg": {"algorithm": {"name": "fedavg", "rounds": 2, "local_steps": 2}, **STAR},
    "deca in bfloat16": {"algorithm": {}, "exchange": {"codec": "bfloat16"}},
}


@pytest.mark.parametrize("name", TRIED)
def test_sites_end_with_bitwise_the_weights_of_the_simulation(name: str, tmp_path: Path, micro_model: Path) -> None:
    consortium = Consortium(tmp_path, micro_model, **TRIED[name])
    summary = run(consortium.config)
    consortium.ended({site: consortium.site(site) for site in consortium.names})
    consortium.assert_agreed(["simulated", *consortium.names])
    for index, site in enumerate(consortium.names):
        if site in NAMES:
            told = consortium.summary(site)
            assert told["bytes_sent_per_peer"][index] == summary["bytes_sent_per_peer"][index]
            assert told["metrics"]["peers"][index] == summary["metrics"]["peers"][index]
            assert told["metrics"]["average_model"] == summary["metrics"]["average_model"]
            sent = sum(event["bytes"] for event in consortium.events(site, "sent"))
            assert sent == told["bytes_sent_per_peer"][index] + told["header_bytes_sent_per_peer"][index]
        page = (tmp_path / site / "run" / "report.html").read_text()
        assert "4 peers" in page and ("This site's " in page) == (site in NAMES)
        assert ("model is also that of" in page) == (site in NAMES and "topology" not in TRIED[name])


def test_a_killed_site_comes_back_and_nothing_is_lost(tmp_path: Path, micro_model: Path) -> None:
    """kill -9 in mid-run; all it had is moved, as to another machine: all end with the bits of an undisturbed run."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 16}, run={"checkpoint_every": 2})
    run(consortium.config)
    processes = {site: consortium.site(site) for site in NAMES}
    victim = processes["east"]
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 7)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert not (tmp_path / "east" / "run" / "summary.json").exists()
    moved = copy(consortium)
    moved.folder = tmp_path / "another machine \u00e9"
    moved.folder.mkdir()
    for name in ("east", "east.jsonl", "test.jsonl"):
        (tmp_path / name).rename(moved.folder / name)
    moved.model = shutil.copytree(micro_model, moved.folder / "base")
    processes["east"] = moved.site("east")
    moved.ended({"east": processes.pop("east")})
    consortium.ended(processes)
    assert json.loads((moved.folder / "east" / "run" / "recipe.json").read_text())["config"]["data"]["train"] == str(
        moved.folder / "east.jsonl"
    )
    (moved.folder / "east").rename(tmp_path / "east")
    assert consortium.events("east", "resume", "events.jsonl")
    consortium.assert_agreed(["simulated", *NAMES])
    assert not any(consortium.events(site, "left_out") for site in NAMES)


def test_a_site_whose_newest_checkpoint_is_damaged_takes_the_one_before(tmp_path: Path, micro_model: Path) -> None:
    """As after a power cut; the others go on, and it catches up with them."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 16}, run={"checkpoint_every": 2})
    processes = {site: consortium.site(site) for site in NAMES}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 7)
    os.kill(processes["east"].pid, signal.SIGKILL)
    processes["east"].join()
    before, newest = sorted((tmp_path / "east" / "run" / "checkpoints" / "peer-001").glob("round-*"))[-2:]
    damaged = newest / "block-000.safetensors"
    start = damaged.read_bytes()[:100]
    damaged.unlink()  # it may be the file of the one before too
    damaged.write_bytes(start)
    processes["east"] = consortium.site("east")
    consortium.ended(processes)
    resumed = consortium.events("east", "resume", "events.jsonl")[0]["round"]
    assert resumed == int(before.name.removeprefix("round-"))
    log = " ".join((tmp_path / "east" / "log").read_text().split())
    assert f"{newest}: damaged: block-000.safetensors is not what was written; the one before it is taken" in log
    assert "delete this folder" not in log
    consortium.assert_agreed()


def test_a_site_that_is_killed_while_it_writes_the_model_keeps_the_one_agreed_on(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is back the others have ended, and will not agree with it a second time."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 4}, grace=GRACE_S)
    run(consortium.config)
    processes = {site: consortium.site(site) for site in NAMES if site != "east"}
    with monkeypatch.context() as dies:
        dies.setattr("peertune.run_end.save_trained", lambda *_: os._exit(9))
        victim = consortium.site("east")  # a fork, which has this
    victim.join(PATIENCE_S)
    assert victim.exitcode == 9
    consortium.ended(processes)
    consortium.ended({"east": consortium.site("east")})
    summary = consortium.summary("east")
    assert summary["agreement"] == {"with": ["north", "south", "west"], "without": [], "unheard": [], "is_one": True}
    assert len(summary["metrics"]["peers"]) == 4 and summary["metrics"]["peers"][1]
    consortium.assert_agreed(["simulated", *NAMES])


def test_who_is_killed_in_the_final_agreement_is_agreed_without(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has sent its part of the first block, and for good."""
    consortium = Consortium(tmp_path, micro_model, {}, grace=1.0)
    start = NetworkExchange.start

    def dying(self: NetworkExchange, round: int, hop: Hop, out: Any) -> None:
        if hop.name == "agree" and out is None:
            os._exit(9)
        start(self, round, hop, out)

    with monkeypatch.context() as dies:
        dies.setattr(NetworkExchange, "start", dying)
        lost = consortium.site("east")
    others = [name for name in NAMES if name != "east"]
    processes = {name: consortium.site(name) for name in others}
    consortium.ended(processes)
    assert lost.exitcode == 9
    consortium.assert_agreed(others)
    for name in others:
        agreement = consortium.summary(name)["agreement"]
        assert agreement["without"] == ["east"] and sorted([name, *agreement["with"]]) == sorted(others)


def test_the_sites_of_a_server_wait_for_it(tmp_path: Path, micro_model: Path) -> None:
    """For longer than the grace: alone each would only go its own way. When it is back all end with one model."""
    fedavg = {"name": "fedavg", "rounds": 30, "local_steps": 2}
    consortium = Consortium(tmp_path, micro_model, fedavg, grace=2.0, **STAR)
    processes = {site: consortium.site(site, delay=0.1) for site in consortium.names}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 5)
    os.kill(processes["server"].pid, signal.SIGKILL)
    processes.pop("server").join()
    wait_for(lambda: all(consortium.events(site, "waiting") for site in NAMES))  # they say so after five seconds
    assert all(process.is_alive() for process in processes.values())
    processes["server"] = consortium.site("server")
    consortium.ended(processes)
    assert not any(consortium.events(site, "left_out") for site in NAMES), "each had the server's answer in all rounds"
    consortium.assert_agreed(processes)


def test_an_average_of_all_goes_on_without_the_lost_and_ends_with_one_model(tmp_path: Path, micro_model: Path) -> None:
    """FedAvg without a server: everybody averages everybody, so no round of theirs ends with one model by itself."""
    fedavg = {"name": "fedavg", "rounds": 30, "local_steps": 2, "server_optimizer": "nesterov"}
    graph = {"kind": "complete", "weights": "samples"}
    consortium = Consortium(tmp_path, micro_model, fedavg, grace=1.0, doors=NAMES, topology=graph)
    processes = {site: consortium.site(site, delay=0.1) for site in NAMES}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 5)
    os.kill(processes["east"].pid, signal.SIGKILL)
    processes.pop("east").join()
    consortium.ended(processes)
    consortium.assert_agreed(processes)
    for site in processes:
        told = consortium.summary(site)["agreement"]
        assert told["without"] == ["east"] and sorted([site, *told["with"]]) == sorted(processes)


def test_a_block_that_is_personal_as_a_whole_is_not_waited_for(tmp_path: Path, micro_model: Path) -> None:
    personal = {"local_modules": ["embed_tokens"]}
    consortium = Consortium(tmp_path, micro_model, personal)
    run(consortium.config)
    consortium.ended({site: consortium.site(site) for site in NAMES})
    shared = [model["lm_head.weight"] for model in consortium.models(NAMES)]
    assert all(torch.equal(shared[0], other) for other in shared)
    own, to = tmp_path / "east" / "run", tmp_path / "own"
    with pytest.raises(ConfigError, match="--peer: got 0, whose personal parts never leave its site, expected 1"):
        export(own, to, peer=0)
    export(own, to, peer=1)
    common, personal = (load_file(folder / "model.safetensors") for folder in (own / "model", to))
    differing = {name for name in common if not torch.equal(common[name], personal[name])}
    assert differing == {"model.embed_tokens.weight"}


def test_a_site_that_stays_away_is_left_out_and_the_others_finish(tmp_path: Path, micro_model: Path) -> None:
    """Its neighbours wait once; every round's record names it, and nobody is dropped in silence."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 16}, grace=GRACE_S)
    processes = {site: consortium.site(site) for site in NAMES}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 5)
    os.kill(processes["east"].pid, signal.SIGKILL)
    processes.pop("east").join()
    consortium.ended(processes)
    for site in ("north", "south"):
        left = [event["round"] for event in consortium.events(site, "left_out") if event["hop"] == "gossip"]
        assert left == list(range(left[0], 64)) and left[0] >= 4
        recorded = [e["round"] for e in consortium.events(site, "round", "events.jsonl") if e["left_out"]]
        assert recorded == left
        waited = [e["time"] for e in consortium.events(site, "left_out")]
        assert len(left) > 10 and sorted(waited) == waited
        summary = consortium.summary(site)
        told = {"peer": site, "went_without": "east", "rounds": len(left)}
        assert summary["rounds_without"] == [told]
        (lost,) = [each for each in summary["contributions"] if each["neighbor"] == "east"]
        assert (lost["in_time"], lost["missed"]) == (64 - len(left), len(left))
        others = [name for name in ("north", "south", "west") if name != site]
        assert summary["agreement"] == {"with": others, "without": ["east"], "unheard": [], "is_one": True}
        assert "without: east" in (tmp_path / site / "log").read_text()
    for site in processes:
        assert "nothing was heard of east: the" in " ".join((tmp_path / site / "log").read_text().split())
        (agreement,) = consortium.events(site, "agreement", "events.jsonl")
        assert agreement["absent"] == [1]
    consortium.assert_agreed(processes)
    assert not consortium.events("west", "left_out")
    loss = [consortium.summary(site)["metrics"] for site in processes]
    assert all(m["average_model"]["loss"] < m["before"]["loss"] for m in loss)


def test_a_site_that_lost_its_folder_comes_back_and_all_agree(tmp_path: Path, micro_model: Path) -> None:
    """Its neighbours have kept their messages, so it computes what it missed anew."""
    consortium, processes = lose_east(tmp_path, micro_model, delay=0.1)  # then it is faster than they
    processes["east"] = consortium.site("east")
    consortium.ended(processes)
    rounds = [event["round"] for event in consortium.events("east", "round", "events.jsonl")]
    assert rounds == sorted(rounds) and rounds[-1] == 191
    away = [event["round"] for event in consortium.events("north", "left_out")]
    assert away and max(away) < 190
    late = [event for event in consortium.events("north", "late") if event["peer"] == "east"]
    assert late and {event["round"] for event in late} <= set(away) and late[0]["used"]
    assert all(event["amount"] < 1.0 for event in late)
    assert consortium.events("east", "was_missed")
    consortium.assert_agreed()


@pytest.mark.parametrize("kept_bytes", [1, outbox.KEPT_BYTES])
def test_a_site_far_behind_takes_up_the_run_from_a_neighbor(
    kept_bytes: int, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is slow, whether what it missed was kept or not: it joins at the beginning of a block's turn."""
    monkeypatch.setattr(outbox, "KEPT_BYTES", kept_bytes)
    consortium, processes = lose_east(tmp_path, micro_model)
    processes["east"] = consortium.site("east", delay=0.05)  # the others must not have ended before it judges
    consortium.ended(processes)
    (joined,) = consortium.events("east", "joined")
    assert joined["round"] % 12 == 0 and joined["missed"] > 1
    rounds = [event["round"] for event in consortium.events("east", "round", "events.jsonl")]
    assert rounds == [*range(joined["round"] - joined["missed"]), *range(joined["round"], 192)]
    (told,) = consortium.events("east", "join", "events.jsonl")
    assert (told["round"], told["missed"]) == (joined["round"], joined["missed"])
    consortium.assert_agreed()


def test_a_site_leaves_in_good_order_and_comes_back(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for it, though the grace is long; by the same command it goes on from where it left."""
    keys, seldom = {"inner_steps": 12, "outer_rounds": 4}, {"checkpoint_every": 100}
    consortium = Consortium(tmp_path, micro_model, keys, grace=600.0, run=seldom)
    with pytest.raises(CheckpointError, match="holds no run of a consortium"):
        leave(tmp_path / "east" / "run")
    processes = {site: consortium.site(site) for site in NAMES}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 5)
    assert main(["leave", str(tmp_path / "east" / "run")]) == 0
    processes["east"].join(PATIENCE_S)
    assert processes["east"].exitcode == 0
    left = len(consortium.events("east", "round", "events.jsonl"))
    assert f"left after round {left}" in " ".join((tmp_path / "east" / "log").read_text().split())
    # It has its own checkpoints only, and no other's to average with.
    assert main(["export", str(tmp_path / "east" / "run"), "--to", str(tmp_path / "own")]) == 0
    assert f"this site's own model, of its newest checkpoint, after round {left}" in capsys.readouterr().out
    own, _ = CheckpointStore(tmp_path / "east" / "run" / "checkpoints").load(1, left)
    exported = load_file(tmp_path / "own" / "model.safetensors")
    trained = [name for name in own if name.startswith("weights/") and name.removeprefix("weights/") in exported]
    assert trained and all(torch.equal(own[name], exported[name.removeprefix("weights/")]) for name in trained)
    wait_for(lambda: bool(consortium.events("north", "left_out")))
    assert [event["peer"] for event in consortium.events("north", "left")] == ["east"]
    processes["east"] = consortium.site("east")
    consortium.ended(processes)
    assert consortium.events("east", "resume", "events.jsonl")[0]["round"] == left
    assert {event["peer"] for event in consortium.events("north", "finished")} == {"east", "west"}
    with pytest.raises(CheckpointError, match="this run is finished"):
        leave(tmp_path / "east" / "run")
    consortium.assert_agreed()


@pytest.mark.parametrize("comes_late", [False, True])
def test_a_request_to_leave_is_gone_with_the_process_that_it_was_for(
    comes_late: bool, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while the last round, the agreement or the export goes on."""
    consortium, out = Consortium(tmp_path, micro_model, {}), tmp_path / "out"

    def asked_to_leave(*_: Any, **__: Any) -> dict[str, Any]:
        out.mkdir()
        (out / "leave").touch()
        if not comes_late:
            raise Left("left after round 1")
        return {}

    monkeypatch.setattr("peertune.consortium.run", asked_to_leave)
    key, data = tmp_path / "east" / "key", str(consortium.data[1])
    options = SiteOptions(charter=consortium.charter, identity=key, out=out, train=data, model=str(micro_model))
    with suppress(Left):
        join(options, Silent())
    assert list(out.iterdir()) == []


def test_the_folder_of_another_sites_run_is_left_as_it_is(tmp_path: Path, micro_model: Path) -> None:
    """A key or folder mistaken for another's: there is no checkpoint of this one, but the other's must not go."""
    consortium, out = Consortium(tmp_path, micro_model, {}), tmp_path / "simulated" / "run"
    run(consortium.config)
    (out / "summary.json").unlink()
    kept = sorted((out / "checkpoints").rglob("*"))
    options = SiteOptions(
        charter=consortium.charter, identity=tmp_path / "east" / "key", out=out, train=str(consortium.data[1]),
        test=str(tmp_path / "test.jsonl"), model=str(micro_model),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a run that is no site's, got the run of the charter's member 1 "):
        join(options, Silent())
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps(recipe | {"site": 0}))
    with pytest.raises(CheckpointError, match=r"the charter's member 0 .* got the run of the charter's member 1 "):
        join(options, Silent())
    with pytest.raises(CheckpointError, match=r"the charter's member 0 .* got a run that is no site's"):
        run(consortium.config, resume=True)
    assert sorted((out / "checkpoints").rglob("*")) == kept


def test_below_the_quorum_the_run_waits_until_enough_are_back(tmp_path: Path, micro_model: Path) -> None:
    """Two of four are killed where three are needed: the others stand still beyond the grace, and say so."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 16}, grace=1.0, quorum=3)
    processes = {site: consortium.site(site) for site in NAMES}
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 4)
    for site in ("east", "west"):
        os.kill(processes[site].pid, signal.SIGKILL)
        processes[site].join()
    wait_for(lambda: all(consortium.events(site, "paused") for site in ("north", "south")))
    (paused, *_) = consortium.events("north", "paused")
    assert paused["quorum"] == 3
    for site in ("east", "west"):
        processes[site] = consortium.site(site)
    consortium.ended(processes)
    for site in ("north", "south"):
        assert len(consortium.events(site, "resumed")) == len(consortium.events(site, "paused"))
    consortium.assert_agreed()


def test_a_member_who_gets_nowhere_is_ejected_by_most_of_the_others(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers and never finishes its round, so all wait, until three of four have signed."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 8})
    processes = {site: consortium.site(site, delay=1000.0 * (site == "east")) for site in NAMES}
    wait_for(lambda: all(consortium.events(site, "connected") for site in NAMES))

    def sign(site: str, member: str = "east") -> int:
        return main(["eject", str(consortium.charter), member, "--identity", str(tmp_path / site / "key")])

    assert sign("east") == 2 and "cannot eject itself" in capsys.readouterr().err
    assert sign("north", "nobody") == 2 and "expected a member's name or id" in capsys.readouterr().err
    assert sign("north") == 0 and "signed by north; 2 more must sign" in capsys.readouterr().out
    assert sign("south", read_charter(consortium.charter).members[1].id) == 0
    assert not consortium.events("north", "ejected")
    assert sign("west") == 0 and "signed by north, south, west; that is enough" in capsys.readouterr().out
    east = processes.pop("east")
    consortium.ended(processes)
    east.kill()
    for site in processes:
        (ejected,) = consortium.events(site, "ejected")
        assert (ejected["peer"], ejected["signed_by"]) == ("east", "north, south, west")
    rounds = len(consortium.events("north", "round", "events.jsonl"))
    assert [e["round"] for e in consortium.events("north", "left_out") if e["hop"] == "gossip"] == list(range(rounds))
    consortium.assert_agreed(processes)


def cannot_be_read(folder: Any) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_an_ejection_holds_with_whole_signatures_of_this_charter_only(tmp_path: Path) -> None:
    charter = signed_charter(tmp_path, "abc")
    path = tmp_path / "charter.toml"
    sign_ejection(path, charter, "c", load_identity(tmp_path / "a"))
    assert ejected(path, charter) == {}, "one of three is too few"
    with pytest.raises(CharterError, match="no member has the id"):
        sign_ejection(path, charter, "c", make_identity(tmp_path / "stranger"))
    whole = sign_ejection(path, charter, "c", load_identity(tmp_path / "b"))
    assert ejected(path, charter) == {2: whole} and whole.signers(charter) == ["a", "b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", cannot_be_read)
        assert ejected(path, charter) == {}, "a folder that cannot be read now ends no run"
    other = charter.model_copy(update={"grace_s": 1.0})
    assert whole.signers(other) == []
    (tmp_path / "ours.eject-c.toml").write_bytes(ejection_path(path, "c").read_bytes())
    assert ejected(tmp_path / "another-name.toml", charter) == {2: whole}, "the charter may be called anything"
    (tmp_path / "ours.eject-c.toml").unlink()
    ejection_path(path, "b").write_bytes(ejection_path(path, "c").read_bytes())
    with pytest.raises(CharterError, match="is about c, expected b"):
        sign_ejection(path, charter, "b", load_identity(tmp_path / "a"))
    ejection_path(path, "b").unlink()
    sizes = [(3, 1), (3, 3), (2, 1), (4, 1), (5, 1), (5, 4), (5, 5)]  # members, quorum
    counts = [needed(SimpleNamespace(members=range(n), quorum=quorum)) for n, quorum in sizes]  # type: ignore[arg-type]
    assert counts == [2, 2, 1, 3, 3, 4, 4], "all others suffice"
    assert whole.model_copy(update={"member": "b"}).signers(charter) == []
    ejection_path(path, "c").write_text("member = ")
    assert ejected(path, charter) == {}


@pytest.mark.parametrize(
    "said", ["a = " + 9000 * "[", "a = " + 5000 * "9", "a" + 300 * ".a" + " = 1", "a = " + 300 * "[" + 300 * "]"]
)
def test_toml_that_nobody_writes_is_refused_and_ends_no_run(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site at work looks at all ejections that lie beside its charter, wherever they are from."""
    charter, path = make_charter(tmp_path, ["a", "b", "c"]), tmp_path / "charter.toml"
    write_charter(charter, path)
    ejection_path(path, "b").write_text(said)
    assert Requests(charter, path, tmp_path / "leave").ejections() == {}
    path.write_text(said)
    for command in (["charter", "sign", "--identity", str(tmp_path / "a")], ["run"]):
        assert main([*command, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "not valid TOML" in line and len(line) < 400
    tree = {**charter.model_dump(mode="json"), "expires": charter.expires}
    path.write_text(tomli_w.dumps(tree) + f"\n[recipe.more]\n{said}")
    assert main(["charter", "sign", str(path), "--identity", str(tmp_path / "a")]) == 2


def test_a_recipe_in_a_charters_place_is_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[run]\nnum_peers = 3\n")
    with pytest.raises(CharterError, match="this is no charter; `peertune charter new` makes one of a recipe"):
        read_charter(path)


@pytest.mark.parametrize("value", ["2024-01-01", "01:02:03", "2024-01-01T01:02:03", "nan", "-inf"])
def test_no_signature_covers_two_recipes(value: str, tmp_path: Path) -> None:
    """What is signed is JSON, which would write a date as the text of one."""
    path, charter = tmp_path / "charter.toml", make_charter(tmp_path, ["a", "b"])
    charter = charter.model_copy(update={"recipe": {"data": {"text_field": value}}})
    write_charter(charter.signed(load_identity(tmp_path / "a")), path)
    assert read_charter(path).digest() == charter.digest()
    path.write_text(path.read_text().replace(f'"{value}"', value))
    with pytest.raises(CharterError, match=r"recipe: .*holds a date"):
        read_charter(path)


def test_no_signature_of_the_ejected_counts_and_no_other_file_is_in_the_way(tmp_path: Path) -> None:
    charter = signed_charter(tmp_path, "abc")
    sites = {name: load_identity(tmp_path / name) for name in "abc"}
    path = tmp_path / "charter.toml"
    with pytest.raises(CharterError, match="c cannot eject itself"):
        sign_ejection(path, charter, "c", sites["c"])
    with pytest.raises(CharterError, match="got 'd', expected a member's name or id"):
        sign_ejection(path, charter, "d", sites["a"])
    one = sign_ejection(path, charter, sites["c"].id, sites["a"])
    own = sites["c"].sign(ejection._digest(charter, one))
    assert one.model_copy(update={"signatures": one.signatures | {"c": own}}).signers(charter) == ["a"]
    unknown = Ejection(member="nobody").signed(charter, sites["a"]).signed(charter, sites["b"])
    ejection_path(path, "nobody").write_text(tomli_w.dumps(unknown.model_dump()))
    ejection_path(path, "a").write_text("half of ")
    sign_ejection(path, charter, "c", sites["b"])
    assert {place: found.signers(charter) for place, found in ejected(path, charter).items()} == {2: ["a", "b"]}


def test_who_is_out_of_reach() -> None:
    charter: Any = SimpleNamespace(members=[SimpleNamespace(name=name) for name in NAMES], grace_s=1e9)
    neighbor = Neighbor(1, charter, None, lambda *_, **__: None)  # type: ignore[arg-type]
    assert not neighbor.is_out_of_reach, "within the grace"
    for state in ("peer_has_left", "peer_is_away"):
        setattr(neighbor.edge, state, True)
        assert neighbor.is_out_of_reach
        neighbor.is_connected = True
        assert not neighbor.is_out_of_reach, "it is back"
        setattr(neighbor.edge, state, False)
        neighbor.is_connected = False
    charter.grace_s = -1.0
    assert neighbor.is_out_of_reach
    neighbor.is_connected = True
    assert not neighbor.is_out_of_reach
    neighbor.edge.peer_is_away = True
    for reached, is_away in ((8, True), (9, False), (8, False)):  # back, but behind; in step; waited for again
        neighbor.edge.peer_round = reached
        assert neighbor.mark_away(10) is is_away
    neighbor.is_ejected = True
    assert neighbor.is_out_of_reach


def test_a_site_believes_an_ejection_that_is_its_own_and_signed_by_enough(tmp_path: Path) -> None:
    charter = signed_charter(tmp_path, "abc")
    one, whole = (sign_ejection(tmp_path / "charter.toml", charter, "c", load_identity(tmp_path / by)) for by in "ab")
    for name, said, is_believed in (("a", whole, False), ("c", one, False), ("c", whole, True)):
        node = Node(charter, load_identity(tmp_path / name), "", lambda *_, **__: None)
        assert node.hear_ejection(json.dumps(said.model_dump()).encode()) is is_believed
        assert node.turned_away == ("c was ejected from this run by a, b" if is_believed else "")
        node.stop()


def test_a_member_can_be_ejected_after_the_charters_last_day(tmp_path: Path) -> None:
    """A run goes on beyond it, and so may what is wrong with a member; `eject` said that a new charter is needed."""
    path, charter = tmp_path / "charter.toml", make_charter(tmp_path, ["a", "b", "c"])
    charter = charter.model_copy(update={"expires": date(2020, 1, 1)})
    for name in "abc":
        charter = charter.signed(load_identity(tmp_path / name))
    write_charter(charter, path)
    with pytest.raises(CharterError, match="expired on 2020-01-01"):
        charter.check()
    assert "1 more must sign" in eject(path, "c", tmp_path / "a")
    assert "that is enough" in eject(path, "c", tmp_path / "b")
    assert ejected(path, charter).keys() == {2}


def test_a_charter_of_another_version_that_cannot_be_read_is_told_as_such(tmp_path: Path) -> None:
    """It was called damaged: a key that is new there is none here."""
    path = tmp_path / "charter.toml"
    write_charter(make_charter(tmp_path, ["a", "b"]).model_copy(update={"version": "9.9"}), path)
    assert read_charter(path).version == "9.9"
    path.write_text(path.read_text().replace("[[members]]", '[[members]]\nregion = "x"'))
    with pytest.raises(CharterError, match=r"is for peertune 9\.9, this is .*, which cannot read it; all sites"):
        read_charter(path)
    for here in (__version__, f"{__version__} with my-methods 3"):
        path.write_text(re.sub("version = .*", f'version = "{here}"', path.read_text()))
        with pytest.raises(CharterError, match=r"members\.0\.region: .*; get the file anew"):
            read_charter(path)
    with pytest.raises(CharterError, match="cannot be read: Is a directory"):
        read_charter(tmp_path)


def test_a_site_stops_where_its_own_ejection_lies_beside_its_charter(tmp_path: Path) -> None:
    """As at every other site, which `peertune eject` asks for; nobody dials it any more who could tell it so."""
    charter = signed_charter(tmp_path, "abc")
    path, log = tmp_path / "charter.toml", AuditLog(tmp_path / "audit.jsonl", print)
    node = Node(charter, load_identity(tmp_path / "c"), "", log)
    exchange = NetworkExchange(node, Requests(charter, path, tmp_path / "leave"))
    sign_ejection(path, charter, "c", load_identity(tmp_path / "a"))
    sign_ejection(path, charter, "c", load_identity(tmp_path / "b"))
    with pytest.raises(TurnedAwayError, match="c, which is this site, was ejected from this run by a, b; it stops"):
        exchange.attend()
    node.stop()
    links = Links()
    links.add(b'{"event": "started", "time": 1, "site": 2, "members": ["a", "b", "c"], "neighbors": [0, 1]}')
    links.add((tmp_path / "audit.jsonl").read_bytes())
    assert list(links.links) == ["a", "b"], "it is no neighbour of its own"


def lose(consortium: Consortium, processes: dict[str, Any], site: str, after: int) -> None:
    """Kill a site after so many rounds; its folder is gone."""
    wait_for(lambda: len(consortium.events(site, "round", "events.jsonl")) >= after)
    os.kill(processes[site].pid, signal.SIGKILL)
    processes[site].join()
    shutil.rmtree(consortium.folder / site / "run")


def lose_east(tmp_path: Path, micro_model: Path, delay: float = 0.0) -> tuple[Consortium, dict[str, Any]]:
    """Sites in mid-run; east is killed, its folder gone, and the others go on without it."""
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 12, "outer_rounds": 4}, grace=0.5)
    processes = {site: consortium.site(site, delay) for site in NAMES}
    lose(consortium, processes, "east", after=3)
    wait_for(lambda: bool(consortium.events("north", "left_out")))
    return consortium, processes


def test_who_is_in_the_agreement_but_was_not_in_the_last_round_is_named(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back on an empty disk in the last turn, of 84 to 95, and makes up what nobody keeps messages of."""
    local = Deca.local

    def is_back(site: str) -> bool:
        return sum(event["peer"] == "east" for event in consortium.events(site, "connected")) > 1

    def slow_in_the_end(self: Deca, round: int) -> Any:
        time.sleep(0.6 if round >= 86 else 0.02)
        if round == 90:
            wait_for(lambda: is_back("north") and is_back("south"))
        return local(self, round)

    monkeypatch.setattr(Deca, "local", slow_in_the_end)
    consortium = Consortium(tmp_path, micro_model, {"inner_steps": 12, "outer_rounds": 2}, grace=6.0)
    processes = {site: consortium.site(site) for site in NAMES}
    lose(consortium, processes, "east", after=40)
    wait_for(lambda: len(consortium.events("north", "round", "events.jsonl")) >= 86)
    processes["east"] = consortium.site("east")
    consortium.ended(processes)
    consortium.assert_agreed()
    for site in NAMES:
        agreement = consortium.summary(site)["agreement"]
        expected = ["east"] if site in ("north", "south") else []  # its neighbours
        assert agreement["without"] == [] and agreement["unheard"] == expected
        log = " ".join((tmp_path / site / "log").read_text().split())
        assert ("nothing was heard of east in the last round, but again in the final" in log) == bool(expected)


def test_a_refused_message_ends_the_stream_and_the_edge_is_dialled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both ends of the edge: each is told why; then they are connected again, and what is right arrives."""
    monkeypatch.setattr("peertune.runtimes.neighbor.REFUSAL_S", 60.0)

    def play(index: int, node: Node, events: list[str]) -> tuple[list[list[int]], int]:
        exchange = NetworkExchange(node)
        hop = Hop("gossip", {(i, j): 0.5 for i in range(2) for j in range(2)}, takes_late=True)
        inboxes = []
        for round, size in enumerate((3, 3 + index, 3)):
            out = {"w": torch.full((size,), float(index))}
            exchange.start(round, hop, out)
            inboxes.append(exchange.finish(round, hop, lambda: {}))
        refused = min(events.count(what) for what in ("refused", "refused_by"))
        node.stop(10.0)
        return [sorted(inbox.payloads) for inbox in inboxes if inbox is not None], refused

    for received, refused in played_by_two(tmp_path, play):
        assert received[0] == received[2] == [0, 1] and refused >= 1
        assert len(received[1]) == 1, "the odd message was left out"


def test_the_weight_of_the_missing_goes_to_self_or_is_spread() -> None:
    row = {0: 0.5, 1: 0.3, 2: 0.2}
    assert without(row, [1], 0) == {0: pytest.approx(0.8), 2: 0.2}
    assert without(row, [1, 2], 0) == {0: pytest.approx(1.0)}
    assert without(row, [1], 0, spreads=True) == without(row, [1], 7)
    assert without(row, [1], 7) == {0: pytest.approx(0.5 / 0.7), 2: pytest.approx(0.2 / 0.7)}  # a server's
    assert without(row, [0, 1, 2], 7) == {}


def wait_for(happened: Callable[[], Any]) -> Any:
    """What happened."""
    end = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def test_members_with_another_charter_are_refused_by_name_of_the_difference(tmp_path: Path, micro_model: Path) -> None:
    """Both ends say what differs; with the right charter the site is let in, and all goes on."""
    consortium = Consortium(tmp_path, micro_model, {})
    good = read_charter(consortium.charter)
    changed = good.model_copy(update={"grace_s": 3.0})
    for site in NAMES:
        changed = changed.signed(load_identity(tmp_path / site / "key"))
    processes = {site: consortium.site(site) for site in ("north", "south", "west")}
    wait_for(lambda: all(consortium.events(site, "connected") for site in processes))  # they have read theirs
    write_charter(changed, consortium.charter)
    east = consortium.site("east")
    wait_for(lambda: bool(consortium.events("east", "refused_by")))
    east.kill()
    east.join()
    assert "grace_s differ" in consortium.events("east", "refused_by")[0]["reason"]
    assert "give both sites the same file" in consortium.events("east", "refused_by")[0]["reason"]
    refusals = consortium.events("north", "refused") + consortium.events("south", "refused")
    assert refusals and all("grace_s differ" in event["reason"] for event in refusals)
    write_charter(good, consortium.charter)
    processes["east"] = consortium.site("east")
    consortium.ended(processes)


def test_what_differs_is_named_by_its_key_in_few_bytes(tmp_path: Path) -> None:
    """And by its part where the other site tells no keys, or nonsense, or has too many."""
    charter = make_charter(tmp_path, ["a", "b"])
    mine = charter.model_copy(update={"recipe": {"algorithm": {"lr": 0.1, "inner_steps": 4}, "run": {"seed": 0}}})
    moved = [charter.members[0], charter.members[1].model_copy(update={"address": "h:1"})]
    recipe = {"algorithm": {"lr": 0.1, "inner_steps": 8}, "run": {"seed": 0}}
    other = mine.model_copy(update={"recipe": recipe, "members": moved, "grace_s": 1.0})
    named = "grace_s, members.b.address, recipe.algorithm.inner_steps"
    assert (
        difference(mine, other.parts(), piece_hashes(other))
        == difference(other, mine.parts(), piece_hashes(mine))
        == named
    )
    assert difference(mine, mine.parts(), piece_hashes(mine)) == ""
    turned = mine.model_copy(update={"members": mine.members[::-1]})
    assert difference(mine, turned.parts(), piece_hashes(turned)) == "members.a.place, members.b.place"
    assert difference(mine, mine.parts() | {"of a later version": "x"}, piece_hashes(mine)) == "of a later version"
    for nonsense in ("", "zz", None, 7, ["a"], "f" * 10**6):
        assert difference(mine, other.parts(), nonsense) == "grace_s, members, recipe"
    many = [charter.members[0].model_copy(update={"name": f"m{i}"}) for i in range(500)]
    crowd = mine.model_copy(update={"members": many})
    assert 0 < len(piece_hashes(crowd)) < 4000 and difference(mine, crowd.parts(), piece_hashes(crowd)).startswith(
        "members"
    )
    wide = mine.model_copy(update={"recipe": {"edges": {f"e{i}": i for i in range(500)}}})
    assert piece_hashes(wide) == "" and difference(mine, wide.parts(), piece_hashes(wide)) == "recipe"
    long = difference(mine, {f"{i}" * 999: "" for i in range(99)})
    assert len(long) < 300 and long.endswith(f" and {99 + len(mine.parts()) - 5} more")


def test_a_refusal_is_logged_when_its_reason_changes(tmp_path: Path) -> None:
    charter, (a, _), _ = two_sites(tmp_path)
    told: list[str] = []
    node = Node(charter, a, "", lambda event, **fields: told.append(fields["reason"]))
    for reason in ("one", "one", "other", "one"):
        node._log_refusal("refused", 1, reason)
    node._loop.close()
    assert told == ["one", "other", "one"]


def play_node(
    charter: Charter, identity: Identity, listen: str, seconds: float, heard: Any, until: Sequence[str] = ("connected",)
) -> None:
    """A site's network alone, until it has logged all these or the time is over; puts what it logged."""
    events: list[str] = []
    node = Node(charter, identity, listen, lambda event, **_: events.append(event))
    node.start([(0, 1)])
    end = time.monotonic() + seconds
    while not set(until) <= set(events) and time.monotonic() < end:
        time.sleep(0.01)
    heard.put([event for event in events if event not in ("finished", "disconnected")])  # as the other may be sooner
    heard.close()
    heard.join_thread()
    node.stop(1.0)
    os._exit(0)


def test_a_stranger_gets_no_answer_and_a_member_still_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no TLS, then a key that is in no charter, then the member in whose place it stood."""
    monkeypatch.setattr(node_module, "HANDSHAKE_S", 1.0)
    charter, (a, b), port = two_sites(tmp_path)
    stranger, (first, second) = make_identity(tmp_path / "c"), charter.members
    forged = charter.model_copy(update={"members": [first, second.model_copy(update={"id": stranger.id})]})
    fork = multiprocessing.get_context("fork")
    heard = [fork.Queue() for _ in range(3)]

    def start(*arguments: Any) -> Any:
        process = fork.Process(target=play_node, args=arguments, daemon=True)
        process.start()
        return process

    server = start(charter, a, f"127.0.0.1:{port}", PATIENCE_S, heard[0], ("connected", "stranger"))
    wait_for(lambda: is_open(port))
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(range(256)))
    start(forged, stranger, "", 1.0, heard[1]).join(PATIENCE_S)
    assert heard[1].get(timeout=PATIENCE_S) == []
    assert server.is_alive() and heard[0].empty()
    start(charter, b, "", PATIENCE_S, heard[2])
    assert heard[2].get(timeout=PATIENCE_S) == ["connected"]
    assert sorted(heard[0].get(timeout=PATIENCE_S)) == ["connected", "stranger"], "one host, once"


def start_network(
    charter: Charter, identity: Identity, listen: str, over: Any, ejected: Sequence[tuple[int, Any]] = ()
) -> Any:
    """A site's network alone, in a process, until it is turned away or all is over.

    Returns:
        A queue: "connected", if it ever was; then what it logged and why it was turned away.
    """
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()

    def play() -> None:
        events: list[str] = []
        node = Node(charter, identity, listen, lambda event, **_: events.append(event))
        node.start([(0, 1)])
        for index, signed in ejected:
            node.soon(partial(node.eject, index, signed))
        was_connected, is_over = False, False
        while not is_over:
            is_over = over.is_set() or bool(node.turned_away)  # and one more look, as both may just have come
            if not was_connected and "connected" in events:
                was_connected = True
                told.put("connected")
            time.sleep(0.01)
        told.put((events, node.turned_away))
        told.close()
        told.join_thread()
        node.stop()
        os._exit(0)

    fork.Process(target=play, daemon=True).start()
    return told


def in_the_end(told: Any) -> Any:
    """What `start_network` tells last, also of a site that was connected before it was ejected."""
    return told.get(timeout=PATIENCE_S) if (first := told.get(timeout=PATIENCE_S)) == "connected" else first


def test_an_ejected_member_is_told_so(tmp_path: Path) -> None:
    charter, (a, b), port = two_sites(tmp_path)
    over = multiprocessing.get_context("fork").Event()
    site = start_network(charter, a, f"127.0.0.1:{port}", over, ejected=[(1, None)])
    wait_for(lambda: is_open(port))
    for _ in range(2):
        assert in_the_end(start_network(charter, b, "", over))[1] == "b was ejected from this run"
    over.set()
    events, reason = site.get(timeout=PATIENCE_S)
    assert reason == "" and events.count("turned_away") == 1 and "stranger" not in events


def test_an_ejected_member_who_is_only_dialled_is_told_so_too(tmp_path: Path) -> None:
    """It would train on alone to the end; whoever else may say it, only the signatures are believed."""
    charter = make_charter(tmp_path, ["a", "b", "c"])
    members = [
        each.model_copy(update={"address": f"127.0.0.1:{port}"})
        for each, port in zip(charter.members, free_ports(3), strict=True)
    ]
    charter = charter.model_copy(update={"members": members})
    a, b, c = (load_identity(tmp_path / name) for name in "abc")
    charter = charter.signed(a).signed(b).signed(c)
    by_one = Ejection(member="b").signed(charter, a)
    whole = by_one.signed(charter, c)
    over = multiprocessing.get_context("fork").Event()
    site = start_network(charter, b, members[1].address, over)
    start_network(charter, a, "", over, ejected=[(1, whole)])
    told = in_the_end(site)
    over.set()
    assert told[1] == "b was ejected from this run by a, c" and told[0].count("ejected") == 1
    node = Node(charter, b, "", lambda *_, **__: None)
    copied = {**by_one.signatures, "c": by_one.signatures["a"]}
    for doubtful in (by_one, whole.model_copy(update={"member": "c"}), Ejection(member="b", signatures=copied)):
        assert not node.hear_ejection(doubtful.model_dump_json().encode())
    for garbage in (b"", b"[" * 99999, b"{}", b'{"member": 1}', bytes(range(256))):
        assert not node.hear_ejection(garbage)
    assert node.turned_away == "" and node.hear_ejection(whole.model_dump_json().encode()) and node.turned_away
    node.stop()


def test_a_second_process_of_a_site_is_turned_away(tmp_path: Path) -> None:
    """At first it takes the place of the one that was there, as a process does that was started anew."""
    charter, (a, b), port = two_sites(tmp_path)
    over = multiprocessing.get_context("fork").Event()
    site = start_network(charter, a, f"127.0.0.1:{port}", over)
    wait_for(lambda: is_open(port))
    first = start_network(charter, b, "", over)
    assert first.get(timeout=PATIENCE_S) == "connected"
    second = start_network(charter, b, "", over)
    assert [second.get(timeout=PATIENCE_S) for _ in range(2)][1][1] == "b runs already, as another process"
    over.set()
    assert first.get(timeout=PATIENCE_S)[1] == ""
    assert site.get(timeout=PATIENCE_S) == "connected"
    events, reason = site.get(timeout=PATIENCE_S)
    assert reason == "" and events.count("runs_twice") == 1


def test_a_site_whose_connection_was_given_up_still_stops(tmp_path: Path) -> None:
    """The task that dials has then been ended once, and goes on until it is ended for good."""
    both = multiprocessing.get_context("fork").Barrier(2)

    def play(index: int, node: Node, events: list[str]) -> int:
        wait_for(lambda: "connected" in events)
        if index == 1:  # the one that dials
            node.soon(node.neighbors[0].end)
        wait_for(lambda: events.count("connected") >= 2)
        both.wait(PATIENCE_S)  # one who stops takes the other's second connection away
        node.stop()
        return index

    assert sorted(played_by_two(tmp_path, play)) == [0, 1]


def test_a_node_that_never_started_leaves_no_loop_open(tmp_path: Path) -> None:
    """As where loading the model fails."""
    charter, (identity, _), _ = two_sites(tmp_path)
    node = Node(charter, identity, "", lambda *_, **__: None)
    node.stop()
    assert node._loop.is_closed()


def test_a_node_that_stops_leaves_nothing_pending_in_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Python tells of tasks that were destroyed; those that write take a while to end."""
    may_stop = multiprocessing.get_context("fork").Event()

    async def slow_to_end(*arguments: Any, write: Any = Neighbor._write) -> None:
        try:
            await write(*arguments)
        finally:
            await asyncio.sleep(3600)

    def play(index: int, node: Node, events: list[str]) -> tuple[int, list[str]]:
        wait_for(lambda: "connected" in events)
        if index == 1:  # the other one stops first
            may_stop.wait(PATIENCE_S)
        node.stop()
        may_stop.set()
        return index, [str(task) for task in asyncio.all_tasks(node._loop)]

    monkeypatch.setattr(Neighbor, "_write", slow_to_end)
    assert sorted(played_by_two(tmp_path, play)) == [(0, []), (1, [])]


def test_a_port_in_use_is_told_before_anything_is_loaded(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the operating system's words, and so by `doctor`."""
    consortium = Consortium(tmp_path, micro_model, {})
    monkeypatch.setattr("peertune.consortium.run", lambda *_, **__: pytest.fail("it was loaded"))
    site = [str(consortium.charter), "--data", str(consortium.data[0]), "--identity", str(tmp_path / "north" / "key")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["join", *site, "--out", str(tmp_path / "out"), "--listen", listen]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"--listen: {listen} cannot be opened: already in use; end what uses it" in told
        with pytest.raises(IdentityError, match=r"\[::\].* cannot be opened: already in use"):
            check_port(f"[::]:{taken.getsockname()[1]}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(IdentityError, match="Cannot assign requested address; name an address"):
        check_port("192.0.2.1:7000")  # of no machine (RFC 5737)
    check_port(listen)


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def two_sites(tmp_path: Path) -> tuple[Charter, list[Identity], int]:
    """A signed charter of two, their keys, and the port where the first can be reached."""
    port = free_ports(1)[0]
    charter = make_charter(tmp_path, ["a", "b"])
    members = [charter.members[0].model_copy(update={"address": f"127.0.0.1:{port}"}), charter.members[1]]
    identities = [load_identity(tmp_path / name) for name in "ab"]
    charter = charter.model_copy(update={"members": members}).signed(identities[0]).signed(identities[1])
    return charter, identities, port


def played_by_two(tmp_path: Path, play: Callable[[int, Node, list[str]], Any]) -> list[Any]:
    """What `play` gives for two sites' networks, each in a process: of its index, its node and the events it logs."""
    charter, identities, port = two_sites(tmp_path)
    fork = multiprocessing.get_context("fork")
    heard = fork.Queue()

    def site(index: int) -> None:
        events: list[str] = []
        listen = f"127.0.0.1:{port}" if index == 0 else ""
        node = Node(charter, identities[index], listen, lambda event, **_: events.append(event))
        node.start([(0, 1)])
        heard.put(play(index, node, events))
        heard.close()
        heard.join_thread()
        os._exit(0)

    for index in range(2):
        fork.Process(target=site, args=(index,), daemon=True).start()
    return [heard.get(timeout=PATIENCE_S) for _ in range(2)]


def make_charter(tmp_path: Path, names: list[str]) -> Charter:
    identities = {name: make_identity(tmp_path / name) for name in names}
    return Charter(
        version=__version__,
        expires=date(2999, 1, 1),
        base="b",
        tokenizer="t",
        recipe={},
        members=[Member(name=name, id=identity.id) for name, identity in identities.items()],
    )


def signed_charter(tmp_path: Path, names: str) -> Charter:
    charter = make_charter(tmp_path, list(names))
    for name in names:
        charter = charter.signed(load_identity(tmp_path / name))
    return charter


def test_a_charter_holds_only_whole_signed_and_unaltered(tmp_path: Path) -> None:
    charter = make_charter(tmp_path, ["a", "b"])
    half = charter.signed(load_identity(tmp_path / "a"))
    with pytest.raises(CharterError, match="b has not signed it"):
        half.check()
    whole = half.signed(load_identity(tmp_path / "b"))
    whole.check()
    write_charter(whole, tmp_path / "charter.toml")
    again = read_charter(tmp_path / "charter.toml")
    assert again == whole
    again.check()
    assert whole.parts().keys() == Charter.model_fields.keys() - {"signatures"}, "all else is signed"
    changes: list[dict[str, Any]] = [{"base": "other"}, {"expires": date(2999, 1, 2)}, {"grace_s": 1.0}]
    for change in changes:
        with pytest.raises(CharterError, match="altered after a signed it"):
            whole.model_copy(update=change).check()
    with pytest.raises(CharterError, match=r"expired on 2999-01-01; .* a run that has begun goes on with it, once all"):
        whole.check(date(2999, 1, 2))
    whole.check(date(2999, 1, 1))  # its last day
    with pytest.raises(CharterError, match=r"is for peertune 9\.9"):
        whole.model_copy(update={"version": "9.9"}).check()
    with pytest.raises(CharterError, match="its quorum is 3, expected at most its 2 members"):
        whole.model_copy(update={"quorum": 3}).check()
    swapped = {**whole.signatures, "b": whole.signatures["a"]}
    with pytest.raises(CharterError, match="b's signature is by another key"):
        whole.model_copy(update={"signatures": swapped}).check()
    with pytest.raises(CharterError, match="no member has the id"):
        charter.signed(make_identity(tmp_path / "stranger"))


def test_a_charter_is_for_the_version_of_the_package_that_brings_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peertune.charter.code_version", lambda method: f"1 with {method}")
    charter = make_charter(tmp_path, ["a"]).model_copy(update={"version": "1 with lazy"})
    charter.model_copy(update={"recipe": {"algorithm": {"name": "lazy"}}}).check_validity()
    with pytest.raises(CharterError, match="is for peertune 1 with lazy, this is 1 with deca"):
        charter.model_copy(update={"recipe": {"algorithm": {"name": "deca"}}}).check_validity()


def test_what_is_a_sites_own_is_taken_from_no_charter(tmp_path: Path) -> None:
    """Whatever stands there, and who wrote it."""
    own = {
        "run": {"out": "x", "device": "cuda"},
        "model": {"trust_remote_code": True},
        "data": {"train": "x", "test": "y"},
    }
    charter = make_charter(tmp_path, ["a"])
    assert charter.model_copy(update={"recipe": own}).config(METHODS) == charter.config(METHODS)
    with pytest.raises(ConfigError, match="run: "):
        charter.model_copy(update={"recipe": {"run": 3}}).config(METHODS)


def test_a_charter_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, charter = tmp_path / "charter.toml", make_charter(tmp_path, ["a", "b"])
    write_charter(charter, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CharterError, match="cannot be written: No space left on device"):
        write_charter(charter.signed(load_identity(tmp_path / "a")), path)
    assert read_charter(path) == charter


def test_signing_takes_over_signatures_that_hold_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of copies that were signed at the same time; an altered or expired one gets no further signature."""
    charter, paths = make_charter(tmp_path, ["a", "b", "c"]), {name: tmp_path / f"{name}.toml" for name in "abc"}

    def sign(name: str, *copies: Path) -> int:
        arguments = ["charter", "sign", *map(str, (paths[name], *copies))]
        return main([*arguments, "--identity", str(tmp_path / name)])

    for path in paths.values():
        write_charter(charter, path)
    assert sign("a") == sign("b") == 0
    assert "signed by b; missing: a, c" in capsys.readouterr().out
    with pytest.raises(CharterError, match="a, c have not signed it"):
        read_charter(paths["b"]).check()
    assert sign("c", paths["a"], paths["b"]) == 0
    assert "signed by a, b, c; missing: nobody" in capsys.readouterr().out
    read_charter(paths["c"]).check()
    paths["a"].write_text(paths["a"].read_text().replace("quorum = 1", "quorum = 2"))
    before = paths["b"].read_bytes()
    assert sign("b", paths["a"]) == 2 and "is another charter than" in capsys.readouterr().err
    assert paths["b"].read_bytes() == before
    paths["b"].write_bytes(altered := paths["a"].read_bytes())
    assert sign("b") == 2 and "it was altered after a signed it" in capsys.readouterr().err
    assert sign("a") == 0, "its own signature, on what it sees now, takes the old one's place"
    assert read_charter(paths["a"]).signatures.keys() == {"a"}
    read_charter(paths["a"]).check_signatures()
    write_charter(charter.model_copy(update={"expires": date(2001, 1, 1)}), paths["c"])
    assert sign("c") == 2 and "expired on 2001-01-01" in capsys.readouterr().err
    assert paths["b"].read_bytes() == altered and not read_charter(paths["c"]).signatures


def test_nothing_may_stand_beside_a_certificate(tmp_path: Path) -> None:
    """It would be trusted too, and whoever owns it could take the member's place."""
    charter = signed_charter(tmp_path, "ab")
    other = make_identity(tmp_path / "c").certificate_pem.decode()
    own = charter.signatures["a"]
    more = {**charter.signatures, "a": own.model_copy(update={"certificate": own.certificate + other})}
    with pytest.raises(CharterError, match="a's certificate is not the one its key came with"):
        charter.model_copy(update={"signatures": more}).check()


def test_a_certificate_is_of_its_keys_id_and_signed_by_that_key(tmp_path: Path) -> None:
    """Else whoever carries the charter could put one there that its owner does not have, or under another's name."""
    charter = signed_charter(tmp_path, "ab")
    a, b = (load_identity(tmp_path / name) for name in "ab")
    charter.check()
    key_a, key_b = (load_pem_private_key(identity.key_pem, None) for identity in (a, b))
    for member, own, common_name, signer in (("a", key_a, a.id, key_b), ("b", key_b, a.id, key_b)):
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
        builder = builder.not_valid_before(ALWAYS[0]).not_valid_after(ALWAYS[1]).public_key(own.public_key())  # type: ignore[arg-type]
        forged = builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM).decode()  # type: ignore[arg-type]
        changed = charter.signatures[member].model_copy(update={"certificate": forged})
        with pytest.raises(CharterError, match=f"{member}'s certificate is not the one"):
            charter.model_copy(update={"signatures": {**charter.signatures, member: changed}}).check()


OF_ANOTHER_CURVE = """\
-----BEGIN CERTIFICATE-----
MIIBOTCB+KADAgECAhQMFErhrnL/A0aJbBV7ojpF0UMVfjAKBggqhkjOPQQDAjAM
MQowCAYDVQQDDAF4MB4XDTI2MTEyNzAzMjM0NVoXDTI5MDgyMzAzMjM0NVowDDEK
MAgGA1UEAwwBeDA+MBAGByqGSM49AgEGBSuBBAAIAyoABJ0gqE4KWkzgO8mUyv6N
7QT0OdIIyqAiANHIh5DbIw5iEhIgcumDkwGjUzBRMB0GA1UdDgQWBBRNxIRvCOUJ
NItmCLN2WnsALscJRDAfBgNVHSMEGDAWgBRNxIRvCOUJNItmCLN2WnsALscJRDAP
BgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCAzAAMC0CFGetFRFuR7TtwH1ZVT/L
m5Xv90I2AhUAkykrMaoA+GdfMdcMWGgy0ggkPAo=
-----END CERTIFICATE-----
"""


def test_a_certificate_of_a_curve_that_nobody_here_knows_is_refused() -> None:
    """In a charter, or of whoever answers at a member's address: it was a traceback."""
    with pytest.raises(IdentityError, match="a certificate cannot be read"):
        certificate_id(OF_ANOTHER_CURVE.encode())


def test_one_neighbor_alone_does_not_end_a_sites_run(tmp_path: Path) -> None:
    """It says that this site was ejected; another, who has not dialled yet, may know better."""
    charter, (identity, _), _ = two_sites(tmp_path)
    node = Node(charter, identity, "", lambda *_, **__: None)
    liar, honest = (SimpleNamespace(turns_away=said, is_out_of_reach=False) for said in ("was ejected", ""))
    node.neighbors, node.dials = {1: liar, 2: honest}, lambda index: index == 1  # type: ignore[assignment, dict-item, method-assign]
    assert node.turned_away == ""
    honest.is_out_of_reach = True
    assert node.turned_away == "was ejected"
    node.stop()


def test_one_who_is_out_of_reach_makes_up_no_quorum_unless_another_clearly_hears_it(tmp_path: Path) -> None:
    """Word of one who is gone is about for a grace, in which nobody is to go on without it."""
    charter = make_charter(tmp_path, ["a", "b", "c"]).model_copy(update={"quorum": 3})
    node = Node(charter, load_identity(tmp_path / "a"), "", lambda *_, **__: None)
    lost = SimpleNamespace(is_out_of_reach=True, last_heard=time.monotonic())
    node.neighbors = {1: SimpleNamespace(is_out_of_reach=False), 2: lost}  # type: ignore[dict-item]
    assert not node.has_quorum
    node.presence.told([0.0, 0.0, 0.0], [0, 0, 0], time.monotonic())
    assert node.has_quorum and not node.has_quorum_without_the_lost
    lost.last_heard -= 60.0
    assert node.has_quorum_without_the_lost
    node.stop()


@pytest.mark.parametrize(("carries", "expected"), [(True, [0.2] * 4), (False, [0.2, 0.4, 0.8, 1.6])])
def test_a_line_that_is_cut_again_and_again_is_dialled_at_once_while_it_carries_something(
    carries: bool, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy that cut every 5 s, a site was soon away for 10 s of 15."""
    charter, (identity, _), _ = two_sites(tmp_path)
    node, waits = Node(charter, identity, "", lambda *_, **__: None), list[float]()
    neighbor: Any = SimpleNamespace(is_ejected=False, turns_away="", last_got=-math.inf)

    async def talk(*_: Any) -> None:
        neighbor.last_got = time.monotonic() + 1.0 if carries else -math.inf

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        neighbor.is_ejected = len(waits) == len(expected)

    async def ready(*_: Any) -> None:
        pass

    call = SimpleNamespace(read=None, write=None, done=lambda: False)
    neighbor.talk, node._ready = talk, ready  # type: ignore[method-assign]
    channel = SimpleNamespace(stream_stream=lambda _: lambda **_: call)
    monkeypatch.setattr(node, "channel", lambda _: nullcontext(channel))
    monkeypatch.setattr(node_module.asyncio, "sleep", sleep)
    node.neighbors = {1: neighbor}
    asyncio.run(node._dial(1))
    assert waits == expected
    node.stop()


def test_a_quorum_is_of_those_who_are_not_ejected(tmp_path: Path) -> None:
    """All others had signed that one goes, and then the run waited for its quorum of all for ever."""
    charter = make_charter(tmp_path, ["a", "b", "c"]).model_copy(update={"quorum": 3})
    node = Node(charter, load_identity(tmp_path / "a"), "", lambda *_, **__: None)
    node.presence.told([0.0, 0.0, 0.0], [0, 0, 0], time.monotonic())
    node.eject(2)
    assert node.quorum == 2 and node.has_quorum and node.has_quorum_without_the_lost
    node.eject(1)
    assert node.has_quorum
    node.stop()


@pytest.mark.parametrize(
    "address", ["host", "host:", "host:0", "host:65536", "http://h:1", "h:abc", ":7000", "fd00::2:7000", "[::1:7000"]
)
def test_addresses_are_host_and_port(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CharterError, match="expected NAME=ID"):
        parse_member(f"a={'a' * 52}@{address}")
    assert main(["join", str(tmp_path / "charter.toml"), "--listen", address]) == 2
    assert "--listen: got" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["h:7000", "[::1]:7000", "[fe80::1%2]:7000", "[fe80::1%br-lan.100]:7000"])
def test_addresses_may_be_names_or_ipv6_also_of_one_interface(address: str) -> None:
    """An interface's name was refused where it has a dash or a dot, as bridges' and VLANs' have."""
    assert parse_member(f"a={'a' * 52}@{address}").address == address


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    own = make_identity(tmp_path)
    with pytest.raises(IdentityError, match=f"a key is there already, of the id {own.id}"):
        make_identity(tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match="got mode 0644, expected 0600"):
        load_identity(tmp_path)
    with pytest.raises(IdentityError, match="peertune keygen"):
        load_identity(tmp_path / "none")


def test_a_key_and_its_certificate_are_one_pair_that_can_be_read(tmp_path: Path) -> None:
    a, b = (make_identity(tmp_path / name) for name in "ab")
    (tmp_path / "a" / "certificate.pem").write_bytes(b.certificate_pem)
    with pytest.raises(IdentityError, match=r"key\.pem and certificate\.pem do not belong together"):
        load_identity(tmp_path / "a")
    (tmp_path / "a" / "certificate.pem").write_bytes(a.certificate_pem)
    assert load_identity(tmp_path / "a") == a
    key = load_pem_private_key(a.key_pem, None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    for damaged in (locked, a.key_pem[:60], b""):
        (tmp_path / "a" / "key.pem").write_bytes(damaged)
        with pytest.raises(IdentityError, match="the identity cannot be read"):
            load_identity(tmp_path / "a")


@pytest.mark.parametrize("text", ["a", "a=b", "a b=" + "a" * 52, "a=" + "a" * 52 + "@h:1#many"])
def test_members_are_spelled_in_one_way(text: str) -> None:
    with pytest.raises(CharterError, match="expected NAME=ID"):
        parse_member(text)


def test_who_does_not_say_how_many_samples_it_has_counts_as_one() -> None:
    members = [parse_member(f"{name}={name * 52}{more}") for name, more in (("a", "#30"), ("b", ""), ("c", "#5"))]
    assert sample_counts(members, 4) == [30, 1, 5, 1] and sample_counts(members, 2) == [30, 1]


def test_a_charter_needs_a_date_to_come_and_as_many_members_as_peers_each_with_its_own_address(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consortium = Consortium(tmp_path, micro_model, {})
    ids = [member.id for member in read_charter(consortium.charter).members]
    for members, message in (
        ([f"--member=m{i}={id}" for i, id in enumerate(ids)], "m0 and m1 are neighbours, and neither has an address"),
        ([f"--member=m={ids[0]}"], "got 1 members for a recipe of 4"),
        ([f"--member=m{i}={ids[0]}" for i in range(5)], "got 5 members for a recipe of 4"),
        ([f"--member=m{i}={ids[0]}@h:{i + 1}" for i in range(4)], "stands there twice"),
        ([f"--member=m{i}={id}@h:1" for i, id in enumerate(ids)], "address h:1 stands there twice"),
        ([f"--member=m={id}@h:{i + 1}" for i, id in enumerate(ids)], "name m stands there twice"),
        ([f"--member=m{i}={id}@[::]:{i + 1}" for i, id in enumerate(ids)], "m0 has the address [::]:1, at which"),
        ([f"--member=m{i}={id}@0.0.0.0:{i + 1}" for i, id in enumerate(ids)], "m0 has the address 0.0.0.0:1, at"),
        ([f"--member=m={ids[0]}", "--set", "data.validation_rows=5"], "data.validation_rows: got 5, expected 0"),
        (["--expires=2001-01-01", f"--member=m={ids[0]}"], "--expires: got 2001-01-01, which is over"),
    ):
        arguments = ["charter", "new", str(consortium.recipe), "--expires=2999-01-01", *members]
        assert main([*arguments, "--to", str(tmp_path / "other.toml")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.toml").exists()


def new_charter_of_one(folder: Path, model: Path) -> list[str]:
    """The command that writes a charter for one site, but for the file's name."""
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree(folder, model, run={"num_peers": 1})))
    member = f"--member=a={make_identity(folder / 'a').id}"
    return ["charter", "new", str(folder / "recipe.toml"), member, "--expires", "2999-01-01", "--to"]


def test_a_charter_says_how_long_a_connection_may_be_silent(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = new_charter_of_one(tmp_path, micro_model)
    assert main([*new, str(tmp_path / "usual.toml")]) == main([*new, str(tmp_path / "own.toml"), "--stall", "4.5"]) == 0
    assert [read_charter(tmp_path / name).stall_s for name in ("usual.toml", "own.toml")] == [30.0, 4.5]
    with pytest.raises(SystemExit):
        main([*new, str(tmp_path / "none.toml"), "--stall", "0"])
    assert "expected seconds above 0" in capsys.readouterr().err


def test_a_charter_without_the_classes_is_noted_and_one_with_them_holds_them(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = new_charter_of_one(tmp_path, micro_model)
    assert main([*new, str(tmp_path / "without.toml")]) == 0
    assert "data.labels: got none" in capsys.readouterr().err
    labels = ["red", "green", "blue"]
    assert main([*new, str(tmp_path / "with.toml"), "--set", f"data.labels={json.dumps(labels)}"]) == 0
    assert "data.labels" not in capsys.readouterr().err
    options = SiteOptions(charter=tmp_path / "with.toml", identity=tmp_path, out=tmp_path, model=str(micro_model))
    assert options.config(read_charter(options.charter)).data.labels == labels


def test_no_charter_lets_code_beside_the_base_run(
    tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even one that all signed with the key in it; a site says so itself."""
    consortium, path = Consortium(tmp_path, micro_model, {}), tmp_path / "other.toml"
    members = [f"--member={m.name}={m.id}@h:{i + 1}" for i, m in enumerate(read_charter(consortium.charter).members)]
    arguments = ["charter", "new", str(consortium.recipe), *members, "--expires=2999-01-01", f"--to={path}"]
    assert main([*arguments, "--set", "model.trust_remote_code=true"]) == 0
    assert "joins with --set model.trust_remote_code=true" in " ".join(capsys.readouterr().err.split())
    assert "trust_remote_code" not in path.read_text()
    charter = read_charter(path)
    assert "path" not in charter.recipe["model"], "a folder of one site is no other's business"
    model = {**charter.recipe["model"], "trust_remote_code": True, "path": str(micro_model)}
    charter = charter.model_copy(update={"recipe": {**charter.recipe, "model": model}})
    options = SiteOptions(charter=path, identity=tmp_path, out=tmp_path)
    assert not options.config(charter).model.trust_remote_code
    own = replace(options, overrides=["model.trust_remote_code=true"])
    assert own.config(charter).model.trust_remote_code


def test_the_tutorials_commands_work_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/consortium.md as it stands, with ids and loopback addresses in place of its placeholders."""
    text = (Path(__file__).parents[1] / "docs" / "consortium.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) == 13
    monkeypatch.chdir(tmp_path)
    recipe = tree(tmp_path, micro_model, run={"num_peers": 3, "threads": 1})
    del recipe["data"]["train"], recipe["data"]["test"]
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    known: dict[str, str] = {}
    sites = []
    for name, port in zip(("north", "east", "south"), free_ports(3), strict=True):
        write_rows(tmp_path / f"{name}.jsonl")
        known[f"{name}.example.org:7000"] = f"127.0.0.1:{port}"
    for command in commands:
        for placeholder, value in known.items():
            command = command.replace(placeholder, value)
        program, *arguments = shlex.split(command)
        assert program == "peertune"
        if arguments[0] == "join" and len(sites) == 3:
            ended(sites)  # who examined their lines have left the ports
        if arguments[0] in ("doctor", "join"):
            arguments += ["--model", str(micro_model)]
            fork = multiprocessing.get_context("fork")
            sites.append(fork.Process(target=lambda a=arguments: os._exit(main(a)), daemon=True))
            sites[-1].start()
            continue
        assert main(arguments) == 0, command
        if arguments[0] == "keygen":
            known["=" + arguments[-1].partition("/")[0].upper()] = "=" + capsys.readouterr().out.strip()
    ended(sites)
    assert all((tmp_path / name / "run" / "model").is_dir() for name in ("north", "east", "south"))


def ended(sites: Sequence[Any]) -> None:
    for site in sites:
        site.join(PATIENCE_S)
        assert site.exitcode == 0


def test_local_consortium_runs_and_goes_on(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "local_consortium.py"
    command = [sys.executable, str(script), str(tmp_path / "sites"), "--set", "algorithm.inner_steps=1"]
    for said in ("$ peertune keygen", "going on with it"):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE_S)
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout and ran.stdout.count("held-out loss") == 5


class ConnectProxy:
    """An HTTP proxy that knows CONNECT, in a thread of its own; `asked` are the addresses it was asked for.

    Args:
        refusal: status that it answers with; empty: it connects.
    """

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.asked: list[str] = []
        self.logins: list[str] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.address = f"127.0.0.1:{server.result(30).sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode().split()
        except asyncio.IncompleteReadError:  # the process that dialled has ended
            writer.close()
            return
        assert request[0] == "CONNECT"
        self.asked.append(request[1])
        self.logins += [base64.b64decode(request[request.index("Basic") + 1]).decode()] if "Basic" in request else []
        if self.refusal:
            writer.write(f"HTTP/1.1 {self.refusal}\r\n\r\n".encode())
            writer.close()
            return
        host, _, port = request[1].rpartition(":")
        far = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(self._carry(reader, far[1]), self._carry(far[0], writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


def speak_nonsense(server: socket.socket) -> None:
    """It hears the other out: whoever closes on what has come takes back what was said, for a reset."""
    while server.fileno() >= 0:
        with suppress(OSError), server.accept()[0] as connection:
            connection.recv(1)
            connection.sendall(b"SSH-2.0-nothing\r\n" * 4)
            while connection.recv(1 << 16):
                pass


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES_OF_PROXIES, *EXEMPTIONS, "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("variable", ["grpc_proxy", "HTTPS_PROXY"])
def test_a_site_that_must_goes_out_through_an_http_proxy(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is encrypted from end to end, so the proxy sees addresses and no more."""
    charter, (a, b), port = two_sites(tmp_path)
    monkeypatch.setenv("no_proxy", "")
    proxy, fork = ConnectProxy(), multiprocessing.get_context("fork")
    heard = [fork.Queue() for _ in range(2)]
    server = fork.Process(target=play_node, args=(charter, a, f"127.0.0.1:{port}", PATIENCE_S, heard[0]), daemon=True)
    server.start()
    wait_for(lambda: is_open(port))
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    fork.Process(target=play_node, args=(charter, b, "", PATIENCE_S, heard[1]), daemon=True).start()
    assert heard[1].get(timeout=PATIENCE_S) == heard[0].get(timeout=PATIENCE_S) == ["connected"]
    assert proxy.asked and set(proxy.asked) == {f"127.0.0.1:{port}"}


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_is_in_the_way_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charter, _, _ = two_sites(tmp_path)
    refuses, passes, (dead,) = ConnectProxy("407 Proxy\x1b[2J Authentication Required"), ConnectProxy(), free_ports(1)

    def reason(proxy: str) -> str:
        monkeypatch.setenv("https_proxy", f"http://me:s3%2Fcret@{proxy}")
        found = asyncio.run(diagnose(charter, 0))
        assert "s3" not in found and "me:" not in found and found.isprintable()
        return found

    told = reason(refuses.address)
    assert told.startswith(f"the HTTP proxy {refuses.address} (https_proxy) refuses: 407 Proxy") and "Required" in told
    assert "USER:PASSWORD@" in told
    assert refuses.logins == ["me:s3/cret"] and refuses.asked == [charter.members[0].address]
    assert f"the HTTP proxy 127.0.0.1:{dead} (https_proxy) cannot be reached" in reason(f"127.0.0.1:{dead}")
    monkeypatch.setenv("no_proxy", "example.org, 127.0.0.0/8")
    assert reason(refuses.address) == "nothing listens there"
    monkeypatch.delenv("no_proxy")
    with socket.create_server(("127.0.0.1", int(charter.members[0].address.rpartition(":")[2]))) as server:
        threading.Thread(target=speak_nonsense, args=(server,), daemon=True).start()
        told = reason(passes.address)
    assert told.startswith(f"through the HTTP proxy {passes.address} (https_proxy): something answers there")


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("Multiple exceptions: [Errno 113] Connect call failed ('fd00::2', 7000, 0, 0), [Errno 111] Connect"
                 " call failed ('10.0.0.2', 7000)"), "nothing listens there"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('10.0.0.2', 7000)"), "nothing listens there"),
        (OSError(errno.EHOSTUNREACH, "Connect call failed ('10.0.0.2', 7000)"), os.strerror(errno.EHOSTUNREACH)),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
    ],
)  # fmt: skip
def test_why_no_connection_can_be_made_is_told_in_the_systems_words(
    error: OSError, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio puts addresses there, and of a name with several all in one text."""
    charter, _, _ = two_sites(tmp_path)

    async def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(asyncio, "open_connection", refused)
    assert asyncio.run(diagnose(charter, 0)) == expected


@pytest.mark.usefixtures("no_proxies")
def test_a_relay_with_nobody_behind_it_is_told_from_what_is_no_peertune(tmp_path: Path) -> None:
    """A site that has not started yet, behind a container's port or a load balancer, looks so from outside."""
    charter, _, port = two_sites(tmp_path)

    async def look(answer: bytes) -> str:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if answer:
                await reader.read(1)
                writer.write(answer)
            writer.close()

        async with await asyncio.start_server(take, "127.0.0.1", port):
            return await diagnose(charter, 0)

    assert "a connection opens and is closed at once" in asyncio.run(look(b""))
    assert asyncio.run(look(b"HTTP/1.1 400 Bad Request\r\n\r\n")) == "something answers there that is no peertune"


@pytest.mark.usefixtures("no_proxies")
def test_one_who_takes_a_connection_and_says_nothing_is_told_from_a_firewall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charter, _, port = two_sites(tmp_path)
    monkeypatch.setattr(probe_module, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", port)):
        told = asyncio.run(diagnose(charter, 0))
    assert told.startswith("a connection opens, but nothing comes over it") and "MTU" in told


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, "None"),
        ({"http_proxy": "http://a:1"}, "a:1 (http_proxy)"),
        ({"http_proxy": "http://a:1", "https_proxy": "http://b:2"}, "b:2 (https_proxy)"),
        ({"https_proxy": "http://b:2", "grpc_proxy": ""}, "None"),
        ({"https_proxy": "https://b:2"}, "None"),
        ({"https_proxy": "http://b:x"}, "None"),
        ({"HTTPS_PROXY": "http://c:3"}, "c:3 (HTTPS_PROXY)"),
        ({"HTTPS_PROXY": "http://c:3", "https_proxy": "http://b:2"}, "b:2 (https_proxy)"),
        ({"HTTPS_PROXY": "http://c:3", "NO_PROXY": "example.org"}, "None"),
        ({"https_proxy": "http://b:2", "no_proxy": "other.net,EXAMPLE.org"}, "None"),
        ({"https_proxy": "http://b:2", "no_proxy": "example.org", "no_grpc_proxy": ""}, "b:2 (https_proxy)"),
    ],
)
def test_the_proxy_is_the_one_that_grpc_goes_through(
    told: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **told})
    take_upper_case()
    assert str(proxy_for("north.example.org:7000")) == expected


def test_grpc_says_nothing_by_itself() -> None:
    """What it has to say of a neighbour out of reach is told in words, once."""
    code = (
        "import os, sys; from peertune.cli import ENVIRONMENT; assert 'grpc' not in sys.modules;"
        " os.environ.update(ENVIRONMENT); import grpc; grpc.insecure_channel('127.0.0.1:1').close()"
    )
    environment = {**os.environ, "grpc_proxy": "ftp://a-scheme-that-it-complains-of"}
    del environment["GRPC_VERBOSITY"]
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_grpc_finds_addresses_as_everything_else_on_the_machine() -> None:
    """Here by a short form of 127.0.0.1 that the system knows and gRPC's own resolver would ask a name server for."""
    code = (
        "import os; from peertune.cli import ENVIRONMENT; os.environ.update(ENVIRONMENT); import grpc; from"
        " concurrent.futures import ThreadPoolExecutor; server = grpc.server(ThreadPoolExecutor(1));"
        " port = server.add_insecure_port('127.0.0.1:0'); server.start();"
        " grpc.channel_ready_future(grpc.insecure_channel(f'127.1:{port}')).result(30); server.stop(None)"
    )
    environment = {**os.environ, "no_grpc_proxy": "127.1"}
    environment.pop("GRPC_DNS_RESOLVER", None)
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S, env=environment).returncode == 0


def test_why_a_neighbor_cannot_be_reached_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charter, (a, b), port = two_sites(tmp_path)
    for name, short in (("RECONNECT_S", 0.1), ("ATTEMPT_S", 1.0), ("REDIAL_S", (0.1, 0.1))):
        monkeypatch.setattr(node_module, name, short)
    charter = charter.model_copy(update={"stall_s": 0.6, "signatures": {}}).signed(a).signed(b)
    fork = multiprocessing.get_context("fork")
    heard, looks, look = fork.Queue(), fork.Semaphore(0), node_module.diagnose

    async def looked(*given: Any) -> str:
        looks.release()
        return await look(*given)

    monkeypatch.setattr(node_module, "diagnose", looked)

    def play() -> None:
        node = Node(charter, b, "", lambda event, **fields: heard.put((event, fields)))
        node.start([(0, 1)])
        time.sleep(100)

    site = fork.Process(target=play, daemon=True)
    site.start()
    assert heard.get(timeout=PATIENCE_S) == ("unreachable", {"peer": "a", "reason": "nothing listens there"})
    for _ in range(4):
        assert looks.acquire(timeout=PATIENCE_S)
    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=speak_nonsense, args=(server,), daemon=True).start()
        assert heard.get(timeout=PATIENCE_S)[1]["reason"] == "something answers there that is no peertune"
        site.kill()  # before nothing listens there again
        site.join()
    assert heard.empty()


def test_what_is_in_the_way_is_found_out_however_short_the_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that drops all takes several seconds to be known as one."""
    charter, (_, b), _ = two_sites(tmp_path)
    monkeypatch.setattr(node_module, "RECONNECT_S", 0.1)

    async def dropped(*_: Any) -> str:
        return "no answer"

    async def attempt() -> dict[str, Any]:
        told: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        node = Node(charter.model_copy(update={"stall_s": 0.05}), b, "", lambda _, **fields: told.set_result(fields))
        trying = asyncio.ensure_future(node._ready(SimpleNamespace(channel_ready=asyncio.Event().wait), 0))
        await asyncio.wait([trying, told], return_when=asyncio.FIRST_COMPLETED)
        trying.cancel()
        node.stop()
        return told.result()

    monkeypatch.setattr(node_module, "diagnose", dropped)
    assert asyncio.run(attempt()) == {"peer": "a", "reason": "no answer"}


def test_what_another_site_says_of_its_charter_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    charter = make_charter(tmp_path, ["a", "b"])
    named = difference(charter, {"\x1b]0;x\x07\x1b[2J\nnote: all is well": "y", **charter.parts()}, "")
    assert named.isprintable() and "all is well" in named


@pytest.mark.parametrize("key", ["version", "\x1b[2J"])
def test_what_a_charter_says_cannot_write_to_a_terminal(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its errors quote it, and it may have come from anybody."""
    path = tmp_path / "charter.toml"
    write_charter(make_charter(tmp_path, ["a", "b"]), path)
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), key: "\x1b]0;x\x07\x1b[2J\nnote: all is well"}))
    assert main(["charter", "sign", str(path), "--identity", str(tmp_path / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and line.startswith("peertune: error: ")
