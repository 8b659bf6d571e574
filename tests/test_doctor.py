"""What `peertune doctor` finds: sites as processes on loopback that measure each other, and every kind of problem.

All that dials or listens is in processes of its own, as gRPC does not survive a fork.
"""

import asyncio
import json
import math
import multiprocessing
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peertune.algorithms import ALGORITHMS
from peertune.assemble import make_algorithm, make_topology
from peertune.charter import Charter, Member, read_charter, write_charter
from peertune.cli import main
from peertune.consortium import new_charter
from peertune.doctor import Finding, examine
from peertune.doctor.inputs import check_charter, check_data, check_model, check_topology
from peertune.doctor.lines import check_clock, predict
from peertune.doctor.machine import check_folder
from peertune.identity import load_identity, make_identity
from peertune.prepare import prepare_model
from peertune.run import run
from peertune.runtimes import probe, survey
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.message import CHUNK_SIZE
from peertune.runtimes.node import Node
from peertune.runtimes.probe import LIMIT, Kind, LineQuality, Probe, _plausible
from peertune.site import SiteOptions
from peertune.workload import Workload, needed_bytes, rehearse
from tests.recipes import recipe, tree, write_rows
from tests.test_consortium import PATIENCE_S, free_ports, is_open, wait_for

SITES = ["north", "south"]
FORK = multiprocessing.get_context("fork")


