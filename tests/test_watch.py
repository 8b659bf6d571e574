"""watch and status: what a run's logs add up to, the page in a browser, metrics, who is answered."""

from __future__ import annotations

import base64
import errno
import http.client
import json
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from peertune import audit
from peertune.audit import AuditLog
from peertune.cli import main
from peertune.errors import CheckpointError, ConfigError
from peertune.lock import FolderLock, is_held
from peertune.logfields import sentence
from peertune.report.events import Events
from peertune.run import run
from peertune.run_folder import RunFolder
from peertune.watch import read_state, status_lines
from peertune.watch import server as server_module
from peertune.watch.folder import RunWatch
from peertune.watch.logs import Links
from peertune.watch.page import fragments
from peertune.watch.server import WatchServer, is_loopback
from peertune.watch.state import Snapshot, snapshot
from tests.recipes import recipe
from tests.test_consortium import NAMES, PATIENCE_S, Consortium, free_ports, wait_for
from tests.test_report import chromium

T0 = 1_760_000_000.0
START = {
    "event": "start",
    "time": T0,
    "config": {"run": {"num_peers": 3}, "algorithm": {"name": "deca"}},
    "rounds": 20,
    "edges": [[0, 1], [1, 2]],
    "hub": None,
}
AUDIT = [
    {"event": "started", "time": T0, "site": 1, "members": ["north", "east", "south"], "neighbors": [0, 2]},
    {"event": "connected", "time": T0 + 1, "peer": "north"},
    {"event": "connected", "time": T0 + 1, "peer": "south"},
    *(
        {"event": "sent", "time": T0 + 2, "peer": p, "round": 0, "hop": "gossip", "bytes": 500}
        for p in ("north", "south")
    ),
    {"event": "fetched", "time": T0 + 3, "peer": "north", "round": 0, "hop": 0, "bytes": 480},
    {"event": "arrived", "time": T0 + 3, "peer": "north", "round": 0, "hop": 0, "bytes": 400, "seconds": 0.5},
    {"event": "arrived", "time": T0 + 4, "peer": "south", "round": 0, "hop": 0, "bytes": 400, "seconds": 0.1},
]
LOST = [
    {"event": "disconnected", "time": T0 + 5, "peer": "south"},
    {"event": "waiting", "time": T0 + 6, "peer": "south", "round": 1},
    {"event": "left_out", "time": T0 + 7, "peers": "south", "round": 1, "hop": "gossip"},
    {"event": "left_out", "time": T0 + 8, "peers": "south", "round": 2, "hop": "gossip"},
]


def round_event(round: int, loss: float = 1.5) -> dict[str, Any]:
    return {
        **{"event": "round", "time": T0 + 3 + round, "round": round, "loss": [None, loss, None]},
        **{"consensus_distance": None, "bytes_sent": [None, 1000 * (round + 1), None], "wall_s": 2.0 * (round + 1)},
    }


def line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode()


def append(path: Path, *events: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(line(event) + b"\n" for event in events))


def folded(events: list[dict[str, Any]], audit: list[dict[str, Any]], alive: bool | None = True) -> Snapshot:
    log, links = Events(), Links()
    for event in events:
        log.add(line(event))
    for event in audit:
        links.add(line(event))
    return snapshot(log, links, T0 + 10, alive, finished=False)


def site_folder(path: Path, rounds: int = 3) -> Path:
    append(path / "events.jsonl", START, *map(round_event, range(rounds)))
    append(path / "audit.jsonl", *AUDIT, *LOST)
    return path


