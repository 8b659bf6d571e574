"""Which moment correction is best: DECA's variants on AG News and FPB, learning rate tuned for each.

Eight peers, Dirichlet 0.25, Erdos-Renyi, english-4m in bfloat16, two outer rounds of R = 12 (FPB: 24) on blocks of two
layers, batch 8, 500 rows a peer. For each variant the learning rate is chosen by the average model's accuracy on 500
rows held out of the training file (seed 0, never the test file); then three seeds are run at that rate and scored on
test rows.
Finished cells are kept in results/discrepancy-cells.jsonl and not run again, so the grid can be stopped and resumed.

    python benchmarks/discrepancy.py [--data agnews fpb] [--workers 2] [--quick]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from _harness import finish

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or HERE.parents[1] / "shared")
CELLS = HERE / "results" / "discrepancy-cells.jsonl"
WEIGHT = ["algorithm.bias_correction=weight"]
VARIANTS: dict[str, list[str]] = {
    "none": ["algorithm.discrepancy=none"],
    "paper": ["algorithm.discrepancy=paper"],
    "descent": ["algorithm.discrepancy=descent"],
    "descent_scaled": ["algorithm.discrepancy=descent_scaled"],
    "descent_scaled, weight": ["algorithm.discrepancy=descent_scaled", *WEIGHT],
    "trivial": ["algorithm.discrepancy=trivial", *WEIGHT],
    "local": ["algorithm.name=local"],
    "pooled": ["algorithm.name=pooled"],
}
FIRST_RATES = [1e-3, 2e-3]
NEXT_RATE = {1e-3: 5e-4, 2e-3: 4e-3}
"""The third rate, tried beside the better of the first two."""
SEEDS = [0, 1, 2]
VALIDATION_ROWS = 500
LENGTHS = {"agnews": 96, "fpb": 64}
INNER_STEPS = {"agnews": 12, "fpb": 24}
"""R. With 12, FPB's peers end at the share of its largest class, whatever the variant."""
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["agnews", "fpb"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--two-rates", action="store_true", help="leave out the third learning rate")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--quick", action="store_true", help="one variant, one rate, one seed, a minute; writes nothing"
    )
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            short = ["algorithm.outer_rounds=1", "algorithm.inner_steps=1"]
            print(json.dumps(run_cell(cell("fpb", "none", 5e-4, 0, "validation"), Path(folder), short)))
        return
    grid = Grid(options.workers)
    for data in options.data:
        grid.run([cell(data, v, lr, 0, "validation") for v in options.variants for lr in FIRST_RATES])
        if not options.two_rates:
            grid.run([cell(data, v, grid.next_rate(data, v), 0, "validation") for v in options.variants])
        grid.run([cell(data, v, grid.best_rate(data, v), s, "test") for s in SEEDS for v in options.variants])
    done = {data: [v for v in VARIANTS if grid.is_complete(data, v)] for data in LENGTHS}
    finish("discrepancy", {data: {v: grid.summary(data, v) for v in variants} for data, variants in done.items()})


def cell(data: str, variant: str, lr: float, seed: int, split: str) -> Cell:
    return {"data": data, "variant": variant, "lr": lr, "seed": seed, "split": split}


