"""What every benchmark script shares: clocks, allocator peaks, FLOPs, interleaved medians, and one way to report.

A script ends with `finish(name, figures)`: one JSON object as the last line of its output, and a file in `results/`
that says at which commit, with which versions and on which machine the figures were made.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "badam", "peft")
ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'=:(,])(?:/[\w.~-]+/|[A-Za-z]:\\)")


def finish(name: str, figures: dict[str, Any], results: Path = RESULTS) -> None:
    """Write `results`/`name`.json and print the figures as the last line of the output.

    Args:
        name: the benchmark's name.
        figures: plain JSON data; no text in it may hold an absolute path, which would name the machine it ran on.
        results: the folder to write to.
    Raises:
        ValueError: a text holds an absolute path, or a number is not finite.
    """
    check_portable(figures)
    record = {
        "name": name,
        "figures": figures,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(figures, allow_nan=False), flush=True)


def kept_run(runs: Path, name: str, recipe: Path | None, settings: list[str]) -> Path:
    """The folder of one finished run of `peertune run`, on one thread; run now unless `runs` holds it already.

    Args:
        runs: the folder of all runs; a run's own is named after `name` and a hash of its settings.
        recipe: the recipe file; none means the packaged defaults.
        settings: `key=value` texts that override its keys.
    Raises:
        subprocess.CalledProcessError: the run failed; what it said stands above on the error stream.
    """
    digest = hashlib.sha256(json.dumps([recipe and recipe.read_text(), settings]).encode()).hexdigest()[:8]
    out = runs / f"{name}-{digest}"
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # cut off
        runs.mkdir(parents=True, exist_ok=True)
        if recipe is None:
            recipe = runs / "empty.toml"
            recipe.write_text("")
        command = [sys.executable, "-m", "peertune", "run", str(recipe), "--out", str(out)]
        command += [part for setting in settings for part in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def check_portable(value: Any, where: str = "figures") -> None:
    """Refuse texts with absolute paths and numbers that JSON cannot hold.

    Raises:
        ValueError: as said; names the place in the tree.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_portable(str(key), f"{where}, a key")
            check_portable(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_portable(item, f"{where}[{i}]")
    elif isinstance(value, PurePath) or (isinstance(value, str) and ABSOLUTE_PATH.search(value)):
        raise ValueError(
            f"{where}: got the path {str(value)!r}, expected none; store a name or a relative path as text"
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: got {value}, expected a finite number; leave out what was not measured")


def commit() -> str:
    """The commit measured, with "-dirty" if anything but results differs from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are compared; a missing one is "absent"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine() -> dict[str, Any]:
    """Processor, logical cores, PyTorch's threads, and the GPU's name (None without one)."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Clock:
    """Times a stretch of code: `cpu_s` is the process's user and system time over all threads, `wall_s` the clock's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> Clock:
        self._wait()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait()
        self.cpu_s, self.wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(
    work: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median times of several pieces of work, run in turn so that a slow spell of the machine falls on all of them.

    Args:
        work: name -> what to time.
    Returns:
        name -> {"cpu_s", "wall_s"}, medians over `repeats`.
    """
    samples: dict[str, list[Clock]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            with Clock(device) as clock:
                run()
            samples[name].append(clock)
    return {name: median_times(clocks) for name, clocks in samples.items()}


def ratio(
    work: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, one: str, other: str
) -> dict[str, Any]:
    """`interleaved` times, after a run of each that is not counted, and the CPU time of `one` over that of `other`."""
    for run in work.values():
        run()
    times = interleaved(work, repeats, device)
    key = f"{one}_over_{other}_cpu".replace(" ", "_")
    return {**times, key: times[one]["cpu_s"] / times[other]["cpu_s"]}


def median_times(clocks: list[Clock]) -> dict[str, float]:
    """{"cpu_s", "wall_s"}: each the median of its own."""
    return {
        "cpu_s": statistics.median(clock.cpu_s for clock in clocks),
        "wall_s": statistics.median(clock.wall_s for clock in clocks),
    }


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of matrix products (a multiply-add is two), forward and backward, as torch's FlopCounterMode counts them.

    Fused attention is counted on GPUs only: the counter has no formula for the CPU's kernel.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def peak_bytes(prepare: Callable[[], None], measured: Callable[[], None], device: torch.device) -> int:
    """Most bytes that torch's allocator held during `measured`, counted from before `prepare`.

    What `prepare` leaves (weights, optimiser state) counts; what it frees does not. On a CPU the sum runs over the
    profiler's allocation and free events; memory that kernels take outside torch's allocator is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        measured()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    marker = "peak_bytes: measured"
    with warnings.catch_warnings():
        # Memory older than the profile is freed now and then; it is not ours to count.
        warnings.filterwarnings("ignore", message=".*[Mm]emory block of unknown size.*")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            prepare()
            with torch.profiler.record_function(marker):
                measured()
    # The public event list folds allocations into the operators that made them, and so loses their order.
    results = profile.profiler.kineto_results
    memory: list[tuple[int, int]] = []
    begin = end = 0
    for event in results.events():
        if event.name() == "[memory]":
            memory.append((event.start_ns(), event.nbytes()))
        elif event.name() == marker:
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
    held = peak = 0
    for when, change in sorted(memory, key=lambda item: item[0]):
        if begin <= when <= end:
            peak = max(peak, held)
        held += change
        if begin <= when <= end:
            peak = max(peak, held)
    return peak
