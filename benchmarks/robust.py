"""What robust mixing costs: each rule against the plain weighted mean, on one block of a peer and its neighbours.

python benchmarks/robust.py [--megabytes 256] [--neighbors 4] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from _harness import RESULTS, finish, interleaved, peak_bytes

from peertune.config import ExchangeSection
from peertune.exchange import Inbox
from peertune.robust import robust_inbox

RULES = {"plain": "none", "clip": "clip", "trimmed_mean": "trimmed_mean"}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("megabytes", 256), ("neighbors", 4), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    members, size = range(options.neighbors + 1), options.megabytes * 1_000_000 // 4
    payloads = {j: {"block": torch.randn(size, generator=rng)} for j in members}
    inbox = Inbox(dict.fromkeys(members, 1 / len(members)), payloads)
    server = Inbox(dict.fromkeys(members[1:], 1 / options.neighbors), payloads)
    figures = {}
    for who, received in (("peer", inbox), ("server", server)):
        rules = {
            name: robust_inbox(ExchangeSection.model_validate({"robust": rule}), 0, received)
            for name, rule in RULES.items()
        }
        work = {name: partial(rule.mean, "block") for name, rule in rules.items()}
        times = interleaved(work, options.repeats, CPU)
        figures[who] = {
            name: {
                **times[name],
                "cpu_over_plain": times[name]["cpu_s"] / times["plain"]["cpu_s"],
                "wall_over_plain": times[name]["wall_s"] / times["plain"]["wall_s"],
                "peak_over_block": peak_bytes(lambda: None, mean, CPU) / (4 * size),
            }
            for name, mean in work.items()
        }
    settings = {name: value for name, value in vars(options).items() if name != "results"}
    finish("robust", {**settings, **figures}, options.results)


if __name__ == "__main__":
    main()
