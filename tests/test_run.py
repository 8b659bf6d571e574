"""Whole runs in simulation: every method, repeatability, resumption, what is left on disk."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peertune import checkpoint, run_state
from peertune import run as runs
from peertune.algorithms import ALGORITHMS, METHODS
from peertune.algorithms.base import LocalReport
from peertune.algorithms.deca import Deca
from peertune.algorithms.fedavg import Fedavg
from peertune.algorithms.local_steps import LocalSteps
from peertune.checkpoint import CheckpointStore, newest_common
from peertune.errors import CheckpointError, ConfigError, DivergedError, StorageError
from peertune.evaluation import measure
from peertune.exchange import Hop, Payload
from peertune.export import export
from peertune.lock import FolderLock
from peertune.prepare import prepare_data
from peertune.progress import Silent
from peertune.run import run
from peertune.storage import append_line, storage_errors
from tests.recipes import Killed, killed_after, recipe, tree


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


SHORT = {"inner_steps": 8, "gossip_every": 2, "rounds": 12, "local_steps": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_runs_learns_and_leaves_a_model(name: str, dtype: str, tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model, model={"dtype": dtype}, algorithm={"name": name, **SHORT})
    summary = run(config)
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    models = 1 if name == "pooled" else 4
    own = config.algorithm.adapter == "none"
    metrics = summary["metrics"]
    assert metrics["average_model"]["loss"] < metrics["before"]["loss"] - (0.5 if own else 0.05)
    assert set(metrics["average_model"]) == {"loss", "perplexity", "accuracy", "macro_f1"}
    assert len(metrics["peers"]) == len(summary["bytes_sent_per_peer"]) == models
    assert all((sent > 0) == (name not in ("local", "pooled")) for sent in summary["bytes_sent_per_peer"])
    assert summary["config"]["algorithm"]["name"] == summary["algorithm"] == name
    assert summary["seed"] == 0 and summary["peak_memory_bytes"] > 1e6 and summary["wall_s"] > 0
    assert len(summary["weights"]) in (models, 0) and (summary["lambda2"] is None or 0 <= summary["lambda2"] <= 1)
    assert [e["round"] for e in events(out, "round")] == list(range(summary["rounds"]))
    remote = config.algorithm.adapter == "bottleneck"
    module = AutoModelForCausalLM.from_pretrained(out / "model", trust_remote_code=remote)
    assert module.config.vocab_size == len(AutoTokenizer.from_pretrained(out / "model"))
    assert (out / "report.html").stat().st_size > 10_000


def test_deca_sends_each_block_once_a_round_to_each_neighbor_and_the_whole_in_the_end(
    tmp_path: Path, micro_model: Path
) -> None:
    summary = run(recipe(tmp_path, micro_model))
    start = events(tmp_path / "out", "start")[0]
    rounds = events(tmp_path / "out", "round")
    sizes = [block["parameters"] for block in start["blocks"]]
    gossip = sum(4 * sizes[e["block"]] * 2 for e in rounds)  # float32, two neighbors on a ring
    assert rounds[-1]["bytes_sent"] == [gossip] * 4
    assert sum(summary["bytes_sent_per_peer"]) == 4 * gossip + 2 * 3 * 4 * sum(sizes)  # a tree of three edges
    edges = summary["bytes_by_edge"]
    assert {(e["source"], e["target"]) for e in edges} == {(i, (i + d) % 4) for i in range(4) for d in (1, -1)}
    for peer in range(4):
        sent = [(e["payload"], e["header"]) for e in edges if e["source"] == peer]
        assert sum(payload for payload, _ in sent) == summary["bytes_sent_per_peer"][peer]
        assert sum(header for _, header in sent) == summary["header_bytes_sent_per_peer"][peer] > 0


def test_after_agreement_all_peers_hold_the_exported_weights(tmp_path: Path, micro_model: Path) -> None:
    """To the bit: the exported model is what each peer holds."""
    from peertune import run_end as module

    held: list[Any] = []
    original = module.agree

    def spy(round: int, members: Any, **options: Any) -> Any:
        told = original(round, members, **options)
        held.extend(dict(m.algorithm.peer.model.module.named_parameters()) for m in members)
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agree", spy)
        run(recipe(tmp_path, micro_model))
    exported = weights(tmp_path / "out")
    for parameters in held:
        for name, value in parameters.items():
            assert torch.equal(value, held[0][name])
            assert torch.equal(value, exported[name])


def test_the_same_recipe_twice_is_bitwise_equal_and_a_seed_is_not(tmp_path: Path, micro_model: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / name), "seed": seed}))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_run_beside_another_in_one_process_is_refused(tmp_path: Path, micro_model: Path) -> None:
    """As two threads of a notebook would begin them: each would draw from what the other has seeded."""
    refused: list[Exception] = []

    class Nested(Silent):
        def rounds(self, done: int, total: int, loss: float | None) -> None:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    def beside() -> None:
        try:
            run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "beside")}))
        except ConfigError as error:
            refused.append(error)

    run(recipe(tmp_path, micro_model), progress=Nested())
    assert refused and "one at a time" in str(refused[0])
    assert not (tmp_path / "beside").exists()
    beside()  # now there is no other
    assert same(weights(tmp_path / "out"), weights(tmp_path / "beside"))


def test_what_is_logged_and_how_often_it_is_saved_changes_nothing(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model))
    other = {"out": str(tmp_path / "other"), "log_every": 3, "checkpoint_every": 5}
    run(recipe(tmp_path, micro_model, run=other, eval={"every": 2}))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "other"))
    assert len(events(tmp_path / "other", "eval")) > len(events(tmp_path / "out", "eval"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ALGORITHMS] + [(name, "bfloat16") for name in ("deca", "pooled", "dpsgd", "fedavg")],
)
def test_a_killed_run_goes_on_bitwise(
    name: str, dtype: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two peers' writes, once in mid-turn and once more after the resumption."""
    options: dict[str, Any] = {"model": {"dtype": dtype}, "algorithm": {"name": name, "rounds": 14, "local_steps": 2}}
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}, **options))
    config = recipe(tmp_path, micro_model, run={"checkpoint_every": 3}, **options)
    save = CheckpointStore.save
    for last in (3, 9):

        def dying(self: CheckpointStore, peer: int, round: int, *rest: Any, last: int = last) -> None:
            if round > last and (peer == 2 or name == "pooled"):
                raise Killed
            save(self, peer, round, *rest)

        monkeypatch.setattr(CheckpointStore, "save", dying)
        with pytest.raises(Killed):
            run(config, resume=last > 3)
        store = CheckpointStore(tmp_path / "out" / "checkpoints")
        assert newest_common([store.rounds(peer) for peer in range(1 if name == "pooled" else 4)]) == last
    monkeypatch.setattr(CheckpointStore, "save", save)
    summary = run(config, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert [e["round"] for e in events(tmp_path / "out", "round")] == list(range(summary["rounds"]))
    assert [e["round"] for e in events(tmp_path / "out", "resume")] == [3, 9]
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["metrics"] == whole["metrics"]
    assert summary["bytes_sent_per_peer"] == whole["bytes_sent_per_peer"]


class TwoModels(LocalSteps):
    """Beside the common model each peer trains another, which never hears of the others."""

    keeps_own = True
    kept_per_weight = 1

    def local(self, round: int) -> LocalReport | None:
        self.personal = self.personal or self.masters.snapshots(self.common)
        with self.in_person():
            super().local(round)
            self.personal = self.masters.snapshots(self.common)
        return super().local(round)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peers_own_model_beside_the_common_one_is_kept_measured_and_exported(
    dtype: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "two_models", TwoModels)
    monkeypatch.setitem(METHODS, "two_models", TwoModels.Config)
    keys = {"algorithm": {"name": "two_models", "rounds": 4, "local_steps": 2}, "model": {"dtype": dtype}}
    whole = run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}, **keys))["metrics"]
    config = recipe(tmp_path, micro_model, run={"checkpoint_every": 1}, **keys)
    with killed_after(2):
        run(config)
    assert run(config, resume=True)["metrics"] == whole
    own = [peer["loss"] for peer in whole["personal"]]
    assert len(set(own)) == 4 and whole["peers"] != whole["personal"]
    for peer in range(4):
        export(tmp_path / "out", tmp_path / f"own{peer}", peer)
    held = [load_file(tmp_path / f"own{peer}" / "model.safetensors") for peer in range(4)]
    assert not any(same(one, weights(tmp_path / "out")) or same(one, held[0]) for one in held[1:])


