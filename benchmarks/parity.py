"""The same recipe as simulation, as ranks and as sites over gRPC: are the weights bitwise equal?

    python benchmarks/parity.py [--methods deca dec_lora fedavg] [--peers 4]

english-4m on AG News, one file a peer, one thread a process. Prints, for each method, the SHA-256 of the exported
weights by runtime, and whether they are one. Ranks talk over Gloo, or over NCCL where each has a GPU of its own; with
fewer GPUs they are left out. Sites may share a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
from _harness import RESULTS, finish, free_port
from safetensors import safe_open

SHARED = Path(os.environ.get("PEERTUNE_TEST_DATA") or Path(__file__).parents[2] / "shared")
ALGORITHMS: dict[str, dict[str, Any]] = {
    "deca": {"outer_rounds": 1, "inner_steps": 6},
    "dec_lora": {"rounds": 6, "local_steps": 2},
    "fedavg": {"rounds": 4, "local_steps": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "english-4m")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "agnews.jsonl.gz", help="labelled rows")
    parser.add_argument("--rows", type=int, default=64, help="rows of a peer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    figures: dict[str, Any] = {"peers": options.peers, "model": options.model.name, "rows": options.rows}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            figures[method] = compare(method, options, Path(folder))
    figures["all_equal"] = all(figures[method]["equal"] for method in options.methods)
    finish("parity-gpu" if torch.cuda.is_available() else "parity", figures, options.results)


def compare(method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Hashes of a method's exported weights, by runtime, and the seconds each took, start-up included."""
    files = write_rows(options, folder)
    recipe = {
        "run": {"num_peers": options.peers, "threads": 1},
        "model": {"path": str(options.model), "max_length": 96},
        "data": {
            "train": [str(file) for file in files[:-1]], "test": str(files[-1]), "task": "classification",
            "partition": {"kind": "files"},
        },
        "topology": {"kind": "star", "weights": "samples"} if method == "fedavg" else {"kind": "ring"},
        "algorithm": {"name": method, "lr": 1e-3, **ALGORITHMS[method]},
    }  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    members = options.peers + (method == "fedavg")
    gpus = torch.cuda.device_count()
    ways: dict[str, Callable[[Path], object]] = {"simulation": lambda out: peertune("run", path, "--out", out)}
    if not 0 < gpus < members:
        ways["nccl" if gpus else "gloo"] = lambda out: ranks(path, out, members)
    ways["grpc"] = lambda out: sites(path, out, members, files, options)
    hashes, seconds = {}, {}
    for name, way in ways.items():
        out, start = folder / name, time.monotonic()
        way(out)
        seconds[name] = time.monotonic() - start
        hashes[name] = [weights_hash(each) for each in ([out] if name != "grpc" else sorted(out.iterdir()))]
    every = {hash for found in hashes.values() for hash in found}
    return {"sha256": {name: sorted(set(found)) for name, found in hashes.items()}, "equal": len(every) == 1,
            "models": {name: len(found) for name, found in hashes.items()}, "seconds": seconds}  # fmt: skip


def write_rows(options: argparse.Namespace, folder: Path) -> list[Path]:
    """A file for each peer, and one to measure on."""
    with gzip.open(options.data, "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range((options.peers + 1) * options.rows), strict=False)]
    files = []
    for i in range(options.peers + 1):
        files.append(folder / f"rows-{i}.jsonl")
        files[-1].write_text("".join(lines[i :: options.peers + 1]), encoding="utf-8")
    return files


def ranks(recipe: Path, out: Path, members: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={members}", "-m", "peertune"]
    subprocess.run([sys.executable, *command, "run", str(recipe), "--out", str(out)], check=True, capture_output=True)


def sites(recipe: Path, out: Path, members: int, files: list[Path], options: argparse.Namespace) -> None:
    keys, charter = recipe.parent / "keys", recipe.parent / "charter.toml"
    named = []
    for i in range(members):
        id = peertune("keygen", "--identity", keys / str(i)).strip()
        named += ["--member", f"site{i}={id}@127.0.0.1:{free_port()}#{options.rows}"]
    peertune("charter", "new", recipe, *named, "--expires", "2999-12-31", "--to", charter)
    for i in range(members):
        peertune("charter", "sign", charter, "--identity", keys / str(i))
    running = []
    for i in range(members):
        data = ["--data", files[i]] if i < options.peers else []
        command = ["join", charter, *data, "--test", files[-1], "--identity", keys / str(i), "--out", out / str(i)]
        running.append(start(*command, "--model", options.model))
    for site in running:
        if site.wait():
            raise SystemExit(f"a site failed: {site.stderr.read().decode() if site.stderr else ''}")


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "peertune", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def peertune(*arguments: object) -> str:
    command = [sys.executable, "-m", "peertune", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def weights_hash(out: Path) -> str:
    """Of the exported tensors, by name."""
    digest = hashlib.sha256()
    for file in sorted((out / "model").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                digest.update(name.encode() + tensors.get_tensor(name).contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