class Two:
    """Two neighbours, of whom north opens a port and south may, with a charter both have signed."""

    def __init__(self, folder: Path, model: Path, both_listen: bool = True, expires: date = date(2999, 1, 1)) -> None:
        self.folder, self.model, self.charter = folder, model, folder / "charter.toml"
        section = tree(folder, model, run={"num_peers": 2, "threads": 1})
        section["data"].pop("train")
        section["data"].pop("test")
        (folder / "recipe.toml").write_text(tomli_w.dumps(section))
        self.ports = dict(zip(SITES, free_ports(2), strict=True))
        members = []
        for name in SITES:
            write_rows(folder / f"{name}.jsonl", 40)
            where = f"127.0.0.1:{self.ports[name]}" if name == "north" or both_listen else ""
            members.append(Member(name=name, id=make_identity(folder / name / "key").id, address=where))
        new_charter(folder / "recipe.toml", [], members, expires, self.charter, 60.0)
        write_charter(self.signed(read_charter(self.charter)), self.charter)

    def signed(self, charter: Charter) -> Charter:
        for name in SITES:
            charter = charter.signed(load_identity(self.folder / name / "key"))
        return charter

    def doctor(self, name: str, wait_s: float = 60.0, **options: Any) -> Callable[[], dict[str, Finding]]:
        """Start a site's examination. Returns a function that waits for its findings, by check."""
        told = FORK.Queue()
        given = {
            "charter": self.charter,
            "identity": self.folder / name / "key",
            "train": str(self.folder / f"{name}.jsonl"),
            "test": str(self.folder / "test.jsonl"),
            "out": self.folder / name / "run",
            "model": str(self.model),
            **options,
        }

        def play() -> None:
            told.put(examine(SiteOptions(**given), wait_s=wait_s))
            told.close()
            told.join_thread()
            os._exit(0)

        process = FORK.Process(target=play, daemon=True)
        process.start()

        def wait() -> dict[str, Finding]:
            found = told.get(timeout=PATIENCE_S)
            process.join()  # until then it holds all sockets of this process that were open when it was forked
            return {finding.check: finding for finding in found}

        return wait

    def command(self, name: str, *arguments: str) -> Any:
        """Start a site's command, whose words go to its log."""

        def play() -> None:
            base = self.folder / name
            with (base / "log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
                code = main([*arguments, "--identity", str(base / "key"), "--out", str(base / "run")])
            os._exit(code)

        process = FORK.Process(target=play, daemon=True)
        process.start()
        return process

    def join(self, name: str) -> Any:
        data = ["--data", str(self.folder / f"{name}.jsonl"), "--model", str(self.model)]
        return self.command(name, "join", str(self.charter), *data)


def problems(found: dict[str, Finding]) -> list[str]:
    return [finding.check for finding in found.values() if finding.mark == "problem"]


@pytest.mark.parametrize("both_listen", [True, False])
def test_two_sites_measure_each_other_and_all_is_well(tmp_path: Path, micro_model: Path, both_listen: bool) -> None:
    """One without a port measures for both: the other takes its report."""
    sites = Two(tmp_path, micro_model, both_listen)
    waiting = {name: sites.doctor(name) for name in SITES}
    found = {name: wait() for name, wait in waiting.items()}
    for name, other in zip(SITES, reversed(SITES), strict=True):
        marks = {check: finding.mark for check, finding in found[name].items()}
        assert set(marks.values()) == {"ok"}, found[name]
        assert {"charter", "key", "port", "device", "data", "base", "disk", "memory", "clock", "round"} <= marks.keys()
        line = found[name][f"line to {other}"].values
        assert 0 < line["rtt_s"] < 10 and line["up"] > 0 and line["down"] > 0 and line["doing"] == "doctor"
        assert abs(line["clock_s"]) < 10 and line["dials"] == ((name == "north") == both_listen)
        assert found[name]["data"].values["samples"] == 40
        assert found[name]["round"].values["seconds"] > found[name]["round"].values["line_s"] > 0
    if not both_listen:
        mine, theirs = (found[name][f"line to {other}"].values for name, other in zip(SITES, SITES[::-1], strict=True))
        assert (mine["up"], mine["down"], mine["clock_s"]) == (theirs["down"], theirs["up"], -theirs["clock_s"])
        assert found["south"]["port"].text == "none: this site only dials out"


def test_a_running_join_answers_and_goes_on(tmp_path: Path, micro_model: Path) -> None:
    """While it waits for its neighbour, who looks first and joins then."""
    sites = Two(tmp_path, micro_model)
    processes = [sites.join("north")]
    wait_for(lambda: is_open(sites.ports["north"]))
    found = sites.doctor("south")()
    assert not problems(found)
    assert found["line to north"].mark == "ok" and found["line to north"].values["doing"] == "join"
    processes.append(sites.join("south"))
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    audit = [json.loads(line) for line in (tmp_path / "north" / "run" / "audit.jsonl").read_text().splitlines()]
    (probed,) = [event for event in audit if event["event"] == "probed"]
    assert probed["peer"] == "south" and 0 < probed["bytes"] <= LIMIT and 0 < probed["received"] <= LIMIT
    files = [load_file(next((tmp_path / n / "run" / "model").glob("*.safetensors"))) for n in SITES]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_join_that_only_dials_is_seen(tmp_path: Path, micro_model: Path) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    process = sites.join("south")
    found = sites.doctor("north")()
    process.kill()
    process.join()
    line = found["line to south"]
    assert line.mark == "warning" and "its run has reached it" in line.text and "`peertune doctor` there" in line.advice
    assert not problems(found) and found["round"].mark == "warning"


def test_the_command_prints_a_line_a_check_and_its_exit_code_says_whether_there_is_a_problem(
    tmp_path: Path, micro_model: Path
) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    options = ["doctor", str(sites.charter), "--wait", "0", "--model", str(micro_model)]
    process = sites.command("north", *options)
    process.join(PATIENCE_S)
    log = (tmp_path / "north" / "log").read_text()
    assert process.exitcode == 0, log
    assert "warning  data: not looked at; name the file with --data" in log.splitlines()
    assert "warning  round: its time cannot be told" in log and "was not waited for" in log
    (tmp_path / "north" / "log").unlink()
    process = sites.command("north", *options, "--json", "--data", str(tmp_path / "none.jsonl"))
    process.join(PATIENCE_S)
    log = (tmp_path / "north" / "log").read_text()
    assert process.exitcode == 1
    found = {finding["check"]: finding for finding in json.loads(log[log.index("[") : log.rindex("]") + 1])}
    assert found["data"]["mark"] == "problem" and found["charter"]["values"]["days"] > 300_000
    assert "of 11 checks found a problem: data" in log


def expired(sites: Two) -> dict[str, Any]:
    charter = read_charter(sites.charter).model_copy(update={"expires": date(2020, 1, 1)})
    write_charter(sites.signed(charter), sites.charter)
    return {}


def readable_key(sites: Two) -> dict[str, Any]:
    (sites.folder / "north" / "key" / "key.pem").chmod(0o644)
    return {}


def no_members_key(sites: Two) -> dict[str, Any]:
    make_identity(sites.folder / "other")
    return {"identity": sites.folder / "other"}


def no_charter(sites: Two) -> dict[str, Any]:
    return {"charter": sites.folder / "none.toml"}


def other_base(sites: Two) -> dict[str, Any]:
    folder = sites.folder / "other base"
    shutil.copytree(sites.model, folder)
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"model": str(folder)}


