"""Rounds a second and memory of simulated FedAvg with LoRA: peertune against Flower's simulation engine on Ray.

    python benchmarks/simulate.py --flower-python FLOWER/bin/python

FLOWER is an environment with flwr[simulation], torch, transformers and peft. Both sides train the same adapter on the
same batches of the same clients with the same cores, each in processes of its own, by turns. A round is: every client
takes its local steps, the server averages. The first round, in which processes warm up, and the last, after which
peertune writes a checkpoint, are not counted. Memory is measured in runs of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _harness import RESULTS, finish

from peertune.algorithms import ALGORITHMS, METHODS
from peertune.config import RunConfig
from peertune.data.batches import Batches
from peertune.model.load import load_model
from peertune.prepare import prepare_data
from peertune.progress import Silent
from peertune.recipe import load_recipe
from peertune.run import run
from peertune.seeds import derive_seed

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
HERE = Path(__file__).resolve().parent
MARGIN = 2
"""Rounds that are run and not counted: the first and the last."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flower-python", help="interpreter that has flwr[simulation]; without it only peertune runs")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "agnews.jsonl.gz", help="rows with a text field")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--local-steps", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batched", type=int, default=8, help="peertune's run.batched_peers; 1: a thread a peer")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence; rows are packed")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="peertune's threads; Flower's actors")
    parser.add_argument("--work", type=int, default=480, help="client steps a measurement has at least")
    parser.add_argument("--max-rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", default="fedavg", help="peertune's; another than fedavg only tries the script")
    parser.add_argument("--no-memory", action="store_true", help="leave the runs out that measure memory")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the script started by itself
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.measure:
        print(json.dumps(measure_peertune(json.loads(options.measure.read_text(encoding="utf-8")))), flush=True)
        return
    if options.method not in ALGORITHMS:
        parser().error(f"--method: got {options.method!r}, expected one of {', '.join(ALGORITHMS)}")
    sides = {"peertune": [sys.executable, str(HERE / "simulate.py"), "--measure"]}
    if options.flower_python:
        sides["flower"] = [options.flower_python, str(HERE / "_flower.py")]
        require_flower(options.flower_python)

    figures: dict[str, Any] = {
        "method": options.method,
        "model": options.model.name,
        "data": options.data.name,
        "adapter": {"kind": "lora", "rank": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "batch": [options.batch_size, options.length],
        "cores": options.cores,
        "repeats": options.repeats,
        "settings": [],
    }
    for dtype, clients, local_steps in itertools.product(options.dtype, options.clients, options.local_steps):
        counted = max(1, min(options.max_rounds, -(-options.work // (clients * local_steps))))
        figures["settings"].append(measure(options, sides, dtype, clients, local_steps, counted, figures))
    finish("simulate", figures, options.results)


def require_flower(python: str) -> None:
    """Stop with one line where the interpreter cannot run the Flower side."""
    try:
        done = subprocess.run(
            [python, "-c", "import flwr.simulation, ray, torch, transformers, peft"], capture_output=True, text=True
        )
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        parser().error(
            f"--flower-python: got {python!r}, expected an interpreter with flwr[simulation], torch, transformers and"
            f" peft; {reason}"
        )


def measure(
    options: argparse.Namespace,
    sides: dict[str, list[str]],
    dtype: str,
    clients: int,
    local_steps: int,
    counted: int,
    figures: Any,
) -> dict[str, Any]:
    """Figures of one type, number of clients and local steps, the sides taking turns."""
    batched = options.batched if options.method == "fedavg" else 1
    setting = {"dtype": dtype, "batched_peers": batched, "clients": clients, "local_steps": local_steps}
    found: dict[str, Any] = {**setting, "rounds": counted}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        spec = write_spec(options, Path(scratch), setting, counted + MARGIN)
        for repeat in range(options.repeats):
            for side, command in sides.items():
                runs[side].append(carry_out([*command, str(spec)], Path(scratch) / f"{side}-{repeat}"))
                rate = rounds_per_s(runs[side][-1])
                label = f"{dtype}, {clients} clients, {local_steps} steps, {side}"
                print(f"{label}: {rate:.3f} rounds/s", file=sys.stderr, flush=True)
        if not options.no_memory:
            spec = write_spec(options, Path(scratch), setting, MARGIN)
            for side, command in sides.items():
                runs[side][0] |= carry_out([*command, str(spec)], Path(scratch) / f"{side}-memory", memory=True)
    for side, several in runs.items():
        rates = [rounds_per_s(each) for each in several]
        found[side] = {
            "rounds_per_s": statistics.median(rates),
            "every_rounds_per_s": rates,
            "first_round_s": statistics.median(each["round_ends"][0] - each["started"] for each in several),
            "first_loss": several[0]["losses"][0],
            "last_loss": several[0]["losses"][-1],
        }
        if "peak_bytes" in several[0]:
            found[side]["peak_bytes"] = several[0]["peak_bytes"]
        if side == "flower":
            # The steps of a round over the cores, without what the engine adds.
            busy = [statistics.median(each["fit_s"][1:-1]) * clients / options.cores for each in several]
            found[side]["steps_s"] = statistics.median(busy)
            figures["flower_versions"] = several[0]["versions"]
    if "flower" in found:
        found["peertune_over_flower"] = found["peertune"]["rounds_per_s"] / found["flower"]["rounds_per_s"]
    return found


def rounds_per_s(figures: dict[str, Any]) -> float:
    """Counted rounds over the time from the end of the first round to the end of the last but one."""
    ends = figures["round_ends"]
    return float((len(ends) - MARGIN) / (ends[-2] - ends[0]))


def carry_out(command: list[str], scratch: Path, *, memory: bool = False) -> dict[str, Any]:
    """Run a side; what its last line says, with "started", and with memory "peak_bytes" instead of the times."""
    scratch.mkdir()
    environment = {
        **os.environ,
        "SIMULATE_SCRATCH": str(scratch),
        "OMP_NUM_THREADS": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # No side reports to its makers.
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    del environment["OMP_NUM_THREADS"]
    started = time.monotonic()
    with (scratch / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        peak = Peak(process.pid) if memory else None
        try:
            output, _ = process.communicate()
        finally:
            process.kill()  # where the wait was interrupted; else it has ended
    if process.returncode:
        tail = (scratch / "stderr").read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise RuntimeError(f"{command[1]} ended with exit code {process.returncode}:\n{tail}")
    if peak:
        return {"peak_bytes": peak.stop()}
    return {"started": started, **json.loads(output.decode().strip().splitlines()[-1])}


class Peak:
    """Most memory that a process and all it started hold together, looked at five times a second.

    Proportional set sizes: a page that n processes share counts 1/n in each. Where the system has none, resident sizes.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.bytes = max(self.bytes, self._held())

    def _held(self) -> int:
        total = 0
        try:
            first = psutil.Process(self._pid)
            family = [first, *first.children(recursive=True)]
        except psutil.Error:
            return 0
        for process in family:
            try:
                sizes = process.memory_full_info()
                total += getattr(sizes, "pss", 0) or sizes.rss
            except psutil.Error:
                continue  # it has just ended
        return total


def write_spec(options: argparse.Namespace, scratch: Path, setting: dict[str, Any], rounds: int) -> Path:
    """What a side is to do, as JSON, and the arrays it is to do it on, so that both do the same.

    The .npz holds samples [samples, length], filled up with -100; draws [clients, rounds x steps, batch] of their
    indices; num_samples [clients]; and the first adapter's tensors.
    """
    spec = {
        "method": options.method,
        "model": str(options.model.resolve()),
        "data": str(options.data.resolve()),
        **setting,
        "rounds": rounds,
        "batch_size": options.batch_size,
        "length": options.length,
        "cores": options.cores,
        "rank": 8,
        "lora_alpha": 16,
        "lr": 1e-3,
        "arrays": str(scratch / f"arrays-{rounds}.npz"),
    }
    path = scratch / f"spec-{rounds}.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    config = recipe(spec, scratch / "unused")
    data = prepare_data(config, None)
    samples: list[Any] = []
    draws = []
    for index, held in data.train.items():
        # As `peertune.run` deals them.
        batches = Batches(
            held.samples,
            options.batch_size,
            seed=derive_seed(config.run.seed, index, "batches"),
            pad_id=data.tokenizer.pad_token_id,
        )
        offset = len(samples)
        draws.append([[offset + i for i in batches.draw()] for _ in range(rounds * setting["local_steps"])])
        samples += [sample.input_ids for sample in held.samples]
    # Packed text: only a client's last sequence is shorter than the others.
    padded = np.full((len(samples), max(map(len, samples))), -100)
    for row, sample in zip(padded, samples, strict=True):
        row[: len(sample)] = sample
    adapter = first_adapter(config, spec)
    np.savez(
        spec["arrays"],
        samples=padded,
        draws=np.array(draws),
        num_samples=[len(held.samples) for held in data.train.values()],
        num_adapter=len(adapter),
        **{f"adapter{i}": tensor for i, tensor in enumerate(adapter)},
    )
    return path


def first_adapter(config: RunConfig, spec: dict[str, Any]) -> list[Any]:
    """The tensors of a new adapter, in the order of the model's parameters."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=spec["rank"], lora_alpha=spec["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.manual_seed(0)
        model: Any = get_peft_model(load_model(config.model, torch.device("cpu")), lora)
    return [p.detach().numpy() for p in model.parameters() if p.requires_grad]


def recipe(spec: dict[str, Any], out: Path) -> RunConfig:
    """peertune's recipe of a spec: nothing evaluated, and neither logged nor stored but after the last round."""
    never = spec["rounds"] + 1
    if spec["batched_peers"] > 1:
        cores = [f"run.batched_peers={spec['batched_peers']}", f"run.threads={spec['cores']}"]
    else:
        cores = [f"run.parallel_peers={spec['cores']}", "run.threads=1"]
    settings = [
        f"run.out={str(out)!r}",
        f"run.num_peers={spec['clients']}",
        *cores,
        "run.device=cpu",
        f"run.checkpoint_every={never}",
        f"run.log_every={never}",
        f"model.path={spec['model']!r}",
        f"model.dtype={spec['dtype']}",
        f"model.max_length={spec['length']}",
        f"data.train={spec['data']!r}",
        "data.task=text",
        f"data.batch_size={spec['batch_size']}",
        "data.max_samples=64",
        "data.partition.kind=iid",
        "topology.kind=star",
        f"algorithm.name={spec['method']}",
        f"algorithm.lr={spec['lr']}",
    ]
    if spec["method"] == "fedavg":
        settings += [
            "algorithm.adapter=lora",
            f"algorithm.rounds={spec['rounds']}",
            f"algorithm.local_steps={spec['local_steps']}",
            f"algorithm.rank={spec['rank']}",
            f"algorithm.lora_alpha={spec['lora_alpha']}",
        ]
    else:  # a stand-in with as many rounds and steps, on all parameters at once
        settings += [
            "algorithm.layers_per_block=0",
            "algorithm.outer_rounds=1",
            f"algorithm.inner_steps={spec['rounds'] * spec['local_steps']}",
            f"algorithm.gossip_every={spec['local_steps']}",
        ]
    return load_recipe(None, settings, METHODS)[0]


class Stopwatch(Silent):
    """A `Progress` that notes when rounds end."""

    def __init__(self) -> None:
        self.round_ends: list[float] = []
        self.losses: list[float | None] = []

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        self.round_ends.append(time.monotonic())
        self.losses.append(loss)


def measure_peertune(spec: dict[str, Any]) -> dict[str, Any]:
    """peertune's side: a whole run, as `peertune run` carries it out."""
    watch = Stopwatch()
    run(recipe(spec, Path(os.environ["SIMULATE_SCRATCH"]) / "out"), progress=watch)
    assert len(watch.round_ends) == spec["rounds"], f"{len(watch.round_ends)} rounds, expected {spec['rounds']}"
    return {"round_ends": watch.round_ends, "losses": watch.losses}


if __name__ == "__main__":
    main()
