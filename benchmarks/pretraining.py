"""Pre-training with rare exchange: DiLoCo and NoLoCo, H = 50, against averaging after every step.

Four peers, 600 local steps, a Llama of 0.46 M parameters with the packaged tokenizer from random weights, wikitext2 and
tinystories dealt at random, 32 sequences of 128 tokens a step and peer. "every_step" is AdamW with the weights averaged
over a server after each step, an all-reduce's traffic; "pooled" is one model on the union of the four batches.

The outer momentum is lower than DiLoCo's 0.9 (--set algorithm.server_momentum=0.9): with twelve outer steps in all,
what the first of them adds would still be added to the last. NoLoCo's is lower still, as the mean of a pair is noisier,
and its pull is whole: three settings were tried on seed 0, two on both. And with batches of 8 in place of 32 peers
drift apart so far in fifty steps that their mean falls behind by more than a tenth.

    python benchmarks/pretraining.py [--seeds 0 1] --runs FOLDER [--workers 2] [--set key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _harness import finish, kept_run

from peertune.model.load import TINY, resolve_path

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
STEPS, H = 600, 50
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 16}
INNER = ["algorithm.lr=3e-3", "algorithm.warmup_steps=50", "algorithm.schedule=cosine"]
EVERY_STEP = ["algorithm.name=fedavg", f"algorithm.rounds={STEPS}", "algorithm.local_steps=1"]
RARELY = [f"algorithm.rounds={STEPS // H}", f"algorithm.local_steps={H}"]
OUTER = ["algorithm.server_lr=0.9", "algorithm.server_momentum=0.5"]
GOSSIP = ["algorithm.outer_lr=1.0", "algorithm.outer_momentum=0.3", "algorithm.gamma=1.0"]
POOLED = ["algorithm.outer_rounds=1", f"algorithm.inner_steps={STEPS}", "algorithm.layers_per_block=0"]
CONTESTANTS: dict[str, list[str]] = {
    "every_step": [*EVERY_STEP, "algorithm.reset_moments=false", "topology.kind=star"],
    "pooled": ["algorithm.name=pooled", *POOLED],
    "diloco": ["algorithm.name=diloco", *RARELY, *OUTER, "topology.kind=star"],
    "noloco": ["algorithm.name=noloco", *RARELY, *GOSSIP, "topology.kind=complete"],
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
    make_shape(options.runs / "shape")
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
        f"model.path={runs / 'shape'}",
        "model.init=random",
        "model.dtype=bfloat16",
        "data.batch_size=32",
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


def make_shape(folder: Path) -> None:
    """Write a folder with the model's config and the packaged tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(resolve_path(TINY), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHAPE))


if __name__ == "__main__":
    main()