@contextmanager
def at_work(path: Path) -> Iterator[None]:
    """As if a run were at work in the folder."""
    lock = FolderLock(path)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def test_a_sites_logs_tell_its_neighbors_and_who_is_missing() -> None:
    state = folded(
        [START, *map(round_event, range(3)), {"event": "checkpoint", "time": T0 + 9, "round": 2}], AUDIT + LOST
    )
    assert (state.site, state.state, state.rounds_done, state.rounds_planned) == ("east", "running", 3, 20)
    north, south = state.peers
    assert (north.name, north.status, north.round, north.behind, north.heard) == ("north", "connected", 0, 2, T0 + 3)
    assert (north.bytes_sent, north.bytes_received, north.bytes_per_s) == (500, 400, pytest.approx(800))
    assert (south.status, south.since, south.rounds_without) == ("missing", T0 + 5, 2)
    assert state.missing == ("south",) and state.waiting_for == () and state.bytes_sent == 1000
    assert state.loss == 1.5 and state.checkpoint_round == 2 and state.checkpoint_time == T0 + 9
    assert state.left_s == pytest.approx(2.0 * 17) and state.elapsed_s == pytest.approx(6.0 + 5)
    waiting = folded([START, round_event(0)], AUDIT + LOST[:2])
    assert waiting.waiting_for == ("south",)
    paused = {"event": "paused", "time": T0 + 7, "round": 1, "present": "north", "quorum": 2}
    assert folded([START, round_event(0)], [*AUDIT, paused]).waiting_for == ("the quorum",)
    resumed = {**paused, "event": "resumed", "time": T0 + 8}
    assert folded([START, round_event(0)], [*AUDIT, paused, resumed]).waiting_for == ()
    back = folded([START], [*AUDIT, *LOST, {"event": "connected", "time": T0 + 9, "peer": "south"}])
    assert back.missing == () and back.peers[1].since == T0 + 9 and back.peers[1].rounds_without == 2
    out = folded([START], [*AUDIT, *LOST, {"event": "ejected", "time": T0 + 9, "peer": "south", "signed_by": "north"}])
    assert out.missing == () and out.peers[1].status == "ejected"
    for kind, then in (("left", "missing"), ("finished", "finished")):
        told: list[dict[str, Any]] = [{"event": kind, "time": T0 + 4, "peer": "south"}, *LOST[:1]]
        gone = folded([START], [*AUDIT, *told])
        assert gone.missing == () and gone.peers[1].status == kind
        told += [{"event": "connected", "time": T0 + 6, "peer": "south"}, *LOST[:1]]
        assert folded([START], [*AUDIT, *told]).peers[1].status == then, "it was back for a moment"
    own = {"event": "ejected", "time": T0 + 9, "peer": "east", "signed_by": "north, south"}
    ended = [status_lines(folded([START], [*AUDIT, *LOST, *told], alive=False))[0] for told in ([], [own])]
    assert "The same command goes on." in ended[0]
    assert ended[1].startswith("east was ejected from this run, and its process has ended.")


def test_the_wait_for_the_first_neighbors_is_no_rounds_pace() -> None:
    """A site that waits an hour for the others does not take an hour a round."""
    late = [{**round_event(r), "wall_s": 3600.0 + 2.0 * r} for r in range(3)]
    assert folded([START, *late], AUDIT).left_s == pytest.approx(2.0 * 17)
    assert folded([START, late[0]], AUDIT).left_s == pytest.approx(3600.0 * 19), "nothing else is known yet"


def test_what_happened_is_told_in_words() -> None:
    """As `join` notes it, and the page's list has it."""
    assert sentence("connected", {"peer": "south"}) == "connected to south"
    unreachable = {"time": T0, "peer": "south", "reason": "nothing listens there"}
    assert sentence("unreachable", unreachable) == "south cannot be reached: nothing listens there"
    late = {"peer": "south", "round": 3, "used": True, "amount": 0.1024918332695961}
    assert sentence("late", late) == "a message of south for round 3 came late, used: yes, amount: 0.1025"
    assert sentence("left_out", {"round": 3}) == "left out, round: 3", "a field is missing"
    assert sentence("probed", {"peer": "{round}", "bytes": 5}) == "probed, peer: {round}, bytes: 5"
    waits = folded([START, round_event(0)], AUDIT + LOST[:2])
    came = [{"event": "late", "time": T0 + r, "peer": "south", "round": r, "used": True} for r in range(20)]
    *_, before, last = folded([START], [*AUDIT, *LOST, *came]).recent
    assert "late" not in before[1] and last[1].startswith("a message of south for round 19"), "one line for them all"
    assert waits.recent[-1][1] == "waits for south, round 1" and "waits for south" in fragments(waits)["recent"]


