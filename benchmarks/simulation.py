"""What a simulation of eight peers costs beyond their training steps: the exchange and the bookkeeping.

One DECA run of eight peers, measured round by round, in turn with the bare steps of the same eight peers (local phase:
forward, backward, block Adam). A whole round adds snapshots, gossip, the moment correction, the consensus distance,
the event log and the checkpoints. CPU seconds, medians over rounds; the default recipe otherwise.

    python benchmarks/simulation.py [--inner-steps 48] [--threads 1] [--dtypes float32 bfloat16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import finish

from peertune.algorithms import METHODS
from peertune.prepare import prepare_data, prepare_model
from peertune.progress import Silent
from peertune.recipe import load_recipe
from peertune.run import Run
from peertune.run_folder import RunFolder
from peertune.run_setup import Inputs
from peertune.runtimes.simulation import SimulatedGroup

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner-steps", type=int, default=48, help="rounds of a block's turn; one sweep is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {
        "threads": options.threads,
        "peers": 8,
        "model": "english-4m",
        "batch": "8 rows of AG News",
    }
    for dtype in options.dtypes:
        figures[dtype] = measure(dtype, options.inner_steps)
    finish("simulation", figures)


def measure(dtype: str, inner_steps: int) -> dict[str, float]:
    """Medians of CPU seconds a round, whole and bare, over one sweep of the blocks."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.out={folder + '/out'!r}",
            f"model.path={str(SHARED / 'models' / 'english-4m')!r}",
            f"model.dtype={dtype}",
            "model.max_length=128",
            f"data.train={str(SHARED / 'data' / 'agnews.jsonl.gz')!r}",
            "data.task=classification",
            "algorithm.outer_rounds=1",
            f"algorithm.inner_steps={inner_steps}",
        ]
        whole, bare = simulation(settings, folder), simulation([*settings, "algorithm.name=local"], folder)
        whole.folder.create({})
        ratios, wholes, bares = [], [], []
        for round in range(whole.method.num_rounds):
            started = time.process_time()
            whole._round(round)
            middle = time.process_time()
            for member in bare.members:
                member.algorithm.local(round)
            ended = time.process_time()
            wholes.append(middle - started)
            bares.append(ended - middle)
            ratios.append(wholes[-1] / bares[-1])
        return {
            "round_cpu_s": statistics.median(wholes),
            "bare_steps_cpu_s": statistics.median(bares),
            "ratio_of_sums": sum(wholes) / sum(bares),
            "median_ratio": statistics.median(ratios),
        }


def simulation(settings: list[str], folder: str) -> Run:
    config, _ = load_recipe(None, settings, METHODS)
    cpu = torch.device("cpu")
    data, module = prepare_data(config, None), prepare_model(config, cpu, None)
    counts = [len(rendered.samples) for rendered in data.train.values()]
    inputs = Inputs(config=config, data=data, module=module, counts=counts, device=cpu)
    return Run(inputs, RunFolder(Path(folder)), Silent(), SimulatedGroup)


if __name__ == "__main__":
    main()