def no_base(sites: Two) -> dict[str, Any]:
    return {"model": str(sites.folder / "none")}


def bad_rows(sites: Two) -> dict[str, Any]:
    return {"overrides": ["data.label_field=colour"]}


def folder_of_another_run(sites: Two) -> dict[str, Any]:
    (sites.folder / "taken").mkdir()
    (sites.folder / "taken" / "recipe.json").write_text(json.dumps({"config": {"run": {"seed": 7}}}))
    return {"out": sites.folder / "taken"}


def folder_that_cannot_be_made(sites: Two) -> dict[str, Any]:
    """A link to nothing takes its place: what any system refuses, and root too."""
    (sites.folder / "gone").symlink_to(sites.folder / "nowhere")
    return {"out": sites.folder / "gone" / "run"}


def folder_under_a_file(sites: Two) -> dict[str, Any]:
    return {"out": sites.charter / "run"}


def agree(sites: Two, section: str, **keys: Any) -> dict[str, Any]:
    """Have both sign another recipe."""
    charter = read_charter(sites.charter)
    recipe = {**charter.recipe, section: {**charter.recipe[section], **keys}}
    write_charter(sites.signed(charter.model_copy(update={"recipe": recipe})), sites.charter)
    return {}


def graph_in_two_parts(sites: Two) -> dict[str, Any]:
    return agree(sites, "topology", kind="edges", edges=[])


def nothing_personal(sites: Two) -> dict[str, Any]:
    return agree(sites, "algorithm", local_modules=["heart"])


