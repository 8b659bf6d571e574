"""The command line on good input: what it prints, writes and returns."""

import argparse
import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peertune
from peertune.algorithms import METHODS
from peertune.checkpoint import CheckpointStore
from peertune.cli import main, output
from peertune.cli.command import _parser
from peertune.cli.output import Bars, progress_console
from peertune.demo import comparison, demo
from peertune.errors import CheckpointError, ConfigError
from peertune.export import _check_peer, export
from peertune.progress import Silent
from peertune.recipe import from_dict
from tests.recipes import tree
from tests.test_bad_input import write_toml


@pytest.fixture
def finished(tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run made by the command."""
    write_toml(tree(tmp_path, micro_model), tmp_path / "recipe.toml")
    assert main(["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_run_prints_a_table_and_how_to_load_the_model(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "average model" in printed
    loading = next(line for line in printed.splitlines() if line.startswith("load it with: "))
    path = loading.partition("from_pretrained('")[2].removesuffix("')")
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size > 0


def test_libraries_draw_no_bars_of_their_own(tmp_path: Path, micro_model: Path) -> None:
    """In no process that the command starts."""
    path = tmp_path / "recipe.toml"
    write_toml(tree(tmp_path, micro_model), path)
    command = [sys.executable, "-m", "peertune", "compare", str(path), "--out", str(tmp_path / "compared")]
    options = ["--algorithms", "local,pooled", "--seeds", "0", "--workers", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and [line for line in lines if "pooled, seed 0: done" in line], done.stderr
    assert all(line.startswith("note: ") for line in lines), lines


def test_set_values_are_toml_and_bare_words_are_strings(tmp_path: Path, micro_model: Path) -> None:
    write_toml(tree(tmp_path, micro_model), tmp_path / "recipe.toml")
    sets = ["topology.kind=complete", "algorithm.betas=[0.8, 0.99]", "run.seed=7", "algorithm.inner_steps=1"]
    arguments = [part for text in sets for part in ("--set", text)]
    assert main(["run", str(tmp_path / "recipe.toml"), *arguments]) == 0
    config = json.loads((tmp_path / "out" / "summary.json").read_text())["config"]
    assert config["topology"]["kind"] == "complete"
    assert config["algorithm"]["betas"] == [0.8, 0.99]
    assert config["run"]["seed"] == 7


def test_a_note_keeps_its_lines_and_cannot_write_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    Bars(progress_console()).note("blocks:\n  0  head\x1b[2J\r")
    assert capsys.readouterr().err == "note: blocks:\n  0  head\ufffd[2J\ufffd\n"


def test_report_is_written_anew(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


def test_export_of_a_finished_run_and_of_its_last_checkpoint_agree(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "one")]) == 0
    (finished / "summary.json").unlink()  # as if it had been killed after the last checkpoint
    capsys.readouterr()
    assert main(["export", str(finished), "--to", str(tmp_path / "two")]) == 0
    assert "of its newest checkpoint, after round" in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    assert main(["export", str(finished), "--to", str(tmp_path / "one")]) == 2


def test_export_of_a_run_that_goes_on_meanwhile(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that it has begun with may be gone, as there are newer ones."""
    (finished / "summary.json").unlink()
    rounds = CheckpointStore.rounds
    asked: list[int] = []

    def first_of_old(store: CheckpointStore, peer: int) -> list[int]:
        asked.append(peer)
        return [1] if len(asked) <= 4 else rounds(store, peer)

    monkeypatch.setattr(CheckpointStore, "rounds", first_of_old)
    assert main(["export", str(finished), "--to", str(tmp_path / "model")]) == 0
    assert "after round 1\n" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="damaged"):
        monkeypatch.setattr(CheckpointStore, "rounds", lambda store, peer: [1])
        export(finished, tmp_path / "none")


