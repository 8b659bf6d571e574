"""What adapters cost on english-4m: memory of N simulated peers on one base, and bytes of a message by kind.

    python benchmarks/adapters.py [--peers 8 16 32 64]

Each figure is of a short run in a process of its own: one round, one local step, AG News. Memory is the process's peak,
data, base, evaluation and libraries included. Bytes are the payload of one message to one neighbour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import RESULTS, finish

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
KINDS = {
    "dec_lora, rank 16, all linear layers": ["algorithm.name=dec_lora"],
    "prompt, 8 tokens": ["algorithm.name=dpsgd", "algorithm.adapter=prompt"],
    "prefix, 8 positions": ["algorithm.name=dpsgd", "algorithm.adapter=prefix"],
    "bottleneck, 16": ["algorithm.name=dec_adapter"],
    "all parameters": ["algorithm.name=dpsgd"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    memory = {}
    for peers in options.peers:
        memory[str(peers)] = short_run([f"run.num_peers={peers}", *KINDS["dec_lora, rank 16, all linear layers"]])[
            "peak_memory_bytes"
        ]
        print(f"{peers} peers: {memory[str(peers)] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    payloads = {}
    for kind, settings in KINDS.items():
        edges = short_run(["run.num_peers=2", *settings])["bytes_by_edge"]
        # One round of gossip and the final agreement: two messages from the root, or the leaf's one and one.
        payloads[kind] = min(edge["payload"] for edge in edges) // 2
    most = payloads["dec_lora, rank 16, all linear layers"]
    finish(
        "adapters",
        {
            "peak_memory_bytes_of_dec_lora_by_peers": memory,
            "payload_bytes_of_a_message": payloads,
            "over_dec_lora": {kind: size / most for kind, size in payloads.items()},
        },
        options.results,
    )


def short_run(settings: list[str]) -> dict[str, Any]:
    """The summary of a run of one round."""
    common = [
        f"model.path={SHARED / 'models' / 'english-4m'}",
        f"data.train={SHARED / 'data' / 'agnews.jsonl.gz'}",
        "data.task=classification",
        "data.max_samples=16",
        "model.max_length=96",
        "run.threads=1",
        "topology.kind=ring",
        "algorithm.rounds=1",
        "algorithm.local_steps=1",
        "algorithm.outer_rounds=1",
        "algorithm.inner_steps=1",
        "algorithm.layers_per_block=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text("")
        command = [sys.executable, "-m", "peertune", "run", f"{folder}/recipe.toml", "--out", f"{folder}/out"]
        command += [part for text in [*common, *settings] for part in ("--set", text)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        summary: dict[str, Any] = json.loads(Path(folder, "out", "summary.json").read_text())
    return summary


if __name__ == "__main__":
    main()