@pytest.mark.parametrize(
    ("arrange", "check", "text"),
    [
        (expired, "charter", "expired on 2020-01-01"),
        (no_charter, "charter", "no such charter"),
        (readable_key, "key", "got mode 0644, expected 0600"),
        (no_members_key, "key", "no member has the id"),
        (other_base, "base", "are not those of the charter"),
        (no_base, "base", "no such local folder"),
        (graph_in_two_parts, "graph", "peer 0 cannot reach peer 1"),
        (nothing_personal, "recipe", "got 'heart', which is in no name"),
        (bad_rows, "data", "no field 'colour'"),
        (folder_of_another_run, "folder", "holds a run that is no site's"),
        (folder_that_cannot_be_made, "folder", "cannot be made: File exists"),
        (folder_under_a_file, "folder", "is a file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_problem_is_named_with_what_to_do(
    arrange: Callable[[Two], dict[str, Any]], check: str, text: str, tmp_path: Path, micro_model: Path
) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    found = sites.doctor("north", 0.0, **arrange(sites))()
    assert problems(found) == [check]
    assert text in found[check].text and found[check].advice


def test_a_folder_is_tried_out_and_left_as_it_was(tmp_path: Path, micro_model: Path) -> None:
    def found(out: Path) -> list[Finding]:
        return check_folder(recipe(tmp_path, micro_model, run={"out": str(out)}), 0)

    assert not found(tmp_path)
    before = sorted(tmp_path.iterdir())
    too_long = tmp_path / "new" / ("n" * 300)
    (problem,) = found(too_long)
    assert problem.mark == "problem" and problem.text == f"{too_long} cannot be made: File name too long"
    assert not found(tmp_path / "new" / "run")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_a_problem(tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = sites.doctor("north", 0.0)()
    assert problems(found) == ["disk"] and "0 MB free" in found["disk"].text


def test_little_memory_is_a_problem(tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    monkeypatch.setattr("peertune.doctor.available_bytes", lambda: 1000)
    found = sites.doctor("north", 0.0)()
    assert problems(found) == ["memory"]
    weights = sum(tensor.nbytes for tensor in load_file(micro_model / "model.safetensors").values())
    assert weights < found["memory"].values["need_bytes"] < 6 * weights
    monkeypatch.setattr("peertune.doctor.available_bytes", lambda: None)
    assert sites.doctor("north", 0.0)()["memory"].mark == "warning"


def test_a_port_in_use_is_a_problem(tmp_path: Path, micro_model: Path) -> None:
    sites = Two(tmp_path, micro_model, both_listen=False)
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("::", sites.ports["north"]))
        taken.listen()
        found = sites.doctor("north", 0.0)()
    assert problems(found) == ["port"] and str(sites.ports["north"]) in found["port"].text


def test_a_neighbor_out_of_reach_is_a_problem_and_why_is_said(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens; a proxy is in the way that is not there; something is no peertune, or has another's key."""
    monkeypatch.setattr(survey, "CONNECT_S", 1.0)
    monkeypatch.setattr(probe, "CONNECT_S", PATIENCE_S)  # each time there is an answer
    sites = Two(tmp_path, micro_model)
    found = sites.doctor("north", 0.0)()
    assert problems(found) == ["line to south"] and "nothing listens there" in found["line to south"].text
    with monkeypatch.context() as proxied:
        dead = f"127.0.0.1:{free_ports(1)[0]}"
        proxied.setenv("grpc_proxy", f"http://me:secret@{dead}")
        proxied.setenv("no_grpc_proxy", "")
        line = sites.doctor("north", 0.0)()["line to south"]
    assert f"the HTTP proxy {dead} (grpc_proxy) cannot be reached" in line.text and "secret" not in str(line)
    assert "see to the proxy and its password" in line.advice
    with socket.create_server(("127.0.0.1", sites.ports["south"])) as server:
        speaker = FORK.Process(target=talk_nonsense, args=(server,), daemon=True)
        speaker.start()
        found = sites.doctor("north", 0.0)()
        speaker.kill()
        speaker.join()
    assert problems(found) == ["line to south"] and "no peertune" in found["line to south"].text
    charter = read_charter(sites.charter)
    swapped = charter.members[0].model_copy(update={"address": charter.members[1].address})
    other = charter.model_copy(update={"members": [swapped, charter.members[1].model_copy(update={"address": ""})]})
    with played(sites.signed(other), tmp_path / "north" / "key", sites.ports["south"]):
        found = sites.doctor("north", 0.0)()
    assert problems(found) == ["line to south"] and "the key of north answers there" in found["line to south"].text


def talk_nonsense(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-nothing\r\n" * 4)
        connection.close()


class played:
    """Context in which a process plays a site's end of its lines."""

    def __init__(self, charter: Charter, identity: Path, port: int) -> None:
        self._charter, self._identity, self._port = charter, identity, port

    def __enter__(self) -> Any:
        events = FORK.Queue()

        def play() -> None:
            node = Node(
                self._charter,
                load_identity(self._identity),
                f"127.0.0.1:{self._port}",
                lambda event, **_: events.put(event),
            )
            node.start([])
            time.sleep(10 * PATIENCE_S)

        self._process = FORK.Process(target=play, daemon=True)
        self._process.start()
        wait_for(lambda: is_open(self._port))
        return events

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def test_another_charter_is_a_problem_on_both_sides(tmp_path: Path, micro_model: Path) -> None:
    sites = Two(tmp_path, micro_model)
    other = tmp_path / "other.toml"
    write_charter(sites.signed(read_charter(sites.charter).model_copy(update={"grace_s": 3.0})), other)
    waiting = [sites.doctor("north"), sites.doctor("south", charter=other)]
    for found, name in zip([wait() for wait in waiting], reversed(SITES), strict=True):
        assert problems(found) == [f"line to {name}"]
        assert "its charter is another: grace_s" in found[f"line to {name}"].text


def test_a_stranger_is_not_answered_and_a_member_still_is(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the charter, but a key of its own in the place of a member's."""
    monkeypatch.setattr(survey, "CONNECT_S", 1.0)
    monkeypatch.setattr("peertune.runtimes.node.HANDSHAKE_S", PATIENCE_S)  # so that no stranger is written down yet
    sites = Two(tmp_path, micro_model)
    good = read_charter(sites.charter)
    stranger = make_identity(tmp_path / "stranger")
    forged = good.model_copy(
        update={"members": [good.members[0], good.members[1].model_copy(update={"id": stranger.id})]}
    )
    forged = forged.signed(load_identity(tmp_path / "north" / "key")).signed(stranger)
    write_charter(forged, tmp_path / "forged.toml")
    with played(good, tmp_path / "north" / "key", sites.ports["north"]) as events:
        found = sites.doctor("south", 0.0, charter=tmp_path / "forged.toml", identity=tmp_path / "stranger")()
        line = found["line to north"]
        assert not line.values and line.mark == "warning" and events.empty()  # north would dial
        asked = ask_bare(forged, stranger, 0)
        assert "not to this site" in asked and events.empty()
        assert sites.doctor("south")()["line to north"].mark == "ok"
        assert events.get(timeout=PATIENCE_S) == "probed"


def ask_bare(charter: Charter, identity: Any, index: int) -> str:
    """Why a survey of one line fails."""
    told = FORK.Queue()

    def play() -> None:
        node = Node(charter, identity, "", lambda event, **_: None, "doctor")
        node.start([])
        seen = survey.Survey(node, [index], 0.0, [])
        node.call(seen.ask_all())
        told.put(seen.failures.get(index, ""))
        told.close()
        told.join_thread()
        os._exit(0)

    FORK.Process(target=play, daemon=True).start()
    return str(told.get(timeout=PATIENCE_S))


class Context:
    """A stream from someone who says what a test wants; what is answered is counted."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames, self.given, self.code = frames, 0, grpc.StatusCode.OK

    async def read(self) -> Any:
        return self.frames.pop(0) if self.frames else grpc.aio.EOF

    async def write(self, frame: bytes) -> None:
        self.given += len(frame)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise ConnectionAbortedError


def charter_of(names: list[str]) -> Charter:
    members = [Member(name=name, id=letter * 52) for name, letter in zip(names, "abc", strict=False)]
    return Charter(version="0", expires=date(2999, 1, 1), base="b", tokenizer="t", recipe={}, members=members)


def answered(frames: list[bytes]) -> tuple[Context, Probe]:
    own = Probe(charter_of(["a", "b"]), "join")
    context = Context(frames)
    with suppress(ConnectionAbortedError):
        asyncio.run(own.answer(1, context))
    return context, own


def hello() -> bytes:
    return Probe(charter_of(["a", "b"]), "doctor")._hello()


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"\x01not json"],
        [b"\x01" + json.dumps({"doing": "x", "charter": {}}).encode()],
        [b"\x01" + b" " * probe.MAX_HELLO],
        [b"\x01" + b"[" * 50_000],
        [hello(), struct.pack("<BQ", Kind.FETCH, LIMIT + 1)],
        [hello(), struct.pack("<BQ", Kind.FETCH, 2**63)],
        [hello(), *[bytes([Kind.CHUNK]) + bytes(CHUNK_SIZE)] * 9],
        [hello(), *[bytes([Kind.PING])] * (probe.MAX_FRAMES + 1)],
        [hello(), struct.pack("<Bdddd", Kind.REPORT, float("nan"), 1.0, 1.0, 0.0)],
        [hello(), struct.pack("<Bdddd", Kind.REPORT, 1.0, 0.0, 1.0, 0.0)],
        [hello(), b"\xff"],
        [hello(), bytes([Kind.PING, 1])],
        [hello(), b""],
    ],
    ids=range(14),
)
def test_a_member_who_asks_for_too_much_or_nonsense_is_turned_away(frames: list[bytes]) -> None:
    context, own = answered(frames)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert context.given < 64 << 10 and not own.visits and not own.slot.locked()


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_random_frames_end_a_probe_or_do_nothing(frames: list[bytes]) -> None:
    context, own = answered([hello(), *frames])
    assert context.given <= LIMIT + (64 << 10) and not own.slot.locked()


def test_a_report_is_seen_from_the_other_side() -> None:
    _, own = answered([hello(), struct.pack("<Bdddd", Kind.REPORT, 0.5, 10.0, 20.0, 3.0)])
    assert own.visits == {1: LineQuality(0.5, 20.0, 10.0, -3.0, "doctor", "")}


def test_there_is_one_probe_at_a_time() -> None:
    async def second() -> Any:
        own = Probe(charter_of(["a", "b"]), "join")
        async with own.slot:
            return own.refusal(1)

    assert asyncio.run(second()) == (probe.BUSY, "one probe at a time")


def test_a_member_is_answered_a_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=lambda: now))
    own = Probe(charter_of(["a", "b", "c"]), "join")

    class Slow(Context):
        async def read(self) -> Any:
            nonlocal now
            now += 25.0
            return await super().read()

    for _ in range(2):  # 50 s each, of the 60 that are granted and what comes back meanwhile
        assert own.refusal(1) is None
        asyncio.run(own.answer(1, Slow([hello()])))
    code, reason = own.refusal(1) or (None, "")
    assert code is probe.TOO_OFTEN and "ask again in 201 s" in reason
    assert own.refusal(2) is None
    now += 201.0
    assert own.refusal(1) is None


def test_a_site_that_was_measured_too_often_is_named_and_no_problem(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "_allowance", lambda self, index: -1.0)
    sites = Two(tmp_path, micro_model, both_listen=False)
    with played(read_charter(sites.charter), tmp_path / "north" / "key", sites.ports["north"]):
        line = sites.doctor("south")()["line to north"]
    assert line.mark == "warning" and "it was measured too often; ask again in 6 s" in line.text, line


def test_a_probe_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEADLINE_S", 0.01)

    class Silent(Context):
        async def read(self) -> Any:
            await asyncio.Event().wait()

    own, context = Probe(charter_of(["a", "b"]), "join"), Silent([])
    with pytest.raises(ConnectionAbortedError):
        asyncio.run(own.answer(1, context))
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED and not own.slot.locked()


LINE = LineQuality(rtt_s=0.1, up=100.0, down=50.0, clock_s=0.0, doing="doctor", differs="")


def test_clocks_are_compared() -> None:
    charter = charter_of(["a", "b", "c"])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert check_clock(charter, {}, now).mark == "ok"
    assert check_clock(charter, {}, datetime(1970, 1, 2, tzinfo=UTC)).mark == "warning"
    assert check_clock(charter, {1: LINE}, now).mark == "ok"
    fast = LineQuality(**{**LINE.__dict__, "clock_s": 86_400.0})
    slow = LineQuality(**{**LINE.__dict__, "clock_s": -90.0})
    found = check_clock(charter, {1: fast, 2: slow}, now)
    assert found.mark == "warning"
    assert found.text == "b's is 1 day, 0:00:00 ahead, c's is 0:01:30 behind"


def test_a_charter_that_ends_soon_is_remarked_on(tmp_path: Path, micro_model: Path) -> None:
    sites = Two(tmp_path, micro_model)
    marks = [check_charter(sites.charter, date(2998, 12, day))[1][0].mark for day in (1, 30)]
    assert marks == ["ok", "warning"]


def test_a_rounds_time_is_its_steps_and_its_slowest_line() -> None:
    charter = charter_of(["a", "b", "c"])
    workload = Workload(rounds=10, steps=4, step_s=2.0, hops=1, sent={1: 1000, 2: 400}, received={1: 400, 2: 400})
    found = predict(charter, workload, {1: LINE, 2: LINE}, [1, 2])
    assert found.mark == "ok"
    assert found.values["seconds"] == pytest.approx(8.0 + 10.1)
    assert found.values["total_s"] == pytest.approx(181.0)
    assert "18.2 s for all" in found.text and "0:03:01" in found.text
    assert predict(charter, workload, {1: LINE}, [1, 2]).mark == "warning"
    assert predict(charter, None, {1: LINE}, [1]).mark == "warning"
    late = predict(
        charter, workload, {1: LINE}, [1], datetime(2999, 1, 1, tzinfo=UTC) + timedelta(hours=23, minutes=59)
    )
    assert late.mark == "warning" and "2999-01-01" in late.advice


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "deca", "gossip_every": 2},
        {"name": "dec_lora", "rounds": 3, "rank": 2, "adapter": "lora"},
        {"name": "gt", "rounds": 3, "local_steps": 2},
        {"name": "noloco", "rounds": 4, "local_steps": 2},
        {"name": "fedavg", "rounds": 3, "local_steps": 2},
    ],
    ids=lambda keys: keys["name"],
)
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_what_a_round_sends_is_what_a_run_sends(
    codec: str, algorithm: dict[str, Any], tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the simulation's own count, before its agreement."""
    sections: dict[str, Any] = {"algorithm": algorithm, "data": {"partition": {"kind": "iid"}}}
    sections["exchange"] = {"codec": codec}
    config = recipe(tmp_path, micro_model, **sections)
    run(config)
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    (start,) = [event for event in events if event["event"] == "start"]
    last = [event for event in events if event["event"] == "round"][-1]
    counts = [peer["samples"] for peer in start["peers"]]
    members = [Member(name=f"m{i}", id="abcdefg"[i] * 52, samples=n) for i, n in enumerate([*counts, 0][:5])]
    shared = {"members": members, "recipe": tree(tmp_path, micro_model, **sections)}
    charter = charter_of(["a"]).model_copy(update=shared)
    options = SiteOptions(
        charter=tmp_path / "charter.toml",
        identity=tmp_path / "key",
        out=tmp_path / "site",
        train=str(tmp_path / "train.jsonl"),
        model=str(micro_model),
    )
    own = options.config(charter)
    data, _ = check_data(own, charter, tmp_path, 0)
    monkeypatch.setattr("peertune.doctor.inputs.check_base", lambda *_: None)
    topology, _ = check_topology(own, charter)
    made, found = check_model(own, charter, tmp_path, 0, torch.device("cpu"), data, topology)
    assert made is not None, found
    workload = rehearse(made, own)
    assert workload.rounds == start["rounds"] == last["round"] + 1
    assert sum(workload.sent.values()) * workload.rounds == pytest.approx(last["bytes_sent"][0])
    assert workload.steps * workload.rounds == config.algorithm.num_steps(len(made.peer.blocks))
    assert workload.step_s > 0 and type(made) is ALGORITHMS[algorithm["name"]]


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300])
@pytest.mark.parametrize("key", ["rtt_s", "up", "down", "clock_s"])
def test_what_a_neighbor_reports_that_can_be_no_measurement_is_refused(key: str, value: float) -> None:
    sound = LineQuality(0.1, 1e6, 1e6, -3.0, "join", "")
    assert _plausible(sound) is sound
    with pytest.raises(ProtocolError, match="what cannot be"):
        _plausible(replace(sound, **{key: value}))


def test_memory_foretold_holds_what_a_method_keeps_and_the_messages_of_a_turn(
    tmp_path: Path, micro_model: Path
) -> None:
    def needed(name: str, **keys: Any) -> tuple[int, int, int]:
        config = recipe(tmp_path, micro_model, algorithm={"name": name, **keys})
        topology = make_topology(config, ALGORITHMS[name], [1] * config.run.num_peers)
        algorithm = make_algorithm(config, prepare_model(config, torch.device("cpu"), None), topology)
        trained = sum(master.numel() for master in map(algorithm.masters.snapshot, algorithm.masters))
        return *needed_bytes(algorithm, 2), 4 * trained

    plain, tracked = needed("dec_lora", adapter="none", rounds=40), needed("gt", rounds=40)
    assert tracked[0] - plain[0] == plain[2], "gradient tracking keeps one more float32 number a weight"
    # Two neighbours' messages, the one before the site's own, and its own of four rounds without a checkpoint.
    assert plain[1] == (3 + 4) * plain[2]
    short, long = needed("deca", inner_steps=1), needed("deca", inner_steps=8)
    assert long[1] > short[1], "messages are kept until a checkpoint, at the end of a block's turn"