def test_the_recipe_in_a_runs_folder_lets_no_code_run(
    finished: Path, tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may come from anybody, and names the base: only who exports it can say that code may run."""
    base, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(micro_model, base)
    settings = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    (base / "config.json").write_text(json.dumps({**settings, "model_type": "x", "auto_map": classes}))
    (base / "modeling_x.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class XConfig(LlamaConfig): model_type = 'x'\n"
        "class XModel(LlamaForCausalLM): config_class = XConfig\n"
    )
    recipe = json.loads((finished / "recipe.json").read_text())
    recipe["config"]["model"] |= {"path": str(base), "trust_remote_code": True}
    (finished / "recipe.json").write_text(json.dumps(recipe))
    (finished / "summary.json").unlink()
    assert main(["export", str(finished), "--to", str(tmp_path / "exported")]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err and not ran.exists()
    assert main(["export", str(finished), "--to", str(tmp_path / "exported"), "--trust-remote-code"]) == 0
    assert ran.exists()


def test_export_follows_no_link_in_a_runs_folder(finished: Path, tmp_path: Path) -> None:
    """The folder may come from anybody, and the model be passed on."""
    (tmp_path / "secret").write_text("a key")
    (finished / "model" / "merges.txt").symlink_to(tmp_path / "secret")
    assert main(["export", str(finished), "--to", str(tmp_path / "exported")]) == 0
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert "model.safetensors" in names and "merges.txt" not in names
    (finished / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "notes").touch()
    (finished / "model").symlink_to(tmp_path / "elsewhere")
    assert main(["export", str(finished), "--to", str(tmp_path / "again")]) == 0
    assert not (tmp_path / "again" / "notes").exists(), "it is the checkpoint's"


def test_a_recipe_that_nests_without_end_is_a_damaged_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "recipe.json").write_text('{"config": ' + 100_000 * "[")
    assert main(["export", str(finished), "--to", str(tmp_path / "exported")]) == 2
    assert "damaged or missing" in capsys.readouterr().err


def test_eval_repeats_the_runs_own_figures(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--data", str(tmp_path / "test.jsonl"), "--task", "classification", "--max-length", "40"]
    assert main(["eval", str(finished / "model"), *options]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = json.loads((finished / "summary.json").read_text())["metrics"]["average_model"]
    counts = {name: got.pop(name) for name in ("data", "rows", "cut", "samples", "labels")}
    assert counts == {"data": str(tmp_path / "test.jsonl"), "rows": 12, "cut": 0, "samples": 12, "labels": 3}
    assert got == pytest.approx(expected, rel=1e-4)


def test_eval_chooses_between_the_classes_that_the_model_was_trained_to_tell(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between those of the file alone a model looks better the fewer rows it is measured on."""
    rows = [line for line in (tmp_path / "test.jsonl").read_text().splitlines() if '"green"' not in line]
    (tmp_path / "two.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["export", str(finished), "--to", str(tmp_path / "copy")]) == 0
    (finished / "summary.json").unlink()
    assert main(["export", str(finished), "--to", str(tmp_path / "checkpoint")]) == 0
    (tmp_path / "three.jsonl").write_text('{"text": "x", "label": "red"}\n{"text": "y", "label": "grey"}\n')
    for model, file, labels in (("copy", "two", 3), ("checkpoint", "two", 3), ("copy", "three", 2)):
        options = ["--data", str(tmp_path / f"{file}.jsonl"), "--task", "classification", "--max-length", "40"]
        assert main(["eval", str(tmp_path / model), *options]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["labels"] == labels
    (tmp_path / "copy" / "labels.json").write_text('["red", ')  # damaged: as if it said nothing
    options = ["--data", str(tmp_path / "two.jsonl"), "--task", "classification", "--max-length", "40"]
    assert main(["eval", str(tmp_path / "copy"), *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["labels"] == 2
    options += ["--set", 'data.labels=["red", "blue", "green", "grey"]']
    assert main(["eval", str(tmp_path / "copy"), *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["labels"] == 4, "it is said which there are"


def test_export_of_a_peers_personal_model(finished: Path, tmp_path: Path, micro_model: Path) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "none"), "--peer", "0"]) == 2
    keys = {"name": "fedavg", "local_modules": ["lm_head"], "rounds": 2, "local_steps": 2}
    write_toml(tree(tmp_path, micro_model, algorithm=keys), tmp_path / "own.toml")
    assert main(["run", str(tmp_path / "own.toml"), "--out", str(tmp_path / "own")]) == 0
    found = []
    for peer in (0, 3):
        assert main(["export", str(tmp_path / "own"), "--to", str(tmp_path / f"p{peer}"), "--peer", str(peer)]) == 0
        found.append(load_file(tmp_path / f"p{peer}" / "model.safetensors"))
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == {"lm_head.weight"}
    assert main(["export", str(tmp_path / "own"), "--to", str(tmp_path / "p4"), "--peer", "4"]) == 2


def test_a_servers_folder_has_nobodys_personal_parts() -> None:
    config, _ = from_dict({"run": {"num_peers": 2}, "algorithm": {"local_modules": ["lm_head"]}}, METHODS)
    with pytest.raises(ConfigError, match="a server has none; leave it out"):
        _check_peer(config, 1, 2)


def test_eval_takes_the_names_of_fields(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (tmp_path / "test.jsonl").read_text().replace('"text"', '"words"').replace('"label"', '"kind"')
    (tmp_path / "named.jsonl").write_text(rows)
    options = ["eval", str(finished / "model"), "--data", str(tmp_path / "named.jsonl"), "--task", "classification"]
    options += ["--max-length", "40"]
    assert main([*options, "--set", "data.text_field=words", "--set", "data.label_field=kind"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 12
    (tmp_path / "named.jsonl").write_text('{"text": "a", "label": "x"}\n')
    assert main(options) == 2
    assert f"{tmp_path / 'named.jsonl'}: got only the class 'x'" in capsys.readouterr().err


def test_every_command_and_argument_says_what_it_is() -> None:
    def silent(parser: argparse.ArgumentParser) -> list[str]:
        found = [] if parser.description else [parser.prog]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for inner in action.choices.values() for name in silent(inner)]
            elif not action.help:
                found.append(f"{parser.prog} {action.metavar}")
        return found

    assert silent(_parser()) == []


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        (["--version"], peertune.__version__),
        (["--help"], "examples:"),
        (["run", "--help"], "inner_steps = 48"),
        (["run", "--help"], "diloco, noloco: 0.0004]"),
        (["run", "--help"], "(choco) Consensus step size"),
        (["run", "--help"], "(noloco) Pull of slow weights"),  # another meaning under the same name
        (["run", "--help"], "One of iid, dirichlet, quantity, column, files."),
        (["run", "--help"], "One of paper, descent, descent_scaled, none, trivial."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert part in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["no-such-command"])
    assert stopped.value.code == 2


def test_a_reader_who_goes_away_is_no_error(tmp_path: Path) -> None:
    """As `| head -1` does, here before the first line is written."""
    (tmp_path / "events.jsonl").write_text('{"event": "start", "time": 1.0}\n')
    read, write = os.pipe()
    os.close(read)
    for buffering in ([], ["-u"]):
        command = [sys.executable, *buffering, "-m", "peertune", "status", str(tmp_path)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, env=environment)
        assert (done.returncode, done.stderr) == (141, "")
    os.close(write)


@contextlib.contextmanager
def silent(label: str) -> Iterator[Silent]:
    yield Silent()


def test_demo_compares_local_deca_and_pooled(tmp_path: Path) -> None:
    short = ["algorithm.outer_rounds=1", "algorithm.inner_steps=1", "data.max_samples=4", "eval.max_samples=8"]
    said: list[str] = []

    class Told(Silent):
        def note(self, message: str) -> None:
            said.append(message)

    table = demo(tmp_path / "demo", lambda label: contextlib.nullcontext(Told()), short)
    assert table.row_count == 5 and said
    assert not [note for note in said if "checkpoint" in note], "there was nothing to go on from, nor to be missed"
    summaries = {
        n: json.loads((tmp_path / "demo" / n / "summary.json").read_text()) for n in ("local", "deca", "pooled")
    }
    assert {s["algorithm"] for s in summaries.values()} == set(summaries)
    assert len({s["metrics"]["before"]["loss"] for s in summaries.values()}) == 1
    before = (tmp_path / "demo" / "deca" / "events.jsonl").read_bytes()
    assert demo(tmp_path / "demo", silent, short).row_count == 5
    assert (tmp_path / "demo" / "deca" / "events.jsonl").read_bytes() == before, "a finished demo is only shown again"
    with pytest.raises(CheckpointError, match=r"algorithm.lr"):
        demo(tmp_path / "demo", silent, [*short, "algorithm.lr=0.5"])
    summaries["deca"]["metrics"]["average_model"]["loss"] = summaries["pooled"]["metrics"]["average_model"]["loss"]
    shares = list(comparison(summaries).columns[2].cells)
    assert shares[0] == "0%" and shares[-1] == shares[-2] == "100%"
    assert all(math.isfinite(float(str(share).rstrip("%"))) for share in shares)


class Refusing(io.StringIO):
    """Stands in for a terminal or a log, behind which is a full disk, or nobody any more."""

    def __init__(self, error: type[OSError]) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def write(self, text: str) -> int:
        self.asked += 1
        raise self.error("refused")


def test_nobody_waits_for_a_terminal_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-S, or of a broken ssh connection: a site's beats to its neighbours would wait with it."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x"):
            pass
    os.set_blocking(writing, True)
    said = b""
    with open(writing, "w") as stream, open(reading, "rb", buffering=0) as reader:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(output, "PATIENCE_S", 0.01)
        with Bars(progress_console()) as bars:
            bars.note("one")
            bars.note("two")
            while b"note: three\n" not in said:
                said += reader.read() or b""
                bars.note("three")
    assert b"note: one\n" in said and b"two" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("ignored", [False, True])
def test_what_asks_a_process_to_end_does_what_ctrl_c_does(number: signal.Signals, ignored: bool) -> None:
    """Unless it was started so that it does not hear it, as by `nohup`."""
    usual = "default_int_handler" if number is signal.SIGINT else "SIG_DFL"  # which nohup or & may have taken from us
    code = (
        "import os, signal, sys, peertune.watch; from peertune.cli import main;"
        f" signal.signal({number:d}, signal.{'SIG_IGN' if ignored else usual});"
        f" peertune.watch.read_state = lambda folder: os.kill(os.getpid(), {number:d}) or sys.exit(0);"
        " sys.exit(main(['status', 'nothing']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if ignored else 128 + number)
    by = "" if number is signal.SIGINT else f" by {number.name}"
    assert done.stderr == ("" if ignored else f"peertune: interrupted{by}\n")


def test_a_signal_that_gets_lost_counts_again() -> None:
    """What is raised while an object is done away with goes nowhere."""
    code = (
        "import os, signal, sys, peertune.watch; from peertune import cli; cli.signals.AGAIN_S = 0.1;"
        " Gone = type('Gone', (), {'__del__': lambda self: os.kill(os.getpid(), signal.SIGTERM)});"
        " sys.unraisablehook = lambda lost: None;"
        " peertune.watch.read_state = lambda folder: (Gone() and 0) or signal.pause();"
        " sys.exit(cli.main(['status', 'nothing']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (143, "peertune: interrupted by SIGTERM\n")


def test_a_command_without_standard_streams_runs(tmp_path: Path) -> None:
    """As a service that was started with them closed: what it opens is not taken for them."""
    code = (
        "import os, sys; [os.close(fd) for fd in range(3)]; sys.stdin = sys.stdout = sys.stderr = None;"
        " from peertune.cli import main; rc = main(['leave', 'nothing']);"
        " sys.exit(rc if os.open('opened', os.O_CREAT | os.O_WRONLY) > 2 else 99)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=300).returncode == 2


@pytest.mark.parametrize("error", [OSError, BrokenPipeError])
def test_progress_that_cannot_be_written_is_lost_and_nothing_else(
    error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Refusing(error))
    with Bars(progress_console()) as bars:
        bars.note("the disk is full")
        bars.rounds(1, 2, 0.5)
    assert stream.asked


def test_another_users_folder_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a site whose umask is 077."""

    def refuse(path: Path | None) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", path and str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    for command in (["leave", str(tmp_path)], ["export", str(tmp_path), "--to", "model"]):
        assert main(command) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in said and "Permission denied; give this command as the user" in said
    monkeypatch.setattr(Path, "exists", lambda path: refuse(None))
    with pytest.raises(PermissionError):  # nobody's file
        main(["leave", str(tmp_path)])


def test_a_finished_run_whose_model_or_summary_is_spoilt_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["run", str(tmp_path / "recipe.toml"), "--out", str(finished), "--resume"]
    expected = load_file(finished / "model" / "model.safetensors")
    shutil.rmtree(finished / "model")
    assert main(again) == 0
    assert "deleted" in capsys.readouterr().out
    assert main(["export", str(finished), "--to", str(tmp_path / "exported")]) == 0
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    (finished / "summary.json").write_text("{")
    assert main(again) != 0
    assert "summary.json: damaged" in capsys.readouterr().err


def test_an_unknown_option_is_answered_with_the_nearest_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (
            ["join", "c.toml", "--dta", "y"],
            "peertune join: error: unrecognized arguments: --dta y; did you mean --data?",
        ),
        (["charter", "sign", "c.toml", "--idntity=k"], "did you mean --identity?"),
        (["run", "r.toml", "--wholly-other"], "peertune run: error: unrecognized arguments: --wholly-other\n"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err


def test_eval_draws_its_rows_from_all_of_a_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file sorted by label would else be measured on its first class alone."""
    lines = sorted((tmp_path / "test.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["label"])
    (tmp_path / "sorted.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "first.jsonl").write_text("\n".join(lines[:4]) + "\n")
    found = []
    for file, more in (("sorted", ["--max-samples", "4"]), ("sorted", ["--max-samples", "4"]), ("first", [])):
        options = ["--data", str(tmp_path / f"{file}.jsonl"), "--task", "classification", "--max-length", "40", *more]
        assert main(["eval", str(finished / "model"), *options]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0] == found[1] and found[0]["rows"] == found[2]["rows"] == 4 and found[0]["loss"] != found[2]["loss"]


@pytest.mark.parametrize("policy", ["", "active"])
def test_waiting_threads_do_not_spin_for_long_unless_asked_to(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert main(["status", "no/such/run"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == (None if policy else "1000")