def test_a_gap_in_the_audit_log_is_told_when_it_begins_and_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk refuses each of a round's many lines; nobody needs to read that each time."""
    told: list[str] = []
    write = AuditLog(tmp_path / "audit.jsonl", told.append)
    write("sent", peer="north")
    append_line, is_full = audit.append_line, True

    def refusing(path: Path, line: str) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        append_line(path, line)

    monkeypatch.setattr(audit, "append_line", refusing)
    for _ in range(5):
        write("sent", peer="north")
    (begins,) = told
    assert "the audit log has a gap" in begins and "No space left" in begins and "same command" in begins
    is_full = False
    write("sent", peer="south")
    write("sent", peer="south")
    assert told[1:] == ["the audit log goes on; 5 of its lines are lost"]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("lost")) for line in lines] == [
        ("sent", None), ("gap", 5), ("sent", None), ("sent", None),
    ]  # fmt: skip


def test_status_says_why_a_neighbor_is_refused_until_it_is_connected() -> None:
    refused = {"event": "refused_by", "time": T0 + 6, "peer": "south", "reason": "another charter: grace_s differ"}
    (*_, south) = status_lines(folded([START], [*AUDIT, *LOST, refused]))
    assert "it refuses this site: another charter: grace_s differ" in south
    unreachable = {"event": "unreachable", "time": T0 + 6, "peer": "south", "reason": "nothing listens there"}
    (*_, south) = status_lines(folded([START], [*AUDIT, *LOST, unreachable]))
    assert "missing" in south and "cannot be reached: nothing listens there" in south
    again = {"event": "connected", "time": T0 + 9, "peer": "south"}
    assert "reached" not in "".join(status_lines(folded([START], [*AUDIT, *LOST, unreachable, again])))
    assert "refuses" not in "".join(status_lines(folded([START], [*AUDIT, *LOST, refused, again])))


def test_what_a_killed_process_was_connected_to_counts_no_more() -> None:
    """Its successor's start says who is connected; nobody said goodbye for the one before."""
    again = {**AUDIT[0], "time": T0 + 9, "connected": [2]}
    state = folded([START], [*AUDIT, {"event": "connected", "time": T0 + 8.9, "peer": "south"}, again])
    assert [(peer.status, peer.since) for peer in state.peers] == [("missing", T0 + 9), ("connected", T0 + 8.9)]
    assert {peer.status for peer in folded([START], AUDIT, alive=False).peers} == {"offline"}


def test_a_simulation_shows_all_its_peers() -> None:
    events = [
        START,
        {**round_event(0), "loss": [1.0, 2.0, 3.0], "bytes_sent": [10, 20, 30], "consensus_distance": 0.25},
    ]
    state = folded(events, [])
    assert not state.is_site and state.consensus_distance == 0.25 and state.loss == 2.0 and state.bytes_sent == 60
    assert [(peer.name, peer.loss, peer.bytes_sent) for peer in state.peers][2] == ("peer 2", 3.0, 30)
    assert state.edges == ((0, 1), (1, 2))
    assert "training loss (nats)" in fragments(state)["loss"]
    assert "consensus distance (L2 norm)" in fragments(state)["consensus"]
    assert 'aria-label="Graph of 3 nodes and 2 edges"' in fragments(state)["graph"]


@pytest.mark.parametrize(
    ("alive", "finished", "events", "expected"),
    [
        (False, False, [], "empty"),
        (True, False, [], "starting"),
        (True, False, [START], "running"),
        (True, False, [round_event(2)], "running"),  # its log was cut while it went on
        (False, False, [START], "stopped"),
        (None, False, [START], "running"),
        (None, False, [{**START, "time": T0 - 100}], "stopped"),
        (False, True, [START], "finished"),
    ],
)
def test_states_of_a_run(alive: bool | None, finished: bool, events: list[dict[str, Any]], expected: str) -> None:
    log = Events()
    for event in events:
        log.add(line(event))
    assert snapshot(log, Links(), T0 + 10, alive, finished).state == expected


PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
LISTS = st.lists(PLAIN | st.lists(PLAIN, max_size=2), max_size=3)
JSON = PLAIN | LISTS | st.dictionaries(st.text(max_size=4), PLAIN | LISTS, max_size=3)
KEYS = [
    "time",
    "round",
    "peer",
    "peers",
    "bytes",
    "seconds",
    "loss",
    "members",
    "neighbors",
    "connected",
    "edges",
    "hub",
]
KINDS = [e["event"] for e in [START, *AUDIT, *LOST]] + ["round", "checkpoint", "resume", "join", "end", "refused"]


@given(
    told=st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.dictionaries(st.sampled_from([*KEYS, "site", "hub", "rounds", "config"]), JSON)
        ),
        max_size=6,
    ),
    garbage=st.binary(max_size=20),
)
def test_no_line_can_break_it(told: list[tuple[str, dict[str, Any]]], garbage: bytes) -> None:
    log, links = Events(), Links()
    for each in (log, links):
        for kind, fields in told:
            each.add(line({**fields, "event": kind}))
        each.add(garbage)
    state = snapshot(log, links, T0, True, False)
    assert len(fragments(state)) == 8 and status_lines(state)


def test_half_a_line_waits_for_its_end_and_garbage_is_left_out(tmp_path: Path) -> None:
    watch = RunWatch(tmp_path)
    assert watch.poll() is False and watch.snapshot().state == "empty"
    append(tmp_path / "events.jsonl", START, round_event(0))
    whole = line(round_event(1)) + b"\n"
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff{]\n[1]\n" + whole[:20])
    assert watch.poll() is True
    assert (watch.snapshot().rounds_done, watch.snapshot().unreadable) == (1, 2)
    assert watch.poll() is False
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(whole[20:])
    assert watch.poll() is True and watch.snapshot().rounds_done == 2
    watch.close()


def test_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    """RunFolder.rewind replaces the file; another that was cut in place is noticed too."""
    folder, watch = RunFolder(tmp_path), RunWatch(tmp_path)
    append(folder.events, START, *map(round_event, range(9)))
    watch.poll()
    assert watch.snapshot().rounds_done == 9
    folder.rewind(4)
    append(folder.events, {"event": "resume", "time": T0 + 20, "round": 4}, round_event(4, loss=9.0))
    watch.poll()
    assert (watch.snapshot().rounds_done, watch.snapshot().loss) == (5, 9.0)
    folder.events.write_bytes(line(START) + b"\n")
    watch.poll()
    assert watch.snapshot().rounds_done == 0
    folder.events.unlink()
    assert watch.poll() is True and watch.snapshot().state == "empty"
    watch.close()


def test_long_runs_have_curves_of_bounded_length() -> None:
    events = [START | {"rounds": 5000}, *map(round_event, range(5000))]
    state = folded(events, [])
    assert 100 <= len(state.curve_rounds) == len(state.curve_loss) <= 300
    state = folded([*events, round_event(5000, loss=9.25)], [])
    assert "of the last round: 9.25" in fragments(state)["loss"], "and not what a point of many rounds has"


def test_nothing_from_the_files_becomes_markup() -> None:
    bad = "<img src=x onerror=alert(1)>\x1b[2J"
    audit = [
        {"event": "started", "time": T0, "site": 0, "members": [bad, bad + "2"], "neighbors": [1]},
        {"event": "refused_by", "time": T0, "peer": bad, "reason": bad},
    ]
    config = {"run": {}, "algorithm": {"name": bad}}
    state = folded([{**START, "config": config}], audit)
    for html in fragments(state).values():
        assert "<img" not in html and "\x1b" not in html
    assert "\x1b" not in "".join(status_lines(state))


def test_the_lock_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    assert is_held(folder) is False

    def hold(told: Any) -> None:
        FolderLock(folder).acquire()
        told.set()
        time.sleep(600)

    fork = multiprocessing.get_context("fork")
    told = fork.Event()
    process = fork.Process(target=hold, args=(told,), daemon=True)
    process.start()
    assert told.wait(PATIENCE_S) and is_held(folder) is True
    with pytest.raises(CheckpointError, match=f"process {process.pid} on .* is at work on this run"):
        FolderLock(folder).acquire()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert is_held(folder) is False and (folder / "lock").exists()
    with at_work(folder):
        assert is_held(folder) is True
    assert folder.exists() and not (folder / "lock").exists()


