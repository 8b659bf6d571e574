"""`peertune compare`: fair cells, resumable, tuned on validation rows only, judged in pairs, and what it writes."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peertune import __version__, prepare
from peertune import run as runs
from peertune.algorithms import METHODS
from peertune.algorithms.fedavg import FedavgConfig
from peertune.algorithms.local_steps import LocalStepsConfig
from peertune.algorithms.turns import BlockwiseConfig
from peertune.cli import main
from peertune.compare import Comparison, Options, compare
from peertune.compare.budget import (
    bytes_a_peer,
    steps_for_bytes,
    steps_for_samples,
    steps_for_seconds,
    with_whole_rounds,
)
from peertune.compare.cells import Cell, Point, quality, read_cell
from peertune.compare.charts import memory_axis
from peertune.compare.comparison import write
from peertune.compare.contestants import Contestant, Lineup, read_contestants
from peertune.compare.grid import Grid, Tuned, _is_preferred
from peertune.compare.inputs import fingerprints
from peertune.compare.stats import paired_interval, pairs, spread
from peertune.compare.table import (
    Row,
    budget_notes,
    cells_of,
    columns,
    diverged_notes,
    markdown,
    pair_cells,
    row,
    terminal_table,
    tuning_notes,
    verdicts,
)
from peertune.compare.workers import play_ahead
from peertune.config import RunConfig
from peertune.errors import CheckpointError, ConfigError, DataError, DivergedError, PeerLostError
from peertune.formatting import NONE, memory
from peertune.peer import Peer
from peertune.prepare import keep_back, prepare_data
from peertune.progress import Silent
from peertune.recipe import from_dict, load_recipe
from peertune.report.charts import SIZE, tick_texts
from peertune.run import run
from peertune.runtimes import rounds
from tests.recipes import killed_after, recipe, tree, write_rows
from tests.test_bad_input import write_toml

NAMES = ["deca", "local", "deca:discrepancy=none"]


class Quiet:
    """A `GridProgress` that remembers the cells it was told of."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    @contextmanager
    def cell(self, label: str, number: int, total: int) -> Iterator[Silent]:
        assert 1 <= number <= total
        self.cells.append(label)
        yield Silent()


@pytest.fixture
def path(tmp_path: Path, micro_model: Path) -> Path:
    """A recipe of four peers on a ring."""
    write_toml(tree(tmp_path, micro_model), tmp_path / "recipe.toml")
    return tmp_path / "recipe.toml"