def test_kill_9_and_resume_from_the_command_line(tmp_path: Path, micro_model: Path) -> None:
    sections: dict[str, Any] = tree(tmp_path, micro_model, algorithm={"outer_rounds": 2, "inner_steps": 12})
    lines = []
    for section, keys in sections.items():
        lines += [f"[{section}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "peertune", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out" / "events.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count('"checkpoint"') >= 2):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "summary.json").exists()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming after round" in done.stderr, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


class Notes:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def rounds(self, done: int, total: int, loss: float | None) -> None: ...


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(tmp_path: Path, micro_model: Path) -> None:
    notes = Notes()
    run(recipe(tmp_path, micro_model), resume=True, progress=notes)
    assert any("starting from the beginning" in note for note in notes.notes)
    again = Notes()
    run(recipe(tmp_path, micro_model), resume=True, progress=again)
    assert any("finished already" in note for note in again.notes)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model))
    before = (tmp_path / "out" / "events.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(recipe(tmp_path, micro_model))
    with pytest.raises(CheckpointError, match=r"algorithm.lr = 0.01, got 0.5"):
        run(recipe(tmp_path, micro_model, algorithm={"lr": 0.5}), resume=True)
    assert (tmp_path / "out" / "events.jsonl").read_bytes() == before


def test_a_run_that_was_finished_while_a_second_one_loaded_is_left_as_it_is(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looked before the first had ended, and gets the lock after it."""
    config, out, load = recipe(tmp_path, micro_model), tmp_path / "out", runs.prepare_model
    run(config)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "summary.json").unlink()
    first = FolderLock(out)
    first.acquire()

    def end_of_the_first(*arguments: Any) -> torch.nn.Module:
        (out / "summary.json").write_bytes(files[out / "summary.json"])
        first.release()
        return load(*arguments)

    monkeypatch.setattr(runs, "prepare_model", end_of_the_first)
    with pytest.raises(CheckpointError, match="another process has finished this run while this one was starting"):
        run(config, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def interrupt(tmp_path: Path, micro_model: Path, after: int = 8) -> None:
    """A run that dies after the checkpoint of some round."""
    with killed_after(after):
        run(recipe(tmp_path, micro_model))


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "foreign"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path, micro_model: Path) -> None:
    interrupt(tmp_path, micro_model)
    folder = tmp_path / "out" / "checkpoints" / "peer-001" / "round-00000008"
    file = folder / "block-000.safetensors"
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-10])
    elif damage == "flip":
        file.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif damage == "json":
        (folder / "state.json").write_text("{")
    else:
        other = folder.parents[1] / "peer-002" / folder.name
        for path in other.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="peer-001"):
        run(recipe(tmp_path, micro_model), resume=True)


@pytest.mark.parametrize("left", [None, b"", b'\xff\n{"event": "round", "round": 0}\n[]\n'])
def test_a_run_whose_log_was_lost_goes_on(left: bytes | None, tmp_path: Path, micro_model: Path) -> None:
    """As by a power cut: a checkpoint is on the disk when it is done, lines of the log some time later."""
    interrupt(tmp_path, micro_model)
    log = tmp_path / "out" / "events.jsonl"
    log.unlink()
    if left is not None:
        log.write_bytes(left)
    run(recipe(tmp_path, micro_model), resume=True)
    assert len(events(tmp_path / "out", "start")) == 1 and (tmp_path / "out" / "report.html").exists()


def test_changed_data_is_noticed(tmp_path: Path, micro_model: Path) -> None:
    interrupt(tmp_path, micro_model)
    config = recipe(tmp_path, micro_model)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:-9]))
    with pytest.raises(CheckpointError, match="data has changed"):
        run(config, resume=True)


def test_who_may_read_the_recipe_may_read_the_weights(tmp_path: Path, micro_model: Path) -> None:
    mask = os.umask(0o027)
    try:
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}))
        lora = {"name": "dec_lora", "rounds": 1, "local_steps": 1}
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "lora")}, algorithm=lora))
    finally:
        os.umask(mask)
    written = [*tmp_path.glob("**/*.safetensors"), *tmp_path.glob("**/recipe.json")]
    assert {path.parent.name for path in written} >= {"model", "adapter", "whole", "lora"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


def test_a_mix_of_deca_holds_the_discrepancy_of_one_tensor_at_a_time(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a whole block would be as much memory again as a message."""
    held, original = [], Deca.correct

    def noted(self: Deca, d: Mapping[str, torch.Tensor]) -> None:
        held.append(len(d))
        original(self, d)

    monkeypatch.setattr(Deca, "correct", noted)
    run(recipe(tmp_path, micro_model))
    assert len(held) > 4 and max(held) == 1


def test_moments_of_a_turn_that_is_over_are_let_go(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, original = [], Deca.state_dict

    def noted(self: Deca, round: int) -> Any:
        held.append((self.calendar.at(round - 1).is_last, len(self.moments) + len(self.anchor)))
        return original(self, round)

    monkeypatch.setattr(Deca, "state_dict", noted)
    run(recipe(tmp_path, micro_model, run={"checkpoint_every": 1}))
    assert {is_last for is_last, _ in held} == {True, False}
    assert all(bool(num) != is_last for is_last, num in held)


def test_moments_that_are_set_back_do_not_stand_idle_between_two_phases(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a simulation of full weights holds them for all its peers while one trains."""
    held, original = [], Fedavg.outgoing

    def noted(self: Fedavg, hop: Hop) -> Payload:
        held.append(len(self.moments))
        return original(self, hop)

    monkeypatch.setattr(Fedavg, "outgoing", noted)
    run(recipe(tmp_path, micro_model, algorithm={"name": "fedavg", "rounds": 2, "local_steps": 2}))
    assert held and not any(held)


def test_two_generations_are_kept(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model, run={"checkpoint_every": 2}))
    store = CheckpointStore(tmp_path / "out" / "checkpoints")
    assert [store.rounds(peer) for peer in range(4)] == [[14, 16]] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_deca_writes_the_blocks_of_the_last_two_turns(
    dtype: str, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, as the generations kept share no file."""
    save, written = checkpoint.save_file, list[tuple[str, str]]()

    def noted(tensors: Any, path: Path) -> None:
        written.append((path.parent.name.strip(".").split(".")[0], path.stem))
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", noted)
    run(recipe(tmp_path, micro_model, model={"dtype": dtype}, algorithm={"outer_rounds": 2}))
    blocks = [f"block-{i:03d}" for i in range(4)]
    for turn in range(8):
        now = [name for round, name in written if round == f"round-{4 * (turn + 1):08d}"]
        changed = blocks if turn < 2 else sorted({blocks[turn % 4], blocks[(turn - 1) % 4]})
        assert now == changed * 4, turn
    before = ["round-00000028", "round-00000032"]
    held = list((tmp_path / "out" / "checkpoints" / "peer-003").rglob("*.safetensors"))
    assert sorted({path.parent.name for path in held}) == before and len({p.stat().st_ino for p in held}) == 8


def test_the_newest_checkpoint_is_complete_by_itself(tmp_path: Path, micro_model: Path) -> None:
    """Also where it shared files with one that is gone."""
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}))
    interrupt(tmp_path, micro_model, after=12)
    found = sorted((tmp_path / "out" / "checkpoints").glob("peer-*/round-*"))
    assert {path.name for path in found} == {"round-00000004", "round-00000008", "round-00000012"}
    for older in found:
        if older.name != "round-00000012":
            shutil.rmtree(older)
    run(recipe(tmp_path, micro_model), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_disk_that_fills_stops_the_run_resumably(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}))
    save, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4 * 4 + 2 * 4 + 1:  # of four blocks: in the second generation's third peer
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left.*the same command \(`peertune run`: with --resume\)"):
        run(recipe(tmp_path, micro_model))
    store = CheckpointStore(tmp_path / "out" / "checkpoints")
    assert newest_common([store.rounds(peer) for peer in range(4)]) == 4
    assert not list((tmp_path / "out").rglob("*.partial"))
    monkeypatch.setattr(checkpoint, "save_file", save)
    run(recipe(tmp_path, micro_model), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_run_whose_log_was_moved_away_ends_all_the_same(tmp_path: Path, micro_model: Path) -> None:
    """As by a log rotation: the model was there, but the run ended with an error, and without a summary."""
    out, notes = tmp_path / "out", list[str]()

    class Rotates(Silent):
        def rounds(self, done: int, total: int, loss: float | None) -> None:
            if done == 3:
                (out / "events.jsonl").unlink()

        def note(self, message: str) -> None:
            notes.append(message)

    summary = run(recipe(tmp_path, micro_model), progress=Rotates())
    assert json.loads((out / "summary.json").read_text()) == summary and weights(out)
    assert "warning: there is no report" in notes[-1]


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "free some space"), (errno.EIO, "see to that disk")])
def test_what_to_do_about_a_disk_depends_on_why_it_refused(number: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{os.strerror(number)}; {told}"), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_run_that_diverges_says_which_peer(tmp_path: Path, micro_model: Path) -> None:
    with pytest.raises(DivergedError, match=r"peer \d, round \d+.*algorithm.lr"):
        run(recipe(tmp_path, micro_model, algorithm={"lr": 1e30, "name": "local"}))


@pytest.mark.parametrize("task", ["text", "instruction", "chat"])
def test_the_other_tasks_run(task: str, tmp_path: Path, micro_model: Path) -> None:
    rows = []
    for i in range(40):
        question, answer = f"say {i}", f"it is {i}"
        rows.append(
            {
                "text": {"text": f"{question} {answer}"},
                "instruction": {"instruction": question, "output": answer},
                "chat": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            }[task]
        )
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = recipe(
        tmp_path,
        micro_model,
        model={"max_length": 90},
        data={"task": task, "train": str(data), "test": str(data), "partition": {"kind": "iid"}},
    )
    metrics = run(config)["metrics"]
    assert metrics["average_model"]["loss"] < metrics["before"]["loss"]
    template = AutoTokenizer.from_pretrained(tmp_path / "out" / "model").chat_template
    assert (template is not None) == (task != "text")


def test_keys_of_another_method_are_refused(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model)
    for name, expected in (("deca", "DecaConfig"), ("gt", "LocalStepsConfig"), ("nothing", "one of deca, ")):
        keys = ALGORITHMS["dec_lora"].Config(name=name)
        with pytest.raises(ConfigError, match=f"got a DecLoraConfig with name = '{name}', expected {expected}"):
            run(config.model_copy(update={"algorithm": keys}))
    assert not (tmp_path / "out").exists()


def test_pooled_is_one_model_on_the_union_of_the_batches(tmp_path: Path, micro_model: Path) -> None:
    """With peers of equal batches, the pooled loss of the first step is the mean of the peers' alone."""
    sections: dict[str, Any] = {"data": {"partition": {"kind": "iid"}}, "algorithm": {"inner_steps": 1}}
    alone = {**sections, "algorithm": {**sections["algorithm"], "name": "local"}}
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "alone")}, **alone))
    pooled = {**sections, "algorithm": {**sections["algorithm"], "name": "pooled"}}
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "pooled")}, **pooled))
    first = events(tmp_path / "pooled", "round")[0]["loss"]
    each = events(tmp_path / "alone", "round")[0]["loss"]
    # Labels differ in length, so tokens weigh the peers slightly unequally.
    assert first == pytest.approx([sum(each) / 4], rel=0.02)


