"""Sixteen sites on a ring, 50 rounds: do memory, threads or file descriptors grow?

    python benchmarks/leaks.py [--sites 16] [--rounds 50]

A process a site on loopback, DECA's shape without its turns: every round trains and exchanges the same block of the
packaged tiny model, so that rounds can be compared. After each round every site's process is looked at from outside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _harness import RESULTS, finish
from _sites import Sites, say

KEYS = ("memory_mb", "threads", "descriptors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--limit-s", type=float, default=1800.0, help="give up after")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    recipe: dict[str, Any] = {
        "run": {"checkpoint_every": 5},
        "model": {"path": "tiny", "max_length": 64},
        "data": {"task": "text", "batch_size": 2},
        "topology": {"kind": "ring"},
        "algorithm": {"name": "dpsgd", "lr": 1e-3, "outer_rounds": 1, "inner_steps": options.rounds},
        "eval": {"max_samples": 20},
    }
    names = [f"site{i:02}" for i in range(options.sites)]
    with tempfile.TemporaryDirectory() as folder:
        sites = Sites(Path(folder) / "run", names, recipe, grace_s=60.0, stall_s=30.0)
        try:
            found = watch(sites, options)
            codes = [sites.wait(name, 600.0) for name in names]
        finally:
            sites.end()
    first, last = options.rounds * 2 // 5, max(found)
    figures: dict[str, Any] = {"sites": options.sites, "rounds": last, "exit_codes": codes, "compared": [first, last]}
    for key in KEYS:
        early, late = ({name: found[at][name][key] for name in names} for at in (first, last))
        figures[key] = {
            "first": statistics.median(early.values()),
            "last": statistics.median(late.values()),
            "largest_growth": max(late[name] - early[name] for name in names),
            "by_round": [statistics.median(each[key] for each in found[at].values()) for at in sorted(found)],
        }
        say(f"{key}: {figures[key]}")
    finish("leaks", figures, options.results)


def watch(sites: Sites, options: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """Round -> site -> what its process held when it was seen to have finished that round."""
    for name in sites.names:
        sites.start_under(name, {"OMP_NUM_THREADS": "1"})  # a fork would come to own what it shares page by page
    found: dict[int, dict[str, dict[str, float]]] = {}
    end = time.monotonic() + options.limit_s
    done = dict.fromkeys(sites.names, 0)
    while any(done[name] < options.rounds - 1 for name in sites.names) and time.monotonic() < end:
        for name in sites.names:
            process = sites.processes[name]
            if process.is_alive() and (now := sites.round(name)) > done[name]:
                seen = psutil.Process(process.pid)
                # What is its own: pages of libraries that all share do not count.
                held = {"memory_mb": seen.memory_full_info().uss / 1e6, "threads": seen.num_threads()}
                held["descriptors"] = seen.num_fds()
                for at in range(done[name] + 1, now + 1):
                    found.setdefault(at, {})[name] = held
                done[name] = now
        time.sleep(0.1)
    whole = {at: each for at, each in found.items() if len(each) == len(sites.names)}
    if not whole:
        raise RuntimeError("no round was finished by all sites")
    return whole


if __name__ == "__main__":
    main()
