"""The cells of a comparison, each an ordinary run folder, carried out one after the other and resumable.

DIR/tune/<name>/<key-value>/           the choice of a setting, on rows kept back for validation, first seed
DIR/probe/<name>[/<key-value>]/seed-<s>/   a short run that tells what a step costs (budgets of bytes and seconds)
DIR/cells/<name>/seed-<s>/             what is compared
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peertune.algorithms import METHODS
from peertune.compare import budget as budgets
from peertune.compare.cells import Cell, DivergedCell, Summary, metric_of, quality, read_cell
from peertune.compare.contestants import Contestant, Lineup
from peertune.compare.inputs import check_inputs, fingerprints, version_notes, write_inputs
from peertune.compare.options import Options, Tune, is_number
from peertune.compare.workers import carry_out, diverged, play_ahead
from peertune.config import AlgorithmConfig, RunConfig
from peertune.data.load import load_table
from peertune.errors import ConfigError, DivergedError
from peertune.memory import release
from peertune.metric import METRICS
from peertune.progress import Progress
from peertune.recipe import from_dict
from peertune.report.events import read_run
from peertune.run_folder import RunFolder
from peertune.storage import check_writable

NUM_POINTS = 8
"""Evaluations of a cell on the way, where the recipe does not say."""
VALIDATION_ROWS = 500
VALIDATION_SEED = 0
"""One choice of those rows for all cells, whatever their seeds: what rates are chosen by is never trained on."""
VALIDATION_SHARE = 10
"""Rows kept back for tuning where the recipe keeps none: VALIDATION_ROWS, at most one row in VALIDATION_SHARE."""


FREE_KEYS = {"run.out", "run.log_every", "run.checkpoint_every"}
"""Keys that may differ between cells done before and those to come: the others show in tables or curves."""


class GridProgress(Protocol):
    """Told how a comparison goes on."""

    def note(self, message: str) -> None:
        """A sentence for the user."""

    def cell(self, label: str, number: int, total: int) -> AbstractContextManager[Progress]:
        """A cell begins, the `number`-th of `total` from 1; finished ones are passed over."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The choice of a setting for one contestant."""

    contestant: str
    key: str
    values: tuple[float | int, ...]
    qualities: tuple[float | None, ...]
    """On the validation rows, by value; None where training diverged."""
    best: float | int | None
    """None where training diverged with every value."""

    @property
    def is_at_edge(self) -> bool:
        """Whether a value beyond the grid may be better."""
        return self.best in (self.values[0], self.values[-1])