@pytest.mark.parametrize("name", ["deca", "fedavg", "gt"])
def test_peers_that_train_at_the_same_time_end_bitwise_the_same(name: str, tmp_path: Path, micro_model: Path) -> None:
    for out, parallel in (("one", 1), ("three", 3)):
        section = {"out": str(tmp_path / out), "parallel_peers": parallel}
        run(recipe(tmp_path, micro_model, run=section, algorithm={"name": name, "rounds": 4}))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "three"))
    with pytest.raises(ConfigError, match=r"run.parallel_peers: got 2 with run.threads = 2"):
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "no"), "parallel_peers": 2, "threads": 2}))


def test_points_on_the_way_are_never_more_than_asked_for(tmp_path: Path, micro_model: Path) -> None:
    method = {"name": "dec_lora", "rounds": 15, "local_steps": 1, "rank": 2}
    run(recipe(tmp_path, micro_model, algorithm=method, eval={"points": 8}))
    assert [e["round"] for e in events(tmp_path / "out", "eval")] == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert len(events(tmp_path / "out", "checkpoint")) == 8


@pytest.mark.parametrize(("name", "times"), [("fedavg", 3), ("deca", 6)])
def test_peers_with_one_model_are_measured_once(
    name: str, times: int, tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the peers' own models, and in the end their average."""
    models: list[Any] = []

    def noting(model: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(model)
        return measure(model, *args, **kwargs)

    monkeypatch.setattr("peertune.run_setup.measure", noting)
    keys = {"name": name, "rounds": 2} if name == "fedavg" else {"name": name, "inner_steps": 1, "outer_rounds": 1}
    metrics = run(recipe(tmp_path, micro_model, algorithm=keys))["metrics"]
    assert len(models) == times and len(metrics["peers"]) == 4
    alike = [peer == metrics["average_model"] for peer in metrics["peers"]]
    assert all(alike) if name == "fedavg" else not any(alike)


def test_half_a_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    """A full disk may take a part of a line; there is space again for the next."""
    path = tmp_path / "events.jsonl"
    for line in ("one", "two"):
        append_line(path, line)
    with path.open("a") as file:
        file.write("thr")
    append_line(path, "four")
    assert path.read_text() == "one\ntwo\nthr\nfour\n"


def test_a_checkpoint_of_the_same_round_takes_the_first_ones_place_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rename = CheckpointStore(tmp_path), Path.rename
    store.save(0, 3, {"all": {"w": torch.zeros(2)}}, {})
    store.save(0, 3, {"all": {"w": torch.ones(2)}}, {})
    assert store.load(0, 3)[0]["w"].tolist() == [1, 1]

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError):
        store.save(0, 3, {"all": {"w": torch.zeros(2)}}, {})
    assert store.load(0, 3)[0]["w"].tolist() == [1, 1]


def test_rows_without_a_label_are_left_out_before_the_others_are_dealt(tmp_path: Path, micro_model: Path) -> None:
    """Else a peer may hold nothing but those."""
    config = recipe(tmp_path, micro_model, data={"partition": {"kind": "dirichlet", "alpha": 0.1}})
    train = Path(str(config.data.train))
    bare = [json.dumps({"text": f"nothing {i}", "label": None}) for i in range(40)]
    train.write_text("\n".join([*train.read_text().splitlines(), *bare]) + "\n")
    found = prepare_data(config, None)
    assert sum(len(rendered.samples) for rendered in found.train.values()) == 60
    assert all("" not in described["classes"] for described in found.holdings)
    assert "40 training rows have no label and were left out" in found.notes


def test_rows_cut_or_dropped_are_noted(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model)
    assert not any("had nothing to learn from" in note for note in prepare_data(config, None).notes)
    with Path(str(config.data.train)).open("a") as file:
        file.write(json.dumps({"text": "long " * 40, "label": "red"}) + "\n")
        file.write(json.dumps({"text": "", "label": "red"}) + "\n")
    [note] = prepare_data(config, None).notes
    assert note == "1 training rows were cut to model.max_length, 1 had nothing to learn from"


def test_a_peak_of_memory_before_a_kill_counts(
    tmp_path: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path, micro_model)
    with monkeypatch.context() as patched:
        patched.setattr(run_state, "peak_bytes", lambda device: 10**15)
        run(config)
    (tmp_path / "out" / "summary.json").unlink()
    assert run(config, resume=True)["peak_memory_bytes"] == 10**15