@pytest.fixture
def make(path: Path, tmp_path: Path) -> Callable[..., tuple[Comparison, Quiet]]:
    """Makes a comparison of `NAMES` over two seeds, unless other options are given."""

    def go(**options: Any) -> tuple[Comparison, Quiet]:
        told = Quiet()
        chosen = {"algorithms": ",".join(NAMES), "seeds": "0,1", **options}
        return compare(Options.parse([str(path)], str(tmp_path / "compared"), **chosen), told), told

    return go


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def test_a_grid_is_run_once_and_written_in_every_form(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    found, told = make()
    out = tmp_path / "compared"
    assert told.cells == [f"{name}, seed {seed}" for seed in (0, 1) for name in NAMES]
    assert [row.contestant for row in found.rows] == NAMES
    slugs = ["deca", "local", "deca-discrepancy-none"]
    folders = [out / "cells" / slug / f"seed-{seed}" for slug in slugs for seed in (0, 1)]
    summaries = [summary_of(folder) for folder in folders]
    measured = [line for line in (folders[0] / "events.jsonl").read_text().splitlines() if '"event": "eval"' in line]
    assert len(measured) == 9, "before, after every second of 16 rounds"
    assert all((folder / "report.html").exists() and not (folder / "checkpoints").exists() for folder in folders)
    own = [s["metrics"]["average_model"]["accuracy"] for s in summaries]
    assert found.rows[0].mean == pytest.approx((own[0] + own[1]) / 2)
    alone = [peer["accuracy"] for s in summaries[2:4] for peer in s["metrics"]["peers"]]
    assert found.rows[1].mean == pytest.approx(sum(alone) / 8), "peers that never agree are measured each by its own"
    assert found.rows[0].samples == found.rows[1].samples == 4 * 4 * 4, "four steps of each of four blocks, by four"
    assert found.rows[1].bytes_sent == 0 < found.rows[0].bytes_sent
    assert all(row.cpu_s > 0 and row.simulated_s > 0 and row.macro_f1 is not None for row in found.rows)
    with found.files["table"].open() as file:
        assert [line["contestant"] for line in csv.DictReader(file)] == NAMES
    with found.files["cells"].open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["contestant"], line["seed"]) for line in lines] == [(n, str(s)) for s in (0, 1) for n in NAMES]
    text = found.files["markdown"].read_text()
    page = found.files["page"].read_text()
    assert all(name in text and name in page for name in NAMES)
    assert not re.search(r"(?:src|href)=\"(?!#)|@import|url\(", page), "the page loads nothing"
    assert len(json.loads(found.files["json"].read_text())["pairs"]) == len(found.pairs) == 3

    stamps = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    again, told = make()
    assert told.cells == [] and again.rows == found.rows
    assert stamps == {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    more, told = make(seeds="0,1,2")
    assert told.cells == [f"{name}, seed 2" for name in NAMES] and more.rows[0].num_seeds == 3
    with pytest.raises(CheckpointError, match=r"algorithm\.lr"):
        make(overrides=["algorithm.lr=0.02"])


def test_graphs_and_partitions_are_contestants_too(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    names = ["deca", "deca: topology.kind=complete", "deca:data.partition.kind=iid:lr=0.02"]
    found, _ = make(algorithms=",".join(names), seeds="0")
    configs = [
        summary_of(tmp_path / "compared" / "cells" / slug / "seed-0")["config"]
        for slug in ("deca", "deca-topology.kind-complete", "deca-data.partition.kind-iid-lr-0.02")
    ]
    assert [config["topology"]["kind"] for config in configs] == ["ring", "complete", "ring"]
    assert [config["data"]["partition"]["kind"] == "iid" for config in configs] == [False, False, True]
    lambda2 = [row.lambda2 for row in found.rows]
    assert lambda2[0] == lambda2[2] == pytest.approx(1 / 3) and lambda2[1] == pytest.approx(0.0, abs=1e-9)
    assert "| λ2 |" in found.files["markdown"].read_text() and "λ2" in found.files["page"].read_text()


def test_methods_in_which_few_train_at_a_time_get_as_many_samples(
    make: Callable[..., tuple[Comparison, Quiet]],
) -> None:
    found, _ = make(algorithms="deca,fedavg:participation=0.5:local_steps=2,rw_lora:local_steps=4", seeds="0")
    assert [row.samples for row in found.rows] == [4 * 4 * 4] * 3
    cells = list(csv.DictReader(found.files["cells"].read_text().splitlines()))
    sent = summary_of(Path(cells[1]["folder"]))["bytes_sent_by_hub"]
    assert [row.bytes_sent_by_hub for row in found.rows] == [None, sent, None] and sent > 0
    assert "| server sent |" in found.files["markdown"].read_text()


def test_personal_models_are_what_is_compared(make: Callable[..., tuple[Comparison, Quiet]]) -> None:
    name = 'fedavg:local_modules=["lm_head"]:rounds=2'
    found, _ = make(algorithms=f"{name},local:inner_steps=1", seeds="0")
    [line, *_] = csv.DictReader(found.files["cells"].read_text().splitlines())
    folder = Path(line["folder"])
    summary = summary_of(folder)
    own = [peer["loss"] for peer in summary["metrics"]["personal"]]
    assert quality(summary, "loss") == pytest.approx(sum(own) / 4) != summary["metrics"]["average_model"]["loss"]
    cell = replace(read_cell(name, 0, folder, summary), metric="loss")
    assert cell.worst_peer == max(own) and len(cell.points) == 2, "on the way nobody holds the average model"
    assert cell.macro_f1 == pytest.approx(sum(peer["macro_f1"] for peer in summary["metrics"]["personal"]) / 4)


def test_one_seeds_cells_share_partition_graph_and_start(make: Callable[..., tuple[Comparison, Quiet]]) -> None:
    found, _ = make(algorithms="deca,pooled,dpsgd")
    starts: dict[str, list[Any]] = {}
    for cell in csv.DictReader(found.files["cells"].read_text().splitlines()):
        first = json.loads((Path(cell["folder"]) / "events.jsonl").read_text().splitlines()[0])
        before = summary_of(Path(cell["folder"]))["metrics"]["before"]
        starts.setdefault(cell["seed"], []).append((first["peers"], before))
    for shared in starts.values():
        assert len(shared) == 3 and shared[0] == shared[1] == shared[2]
    assert starts["0"][0][0] != starts["1"][0][0], "another seed deals the rows anew"


def test_an_interrupted_cell_goes_on_from_its_checkpoint(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    with killed_after(8, "local"):
        make(algorithms="deca,local", seeds="0")
    _, told = make(algorithms="deca,local", seeds="0")
    assert told.cells == ["local, seed 0"]
    cell = tmp_path / "compared" / "cells" / "local" / "seed-0"
    events = [json.loads(line) for line in (cell / "events.jsonl").read_text().splitlines()]
    assert [e["round"] for e in events if e["event"] == "resume"] == [8]
    rounds = [e for e in events if e["event"] == "round"]
    assert [e["round"] for e in rounds] == list(range(16))
    spent = [e["cpu_s"] for e in rounds]
    assert spent == sorted(spent) and spent[8] > spent[7] > 0, "CPU time counts on over the interruption"


def test_tuning_chooses_by_validation_rows_and_never_reads_the_test_file(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = prepare.load_table

    def spy(sources: Any, *rest: Any, **options: Any) -> Any:
        read.append(f"{len(told_runs)} {Path(sources).name}")
        return load(sources, *rest, **options)

    told_runs: list[str] = []
    original = runs.run

    def counted(config: Any, **options: Any) -> Any:
        told_runs.append(config.run.out)
        if config.algorithm.lr > 1:
            Path(config.run.out).mkdir(parents=True)
            (Path(config.run.out) / "events.jsonl").write_text('{"event": "start", "time": 0}\n')
            (Path(config.run.out) / "recipe.json").write_text(json.dumps({"config": config.to_dict()}))
            raise DivergedError("the training loss became nan")
        return original(config, **options)

    monkeypatch.setattr(prepare, "load_table", spy)
    monkeypatch.setattr(runs, "run", counted)
    # A rate of 1e-9 leaves the base as it is.
    found, _ = make(algorithms="deca,local", tune="lr=1e-9,1e-2,10")
    assert [choice.best for choice in found.tuned] == [1e-2, 1e-2]
    assert [choice.is_at_edge for choice in found.tuned] == [False, False]
    assert [choice.qualities[2] for choice in found.tuned] == [None, None]
    tuning = [i for i, out in enumerate(told_runs, 1) if "/tune/" in out]
    assert len(tuning) == 6 and len(told_runs) == 10
    assert not [line for line in read if line.endswith(" test.jsonl") and int(line.split()[0]) in tuning]
    assert [line for line in read if line.endswith(" test.jsonl")]
    for out in filter(lambda out: "lr-10" not in out, told_runs):
        start = json.loads((Path(out) / "events.jsonl").read_text().splitlines()[0])
        assert sum(peer["samples"] for peer in start["peers"]) == 54, "a tenth of 60 rows is kept back in every cell"
        assert start["config"]["data"]["validation_rows"] == 6
        assert (start["config"]["eval"]["split"] == "validation") == ("/tune/" in out)
    for name in ("deca", "local"):
        cell = summary_of(tmp_path / "compared" / "cells" / name / "seed-1")
        assert cell["config"]["algorithm"]["lr"] == 1e-2
    again, told = make(algorithms="deca,local", tune="lr=1e-9,1e-2,10")
    assert told.cells == [] and again.tuned == found.tuned, "what diverged is not tried again either"


def test_each_contestant_gets_its_own_best_value_of_the_first_seed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all cells keep back the same rows, whatever their seeds: none is chosen by what another trains on."""
    best = {"deca": 1e-3, "local": 4e-3}
    asked: list[RunConfig] = []

    def pretend(config: RunConfig, **options: Any) -> dict[str, Any]:
        asked.append(config)
        told = {"loss": abs(config.algorithm.lr - best[config.algorithm.name])}
        return {"algorithm": config.algorithm.name, "config": {}, "metrics": {"average_model": told, "peers": [told]}}

    monkeypatch.setattr(runs, "run", pretend)
    monkeypatch.setattr("peertune.compare.grid.read_cell", lambda *told: told)
    texts = {"algorithms": "deca,local", "seeds": "3,4", "tune": "lr=1e-3,2e-3,4e-3"}
    options = Options.parse([str(path)], str(tmp_path / "out"), **texts)
    grid = Grid(read_contestants(options), options, Quiet())
    tuned = grid.tune()
    assert [choice.best for choice in tuned] == [1e-3, 4e-3] and all(choice.is_at_edge for choice in tuned)
    assert not replace(tuned[0], best=2e-3).is_at_edge
    assert [(config.run.seed, config.eval.split, config.eval.points) for config in asked] == [(3, "validation", 0)] * 6
    grid.play(tuned)
    cells = [(config.algorithm.name, config.run.seed, config.algorithm.lr, config.eval.split) for config in asked[6:]]
    assert cells == [(name, seed, lr, "test") for seed in (3, 4) for name, lr in best.items()]
    assert {(config.data.validation_rows, config.data.validation_seed) for config in asked} == {(6, 0)}


def test_bytes_are_those_that_the_first_sends_with_the_same_seed_and_value(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a value is tuned; what a step sends is found out anew for each, with nothing measured."""
    a_step = {"deca": 100, "choco": 30, "gt": 10}
    asked: list[RunConfig] = []
    steps: dict[str, int] = {}
    sent: dict[str, int] = {}

    def pretend(config: RunConfig, *, progress: Any, **options: Any) -> dict[str, Any]:
        progress.note("the same remark")
        asked.append(config)
        method = config.algorithm
        steps[config.run.out] = method.num_steps(blocks[method.name])
        each = a_step[method.name] * (config.run.seed if method.name == "deca" else 1)
        sent[config.run.out] = each * steps[config.run.out]
        measured = {"average_model": {"loss": method.lr}, "peers": [{"loss": method.lr}]}
        return {
            "algorithm": method.name,
            "config": {},
            "metrics": measured,
            "bytes_sent_per_peer": [sent[config.run.out]],
        }

    def record(folder: Path) -> Any:
        return SimpleNamespace(rounds=[SimpleNamespace(bytes_sent=(sent[str(folder)],))])

    monkeypatch.setattr(runs, "run", pretend)
    monkeypatch.setattr("peertune.compare.grid.read_cell", lambda *told: told)
    monkeypatch.setattr("peertune.compare.grid.read_run", record)
    said: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda progress, message: said.append(message))
    told = {"algorithms": "deca,choco:local_steps=1,gt:local_steps=1", "seeds": "3,4", "tune": "lr=1e-3,2e-3"}
    asking = ["eval.every=2", "data.validation_rows=5"]
    options = Options.parse([str(path)], str(tmp_path / "out"), budget="bytes", overrides=asking, **told)
    grid = Grid(read_contestants(options), options, Quiet())
    blocks = {name.partition(":")[0]: count for name, count in grid.budget.num_blocks.items()}
    grid.play(grid.tune())
    assert len(asked) == grid.num_cells == 20
    assert len({config.run.out for config in asked}) == 20 - 2, "that of the chosen value was found out while tuning"
    assert said == ["the same remark"]
    whole = [(config, steps[config.run.out]) for config in asked if "/probe/" not in config.run.out]
    first = [num for config, num in whole if config.algorithm.name == "deca"]
    assert len(whole) == 3 * (2 + 2) and len(set(first)) == 1
    for config, num in whole:
        if config.algorithm.name != "deca":
            assert num == first[0] * 100 * config.run.seed // a_step[config.algorithm.name]
    judged = [(config.eval.split, config.eval.every, config.eval.points) for config, _ in whole]
    assert judged == [("validation", 0, 0)] * 6 + [("test", 2, 0)] * 6
    for config in asked:
        if "/probe/" in config.run.out:
            assert (config.data.test, config.eval.split, config.eval.every, config.eval.points) == ("", "test", 0, 0)


def test_of_equal_accuracies_the_lower_loss_is_preferred() -> None:
    def summary(accuracy: float, loss: float) -> dict[str, Any]:
        return {"algorithm": "deca", "config": {}, "metrics": {"average_model": {"accuracy": accuracy, "loss": loss}}}

    best = summary(0.5, 1.0)
    assert [_is_preferred(summary(*told), best) for told in ((0.5, 0.9), (0.5, 1.1), (0.6, 9.0), (0.4, 0.1))] == [
        True, False, True, False
    ]  # fmt: skip


def test_what_a_recipe_says_of_evaluations_and_kept_rows_stays_so(path: Path, tmp_path: Path) -> None:
    """Also where all are judged by the validation rows and there is no test file."""

    def asked(*overrides: str, **options: Any) -> tuple[Any, ...]:
        texts = {"algorithms": "deca,local", "seeds": "3", **options}
        chosen = Options.parse([str(path)], str(tmp_path / "out"), overrides=list(overrides), **texts)
        grid = Grid(read_contestants(chosen), chosen, Quiet())
        config = grid._config(grid.contestants[0], 3, None, tmp_path / "out")
        return config.eval.every, config.eval.points, config.data.validation_rows, config.data.validation_seed

    assert asked() == (0, 8, 0, None)
    assert asked("eval.points=3") == (0, 3, 0, None) and asked("eval.every=2") == (2, 0, 0, None)
    kept = ["data.validation_rows=5", "data.validation_seed=9"]
    assert asked(*kept, tune="lr=1e-3,1e-2") == (0, 8, 5, 9)
    assert asked(*kept, "eval.split=validation", "data.test=") == (0, 8, 5, 9)


def test_an_edge_of_the_grid_is_said(make: Callable[..., tuple[Comparison, Quiet]]) -> None:
    found, _ = make(algorithms="deca,local", seeds="0", tune="lr=1e-9,1e-2")
    assert all(choice.is_at_edge and choice.best == 1e-2 for choice in found.tuned)
    assert sum("grid's edge" in sentence for sentence in found.verdicts) == 2
    assert any("no noise can be told" in sentence for sentence in found.verdicts)


def test_validation_rows_are_neither_trained_on_nor_tested(tmp_path: Path, micro_model: Path) -> None:
    def ids(samples: Sequence[Any]) -> set[bytes]:
        return {sample.input_ids.tobytes() for sample in samples}

    sections: dict[str, Any] = {"data": {"validation_rows": 9}}
    tested = prepare_data(recipe(tmp_path, micro_model, **sections), None)
    judged = prepare_data(recipe(tmp_path, micro_model, **sections, eval={"split": "validation"}), None)
    whole = prepare_data(recipe(tmp_path, micro_model), None)
    train = [sample for held in judged.train.values() for sample in held.samples]
    assert ids(train) == ids([sample for held in tested.train.values() for sample in held.samples])
    assert len(judged.test.samples) == 9 and len(train) == 51
    assert not ids(judged.test.samples) & ids(train)
    assert ids(judged.test.samples) | ids(train) == ids(
        [sample for held in whole.train.values() for sample in held.samples]
    )
    assert ids(tested.test.samples) == ids(whole.test.samples)
    assert judged.test.labels == whole.test.labels
    moved = recipe(tmp_path, micro_model, run={"seed": 1}, **sections, eval={"split": "validation"})
    assert ids(prepare_data(moved, None).test.samples) != ids(judged.test.samples)


def test_a_validation_split_that_cannot_be_is_refused(tmp_path: Path, micro_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.split.*data\.validation_rows"):
        run(recipe(tmp_path, micro_model, eval={"split": "validation"}))
    with pytest.raises(DataError, match=r"data\.validation_rows: got 60 of 60"):
        run(recipe(tmp_path, micro_model, data={"validation_rows": 60}))
    assert not (tmp_path / "out").exists()


def test_the_byte_budget_is_kept_and_nearly_used_up(make: Callable[..., tuple[Comparison, Quiet]]) -> None:
    found, told = make(
        algorithms="deca,dpsgd,deca:gossip_every=3,local",
        seeds="0",
        budget="bytes",
        overrides=["algorithm.inner_steps=12"],
    )
    deca, dpsgd, rarely, local = found.rows
    # The step that fits last is worth one sweep of the blocks, or one exchange of everything.
    assert 0.7 * deca.bytes_sent < dpsgd.bytes_sent <= deca.bytes_sent
    assert 0.7 * deca.bytes_sent < rarely.bytes_sent <= deca.bytes_sent
    assert dpsgd.samples < deca.samples < rarely.samples
    assert (local.bytes_sent, local.samples) == (0, deca.samples), "what sends nothing is held to the samples"
    assert "deca, seed 0, probe" not in told.cells and "dpsgd, seed 0, probe" in told.cells


def test_the_budget_of_seconds_is_kept_roughly(
    make: Callable[..., tuple[Comparison, Quiet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs by the weights that are trained: what a step takes of a machine's time is never the same."""
    spent, backward = 0.0, Peer.backward

    def timed(self: Peer, *given: Any) -> Any:
        nonlocal spent
        spent += sum(weights.numel() for weights in self.model.parameters().values() if weights.requires_grad)
        return backward(self, *given)

    monkeypatch.setattr(Peer, "backward", timed)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(process_time=lambda: spent, perf_counter=lambda: spent))
    found, _ = make(algorithms="deca,dpsgd", seeds="0", budget="seconds", overrides=["algorithm.inner_steps=16"])
    assert found.rows[1].cpu_s == pytest.approx(found.rows[0].cpu_s, rel=0.4)
    assert found.rows[1].samples < found.rows[0].samples, "a step of all blocks takes longer than one of a block"


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_steps_round_trip_and_are_never_exceeded(name: str, data: st.DataObject) -> None:
    config = from_dict({"algorithm": {"name": name}}, METHODS)[0].algorithm
    blocks = data.draw(st.integers(1, 40), label="blocks")
    shortest = config.with_steps(1, blocks).num_steps(blocks)
    steps = data.draw(st.integers(shortest, 20_000), label="steps")
    fitted = config.with_steps(steps, blocks)
    assert shortest <= fitted.num_steps(blocks) <= steps
    assert type(fitted) is type(config) and fitted.lr == config.lr
    again = fitted.with_steps(fitted.num_steps(blocks), blocks)
    assert again.num_steps(blocks) == fitted.num_steps(blocks)
    own = config.num_steps(blocks)
    assert config.with_steps(own, blocks) == config


def test_too_few_steps_for_all_sweeps_make_fewer_sweeps() -> None:
    """Else a method would take up to T times the steps that it may."""
    config = BlockwiseConfig(outer_rounds=4, inner_steps=48)
    fitted = [config.with_steps(steps, 5) for steps in (3, 12, 20, 47)]
    assert [(each.outer_rounds, each.inner_steps) for each in fitted] == [(1, 1), (2, 1), (4, 1), (4, 2)]


@given(steps=st.integers(1, 5000), blocks=st.integers(1, 12), every=st.integers(1, 9), sweeps=st.integers(1, 6))
def test_whole_rounds_leave_no_short_one(steps: int, blocks: int, every: int, sweeps: int) -> None:
    config = BlockwiseConfig(outer_rounds=sweeps, gossip_every=every)
    fitted = with_whole_rounds(config, steps, blocks)
    assert isinstance(fitted, BlockwiseConfig)
    assert fitted.inner_steps % every == 0
    assert fitted.num_steps(blocks) <= max(steps, blocks * every)


def test_samples_are_steps_times_batches_of_those_who_train() -> None:
    """A step of two batches draws twice as many; where one in five trains, peers draw a fifth on average."""
    gossip = LocalStepsConfig(rounds=10, local_steps=6)
    twice = gossip.model_copy(update={"grad_accumulation": 2})
    few = FedavgConfig(participation=0.2)
    cases = ((gossip, twice, 30), (twice, gossip, 120), (twice, twice, 60), (gossip, few, 300), (few, gossip, 100))
    for first, other, steps in cases:
        assert steps_for_samples(first, 1, other, 5) == steps
    third = few.model_copy(update={"rounds": 7, "local_steps": 1, "participation": 1 / 3})
    assert steps_for_samples(third, 1, third, 3) == 7, "which floats make a little less"


def test_bytes_that_the_agreement_takes_are_set_aside() -> None:
    """A probe of 4 steps sent 60 and 100 while it trained, and 20 more a peer in the end: 20 a step."""
    probe, rounds = (
        {"bytes_sent_per_peer": [80, 120]},
        [SimpleNamespace(bytes_sent=sent) for sent in ((30, 50), (60, 100))],
    )
    events: Any = SimpleNamespace(rounds=rounds)
    assert bytes_a_peer(probe) == 100
    assert [steps_for_bytes(allowed, probe, events, 4, 99) for allowed in (10.0, 119.0, 120.0)] == [1, 4, 5]
    events.rounds[-1].bytes_sent = (0, 0)
    assert steps_for_bytes(120.0, probe, events, 4, 99) == 99, "it sends nothing while it trains"
    assert [steps_for_seconds(allowed, {"cpu_s": 2.0}, 4) for allowed in (0.1, 3.0)] == [1, 6]


def cell_of(monkeypatch: pytest.MonkeyPatch, *, name: str = "deca", models: int = 2, **metrics: Any) -> Cell:
    """A cell of two peers that hold 10 and 30 sequences; of four rounds the first and last were logged."""
    epochs = [(0.4, 0.4), (2.0, 1.0)] if models > 1 else [(0.4,), (1.0,)]
    run = SimpleNamespace(
        num_models=models,
        holdings=[SimpleNamespace(sequences=10), SimpleNamespace(sequences=30)],
        rounds=[
            SimpleNamespace(round=round, epochs=drawn, bytes_sent=(sent, 3 * sent)[:models])
            for round, drawn, sent in zip((0, 3), epochs, (10, 40), strict=True)
        ],
        evaluations=[SimpleNamespace(round=round, average_model={"loss": 4.0 - round}) for round in (0, 1, 2, 4)]
        + [SimpleNamespace(round=3, average_model={})],  # which had no finite loss
    )
    summary = {
        "algorithm": name,
        "config": {"run": {"num_peers": 2}},
        "metrics": {"average_model": {"loss": 0.5}, "peers": [{"loss": 0.75}, {"loss": 1.25}][:models], **metrics},
        "bytes_sent_per_peer": [50, 130][:models],
        "cpu_s": 6.0,
    }
    monkeypatch.setattr("peertune.compare.cells.read_run", lambda folder: run)
    return read_cell(name, 0, Path(), summary)


def test_a_curve_counts_samples_and_bytes_of_a_peer_after_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between logged rounds they are interpolated; the end is what the peers end with, its agreement included."""
    cell = cell_of(monkeypatch)
    found = [(point.samples, point.bytes, point.quality) for point in cell.points]
    # After rounds 1 and 4 of 4: 8 and 25 samples, 20 and 80 bytes.
    expected = [(0, 0, 4.0), (8, 20, 3.0), (8 + 17 / 3, 40, 2.0), (25, 90, 0.5)]
    assert found == [pytest.approx(point) for point in expected]
    assert (cell.metric, cell.quality, cell.worst_peer, cell.samples) == ("loss", 0.5, 1.25, 25)
    assert (cell.cpu_s, cell.bytes_sent, cell.bytes_sent_by_hub) == (3.0, 90, None)


def test_a_curve_of_those_who_never_agree_has_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [point.quality for point in cell_of(monkeypatch, name="local").points] == [4.0, 1.0]
    personal = cell_of(monkeypatch, personal=[{"loss": 0.25}, {"loss": 0.5}])
    assert [point.quality for point in personal.points] == [4.0, 0.375] and personal.worst_peer == 0.5


def test_a_pooled_models_passes_are_over_all_data_and_count_for_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cell_of(monkeypatch, name="pooled", models=1)
    assert [point.samples for point in cell.points] == pytest.approx([0, 8, 12, 20])
    assert [point.quality for point in cell.points] == [4.0, 3.0, 2.0, 0.75]


def test_peers_under_a_robust_rule_are_measured_each_by_its_own_unless_a_server_made_one_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary = dict(cell_of(monkeypatch).summary)
    summary["config"] = {"run": {"num_peers": 2}, "exchange": {"robust": "clip"}}
    assert quality(summary, "loss") == 1.0
    assert quality({**summary, "bytes_sent_by_hub": 5}, "loss") == 0.5


def test_a_row_is_the_mean_over_seeds_and_the_most_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, told = cell_of(monkeypatch), {"simulated_s": 10.0, "lambda2": 0.5, "peak_memory_bytes": 7}
    metrics = {"average_model": {"loss": 1.5, "macro_f1": 0.25}, "peers": [{"loss": 2.0}, {"loss": 3.25}]}
    more = {"metrics": metrics, "bytes_sent_per_peer": [100, 40], "cpu_s": 2.0, "peak_memory_bytes": 5}
    other = replace(cell, seed=1, summary={**cell.summary, **told, **more})
    found = row("deca", [replace(cell, summary={**cell.summary, **told}), other], [], "loss", None)
    assert (found.mean, found.spread) == (1.0, pytest.approx(0.5**0.5))
    assert (found.worst_peer, found.bytes_sent, found.cpu_s) == ((1.25 + 3.25) / 2, 80.0, 2.0)
    assert (found.peak_memory_bytes, found.simulated_s, found.lambda2, found.num_seeds) == (7, 10.0, 0.5, 2)
    lost = row("deca", [other], [0], "loss", None)
    assert (lost.mean, lost.worst_peer, lost.bytes_sent, lost.num_seeds) == (None, None, 70.0, 2)
    assert (found.macro_f1, lost.macro_f1) == (0.25, None), "that of the seeds which are left is no one's"
    assert "tuned" not in columns([found, lost])
    choice = Tuned(contestant="deca", key="lr", values=(0.1, 0.2), qualities=(1.0, 2.0), best=0.1)
    tuned = row("deca", [other], [], "loss", choice)
    assert cells_of(tuned, ["tuned"]) == ["lr = 0.1 (edge)"] and "tuned" in columns([found, tuned])
    assert "tuned" not in [column.header for column in terminal_table([tuned], 999).columns], "a sentence says it"


def test_the_paired_interval_is_the_hand_computed_one() -> None:
    # Differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653; half width 4.302653 / sqrt(3) = 2.484138.
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    # Differences 1, 2, 3, 2: mean 2, s = sqrt(2 / 3), t(0.975, 3) = 3.182446; half width 1.299228.
    found = paired_interval([1.0, 2.0, 3.0, 2.0])
    assert found == pytest.approx((0.700772, 3.299228), abs=1e-6)
    assert paired_interval([0.1]) is None and spread([0.1]) is None


def test_pairing_sees_what_the_spread_hides_and_words_have_the_metrics_direction() -> None:
    quality = {"a": [0.50, 0.60, 0.70], "b": [0.45, 0.551, 0.649], "c": [0.65, 0.60, 0.55]}
    found = {(p.one, p.other): p for p in pairs(quality)}
    assert found["a", "b"].is_clear, "a is ahead by about 0.05 with every seed, though seeds differ by 0.2"
    assert not found["a", "c"].is_clear and found["a", "c"].difference == pytest.approx(0)
    said = verdicts(list(found.values()), "accuracy")
    assert said[0].startswith("a is better than b in accuracy by 5.0 points")
    assert "not larger than the seed noise" in said[1] and "3 pairs" in said[3] and "one in 20 " in said[3]
    assert verdicts([found["a", "b"]], "loss")[0].startswith("b is better than a in loss by 0.05")
    alone = verdicts(pairs({"a": [0.5], "b": [0.4]}), "accuracy")
    assert alone[0] == "a and b: a is ahead by 10.0 points with this one seed." and "no noise can be told" in alone[1]


def test_of_many_pairs_only_those_beyond_the_noise_have_a_sentence() -> None:
    """Twelve methods are 66 pairs, which nobody reads."""
    same = {f"m{i}": [0.5, 0.6, 0.7 + i / 100] for i in range(11)}
    found = pairs({**same, "best": [0.9, 1.01, 1.1]})
    clear = [pair for pair in found if pair.is_clear]
    said = verdicts(found, "accuracy")
    assert len(found) == 66 and len(clear) == 11 == len(said) - 2
    assert all(text.startswith("best is better than") for text in said[:11])
    assert "of all 66 pairs" in said[11] and said[11].endswith("those above can be told from the seed noise.")
    assert verdicts(pairs(same), "accuracy")[0].endswith("none can be told from the seed noise.")
    alone = verdicts(pairs({name: values[:1] for name, values in same.items()}), "accuracy")
    assert len(alone) == 2 and "no noise can be told" in alone[1] and "Of these" not in alone[0]
    assert len(verdicts(pairs({name: same[name] for name in ("m0", "m1", "m2", "m3", "m4")}), "accuracy")) == 10 + 1
    noise = {"c": [1, 0, 2], "d": [2, 1, 0], "e": [0, 2, 1], "f": [1, 2, 0]}
    [_, rest, _] = verdicts(pairs({"a": [0, 1, 2], "b": [0.1, 1.1, 2.101], **noise}), "accuracy")
    assert rest.endswith("Of these, the one above can be told from the seed noise.")
    apart = verdicts(pairs({f"m{i}": [i, i + 0.01, i + 0.02 + i / 1000] for i in range(30)}), "accuracy")
    assert len(apart) == 29 + 2 and all(" than m0 in accuracy" in text for text in apart[:29])
    assert apart[29].endswith("Of these, 435, with m0 those above, can be told from the seed noise.")


def test_memory_has_ticks_at_round_numbers_of_its_unit() -> None:
    shown = tick_texts(memory_axis(0.0, 0.9 * 2**30), memory)
    assert [text.replace("\u202f", " ") for text in shown] == [
        "0 B",
        "200 MiB",
        "400 MiB",
        "600 MiB",
        "800 MiB",
        "1000 MiB",
    ]
    assert memory_axis(0.0, 1.2 * 2**30).ticks[-1] == 1.25 * 2**30


def test_recipes_are_contestants_and_the_command_prints_a_table(
    path: Path, tmp_path: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "fast<er>.toml"
    write_toml(tree(tmp_path, micro_model, algorithm={"lr": 2e-2}, run={"out": "elsewhere"}), other)
    arguments = ["compare", str(path), str(other), "--seeds", "3", "--out", str(tmp_path / "c")]
    assert main([*arguments, "--set", "algorithm.inner_steps=1"]) == 0
    printed = capsys.readouterr()
    assert "recipe" in printed.out and "fast<er>" in printed.out and "no noise can be told" in printed.out
    assert "[2/2] fast<er>, seed 3" in printed.err
    config = summary_of(tmp_path / "c" / "cells" / "fast-er" / "seed-3")["config"]
    assert (config["run"]["seed"], config["algorithm"]["lr"], config["algorithm"]["inner_steps"]) == (3, 2e-2, 1)
    assert not Path("elsewhere").exists()
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "fast&lt;er&gt;" in page and "<er>" not in page


def test_names_in_other_scripts_have_folders_of_their_own() -> None:
    names = ["модель", "方法", "deca:lr=0.1", "a/b", "***"]
    slugs = [Contestant(name=name, config=RunConfig()).slug for name in names]
    assert slugs == ["модель", "方法", "deca-lr-0.1", "a-b", "unnamed"]


ONE = ["compare", "recipe.toml"]
BAD = {
    "unknown method": ([*ONE, "--algorithms", "deca,decca"], ["algorithm.name", "decca", "did you mean deca"]),
    "one contestant": (ONE, ["two or more"]),
    "a name twice": ([*ONE, "--algorithms", "deca,deca"], ["--algorithms", "deca twice"]),
    "upper and lower case": ([*ONE, "--algorithms", "deca:lr=1e-3,deca:lr=1E-3"], ["share the folder"]),
    "epochs are not tuned": (
        [*ONE, "--algorithms", "fedavg,fedavg:lr=0.1", "--tune", "local_epochs=1,2"], ["local_epochs tuned"]
    ),
    "unknown setting": ([*ONE, "--algorithms", "deca,local:discrepancy=none"], ["local has no key 'discrepancy'"]),
    "another section's setting": (
        [*ONE, "--algorithms", "deca,deca:data.batch_size=1"], ["data.batch_size", "topology., data.partition."]
    ),
    "bad graph": ([*ONE, "--algorithms", "deca,deca:topology.kind=line"], ["topology.kind", "line"]),
    "setting without value": ([*ONE, "--algorithms", "deca,deca:lr"], ["'lr'", "key=value"]),
    "bad setting": ([*ONE, "--algorithms", "deca,deca:discrepancy=nil"], ["algorithm.discrepancy", "nil"]),
    "seeds no numbers": ([*ONE, "--algorithms", "deca,local", "--seeds", "0,x"], ["--seeds", "0,x"]),
    "a seed twice": ([*ONE, "--algorithms", "deca,local", "--seeds", "1,1"], ["--seeds", "1 twice"]),
    "unknown budget": ([*ONE, "--algorithms", "deca,local", "--budget", "euros"], ["--budget", "euros", "samples"]),
    "epochs are not counted": (
        [*ONE, "--algorithms", "deca,fedavg:local_epochs=1"], ["--budget samples", "local_epochs = 1", "local_steps"]
    ),
    "tune no key": ([*ONE, "--algorithms", "deca,local", "--tune", "pace=1,2"], ["--tune pace", "deca", "lr"]),
    "tune no number": ([*ONE, "--algorithms", "deca,local", "--tune", "lr=fast"], ["--tune", "lr=fast"]),
    "tune impossible": ([*ONE, "--algorithms", "deca,local", "--tune", "lr=-1"], ["algorithm.lr", "-1", "greater"]),
    "setting of nothing": ([*ONE, "--algorithms", "deca,deca:lr= "], ["'lr='", "key=value"]),
    "setting of no key": ([*ONE, "--algorithms", "deca,deca:=1"], ["deca has no key ''; it has name, lr"]),
    "tuned and set": ([*ONE, "--algorithms", "deca,deca:lr=0.1", "--tune", "lr=1,2"], ["deca:lr=0.1", "itself"]),
    "tuned and set in full": (
        [*ONE, "--algorithms", "deca,deca: algorithm.lr = 0.1", "--tune", "lr=1,2"], ["algorithm.lr = 0.1", "itself"]
    ),
    "tuned on rows that all are judged by": (
        [*ONE, *("--algorithms", "deca,local", "--tune", "lr=1,2", "--set", "data.validation_rows=5"),
         *("--set", "eval.split=validation")], ["--tune", "eval.split", "splits off its own"]
    ),
    "too few rows to tune on": (
        [*ONE, "--algorithms", "deca,local", "--tune", "lr=1,2", "--set", "data.train=few.jsonl"],
        ["--tune: data.train has 9 rows", "data.validation_rows"],
    ),
    "tune what is not used": ([*ONE, "--algorithms", "deca,local", "--tune", "rank=2,4"], ["rank", "deca", "not used"]),
    "other data": (["compare", "recipe.toml", "other.toml"], ["data.batch_size", "4", "2", "[algorithm]"]),
    "same stem": (["compare", "recipe.toml", "sub/recipe.toml"], ["share the folder"]),
    "recipes and algorithms": (["compare", "recipe.toml", "other.toml", "--algorithms", "deca,local"], ["2 recipes"]),
    "no held-out rows": ([*ONE, "--algorithms", "deca,local", "--set", "data.test="], ["data.test"]),
    "no such recipe": (["compare", "missing.toml", "recipe.toml"], ["missing.toml"]),
    "out under a file": ([*ONE, "--algorithms", "deca,local", "--out", "recipe.toml/x"], ["--out", "is a file"]),
    "no bytes to fit": ([*ONE, "--algorithms", "local,deca", "--budget", "bytes"], ["--budget bytes", "local"]),
    "nobody to send to": (
        [*ONE, "--algorithms", "deca,local", "--budget", "bytes", "--set", "run.num_peers=1"], ["sends nothing", "deca"]
    ),
}  # fmt: skip


def test_a_second_grid_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """One of the two would count, and the table would not say so."""
    with pytest.raises(SystemExit, match="2"):
        main([*ONE, "--algorithms", "deca,gt", "--tune", "lr=1,2", "--tune", "local_steps=1,2"])
    assert "--tune: got it twice, expected once: 'lr=1,2' or 'local_steps=1,2'" in capsys.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(
    name: str,
    path: Path,
    tmp_path: Path,
    micro_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_toml(tree(tmp_path, micro_model, data={"batch_size": 2}), tmp_path / "other.toml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "recipe.toml").write_text(path.read_text())
    write_rows(tmp_path / "few.jsonl", 9)
    before = sorted(tmp_path.rglob("*"))
    arguments, parts = BAD[name]
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note:", "Loading"))]
    assert sorted(tmp_path.rglob("*")) == before
    assert len(errors) == 1 and errors[0].startswith("peertune: error: "), errors
    for part in parts:
        assert part in errors[0]


def test_labels_of_validation_rows_are_classes_too(tmp_path: Path, micro_model: Path) -> None:
    """Even where all rows of a label happen to be kept back."""
    config = recipe(tmp_path, micro_model, data={"validation_rows": 57, "partition": {"kind": "iid"}})
    config = config.model_copy(update={"run": config.run.model_copy(update={"num_peers": 1})})
    assert len(prepare_data(config, None).test.labels) == 3


def test_keeping_back_nothing_changes_nothing() -> None:
    from peertune.data.load import Table

    table = Table([{"text": str(i)} for i in range(10)], [i // 5 for i in range(10)])
    assert keep_back(table, 0, 0) == (table, [])
    train, validation = keep_back(table, 3, 0)
    assert [row["text"] for row in train.rows] == sorted({str(i) for i in range(10)} - {r["text"] for r in validation})
    assert [train.source[i] for i in range(7)] == [int(row["text"]) // 5 for row in train.rows]


def test_workers_change_nothing_but_the_time(path: Path, tmp_path: Path) -> None:
    def found(out: str, workers: int) -> list[Any]:
        asked = Options.parse(
            [str(path)], str(tmp_path / out), algorithms="deca,fedavg", seeds="0", tune="lr=1e-3,1e-2", workers=workers
        )
        quiet = Quiet()
        rows = [(row.contestant, row.mean, row.worst_peer) for row in compare(asked, quiet).rows]
        assert bool(quiet.cells) == (workers == 1), "cells that workers did are found done"
        if workers > 1:
            assert "4 runs to be done, 2 at a time" in quiet.notes, "tuning"
            assert [note for note in quiet.notes if "(1 of 4, about" in note]
            assert [note for note in quiet.notes if note.endswith("(4 of 4)")]
        return rows

    assert found("one", 1) == found("two", 2)


@pytest.mark.parametrize(("key", "names"), [("inner_steps", "deca,dpsgd"), ("rounds", "dec_lora,fedavg")])
def test_what_the_budget_sets_cannot_be_tuned(key: str, names: str, path: Path, tmp_path: Path) -> None:
    """Each value would give the same run."""
    asked = Options.parse([str(path)], str(tmp_path / "compared"), algorithms=names, seeds="0", tune=f"{key}=1,2")
    with pytest.raises(ConfigError, match=f"--tune {key}: got .*, but the budget sets how long"):
        compare(asked, Quiet())
    assert not (tmp_path / "compared").exists()


def test_a_name_that_claims_another_length_than_the_budgets_is_remarked_on(
    make: Callable[..., tuple[Comparison, Quiet]], path: Path, tmp_path: Path
) -> None:
    _, told = make(algorithms="deca,deca:inner_steps=2,deca:gossip_every=2", seeds="0")
    assert [note for note in told.notes if note.startswith("deca:inner_steps=2: the budget sets inner_steps to 4")]
    assert not any(note.startswith("deca:gossip_every") for note in told.notes)
    lengths(path, tmp_path, "deca,deca: algorithm.inner_steps = 2", told := Quiet())
    assert [note for note in told.notes if "the budget sets inner_steps to 4" in note]


def test_sweeps_can_be_tuned_where_the_budget_leaves_room_for_them(
    make: Callable[..., tuple[Comparison, Quiet]],
) -> None:
    """T stays as it is tuned, and R gives way."""
    found, _ = make(algorithms="deca,deca:discrepancy=none", seeds="0", tune="outer_rounds=1,2")
    assert [choice.key for choice in found.tuned] == ["outer_rounds"] * 2


def test_workers_end_when_the_comparison_is_killed(path: Path, tmp_path: Path) -> None:
    """Else they would go on for hours, and the same command, given again, would find their folders locked."""
    out = tmp_path / "compared"
    command = [sys.executable, "-m", "peertune", "compare", str(path), "--algorithms", "deca,dpsgd", "--seeds", "0"]
    settings = ["--set", "run.threads=1", "--set", "algorithm.outer_rounds=100000", "--workers", "2", "--out", str(out)]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 300
        while len(list(out.glob("cells/*/*/events.jsonl"))) < 2 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=300)[1]


class Deadly:
    """A recipe that ends the process which takes it up."""

    def __init__(self, out: Path) -> None:
        self.run = SimpleNamespace(out=str(out))

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_a_worker_that_is_killed_is_an_error_in_one_line(tmp_path: Path) -> None:
    cells: list[Any] = [(Deadly(tmp_path / "cell"), "deca, seed 0")]
    with pytest.raises(PeerLostError, match=r"--workers: the process of a cell was killed, .* with 2 at a time"):
        play_ahead(cells, tmp_path, 2, print)


def test_of_a_workers_error_it_is_said_whose_it_is(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model)
    Path(str(config.data.test)).unlink()
    said: list[str] = []
    with pytest.raises(DataError, match="no such file"):
        play_ahead([(config, "deca, seed 0")], tmp_path, 2, said.append)
    assert said[1:] == ["deca, seed 0: failed"]


def test_a_contestant_may_have_batched_peers_and_another_not(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    make(algorithms="dec_lora:local_steps=1:run.batched_peers=2,local", seeds="0")
    recipes = sorted(tmp_path.glob("compared/cells/*/seed-0/recipe.json"))  # dec_lora's, local's
    sections = [json.loads(path.read_text())["config"]["run"] for path in recipes]
    assert [section["batched_peers"] for section in sections] == [2, 1]


RECKLESS = "local:lr=1e30"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_diverges_is_marked_and_the_others_are_compared(
    workers: int, make: Callable[..., tuple[Comparison, Quiet]], capsys: pytest.CaptureFixture[str]
) -> None:
    def go() -> tuple[Comparison, Quiet]:
        return make(algorithms=f"{RECKLESS},deca,local", seeds="0", workers=workers)

    found, _ = go()
    assert [row.diverged for row in found.rows] == [(0,), (), ()]
    assert found.rows[0].mean is None and found.rows[1].mean is not None
    assert [(pair.one, pair.other) for pair in found.pairs] == [("deca", "local")]
    assert [s for s in found.verdicts if s.startswith(f"{RECKLESS}: training diverged with seed 0")]
    for kind, key in (("table", "mean"), ("cells", "quality")):
        with found.files[kind].open() as file:
            lines = list(csv.DictReader(file))
        assert {line["contestant"] for line in lines if line[key] == "diverged"} == {RECKLESS}
    assert f"| {RECKLESS} | diverged |" in found.files["markdown"].read_text()
    assert "<td>diverged</td>" in found.files["page"].read_text()
    Console().print(terminal_table(found.rows))
    assert "diverged" in capsys.readouterr().out
    again, told = go()
    assert told.cells == [] and again.rows == found.rows, "what diverged is not run again"


def test_one_seed_that_diverges_takes_a_contestant_out_of_the_pairs(
    make: Callable[..., tuple[Comparison, Quiet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runs.run

    def failing(config: Any, **options: Any) -> Any:
        summary = original(config, **options)
        if (config.algorithm.name, config.run.seed) == ("local", 1):
            (Path(config.run.out) / "summary.json").unlink()
            raise DivergedError("the training loss became nan")
        return summary

    monkeypatch.setattr(runs, "run", failing)
    found, _ = make(algorithms="deca,local,dpsgd", seeds="0,1")
    assert "diverged (1 of 2)" in found.files["markdown"].read_text()
    assert [(pair.one, pair.other) for pair in found.pairs] == [("deca", "dpsgd")]
    assert found.rows[1].samples == found.rows[0].samples, "of the seed that is left"


def test_a_contestant_whose_whole_grid_diverges_is_marked(
    make: Callable[..., tuple[Comparison, Quiet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runs.run

    def failing(config: Any, **options: Any) -> Any:
        if config.algorithm.name != "local":
            return original(config, **options)
        Path(config.run.out).mkdir(parents=True)
        raise DivergedError("the training loss became nan")

    monkeypatch.setattr(runs, "run", failing)
    found, told = make(algorithms="local,deca", seeds="0", tune="lr=1e-3,1e-2")
    assert found.tuned[0].best is None and found.rows[0].tuned == "lr: all diverged"
    assert [row.diverged for row in found.rows] == [(0,), ()] and "local, seed 0" not in told.cells
    assert any("diverged with every lr of 0.001, 0.01; tune over smaller" in said for said in found.verdicts)


def test_where_all_diverge_or_the_budgets_measure_does_there_is_nothing_to_compare(
    make: Callable[..., tuple[Comparison, Quiet]],
) -> None:
    with pytest.raises(DivergedError, match=r"every contestant and seed.*lower algorithm.lr"):
        make(algorithms=f"{RECKLESS},local:lr=1e29", seeds="0")
    with pytest.raises(DivergedError, match=r"--budget bytes: dpsgd:lr=1e30, the first contestant, diverged"):
        make(algorithms="dpsgd:lr=1e30,local", seeds="0", budget="bytes")


def test_workers_need_a_thread_count_and_independent_cells(path: Path, tmp_path: Path) -> None:
    for text, extra in (("run.threads = 0", {"overrides": ["run.threads=0"]}), ("--budget bytes", {"budget": "bytes"})):
        options: dict[str, Any] = {"algorithms": "deca,fedavg", "workers": 2, **extra}
        with pytest.raises(ConfigError, match=text):
            compare(Options.parse([str(path)], str(tmp_path / "out"), **options), Quiet())


def test_the_recipes_own_method_says_how_long_all_train(path: Path, tmp_path: Path, micro_model: Path) -> None:
    """Its keys of length mean nothing to a first contestant of another method, whose defaults nobody asked for."""
    told = Quiet()
    assert lengths(path, tmp_path, "gt:lr=1e-3,deca", told) == lengths(path, tmp_path, "deca,gt:lr=1e-3")
    assert told.notes == []  # remarks come with the lineup
    assert "the recipe's own method, deca" in lineup(path, "gt,deca").notes[0]
    assert lineup(path, "gt:rounds=3:local_steps=1,deca").pace.name == "gt:rounds=3:local_steps=1"
    assert lengths(path, tmp_path, "gt:rounds=3:local_steps=1,deca")["gt"] == 3
    by_set = Options.parse([str(path)], "", algorithms="gt:local_steps=1,deca", overrides=["algorithm.rounds=3"])
    assert read_contestants(by_set).pace.name == "gt:local_steps=1"
    not_its_own = Options.parse([str(path)], "", algorithms="gt,deca", overrides=["algorithm.inner_steps=3"])
    assert read_contestants(not_its_own).pace.name == "deca"
    write_toml(tree(tmp_path, micro_model, algorithm={"name": "fedavg", "local_epochs": 3}), path)
    with pytest.raises(ConfigError, match=r"fedavg has algorithm\.local_epochs = 3"):
        lengths(path, tmp_path, "gt:local_steps=1,deca")
    assert lengths(path, tmp_path, "fedavg,fedavg:lr=1e-3"), "passes over the same data are alike"


def test_a_key_without_effect_is_remarked_on_where_it_was_meant_for_somebody(path: Path) -> None:
    def notes(algorithms: str, *overrides: str) -> list[str]:
        asked = Options.parse([str(path)], "", algorithms=algorithms, overrides=list(overrides))
        return read_contestants(asked).notes

    assert notes("deca:rank=4,dec_lora", "algorithm.rank=8") == [
        "deca:rank=4: algorithm.rank is not used with algorithm.adapter = 'none' (but with 'lora')"
    ]
    assert notes("deca,dec_lora", "algorithm.rank=8") == [], "dec_lora uses it"
    assert notes("deca,local", "algorithm.rank=8") == ["algorithm.rank is used by none of those compared"]


def test_what_a_contestants_name_sets_goes_before_what_is_set_for_all(path: Path) -> None:
    chosen = ["algorithm.lr=0.25", "topology.kind=star"]
    asked = Options.parse([str(path)], "", algorithms="deca:lr=0.5,deca:topology.kind=complete", overrides=chosen)
    found = [each.config for each in read_contestants(asked).contestants]
    assert [(config.algorithm.lr, config.topology.kind) for config in found] == [(0.5, "star"), (0.25, "complete")]


def test_a_recipes_file_name_cannot_write_to_the_terminal(path: Path, tmp_path: Path) -> None:
    other = shutil.copy(path, tmp_path / "fast\x1b[2J.toml")
    asked = Options.parse([str(path), str(other)], "")
    assert read_contestants(asked).contestants[1].name == "fast\ufffd[2J"


def lineup(path: Path, names: str) -> Lineup:
    return read_contestants(Options.parse([str(path)], "", algorithms=names))


def lengths(path: Path, tmp_path: Path, names: str, told: Quiet | None = None) -> dict[str, int]:
    """Local steps of each contestant that the budget of samples gives, by method."""
    asked = Options.parse([str(path)], str(tmp_path / "none"), algorithms=names, seeds="0")
    grid = Grid(read_contestants(asked), asked, told or Quiet())
    methods = [contestant.config.algorithm for contestant in grid.contestants]
    return {method.name: grid.budget.steps(method) for method in methods}


def test_cells_of_other_data_or_links_are_not_mixed(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    make(algorithms="local,pooled", seeds="0")
    with pytest.raises(CheckpointError, match=r"link\.bandwidth_mbit"):
        make(algorithms="local,pooled", seeds="0,1", overrides=["link.bandwidth_mbit=1"])
    with pytest.raises(CheckpointError, match=r"eval\.points"):
        make(algorithms="local,pooled", seeds="0", overrides=["eval.points=1"])
    make(algorithms="local,pooled", seeds="1,0")  # another seed first
    with pytest.raises(CheckpointError, match=r"eval\.points"):  # though seed 2 has not been begun
        make(algorithms="local,pooled", seeds="2,0", overrides=["eval.points=1"])
    assert not (tmp_path / "compared" / "cells" / "local" / "seed-2").exists()
    make(algorithms="local,pooled", seeds="0", overrides=["run.log_every=3", "run.checkpoint_every=2"])
    (tmp_path / "compared" / "inputs.json").write_text("half")  # as of one killed while it wrote it
    make(algorithms="local,pooled", seeds="0")
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text().replace("a", "b"))
    with pytest.raises(ConfigError, match=r"train\.jsonl had other contents"):
        make(algorithms="local,pooled", seeds="0,1")


def test_cells_of_other_versions_are_said_to_be(make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path) -> None:
    told = make(algorithms="local,pooled", seeds="0")[1]
    assert not any("may not compare" in note for note in told.notes)
    recipe = tmp_path / "compared" / "cells" / "pooled" / "seed-0" / "recipe.json"
    tried = tmp_path / "compared" / "tune" / "local" / "lr-0.1" / "recipe.json"
    tried.parent.mkdir(parents=True)
    tried.write_text(recipe.read_text().replace(__version__, "0.0.2"))
    text = json.loads(recipe.read_text())
    text["versions"] |= {"peertune": "0.0.1 with my-methods 3"}
    recipe.write_text(json.dumps(text))
    comparison, told = make(algorithms="local,pooled", seeds="0,1")
    note, of_tuning = sorted([note for note in told.notes if "may not compare" in note], reverse=True)
    assert of_tuning.startswith("local: has cells of peertune 0.0.2, now it is")
    assert note.startswith(f"pooled: has cells of peertune 0.0.1 with my-methods 3, now it is peertune {__version__}:")
    assert note in comparison.verdicts and note in comparison.files["markdown"].read_text()


def test_only_local_files_have_fingerprints(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's name, or the standard library's, is no file; the working directory is not looked at in its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("{}")
    config = load_recipe(path, ["data.train=['stdlib','org/name','folder:train']", "data.test=train.jsonl"], METHODS)[0]
    found = fingerprints(config, tmp_path)
    assert found.keys() == {"folder:train", "train.jsonl", config.model.path}
    (tmp_path / "other.txt").write_text("anything")
    assert fingerprints(config, tmp_path) == found
    (tmp_path / "folder" / "train.jsonl").write_text("{ }")
    assert {name for name, now in fingerprints(config, tmp_path).items() if now != found[name]} == {"folder:train"}


def test_all_cells_keep_back_the_same_rows(tmp_path: Path, micro_model: Path) -> None:
    data = tree(tmp_path, micro_model)["data"]
    kept = []
    for seed, partition_seed in ((0, None), (1, None), (0, 7)):
        given = {**data, "validation_rows": 6, "validation_seed": 5}
        given["partition"] = {**data.get("partition", {}), "seed": partition_seed}
        config = from_dict(tree(tmp_path, micro_model, run={"seed": seed}) | {"data": given}, METHODS)[0]
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"split": "validation"})})
        kept.append([sample.input_ids.tolist() for sample in prepare_data(config, None).test.samples])
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 6


def test_one_that_is_clearly_behind_is_said_to_be_so() -> None:
    """Whichever of a pair comes first: the interval then lies below zero, and its ends change places in words."""
    [pair] = pairs({"b": [0.45, 0.551, 0.649], "a": [0.50, 0.60, 0.70]})
    assert pair.is_clear and not pair.is_tie
    [said] = verdicts([pair], "accuracy")
    assert said.startswith("a is better than b in accuracy by 5.0 points") and "4.8 points to 5.2 points" in said
    assert pair_cells(pair, "accuracy") == ["b − a", "−5.0 points", "−5.2 points to −4.8 points", "yes"]  # noqa: RUF001


def test_equal_differences_show_no_noise() -> None:
    """Accuracies are counts over few rows: two seeds may have the same difference by chance."""
    [pair] = pairs({"a": [0.62, 0.58], "b": [0.60, 0.56]})
    assert pair.interval is None and not pair.is_clear
    assert pair_cells(pair, "accuracy")[1:] == ["+2.0 points", NONE, "cannot be told"]
    assert "no noise can be told" in verdicts([pair], "accuracy")[0]
    [dust] = pairs({"a": [0.1 + 0.2], "b": [0.3]})
    assert "equal with this one seed" in verdicts([dust], "accuracy")[0]


def test_who_diverged_and_what_was_tuned_is_said_in_words() -> None:
    said = diverged_notes({"a": [1], "b": [], "c": [0, 1]}, 2)
    assert said == [
        "a: training diverged with seed 1; it is left out of the pairs, and what is shown of it is of its other seeds.",
        "c: training diverged with seed 0, 1; it is left out of the pairs.",
    ]
    one = Tuned(contestant="a", key="lr", values=(0.1,), qualities=(1.0,), best=0.1)
    [told] = tuning_notes([one])
    assert told.endswith("chosen on validation rows; the grid has one value, so nothing was chosen between.")
    [told] = tuning_notes([replace(one, values=(0.05, 0.1, 0.2), qualities=(2.0, 1.0, 3.0))])
    assert told == "a: lr = 0.1 of 0.05, 0.1, 0.2, chosen on validation rows."


def made_cell(name: str, seed: int, ends: Sequence[float], peers: Sequence[float], *steps: float) -> Cell:
    """A cell with a loss before, one at each of `steps` samples, of 10 bytes each."""
    places = [0.0, *map(float, steps)]
    points = tuple(Point(samples=x, bytes=10 * x, quality=y) for x, y in zip(places, ends, strict=True))
    config = RunConfig().to_dict()
    config["run"]["num_peers"], config["data"]["validation_rows"] = 2, 7
    summary = {
        "algorithm": "dpsgd",
        "config": config,
        "metrics": {"average_model": {"loss": ends[-1]}, "peers": [{"loss": loss} for loss in peers]},
        "bytes_sent_per_peer": [5 * places[-1], 15 * places[-1]],
        "peak_memory_bytes": 2**20 * (seed + 1),
        "cpu_s": 6.0,
        "simulated_s": 3.0,
        "lambda2": None,
        "rounds": 9,
    }
    return Cell(contestant=name, seed=seed, folder=Path(name), summary=summary, metric="loss", points=points)


def test_tables_and_page_show_what_was_measured(tmp_path: Path) -> None:
    cells = [
        made_cell("a", 0, [4.0, 3.0, 1.0], [0.5, 3.0], 10, 20),
        made_cell("b", 0, [4.0, 2.0], [2.0, 2.25], 60),
        made_cell("a", 1, [5.0, 2.0, 2.0], [2.0, 2.5], 10, 20),
        made_cell("b", 1, [5.0, 9.0, 3.002], [3.0, 3.25], 30, 60),  # of a budget that gave it more rounds
    ]
    tuned = [
        Tuned(contestant="a", key="lr", values=(0.1, 0.2, 0.4), qualities=(3.0, 1.0, None), best=0.2),
        Tuned(contestant="b", key="lr", values=(0.1, 0.2, 0.4), qualities=(2.0, 3.0, 4.0), best=0.1),
    ]
    options = Options.parse([], str(tmp_path), seeds="0,1")
    found = write(options, list(cells), tuned)
    assert any(said.startswith("b took 3.0 times the samples of a") for said in found.verdicts)

    lines = list(csv.DictReader(found.files["cells"].read_text().splitlines()))
    assert [(line["contestant"], line["seed"], line["quality"], line["worst_peer"]) for line in lines] == [
        ("a", "0", "1.0", "3.0"), ("b", "0", "2.0", "2.25"), ("a", "1", "2.0", "2.5"), ("b", "1", "3.002", "3.25")
    ]  # fmt: skip
    told = {"samples": "20.0", "bytes_sent": "200.0", "bytes_sent_by_hub": "", "macro_f1": "", "cpu_s": "3.0"}
    assert lines[0].items() >= {**told, "rounds": "9", "lr": str(RunConfig().algorithm.lr)}.items()
    [line, _] = csv.DictReader(found.files["table"].read_text().splitlines())
    assert line.items() >= {"mean": "1.5", "worst_peer": "2.75", "peak_memory_bytes": str(2**21), "lambda2": ""}.items()
    record = json.loads(found.files["json"].read_text())
    assert [pair["is_clear"] for pair in record["pairs"]] == [True] and record["verdicts"] == found.verdicts
    assert [choice["is_at_edge"] for choice in record["tuned"]] == [False, True]

    page = found.files["page"].read_text().replace("\\u202f", " ")
    ids, links = re.findall(r'<section id="(\w+)"', page), re.findall(r'<a href="#(\w+)"', page)
    assert links == ids and "tuning" in ids
    without = write(options, list(cells), []).files["page"].read_text()
    assert '"#tuning"' not in without and 'id="tuning"' not in without
    charts = [json.loads(html.unescape(text)) for text in re.findall(r'data-points="([^"]*)"', page)]
    curves = [
        {row["name"]: {x: y for x, y in zip(chart["label"], row["text"], strict=True) if y != NONE}}
        for chart in charts
        for row in chart["rows"]
    ]
    a = ["4.500 (4.000 to 5.000)", "2.500 (2.000 to 3.000)", "1.500 (1.000 to 2.000)"]
    b = ["4.500 (4.000 to 5.000)", "2.501 (2.000 to 3.002)"]
    assert curves == [
        {"a": dict(zip(("0", "10", "20"), a, strict=True))}, {"b": dict(zip(("0", "60"), b, strict=True))},
        {"a": dict(zip(("0 B", "100 B", "200 B"), a, strict=True))}, {"b": dict(zip(("0 B", "600 B"), b, strict=True))},
        {"a": {"1.5 MiB": a[-1]}}, {"b": {"1.5 MiB": b[-1]}},
    ]  # fmt: skip
    [line, *_] = re.findall(r'class="line mean" stroke="[^"]+" d="([^"]+)"', page)
    [bars, *_] = re.findall(r'class="line peer" stroke="[^"]+" stroke-opacity="0.45" d="([^"]+)"', page)
    falls = [float(y) for y in re.findall(r"[ML]\S+ (\S+)", line)]
    assert falls == sorted(set(falls)) and len(falls) == 3, "what is less lies further down"
    assert all(0 <= float(end) <= SIZE for end in re.findall(r"[\d.-]+", bars))
    colors = {name: color for color, name in re.findall(r'<i class="dot" style="--c:([^"]+)"></i>(\w)</td>', page)}
    assert colors == {row["name"]: row["color"] for row in charts[0]["rows"]} and len(set(colors.values())) == 2
    assert "b: start and end only" in page and "a: start" not in page and "a, b" not in page
    assert "<td>a</td><td>0.5000</td><td>3.000</td><td>2.500</td>" in page, "lowest, highest and range of the peers"
    assert "<td>a</td><td>3.000</td><td><b>1.000</b></td><td>diverged</td><td>0.2</td>" in page
    assert "<td>b</td><td><b>2.000</b></td><td>3.000</td><td>4.000</td><td>0.1 (the grid" in page
    assert page.count("<li class=clear>") == 1 and "<li class=clear>a is better than b" in page
    assert "7 rows kept back" in page and "draws as many samples" in page


def test_long_names_have_folders_and_whole_sentences(
    make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    edges = ",".join(f"[{i},{(i + 1) % 4}]" for i in range(4)).replace(" ", "")
    long = [f"local:topology.kind=edges:topology.edges=[{edges}]:lr=1.{'0' * 200}{i}e-3" for i in (1, 2)]
    found, _ = make(algorithms=",".join(long), seeds="0")
    assert len({path.name for path in (tmp_path / "compared" / "cells").iterdir()}) == 2
    page = found.files["page"].read_text()
    assert found.verdicts[0].removesuffix("with this one seed.")[-30:].strip() in page
    assert "All have 0" in page  # nothing was sent
    assert "<h1>2 contestants</h1>" in page and "<title>2 contestants" in page


def test_a_budget_that_was_missed_is_said(make: Callable[..., tuple[Comparison, Quiet]]) -> None:
    rows = make(algorithms="deca,local", seeds="0")[0].rows
    assert budget_notes(rows, "samples") == []
    assert rows[1].bytes_sent == 0 and budget_notes(rows, "bytes") == [], "who sends nothing has the samples alike"
    [said] = budget_notes([rows[0], replace(rows[1], samples=4 * (rows[0].samples or 0))], "samples")
    assert said.startswith("local took 4") and "does not compare" in said
    [said] = budget_notes([rows[0], replace(rows[1], samples=(rows[0].samples or 0) / 4)], "samples")
    assert said.startswith("local took 0.25 times the samples of deca")
    slack = [
        budget_notes([rows[0], replace(rows[1], samples=x * (rows[0].samples or 0))], "samples") for x in (1.09, 1.15)
    ]
    assert [len(said) for said in slack] == [0, 1]
    for budget, key in (("bytes", "bytes_sent"), ("seconds", "cpu_s")):
        other = replace(rows[0], contestant="gt", **{key: 3 * getattr(rows[0], key)})
        [said] = budget_notes([rows[0], other], budget)
        assert said.startswith(f"gt took 3.0 times the {budget} of deca")
        assert budget_notes([rows[0], other], "samples") == []
    others = [replace(rows[1], contestant=name, samples=(rows[0].samples or 0) / 4) for name in ("gt", "qg")]
    [said] = budget_notes([rows[0], *others], "samples")
    assert said.startswith("gt, qg took 0.25 times the samples of deca")


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_terminals_table_fits_with_whole_numbers(width: int) -> None:
    name = "fedavg:local_steps=4:lr=2.5e-3"
    row = Row(
        contestant=name, num_seeds=3, metric="accuracy", mean=0.61, spread=0.123, worst_peer=0.4, macro_f1=0.5,
        samples=1536.0, bytes_sent=9.37e9, bytes_sent_by_hub=7.5e10, peak_memory_bytes=1_500_000_000, cpu_s=15.8,
        simulated_s=1200.0, lambda2=None, tuned="",
    )  # fmt: skip
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table([row], width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    shown = ["61.0 ± 12.3\u202f%", "40.0\u202f%", "50.0\u202f%", "1\u202f536", "9.37\u202fGB"]
    shown += ["1.4\u202fGiB"] if width >= 100 else []
    shown += ["75\u202fGB"] if width >= 160 else []
    assert all(number in text for number in shown)
    assert ("in table.md" in text) == (width < 160) and (name in text) == (width >= 80)
    # A longer name goes on in the next line before a column is left out, and keeps some width; not all have a server.
    long = terminal_table([replace(row, contestant=3 * name)], width)
    assert len(long.columns) == len(terminal_table([row], width).columns)
    assert terminal_table([row], width // 3).columns[0].min_width == 8
    assert "server sent" not in str(terminal_table([replace(row, bytes_sent_by_hub=None)], width).caption)


def test_names_are_no_markup() -> None:
    console = Console(width=200, file=io.StringIO())
    row = Row(
        contestant="[bold]x", num_seeds=1, metric="accuracy", mean=0.5, spread=None, worst_peer=None, macro_f1=None,
        samples=1.0, bytes_sent=0.0, bytes_sent_by_hub=None, peak_memory_bytes=1, cpu_s=1.0, simulated_s=None,
        lambda2=None, tuned="",
    )  # fmt: skip
    console.print(terminal_table([row]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]x" in text and "50.0\u202f%" in text
    assert markdown([replace(row, contestant="a|b")], [], [], "accuracy").splitlines()[2].startswith("| a\\|b | ")


@pytest.mark.parametrize(
    ("other", "refusal"),
    [
        ("noloco:group_size=3", r"algorithm\.group_size: got 3 on a graph"),
        ("choco:exchange.codec=bfloat16", r"exchange\.codec: got 'bfloat16', but choco does not only average"),
        ("choco:exchange.robust=clip", r"exchange\.robust: got 'clip', but choco takes no mean"),
    ],
)
def test_a_contestant_that_cannot_be_run_is_refused_before_any_is(
    other: str, refusal: str, make: Callable[..., tuple[Comparison, Quiet]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{other}: {refusal}"):
        make(algorithms=f"dpsgd,{other}", seeds="0")
    assert not (tmp_path / "compared").exists()


def test_a_method_that_trains_all_blocks_at_once_gets_as_many_samples(
    make: Callable[..., tuple[Comparison, Quiet]],
) -> None:
    """Its schedule is counted in the model's blocks all the same."""
    found, _ = make(algorithms="dpsgd,deca,local,dec_lora:local_steps=1", seeds="0")
    assert len({row.samples for row in found.rows}) == 1