class Grid:
    """All cells. Building it refuses what cannot be compared; nothing is written before `tune` or `play`."""

    def __init__(self, lineup: Lineup, options: Options, progress: GridProgress) -> None:
        contestants = lineup.contestants
        self.contestants, self.options, self.progress = contestants, options, progress
        self.base = options.recipes[0].parent
        first = contestants[0].config
        check_writable(options.out, "--out")
        if options.workers > 1 and options.budget != "samples":
            raise ConfigError(
                f"--workers: got {options.workers} with --budget {options.budget}, where a cell waits for the first"
                " contestant's; expected 1, or --budget samples"
            )
        if options.workers > 1 and not first.run.threads:
            raise ConfigError(
                f"--workers: got {options.workers} with run.threads = 0, where each would take all cores; set it, such"
                " as --set run.threads=1"
            )
        if first.eval.split == "test" and not first.data.test:
            raise ConfigError("data.test: got none, expected held-out rows to compare on; set it, or eval.split")
        self.validation_rows = first.data.validation_rows
        if options.tune is not None:
            self._check_tune(options.tune)
            self.validation_rows = self.validation_rows or self._rows_for_tuning()
        self.budget = budgets.Budget(lineup, options, self.base, progress.note)
        self._number = 0
        self._heard: set[str] = set()
        self._inputs = fingerprints(first, self.base)
        check_inputs(options.out, self._inputs)
        self._check_known_cells()
        self.version_notes = version_notes(options.out, contestants)
        """Whose finished runs are of other versions."""
        for sentence in self.version_notes:
            progress.note(sentence)

    def tune(self) -> list[Tuned]:
        """Try the grid's values on the first seed and choose by the validation rows; nothing where none was asked."""
        write_inputs(self.options.out, self._inputs)
        tune = self.options.tune
        if tune is None:
            return []
        reference: Summary | None = None
        found = []
        if self.options.workers > 1:
            ahead = [
                (self._tuning_config(tune, contestant, value, None), _tuning_label(tune, contestant, value))
                for contestant in self.contestants
                for value in tune.values
            ]
            self._ahead(ahead)
        for contestant in self.contestants:
            qualities: list[float | None] = []
            best: tuple[Summary, float | int] | None = None
            for value in tune.values:
                config = self._tuning_config(tune, contestant, value, reference)
                summary = None if config is None else self._play(config, _tuning_label(tune, contestant, value))
                if summary is None:
                    qualities.append(None)
                    continue
                reference = reference or summary
                qualities.append(quality(summary, metric_of(summary)))
                if best is None or _is_preferred(summary, best[0]):
                    best = (summary, value)
            found.append(
                Tuned(
                    contestant=contestant.name,
                    key=tune.key,
                    values=tune.values,
                    qualities=tuple(qualities),
                    best=None if best is None else best[1],
                )
            )
        return found

    def play(self, tuned: Sequence[Tuned] = ()) -> list[Cell | DivergedCell]:
        """Run all cells with the chosen settings: seed by seed, the contestants in their order.

        A contestant that diverged with every value it was tuned over is not run again.
        """
        chosen = {choice.contestant: choice.best for choice in tuned if choice.best is not None}
        lost = {choice.contestant for choice in tuned if choice.best is None}
        cells: list[Cell | DivergedCell] = []
        if self.options.workers > 1:
            self._ahead(
                [
                    (self._cell_config(contestant, seed, chosen, None), f"{contestant.name}, seed {seed}")
                    for seed in self.options.seeds
                    for contestant in self.contestants
                    if contestant.name not in lost
                ]
            )
        for seed in self.options.seeds:
            reference: Summary | None = None
            for contestant in self.contestants:
                name, folder = contestant.name, self._cell_folder(contestant, seed)
                config = None if name in lost else self._cell_config(contestant, seed, chosen, reference)
                summary = None if config is None else self._play(config, f"{name}, seed {seed}")
                if summary is None:
                    cells.append(DivergedCell(contestant=name, seed=seed, folder=folder))
                    continue
                reference = reference or summary
                cells.append(read_cell(name, seed, folder, summary))
        return cells

    def _tuning_config(
        self, tune: Tune, contestant: Contestant, value: float | int, reference: Summary | None
    ) -> RunConfig | None:
        folder = self.options.out / "tune" / contestant.slug / _spell(tune.key, value)
        return self._fitted(contestant, self.options.seeds[0], value, reference, folder, validation=True)

    def _cell_config(
        self, contestant: Contestant, seed: int, chosen: Mapping[str, float | int], reference: Summary | None
    ) -> RunConfig | None:
        value = chosen.get(contestant.name)
        return self._fitted(contestant, seed, value, reference, self._cell_folder(contestant, seed))

    @property
    def num_cells(self) -> int:
        """Runs of the whole comparison, tuning and probes included."""
        count, seeds = len(self.contestants), len(self.options.seeds)
        values = len(self.options.tune.values) if self.options.tune else 0
        with_probe = 0 if self.options.budget == "samples" else count - 1
        return (count + with_probe) * (seeds + values)

    def _fitted(
        self,
        contestant: Contestant,
        seed: int,
        value: float | int | None,
        reference: Summary | None,
        folder: Path,
        *,
        validation: bool = False,
    ) -> RunConfig | None:
        """A cell's recipe, its number of steps fitted to the budget; None where its probe diverged.

        Args:
            value: of the key that is tuned.
            reference: the first contestant's cell of the same kind; None for that cell itself, and where it diverged.
        Raises:
            DivergedError: the first contestant diverged, so what it spends is not known.
        """
        config = self._config(contestant, seed, value, folder, validation)
        algorithm, blocks = config.algorithm, self.budget.num_blocks[contestant.name]
        first = self.contestants[0]
        steps = self.budget.steps(algorithm)
        if self.options.budget == "samples" or contestant is first:
            return _with_algorithm(config, algorithm.with_steps(steps, blocks))
        if reference is None:
            raise DivergedError(
                f"--budget {self.options.budget}: {first.name}, the first contestant, diverged (seed {seed}), so what"
                " the others may spend is not known; name another first, lower its algorithm.lr, or take --budget"
                " samples, with another --out"
            )
        probe = self._probe(
            contestant, seed, value, self.budget.fit(algorithm, max(1, steps // budgets.PROBE_SHARE), blocks)
        )
        taken = probe.algorithm.num_steps(blocks)
        summary = self._play(probe, f"{contestant.name}, seed {seed}, probe")
        if summary is None:
            return None
        if self.options.budget == "bytes":
            events = read_run(Path(probe.run.out))
            steps = budgets.steps_for_bytes(budgets.bytes_a_peer(reference), summary, events, taken, steps)
        else:
            steps = budgets.steps_for_seconds(float(reference["cpu_s"]), summary, taken)
        return _with_algorithm(config, self.budget.fit(algorithm, steps, blocks))

    def _config(
        self, contestant: Contestant, seed: int, value: float | int | None, folder: Path, validation: bool = False
    ) -> RunConfig:
        tree = contestant.config.to_dict()
        tree["run"] |= {"seed": seed, "out": str(folder)}
        tree["data"]["validation_rows"] = self.validation_rows
        if self.validation_rows and tree["data"]["validation_seed"] is None:
            tree["data"]["validation_seed"] = VALIDATION_SEED
        if validation:
            tree["eval"] |= {"split": "validation", "every": 0, "points": 0}
        elif not tree["eval"]["every"]:
            tree["eval"]["points"] = tree["eval"]["points"] or NUM_POINTS
        if value is not None:
            assert self.options.tune is not None
            tree["algorithm"][self.options.tune.key] = value
        return from_dict(tree, METHODS)[0]

    def _probe(
        self, contestant: Contestant, seed: int, value: float | int | None, algorithm: AlgorithmConfig
    ) -> RunConfig:
        folder = self.options.out / "probe" / contestant.slug
        if value is not None and self.options.tune is not None:
            folder /= _spell(self.options.tune.key, value)
        config = self._config(contestant, seed, value, folder / f"seed-{seed}")
        # What a step costs needs no evaluation.
        data = config.data.model_copy(update={"test": ""})
        evaluation = config.eval.model_copy(update={"every": 0, "points": 0, "split": "test"})
        return _with_algorithm(config, algorithm).model_copy(update={"data": data, "eval": evaluation})

    def _play(self, config: RunConfig, label: str) -> Summary | None:
        """One run: taken as it is where it is finished, else begun or gone on with; None where it diverged."""
        self._number += 1
        folder = RunFolder(Path(config.run.out))
        folder.check(config.to_dict(), resume=True, free=FREE_KEYS)
        if folder.summary.exists():
            return folder.read_summary()
        if diverged(folder.path):
            return None
        release()
        with self.progress.cell(label, self._number, self.num_cells) as progress:
            summary = carry_out(config, self.base, _Once(progress, self._heard))
        if summary is None:
            self.progress.note(f"{label}: diverged")
        return summary

    def _ahead(self, cells: Sequence[tuple[RunConfig | None, str]]) -> None:
        """Run what is not finished with all workers; `_play` then finds it. For --budget samples, as checked above."""
        known = [(config, label) for config, label in cells if config is not None]
        play_ahead(known, self.base, self.options.workers, self.progress.note)

    def _cell_folder(self, contestant: Contestant, seed: int) -> Path:
        return self.options.out / "cells" / contestant.slug / f"seed-{seed}"

    def _check_tune(self, tune: Tune) -> None:
        if self.contestants[0].config.eval.split != "test":
            raise ConfigError(
                '--tune: got it with eval.split = "validation", expected "test": tuning splits off its own'
            )
        for contestant in self.contestants:
            algorithm = contestant.config.algorithm
            now = getattr(algorithm, tune.key, "")
            if now is not None and not is_number(now):
                numeric = [key for key, value in algorithm if is_number(value)]
                raise ConfigError(
                    f"--tune {tune.key}: {contestant.name} has no such number under [algorithm]; it has"
                    f" {', '.join(numeric)}"
                )
            if contestant.sets(tune.key):
                raise ConfigError(
                    f"--tune {tune.key}: {contestant.name!r} sets it itself; leave it out of one of the two"
                )
            for value in tune.values:
                tree = contestant.config.to_dict()
                tree["algorithm"][tune.key] = value
                for remark in from_dict(tree, METHODS)[1]:
                    if remark.startswith(f"algorithm.{tune.key} "):
                        raise ConfigError(f"--tune {tune.key}: {contestant.name}: {remark}; tune another key")

    def _rows_for_tuning(self) -> int:
        section = self.contestants[0].config.data
        total = len(load_table(section.train, section, base=self.base).rows)
        rows = min(VALIDATION_ROWS, total // VALIDATION_SHARE)
        if rows == 0:
            raise ConfigError(
                f"--tune: data.train has {total} rows, too few to keep a tenth back for validation; set"
                " data.validation_rows"
            )
        return rows

    def _check_known_cells(self) -> None:
        """Refuse a folder of another comparison before hours are spent; what is tuned or probed is known later."""
        if self.options.tune is None and self.options.budget == "samples":
            for seed in self.options.seeds:
                for contestant in self.contestants:
                    folder = self._cell_folder(contestant, seed)
                    config = self._fitted(contestant, seed, None, None, folder)
                    assert config is not None  # no probe is needed
                    RunFolder(folder).check(config.to_dict(), resume=True, free=FREE_KEYS)


class _Once:
    """A cell's progress that says each sentence once in the whole grid."""

    def __init__(self, progress: Progress, heard: set[str]) -> None:
        self._progress, self._heard = progress, heard

    def note(self, message: str) -> None:
        if message not in self._heard:
            self._heard.add(message)
            self._progress.note(message)

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        self._progress.rounds(done, total, loss)


def _with_algorithm(config: RunConfig, algorithm: AlgorithmConfig) -> RunConfig:
    return config.model_copy(update={"algorithm": algorithm})


def _is_preferred(one: Summary, other: Summary) -> bool:
    """Better by the metric; where they are equal, by the loss."""
    metric = metric_of(one)
    a, b = quality(one, metric), quality(other, metric)
    return METRICS[metric].is_better(a, b) if a != b else quality(one, "loss") < quality(other, "loss")


def _tuning_label(tune: Tune, contestant: Contestant, value: float | int) -> str:
    return f"{contestant.name}, tuning {tune.key} = {value:g}"


def _spell(key: str, value: float | int) -> str:
    return f"{key}-{value!r}"
