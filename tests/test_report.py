"""The report: what it shows for whole, young, small and large runs, and that it is safe and self-contained."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peertune.errors import CheckpointError
from peertune.report import charts, series, text, write_report
from peertune.report.events import read_run
from peertune.report.page import SECTIONS
from peertune.seeds import numpy_rng

LABELS = ("Business", "Sci/Tech", "Sports", "World")
BLOCKS = ("layers 0", "layers 1", "layers 2", "layers 3", "final norm and head")
VOID = {"meta", "br", "link", "img"}
Events = list[dict[str, Any]]


def metropolis(num_peers: int, edges: Sequence[tuple[int, int]]) -> list[list[float]]:
    """A mixing matrix with rows that sum to 1, as a run writes it."""
    degree = Counter(node for edge in edges for node in edge)
    weights = [[0.0] * num_peers for _ in range(num_peers)]
    for i, j in edges:
        weights[i][j] = weights[j][i] = 1 / (1 + max(degree[i], degree[j]))
    for i, row in enumerate(weights):
        row[i] = 1 - sum(row)
    return weights


def synthetic_events(
    num_peers: int = 8,
    num_rounds: int = 240,
    labels: Sequence[str] = LABELS,
    blocks: Sequence[str] = BLOCKS,
    task: str = "classification",
    inner_steps: int = 12,
    seed: int = 0,
) -> Events:
    """The events of a finished DECA run with plausible numbers."""
    rng = numpy_rng(seed, "report")
    pairs = [(i, j) for i in range(num_peers) for j in range(i + 1, num_peers)]
    kept = [p for p in pairs if rng.random() < min(0.5, 6 / num_peers) or p[1] - p[0] == 1]
    weights = metropolis(num_peers, kept)
    shares = rng.dirichlet([0.25] * num_peers, size=len(labels)) if labels else []
    held = [{label: int(3000 * shares[c][p]) for c, label in enumerate(labels)} for p in range(num_peers)]
    samples = [sum(h.values()) + 40 for h in held]
    classification = task == "classification"

    def metrics(progress: float, peer: bool = False) -> dict[str, float]:
        loss = 2.9 - 2.1 * progress + (0.2 * rng.random() * progress if peer else 0)
        if not classification:
            return {"loss": loss, "perplexity": math.exp(loss)}
        accuracy = 0.27 + 0.61 * progress - (0.1 * rng.random() * progress if peer else 0)
        return {"loss": loss, "accuracy": accuracy, "macro_f1": accuracy - 0.02}

    time = 1_760_000_000.0
    events: Events = [
        {
            "event": "start",
            "time": time,
            "config": {
                "run": {"seed": seed, "num_peers": num_peers, "out": "runs/latest", "device": "auto", "log_every": 1},
                "model": {"path": "tiny", "dtype": "float32", "max_length": 256},
                "data": {
                    "train": "stdlib" if not classification else "ag_news/train.parquet",
                    "task": task,
                    "batch_size": 8,
                    "partition": {"kind": "dirichlet", "alpha": 0.25, "column": "", "min_size": 1, "seed": None},
                },
                "topology": {"kind": "erdos_renyi", "p": 0.5, "edges": [], "weights": "metropolis"},
                "algorithm": {
                    "name": "deca" if num_peers > 1 else "pooled",
                    "lr": 5e-5,
                    "betas": [0.9, 0.999],
                    "inner_steps": inner_steps,
                    "moment_correction": True,
                },
                "eval": {"every": 40, "max_samples": 1000},
            },
            "versions": {"peertune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.3"},
            "notes": ["Tied embeddings are frozen (model.train_embeddings = untied)."],
            "model": {"parameters": 4_213_760, "trained": 3_150_000, "frozen": ["model.embed_tokens.weight"]},
            "blocks": [
                {"index": i, "name": name, "parameters": 740_000 - 17_000 * i, "tensors": 9} for i, name in enumerate(blocks)
            ],
            "peers": [
                {
                    "samples": samples[p],
                    "sequences": samples[p] - p % 3,
                    "tokens": samples[p] * 61,
                    "cut": 3 * p,
                    "dropped": 0,
                    "classes": {k: v for k, v in held[p].items() if v},
                }
                for p in range(num_peers)
            ],
            "edges": [list(p) for p in kept],
            "weights": weights if num_peers > 1 else [],
            "lambda2": 0.743 if num_peers > 1 else 0.0,
            "rounds": num_rounds,
        },
        {"event": "eval", "time": time, "round": 0, "average_model": metrics(0), "peers": None},
    ]
    sent = [0] * num_peers
    for r in range(num_rounds):
        progress = 1 - math.exp(-4 * (r + 1) / num_rounds)
        for p in range(num_peers):
            sent[p] += 740_000 * 4 * sum(p in pair for pair in kept)
        turn = r // inner_steps
        events.append(
            {
                "event": "round",
                "time": time + 0.4 * r,
                "round": r,
                "outer_round": turn // max(1, len(blocks)),
                "block": turn % max(1, len(blocks)),
                "inner_step": r % inner_steps,
                "loss": [2.8 - 2 * progress + 0.06 * p / num_peers + 0.09 * float(rng.normal()) for p in range(num_peers)],
                "lr": 5e-5,
                "grad_norm": [1.0] * num_peers,
                "consensus_distance": (
                    0.002 * (1 + r % inner_steps) ** 0.5 * math.exp(0.2 * float(rng.normal())) if num_peers > 1 else None
                ),
                "bytes_sent": list(sent),
                "epochs": [8 * (r + 1) / samples[p] for p in range(num_peers)],
                "wall_s": 0.4 * (r + 1),
            }
        )
        if (r + 1) % 40 == 0 and r + 1 < num_rounds:
            peers = [metrics(progress, True) for _ in range(num_peers)] if num_peers > 1 else None
            events.append({"event": "eval", "time": time, "round": r + 1, "average_model": metrics(progress), "peers": peers})
    final = {"before": metrics(0), "average_model": metrics(1), "peers": [metrics(1, True) for _ in range(num_peers)]}
    if num_peers > 1:
        events.append({"event": "agreement", "time": time, "hops": 4, "bytes_sent": [s + 12_600_000 for s in sent]})
    events.append({"event": "end", "time": time, "metrics": final, "wall_s": 0.4 * num_rounds, "peak_memory_bytes": 734_003_200})
    return events


def save(run_dir: Path, events: Events, tail: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run_dir / "events.jsonl").write_text(lines + tail, encoding="utf-8")
    return run_dir
