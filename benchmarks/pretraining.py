"""Pre-training with rare exchange: DiLoCo and NoLoCo, H = 50, against averaging after every step.

Four peers, 600 local steps, the shape of the packaged tiny model (1.4 M parameters) from random weights, wikitext2 and
tinystories dealt at random, eight sequences of 128 tokens a step and peer. "every_step" is AdamW with the weights
averaged over a server after each step, an all-reduce's traffic; "pooled" is one model on the union of the four batches.

    python benchmarks/pretraining.py [--seeds 0 1] --runs FOLDER [--workers 2] [--set key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _harness import finish, kept_run

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
STEPS, H = 600, 50
INNER = ["algorithm.lr=3e-3", "algorithm.warmup_steps=50", "algorithm.schedule=cosine"]
EVERY_STEP = ["algorithm.name=fedavg", f"algorithm.rounds={STEPS}", "algorithm.local_steps=1"]
RARELY = [f"algorithm.rounds={STEPS // H}", f"algorithm.local_steps={H}"]
POOLED = ["algorithm.outer_rounds=1", f"algorithm.inner_steps={STEPS}", "algorithm.layers_per_block=0"]
CONTESTANTS: dict[str, list[str]] = {
    "every_step": [*EVERY_STEP, "algorithm.reset_moments=false", "topology.kind=star"],
    "pooled": ["algorithm.name=pooled", *POOLED],
    "diloco": ["algorithm.name=diloco", *RARELY, "topology.kind=star"],
    "noloco": ["algorithm.name=noloco", *RARELY, "topology.kind=complete"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], help="override a key for all")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; finished ones are not run again")
    parser.add_argument("--results", type=Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    jobs = [(name, seed) for seed in options.seeds for name in options.contestants]
    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(lambda job: run_one(*job, options.runs, options.set), jobs))
    figures: dict[str, Any] = {
        "steps": STEPS,
        "local_steps": H,
        "seeds": options.seeds,
        "settings": INNER + options.set,
    }
    for name in options.contestants:
        mine = [f for (other, _), f in zip(jobs, found, strict=True) if other == name]
        figures[name] = {
            "loss": statistics.mean(f["loss"] for f in mine),
            "loss_by_seed": [f["loss"] for f in mine],
            "bytes_sent_per_peer": mine[0]["bytes"],
        }
    if "every_step" in figures:
        base = figures["every_step"]
        for name in options.contestants:
            figures[name]["loss_over_every_step"] = figures[name]["loss"] / base["loss"]
            figures[name]["bytes_over_every_step"] = figures[name]["bytes_sent_per_peer"] / base["bytes_sent_per_peer"]
    finish("pretraining", figures, **({"results": options.results} if options.results else {}))


def run_one(name: str, seed: int, runs: Path, extra: list[str]) -> dict[str, float]:
    """Held-out loss of the common model and mean bytes a peer sent in its rounds (agreement left out)."""
    files = {
        key: [str(SHARED / "data" / f"{corpus}{end}.jsonl.gz") for corpus in ("wikitext2", "tinystories")]
        for key, end in (("train", ""), ("test", "-test"))
    }
    settings = [
        "run.num_peers=4",
        "run.threads=1",
        f"run.seed={seed}",
        "run.log_every=50",
        "run.checkpoint_every=100000",
        "model.path=tiny",
        "model.init=random",
        "model.max_length=128",
        "data.task=text",
        "data.partition.kind=iid",
        *(f"data.{key}={json.dumps(paths)}" for key, paths in files.items()),
        "eval.max_samples=400",
        *INNER,
        *CONTESTANTS[name],
        *extra,
    ]
    out = kept_run(runs, f"{name}-{seed}", None, settings)
    summary = json.loads((out / "summary.json").read_text())
    rounds = [e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["event"] == "round"]
    sent = statistics.mean(rounds[-1]["bytes_sent"])
    result = {"loss": summary["metrics"]["average_model"]["loss"], "bytes": sent}
    print(name, seed, extra, result, summary["wall_s"], file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    main()
