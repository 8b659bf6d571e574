"""kill -9 at random moments, then --resume: are the final weights bitwise those of a run that was left alone?

The demo's recipe made short, as processes of their own. A run is killed after a random share of the undisturbed run's
time, resumed, and its exported weights compared; and the same recipe is run twice undisturbed.

    python benchmarks/resume.py [--kills 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import finish

SETTINGS = ["algorithm.outer_rounds=1", "algorithm.inner_steps=6", "run.checkpoint_every=1", "data.max_samples=12"]
SETTINGS += ["data.partition.kind=files", "model.max_length=64", "run.threads=1", "eval.max_samples=16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text("")
        started = time.monotonic()
        start(folder, "alone").wait()
        whole_s = time.monotonic() - started
        start(folder, "twin").wait()
        runs: list[dict[str, Any]] = []
        for i in range(options.kills):
            share = rng.uniform(0.3, 0.98)  # before that, Python and the libraries are still loading
            process = start(folder, f"killed-{i}")
            time.sleep(share * whole_s)
            process.send_signal(signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            start(folder, f"killed-{i}", "--resume").wait()
            runs.append({"after_share": share, "was_running": killed, **resumed(folder / f"killed-{i}")})
            runs[-1]["bitwise_equal"] = weights(folder, f"killed-{i}") == weights(folder, "alone")
        twice = weights(folder, "twin") == weights(folder, "alone")
    finish("resume", {"the_same_recipe_twice_is_bitwise_equal": twice, "kills": runs})


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "peertune",
        "run",
        str(folder / "recipe.toml"),
        "--out",
        str(folder / out),
        *options,
    ]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload]


def resumed(out: Path) -> dict[str, Any]:
    """The round a run went on from, if it had a checkpoint."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return {"resumed_after_round": next((e["round"] for e in events if e["event"] == "resume"), None)}


def weights(folder: Path, out: str) -> bytes:
    return (folder / out / "model" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
