"""Federated agents on toolchat-bfcl: the tuned common model against the base and against every peer alone.

Eight peers, each with the conversations of one category of functions. "fedavg" averages LoRA adapters over a server;
"local" gives each peer the same steps, rate and adapter, alone. Loss on the tokens of the calls, and the share of
held-out rows where the right function is the likeliest of those offered; whole generated calls for a few.

    python benchmarks/agents.py [--seeds 0 1] --runs FOLDER [--workers 2] [--set key=value ...]
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

from _harness import RESULTS, finish, kept_run

from peertune.metric import metric_named

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or ROOT.parent / "shared")
METRICS = ("call_loss", "function_name_choice_accuracy", "function_name_accuracy", "call_accuracy", "calls_parsed")
CONTESTANTS = {
    "fedavg": [],
    "local": ["algorithm.name=local", "algorithm.outer_rounds=1", "algorithm.layers_per_block=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=100, help="local steps of a peer")
    parser.add_argument("--rows", type=int, default=150, help="held-out rows, all scored for the choice of function")
    parser.add_argument("--generate", type=int, default=16, help="of them, answered by generation")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], help="override a key for all")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; finished ones are not run again")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    jobs = [(name, seed) for seed in options.seeds for name in CONTESTANTS]
    with ThreadPoolExecutor(options.workers) as pool:
        found = dict(zip(jobs, pool.map(lambda job: run_one(*job, options), jobs), strict=True))
    common = [found["fedavg", seed] for seed in options.seeds]
    alone = [found["local", seed] for seed in options.seeds]
    figures: dict[str, Any] = {"steps": options.steps, "rows": options.rows, "seeds": options.seeds, "set": options.set}
    figures["base"] = {metric: common[0]["before"][metric] for metric in METRICS}
    figures["common"] = {metric: [m["average_model"][metric] for m in common] for metric in METRICS}
    figures["alone"] = {metric: [[peer[metric] for peer in m["peers"]] for m in alone] for metric in METRICS}
    figures["beats_base_and_every_peer_alone"] = {
        metric: [
            all(metric_named(metric).is_better(ours, other) for other in [figures["base"][metric], *peers])
            for ours, peers in zip(figures["common"][metric], figures["alone"][metric], strict=True)
        ]
        for metric in METRICS
    }
    for metric in METRICS[:2]:
        mean = statistics.mean(value for peers in figures["alone"][metric] for value in peers)
        print(f"{metric}: base {figures['base'][metric]:.3f}, alone {mean:.3f} on average, common", end=" ")
        print(", ".join(f"{value:.3f}" for value in figures["common"][metric]))
    finish("agents", figures, options.results)


def run_one(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run's metrics."""
    settings = [
        f"model.path={SHARED / 'models' / 'english-4m'}",
        f"data.train={SHARED / 'data' / 'toolchat-bfcl.jsonl.gz'}",
        f"data.test={SHARED / 'data' / 'toolchat-bfcl-test.jsonl.gz'}",
        "run.threads=1",
        f"run.seed={seed}",
        "run.checkpoint_every=100000",
        f"algorithm.rounds={options.steps // 5}",
        f"algorithm.inner_steps={options.steps}",
        f"eval.max_samples={options.rows}",
        f"eval.choice_samples={options.rows}",
        f"eval.generate_samples={options.generate}",
        *CONTESTANTS[name],
        *options.set,
    ]
    out = kept_run(options.runs, f"{name}-{seed}", ROOT / "recipes" / "fedavg_agents.toml", settings)
    summary = json.loads((out / "summary.json").read_text())
    print(name, seed, f"{summary['wall_s']:.0f} s", file=sys.stderr, flush=True)
    metrics: dict[str, Any] = summary["metrics"]
    return metrics


if __name__ == "__main__":
    main()
