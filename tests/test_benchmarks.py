"""The benchmark scripts, at toy size: what they print and write, and that the contestants train alike."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from peertune import checkpoint
from peertune.algorithms import ALGORITHMS
from peertune.runtimes.edge import Edge

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package: the scripts find each other beside themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def block_step() -> ModuleType:
    return script("block_step")


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return script("_harness")


def contestant(block_step: ModuleType, name: str, **options: bool) -> Any:
    kind, _ = block_step.CONTESTANTS[name]
    if kind.needs and not importlib.util.find_spec(kind.needs):
        pytest.skip(f"{name} needs the package {kind.needs}")
    made = kind(block_step.SHAPES["quick"], CPU, block_step.Options(**options))
    made.setup()
    return made


def test_a_quick_run_ends_with_its_figures_and_stores_them(
    block_step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["full", "peertune", "--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    block_step.main(arguments)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = json.loads((tmp_path / "block_step-quick.json").read_text())

    assert stored["figures"] == figures
    assert {"name", "commit", "versions", "machine", "date"} <= stored.keys()
    assert {"python", "torch", "transformers", "badam", "peft"} <= stored["versions"].keys()
    assert {"processor", "cores", "threads", "gpu"} <= stored["machine"].keys()
    assert str(ROOT) not in json.dumps(stored)

    full, peertune = figures["contestants"]["full"], figures["contestants"]["peertune"]
    for found in (full, peertune):
        assert {"flops", "peak_bytes", "cpu_s", "wall_s", "checkpointed", "sweep_cpu_s", "sweep_wall_s"} <= found.keys()
        assert {*found["flops"]} == {*found["peak_bytes"]} == {*found["cpu_s"]} == {str(b) for b in figures["blocks"]}
        assert all(seconds > 0 for seconds in (*found["cpu_s"].values(), found["sweep_cpu_s"]))
    flops = [peertune["flops"][str(block)] for block in figures["blocks"]]
    assert flops[0] > flops[1] > flops[2], "a block further up must need fewer FLOPs"
    assert flops[0] < full["flops"]["0"]
    assert peertune["peak_bytes"]["0"] < full["peak_bytes"]["0"]
    assert figures["over_full"]["peertune"]["flops"]["0"] == pytest.approx(flops[0] / full["flops"]["0"], abs=1e-4)
    assert peertune["first_loss"] == pytest.approx(full["first_loss"], abs=1e-3)


def test_unknown_contestants_are_refused(block_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        block_step.main(["--quick", "peertuna"])
    assert stop.value.code == 2
    assert "peertuna" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["badam", "peertune"])
def test_block_contestants_train_as_the_hand_written_limit(block_step: ModuleType, name: str) -> None:
    batch = block_step.make_batches(block_step.SHAPES["quick"], 1, CPU)[0]
    losses: dict[str, list[float]] = {}
    for one in ("limit", name):
        made = contestant(block_step, one)
        losses[one] = []
        for block in (1, 2):
            made.set_block(block)
            losses[one] += [made.step(batch).item() for _ in range(6)]
    assert losses["limit"][0] - losses["limit"][-1] > 0.02
    assert losses[name] == pytest.approx(losses["limit"], abs=2e-3)


@pytest.mark.parametrize("name", ["limit", "peertune"])
def test_a_cached_prefix_changes_no_bit(block_step: ModuleType, name: str) -> None:
    batches = block_step.make_batches(block_step.SHAPES["quick"], 2, CPU)
    plain, cached = contestant(block_step, name), contestant(block_step, name, cache=True)
    # The second sweep starts below what is cached, which has changed since.
    for block in (0, 1, 2, 3, 0, 1):
        for made in (plain, cached):
            made.set_block(block)
        for batch in batches:
            assert plain.step(batch).item() == cached.step(batch).item()
    for mine, theirs in zip(plain.model.parameters(), cached.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["full", "badam", "limit"])
def test_checkpointing_saves_memory_and_nothing_else(block_step: ModuleType, harness: ModuleType, name: str) -> None:
    batch = block_step.make_batches(block_step.SHAPES["quick"], 1, CPU)[0]
    losses, flops = [], []
    for checkpointing in (False, True):
        made = contestant(block_step, name, checkpointing=checkpointing)
        made.set_block(2)
        losses.append([made.step(batch).item() for _ in range(3)])
        flops.append(harness.count_flops(lambda made=made: made.step(batch)))
    assert losses[0] == losses[1]
    assert flops[1] > flops[0]


def test_the_peak_counts_what_stays_and_not_what_setup_freed(harness: ModuleType) -> None:
    kept: list[torch.Tensor] = []

    def prepare() -> None:
        torch.zeros(1 << 24)
        kept.append(torch.zeros(1 << 20))

    def measured() -> None:
        first = torch.ones(1 << 21)
        second = torch.ones(1 << 21)
        del first
        torch.ones(1 << 20)
        del second

    expected = 4 * ((1 << 20) + 2 * (1 << 21))
    assert harness.peak_bytes(prepare, measured, CPU) == pytest.approx(expected, rel=1e-3)


def test_interleaving_takes_turns(harness: ModuleType) -> None:
    order: list[str] = []
    times = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}
    assert times["a"].keys() == {"cpu_s", "wall_s"}


@pytest.mark.parametrize(
    "value",
    [
        {"model": "/home/someone/model"},
        ["read from /srv/data/x"],
        {"C:\\models\\x": 1},
        {"p": Path("runs")},
        {"x": float("nan")},
    ],
)
def test_figures_name_no_place_on_the_machine(harness: ModuleType, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="figures"):
        harness.finish("broken", {"value": value}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def simulate() -> ModuleType:
    return script("simulate")


@pytest.fixture
def toy(tmp_path: Path, micro_model: Path) -> list[str]:
    """Arguments of `simulate.py` for a run of a second; a full-parameter method stands in for the adapter's."""
    rows = [json.dumps({"text": f"row {i} tells of {i * i} small things " * 4}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    values = {
        "model": micro_model, "data": tmp_path / "rows.jsonl", "clients": 3, "local-steps": 2, "batch-size": 2,
        "length": 32, "cores": 1, "work": 12, "repeats": 1, "method": "dpsgd", "results": tmp_path / "results",
        "dtype": "float32",
    }  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def test_simulations_are_timed_and_joined_with_flowers(
    simulate: ModuleType, toy: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Flower itself is not needed: a program that answers as its side does stands in."""
    answer = {"round_ends": [10, 14, 18, 99], "losses": [3, 2, 1, 0], "fit_s": [9, 1, 1, 9], "versions": {"flwr": "0"}}
    flower = tmp_path / "flower-python"
    flower.write_text(f"#!{sys.executable}\nimport sys\nif sys.argv[1] != '-c':\n    print({json.dumps(answer)!r})\n")
    flower.chmod(0o755)
    simulate.main([*toy, "--flower-python", str(flower)])
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "results" / "simulate.json").read_text())["figures"] == figures
    assert figures["flower_versions"] == {"flwr": "0"}
    (setting,) = figures["settings"]
    assert (setting["clients"], setting["local_steps"], setting["rounds"]) == (3, 2, 2)
    assert setting["flower"]["rounds_per_s"] == 2 / 8
    assert setting["flower"]["steps_s"] == 3
    assert (setting["flower"]["first_loss"], setting["flower"]["last_loss"]) == (3, 0)
    ours = setting["peertune"]
    assert ours["rounds_per_s"] > 0 and ours["first_round_s"] > 0
    assert ours["last_loss"] < ours["first_loss"]
    assert setting["peertune_over_flower"] == pytest.approx(ours["rounds_per_s"] * 4)
    assert 50e6 < ours["peak_bytes"] < 5e9, "a process with torch loaded"


def test_both_sides_of_a_simulation_get_the_same_batches(simulate: ModuleType, toy: list[str], tmp_path: Path) -> None:
    from peertune.model.load import load_model
    from peertune.prepare import prepare_data
    from peertune.progress import Silent
    from peertune.run import Run
    from peertune.run_folder import RunFolder
    from peertune.run_setup import Inputs
    from peertune.runtimes.simulation import SimulatedGroup

    options = simulate.parser().parse_args(toy)
    options.clients = 3
    setting = {"dtype": "float32", "batched_peers": 1, "clients": 3, "local_steps": 2}
    spec = json.loads(simulate.write_spec(options, tmp_path, setting, 4).read_text())
    with np.load(spec["arrays"]) as file:
        arrays = dict(file)
    config = simulate.recipe(spec, tmp_path / "out")
    data = prepare_data(config, None)
    counts = [len(rendered.samples) for rendered in data.train.values()]
    inputs = Inputs(config=config, data=data, module=load_model(config.model, CPU), counts=counts, device=CPU)
    run = Run(inputs, RunFolder(tmp_path), Silent(), SimulatedGroup)
    assert run.method.num_rounds == 4
    assert arrays["draws"].shape == (3, 8, 2)
    for member, draws, held in zip(run.members, arrays["draws"], arrays["num_samples"], strict=True):
        assert held == len(member.algorithm.peer.batches.samples)
        for draw in draws:
            batch = member.algorithm.peer.batches.next()
            labels = arrays["samples"][draw][:, : batch.input_ids.shape[1]]
            assert np.array_equal(np.where(batch.attention_mask, batch.input_ids, -100), labels)
    adapter = [arrays[f"adapter{i}"] for i in range(arrays["num_adapter"])]
    assert len(adapter) == 3 * 7 * 2
    assert {min(tensor.shape) for tensor in adapter} <= {6, 8}


def test_an_interpreter_without_flower_is_refused(
    simulate: ModuleType, toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for python in (tmp_path / "no-such-python", Path("/bin/false")):
        with pytest.raises(SystemExit) as stop:
            simulate.main([*toy, "--flower-python", str(python)])
        assert stop.value.code == 2
        assert f"--flower-python: got {str(python)!r}" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_side_that_fails_says_why(simulate: ModuleType, tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no room left')"]
    with pytest.raises(RuntimeError, match=r"exit code 1:\nno room left"):
        simulate.carry_out(failing, tmp_path / "scratch")


def test_an_exchange_is_measured_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = script("exchange")
    arguments = ["--megabytes", "2", "--repeats", "1", "--every", "0.1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["exchange.py", *arguments])
    exchange.main()
    figures = json.loads((tmp_path / "exchange.json").read_text())["figures"]
    assert figures["bytes"] == 2_000_000 and figures["mb_per_s"].keys() == {
        "raw",
        "tls",
        "socket_tls",
        "grpc_tls",
        "peertune",
        "first_round",
    }
    assert all(figures[f"{name}_over_raw"] > 0 for name in ("bare_tls", "bare_socket_tls", "bare_grpc_tls", "peertune"))
    assert figures["training"]["steps_per_s_alone"] > 0


def test_norms_and_small_tensors_are_measured_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead, stored = script("overhead"), []
    monkeypatch.setattr(overhead, "finish", lambda name, figures: stored.append(figures))
    monkeypatch.setattr(
        sys, "argv", ["overhead.py", "--repeats", "1", "--model", str(ROOT / "src" / "peertune" / "tiny")]
    )
    overhead.main()
    (figures,) = stored
    assert figures["norm, bfloat16"]["kept_bytes"]["ours"] < figures["norm, bfloat16"]["kept_bytes"]["theirs"]
    assert figures["adapter"]["tensors"] > 0
    assert figures["adapter"]["side_by_side_over_loose_cpu"] > 0


def test_robust_means_are_measured_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robust = script("robust")
    monkeypatch.setattr(sys, "argv", ["robust.py", "--megabytes", "1", "--repeats", "1", "--results", str(tmp_path)])
    robust.main()
    figures = json.loads((tmp_path / "robust.json").read_text())["figures"]
    for who in ("peer", "server"):
        assert figures[who].keys() == {"plain", "clip", "trimmed_mean"}
        assert figures[who]["plain"]["cpu_over_plain"] == 1 and figures[who]["clip"]["peak_over_block"] < 2.5


@pytest.mark.parametrize("phase", ["training", "sending", "receiving", "checkpoint"])
def test_a_fault_happens_in_its_phase(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, happened = script("_sites"), []
    for owner, name in ((Edge, "_chunks"), (Edge, "receive"), (checkpoint, "save_file")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    monkeypatch.setattr(ALGORITHMS["deca"], "local", lambda algorithm, round: None)
    sites.Fault(phase, 2, lambda: happened.append(phase)).arm("deca")
    for round in (1, 2, 3):
        ALGORITHMS["deca"].local(None, round)
        here, there, key, payload = Edge(), Edge(), (round, 0), {"x": torch.ones(3)}
        there.round = round
        there.expect(key, payload, lambda _: None)
        (offer,) = here.post(key, payload)
        (want,) = there.receive(offer)
        for chunk in here.receive(want):
            there.receive(chunk)
        (tmp_path / f"round-{round}.tmp").mkdir()
        checkpoint.save_file(payload, tmp_path / f"round-{round}.tmp" / "weights")
        assert happened == [phase] * (round >= 2)