def test_a_lock_that_another_user_holds_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a run is judged by its silence; it is not said to have stopped."""
    with at_work(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
            assert is_held(tmp_path) is None
        assert is_held(tmp_path) is True


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    with at_work(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "lock").exists()
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_to_be_freed_before_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder was advised, in which a run begins anew."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match="lock: cannot be written: No space left on device; free some space"):
        FolderLock(tmp_path).acquire()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model)
    with at_work(tmp_path / "out"), pytest.raises(CheckpointError, match="is at work on this run"):
        run(config)
    run(config)
    assert not (tmp_path / "out" / "lock").exists()


def test_status_says_in_words_and_by_its_exit_code_how_a_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site_folder(tmp_path / "run")
    with at_work(folder):
        assert main(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "east is running; missing: south." in told and "2 rounds without it" in told
    assert "Round 3 of 20 (15" in told and "Loss 1.5" in told
    assert "last line written" in told, "long ago: its disk may be full, and it further than its log"
    assert "last line written" not in "\n".join(status_lines(folded([START, round_event(0)], AUDIT)))
    assert main(["status", str(folder)]) == 1
    assert "No process is at work on this run" in capsys.readouterr().out
    assert main(["status", str(folder), "--json"]) == 1
    state = json.loads(capsys.readouterr().out)
    assert (state["state"], state["rounds_done"], state["peers"][1]["rounds_without"]) == ("stopped", 3, 2)
    (folder / "summary.json").write_text("{}")
    assert main(["status", str(folder)]) == 0
    assert "east is finished." in capsys.readouterr().out
    for wrong in (tmp_path / "none", folder / "summary.json"):
        assert main(["status", str(wrong)]) == 2
        assert "expected a" in capsys.readouterr().err


def test_status_of_a_whole_run(tmp_path: Path, micro_model: Path) -> None:
    summary = run(recipe(tmp_path, micro_model))
    state = read_state(tmp_path / "out")
    assert (state.state, state.rounds_done, state.method) == ("finished", summary["rounds"], "deca")
    assert len(state.peers) == 4 and state.consensus_distance is not None and state.elapsed_s == summary["wall_s"]


def test_a_sites_own_logs_and_a_second_join_in_its_folder(tmp_path: Path, micro_model: Path) -> None:
    """Frozen in mid-run it is at work still: a second join is refused, changes nothing, and the run ends well."""
    consortium = Consortium(tmp_path, micro_model, {})
    processes = {site: consortium.site(site, delay=0.1) for site in NAMES}  # it has sixteen rounds
    folder = tmp_path / "east" / "run"
    wait_for(lambda: len(consortium.events("east", "round", "events.jsonl")) >= 2)
    os.kill(processes["east"].pid, signal.SIGSTOP)
    try:
        second = consortium.site("east")
        second.join(PATIENCE_S)
        state = read_state(folder)
    finally:
        os.kill(processes["east"].pid, signal.SIGCONT)
    assert second.exitcode == 2
    assert f"process {processes['east'].pid} on " in (tmp_path / "east" / "log").read_text()
    assert (state.state, state.site, state.missing) == ("running", "east", ())
    assert [(peer.name, peer.status) for peer in state.peers] == [("north", "connected"), ("south", "connected")]
    consortium.ended(processes)
    assert (read_state(folder).state, len(consortium.events("east", "started"))) == ("finished", 1)
    for peer in read_state(folder).peers:
        arrived = [event for event in consortium.events("east", "arrived") if event["peer"] == peer.name]
        rounds = [event["round"] for event in arrived if event["round"] < 16]
        assert rounds == list(range(16)) and all(event["seconds"] >= 0 for event in arrived)
        fetched = [e for e in consortium.events(peer.name, "fetched") if e["peer"] == "east"]
        assert peer.bytes_received == sum(event["bytes"] for event in fetched)


@contextmanager
def serving(path: Path, port: int = 0) -> Iterator[WatchServer]:
    server = WatchServer(path, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.close()
        thread.join()


def get(server: WatchServer, path: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=PATIENCE_S)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_it_listens_on_loopback_only_and_answers_no_other_name(tmp_path: Path) -> None:
    with serving(site_folder(tmp_path)) as server:
        port = server.server_address[1]
        assert server.socket.getsockname() == ("127.0.0.1", port)
        for path in ("/", "/state.json", "/metrics", "/events", "/style.css"):
            status, body, _ = get(server, path, Host=f"evil.example:{port}")
            assert status == 421 and "east" not in body
        for good in (f"localhost:{port}", "127.0.0.1", "LOCALHOST"):
            status, body, headers = get(server, "/state.json", Host=good)
            assert status == 200 and json.loads(body)["site"] == "east"
            assert "script-src 'self'" in headers["Content-Security-Policy"]
            assert "Access-Control-Allow-Origin" not in headers
        assert get(server, "/../server.py")[0] == 404
        with pytest.raises(ConfigError, match=f"--port: {port} cannot be opened"):
            WatchServer(tmp_path, port)


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        ["evil.example"],
        ["127.0.0.1.evil.example"],
        ["localhost:1@evil"],
        ["localhost", "evil"],
        ["127.0.0.1:"],
        [""],
    ],
)
def test_hosts_that_are_not_loopback(hosts: list[str]) -> None:
    assert not is_loopback(hosts)


def test_clients_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 2)
    with serving(site_folder(tmp_path)) as server:
        streams = [socket.create_connection(server.server_address[:2], timeout=PATIENCE_S) for _ in range(2)]
        for stream in streams:
            stream.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in stream.recv(100)
        assert get(server, "/state.json")[0] == 503
        for stream in streams:
            stream.close()
        append(tmp_path / "events.jsonl", round_event(3))  # what is sent next finds them gone
        wait_for(lambda: get(server, "/state.json")[0] == 200 or append(tmp_path / "events.jsonl", round_event(3)))


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    folder = site_folder(tmp_path)
    append(folder / "events.jsonl", {"event": "checkpoint", "time": T0 + 9, "round": 2})
    with at_work(folder), serving(folder) as server:
        status, body, headers = get(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    families = list(text_string_to_metric_families(body))
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert found[("peertune_up",)] == 1 and found[("peertune_finished",)] == 0
    assert found[("peertune_round",)] == 3 and found[("peertune_rounds_planned",)] == 20
    assert found[("peertune_loss",)] == 1.5 and found[("peertune_checkpoint_round",)] == 2
    assert found[("peertune_sent_bytes_total", "north")] == 500
    assert found[("peertune_neighbor_connected", "north")] == 1
    assert found[("peertune_neighbor_connected", "south")] == 0
    assert found[("peertune_rounds_without_neighbor_total", "south")] == 2
    assert ("peertune_consensus_distance",) not in found, "a site does not know it"
    for family in families:
        assert family.name.startswith("peertune_") and family.documentation
        assert all(s.name.endswith("_total") == (family.type == "counter") for s in family.samples)
    documented = (Path(__file__).parents[1] / "docs" / "consortium.md").read_text().replace("{neighbor}", "")
    assert all(f"`{sample.name}`" in documented for family in families for sample in family.samples)


def test_a_simulations_metrics(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", START, {**round_event(0), "consensus_distance": 0.5, "bytes_sent": [1, 2, 3]})
    with serving(tmp_path) as server:
        body = get(server, "/metrics")[1]
    found = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(body) for s in f.samples}
    assert found[("peertune_consensus_distance",)] == 0.5 and found[("peertune_peer_sent_bytes_total", "2")] == 3
    assert found[("peertune_up",)] == 0


class Browser:
    """A headless browser with one page, asked over its debugging protocol (WebSocket, RFC 6455)."""

    def __init__(self, url: str, profile: Path) -> None:
        self.errors: list[str] = []
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
        options = ("--disable-component-update", "--disable-sync", "--remote-debugging-port=0")
        self._process = subprocess.Popen(
            [chromium(), *flags, *options, f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = profile / "DevToolsActivePort"
        port = int(wait_for(lambda: told.exists() and told.read_text().splitlines())[0])
        place = wait_for(lambda: self._page(port, url))
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {place} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = self._socket.makefile("rb")
        assert b"101" in self._file.readline()
        while self._file.readline().strip():
            pass
        self._number = 0
        self.ask("Runtime.enable")
        self.ask("Log.enable")

    def _page(self, port: int, url: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("GET", "/json")
        pages = json.loads(connection.getresponse().read())
        connection.close()
        return next((p["webSocketDebuggerUrl"].split(str(port), 1)[1] for p in pages if p["url"] == url), "")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": parameters}).encode()
        mask = os.urandom(4)
        size = struct.pack(">BBH", 0x81, 0x80 | 126, len(data))
        self._socket.sendall(size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            told = json.loads(self._frame())
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(told["params"]))
            if told.get("id") == self._number:
                return dict(told["result"])

    def _frame(self) -> bytes:
        whole, last = b"", False
        while not last:
            first, size = self._file.read(2)
            last, size = bool(first & 0x80), size & 0x7F
            if size >= 126:
                (size,) = struct.unpack(">H" if size == 126 else ">Q", self._file.read(2 if size == 126 else 8))
            whole += self._file.read(size)
        return whole

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text(self, id: str) -> str:
        return str(self.value(f"document.getElementById({id!r})?.innerText ?? ''"))

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def browser_of(tmp_path: Path) -> Iterator[Callable[[str], Browser]]:
    opened: list[Browser] = []

    def open_page(url: str) -> Browser:
        opened.append(Browser(url, tmp_path / f"profile{len(opened)}"))
        return opened[-1]

    yield open_page
    for browser in opened:
        browser.close()
        shutil.rmtree(tmp_path / "profile0", ignore_errors=True)


def test_a_browser_shows_the_run_and_what_changes(tmp_path: Path, browser_of: Callable[[str], Browser]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with serving(folder) as server:
        page = browser_of(server.url)
        wait_for(lambda: "no run in this folder yet" in page.text("says"))
        site_folder(folder)
        with at_work(folder):
            wait_for(lambda: "east is running; missing: south." in page.text("says"))
            wait_for(lambda: "3 of 20" in page.text("boxes").replace("\n", " "))
            assert "2 rounds" not in page.text("says"), "what is read out changes with what matters only"
            row = page.value("[...document.querySelectorAll('#peers tbody tr')].map(r => r.innerText).join('|')")
            assert "north" in row and "missing" in row
            assert page.value("document.querySelector('#graph svg').getAttribute('aria-label')").count("missing") == 1
            assert page.value("document.querySelectorAll('#graph line.missing').length") == 1
            append(folder / "events.jsonl", round_event(3, loss=1.25))
            append(folder / "audit.jsonl", {"event": "connected", "time": T0 + 11, "peer": "south"})
            wait_for(lambda: "4 of 20" in page.text("boxes").replace("\n", " "))
            wait_for(lambda: "nobody is missing" in page.text("says"))
            assert "1.25" in page.text("loss") and page.value("document.title").startswith("4/20 east")
            assert page.value("document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')") == "20"
            colors = []
            for scheme in ("light", "dark"):
                page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                colors.append(page.value("getComputedStyle(document.body).backgroundColor"))
            assert colors[0] != colors[1]
        wait_for(lambda: "No process is at work" in page.text("says"))
        assert not page.errors


def test_the_page_connects_again_by_itself(tmp_path: Path, browser_of: Callable[[str], Browser]) -> None:
    folder = site_folder(tmp_path / "run")
    (port,) = free_ports(1)  # which nobody else gets in between
    with serving(folder, port) as server:
        page = browser_of(server.url)
        wait_for(lambda: "3 of 20" in page.text("boxes").replace("\n", " "))
    wait_for(lambda: not page.value("document.getElementById('lost').hidden"))
    append(folder / "events.jsonl", round_event(3))
    with serving(folder, port):
        wait_for(lambda: page.value("document.getElementById('lost').hidden"))
        wait_for(lambda: "4 of 20" in page.text("boxes").replace("\n", " "))
