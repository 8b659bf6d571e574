"""Five sites as five processes on loopback, each with a key, data and a folder of its own, by the commands one types.

    python scripts/local_consortium.py [FOLDER]

Each site holds one package group of Python's standard library; nothing but the active block's weights leaves it. The
steps are those of docs/consortium.md, printed as they are taken. Ctrl-C ends all sites; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from peertune.data.stdlib import load_stdlib

SITES = ["north", "east", "south", "west", "centre"]
RECIPE = """\
[run]
num_peers = 5
threads = 1
checkpoint_every = 5

[model]
path = "tiny"
max_length = 128

[data]
task = "text"
batch_size = 8

[topology]
kind = "ring"

[algorithm]
name = "deca"
lr = 1e-2
schedule = "linear"
eps = 2e-3
outer_rounds = 1
inner_steps = 10

[eval]
max_samples = 100
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("local-consortium"))
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    charter = folder / "charter.toml"
    if charter.exists():
        print(f"{charter} is there already: going on with it", flush=True)
    else:
        write_data(folder)
        agree(folder, charter, [part for text in options.set for part in ("--set", text)])
    sites = {name: join(folder, charter, name) for name in SITES}
    try:
        codes = {name: site.wait() for name, site in sites.items()}
    except KeyboardInterrupt:
        return 130
    for name in SITES:
        summary = folder / name / "run" / "summary.json"
        if summary.exists():
            metrics = json.loads(summary.read_text())["metrics"]
            before, after = metrics["before"]["loss"], metrics["average_model"]["loss"]
            print(f"{name:7} held-out loss {before:.3f} -> {after:.3f}   model: {folder / name / 'run' / 'model'}")
        else:
            print(f"{name:7} ended with exit code {codes[name]}: {folder / name / 'log'}")
    return max(codes.values())


def write_data(folder: Path) -> None:
    """A site's rows are those of every fifth package group; the held-out rows are the same for all."""
    for split in ("train", "test"):
        rows, group = load_stdlib(split)
        for number, name in enumerate(SITES):
            (folder / name).mkdir(exist_ok=True)
            mine = [row for row, g in zip(rows, group, strict=True) if split == "test" or g % len(SITES) == number]
            lines = [json.dumps({"text": row["text"]}) + "\n" for row in mine]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def agree(folder: Path, charter: Path, overrides: list[str]) -> None:
    """Keys, the charter, and everybody's signature under it."""
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    members = []
    for name in SITES:
        id = peertune("keygen", "--identity", folder / name / "key").stdout.strip()
        # On a ring of five, three open a port; the other two only dial out, as from behind a firewall.
        address = f"@127.0.0.1:{free_port()}" if name in ("north", "south", "centre") else ""
        members += ["--member", f"{name}={id}{address}"]
    peertune("charter", "new", folder / "recipe.toml", *members, *overrides, "--expires", "2999-12-31", "--to", charter)
    for name in SITES:
        peertune("charter", "sign", charter, "--identity", folder / name / "key")


def join(folder: Path, charter: Path, name: str) -> subprocess.Popen[str]:
    home = folder / name
    command = [
        *("join", charter, "--data", home / "train.jsonl", "--test", home / "test.jsonl"),
        *("--identity", home / "key", "--out", home / "run"),
    ]
    show(*command)
    with (home / "log").open("a") as log:
        return subprocess.Popen(argv(*command), stdout=log, stderr=log, text=True)


def peertune(*arguments: object) -> subprocess.CompletedProcess[str]:
    show(*arguments)
    return subprocess.run(argv(*arguments), check=True, stdout=subprocess.PIPE, text=True)


def argv(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "peertune", *map(str, arguments)]


def show(*arguments: object) -> None:
    print("$ peertune " + shlex.join(map(str, arguments)), flush=True)


def free_port() -> int:
    """Of those that a system gives to nobody by itself: it is some time until a site opens it."""
    for port in random.sample(range(20000, 32768), 1000):
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


if __name__ == "__main__":
    sys.exit(main())