class Grid:
    """Cells done and to do."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.lock = Lock()
        self.done: dict[str, Cell] = {}
        CELLS.parent.mkdir(exist_ok=True)
        if CELLS.exists():
            for line in CELLS.read_text().splitlines():
                entry = json.loads(line)
                self.done[json.dumps(entry["cell"])] = entry

    def run(self, cells: list[Cell]) -> None:
        todo = [c for c in cells if json.dumps(c) not in self.done]
        with ThreadPoolExecutor(self.workers) as pool, tempfile.TemporaryDirectory() as folder:
            list(pool.map(lambda item: self._one(item[1], Path(folder) / str(item[0])), enumerate(todo)))

    def _one(self, c: Cell, folder: Path) -> None:
        entry = {"cell": c, **run_cell(c, folder, [])}
        with self.lock, CELLS.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            self.done[json.dumps(c)] = entry
        print(json.dumps(entry), file=sys.stderr, flush=True)

    def best_rate(self, data: str, variant: str) -> float:
        """By the average model's validation accuracy; by its loss where two are equal."""

        entries = [
            self.done[key]
            for lr in (*FIRST_RATES, *NEXT_RATE.values())
            if (key := json.dumps(cell(data, variant, lr, 0, "validation"))) in self.done
        ]
        return float(max(entries, key=lambda e: (e["accuracy"], -e["loss"]))["cell"]["lr"])

    def next_rate(self, data: str, variant: str) -> float:
        """The rate beside the better of the first two."""
        done = {lr: self.done[json.dumps(cell(data, variant, lr, 0, "validation"))] for lr in FIRST_RATES}
        return NEXT_RATE[max(FIRST_RATES, key=lambda lr: (done[lr]["accuracy"], -done[lr]["loss"]))]

    def is_complete(self, data: str, variant: str) -> bool:
        """Whether all seeds have been scored on the test rows."""
        if not all(json.dumps(cell(data, variant, lr, 0, "validation")) in self.done for lr in FIRST_RATES):
            return False
        lr = self.best_rate(data, variant)
        return all(json.dumps(cell(data, variant, lr, seed, "test")) in self.done for seed in SEEDS)

    def summary(self, data: str, variant: str) -> dict[str, Any]:
        lr = self.best_rate(data, variant)
        runs = [self.done[json.dumps(cell(data, variant, lr, seed, "test"))] for seed in SEEDS]
        figures: dict[str, Any] = {"lr": lr}
        for key in ("accuracy", "macro_f1", "loss", "peers_accuracy", "worst_peer_accuracy"):
            values = [r[key] for r in runs]
            figures[key] = {"mean": statistics.mean(values), "sd": statistics.stdev(values), "seeds": values}
        return figures


def run_cell(c: Cell, folder: Path, extra: list[str]) -> dict[str, float]:
    """One run in a process of its own; the figures of its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split_files(c["data"], folder)
    settings = [
        "run.threads=1",
        "run.log_every=8",
        "run.checkpoint_every=100000",
        f"run.seed={c['seed']}",
        f"model.path={str(SHARED / 'models' / 'english-4m')!r}",
        "model.dtype=bfloat16",
        f"model.max_length={LENGTHS[c['data']]}",
        f"data.train={str(train)!r}",
        f"data.test={str(test)!r}" if c["split"] == "test" else f"data.test={str(folder / 'validation.jsonl')!r}",
        "data.task=classification",
        "data.max_samples=500",
        "algorithm.outer_rounds=2",
        f"algorithm.inner_steps={INNER_STEPS[c['data']]}",
        f"algorithm.lr={c['lr']}",
        f"eval.max_samples={1000 if c['split'] == 'test' else VALIDATION_ROWS}",
        *VARIANTS[c["variant"]],
        *extra,
    ]
    recipe = folder / "recipe.toml"
    recipe.write_text("")
    command = [sys.executable, "-m", "peertune", "run", str(recipe), "--out", str(folder / "out")]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = json.loads((folder / "out" / "summary.json").read_text())
    average, peers = summary["metrics"]["average_model"], summary["metrics"]["peers"]
    return {
        "accuracy": average["accuracy"],
        "macro_f1": average["macro_f1"],
        "loss": average["loss"],
        "peers_accuracy": statistics.mean(p["accuracy"] for p in peers),
        "worst_peer_accuracy": min(p["accuracy"] for p in peers),
        "before_accuracy": summary["metrics"]["before"]["accuracy"],
        "wall_s": summary["wall_s"],
    }


def split_files(data: str, folder: Path) -> tuple[Path, Path]:
    """The training file without its last rows, which become the validation file, and the test file."""
    with gzip.open(SHARED / "data" / f"{data}.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()
    train = folder / "train.jsonl"
    train.write_text("".join(lines[:-VALIDATION_ROWS]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("".join(lines[-VALIDATION_ROWS:]), encoding="utf-8")
    return train, SHARED / "data" / f"{data}-test.jsonl.gz"


if __name__ == "__main__":
    main()
