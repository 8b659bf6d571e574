"""DeCAF's mixing: QR of the stacked factors against the SVD of the whole averaged product, one linear layer.

python benchmarks/decaf.py [--hidden 2048] [--rank 16] [--neighbors 3] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from _harness import finish, interleaved
from torch import Tensor

from peertune.algorithms.decaf import average_product


def naive(weights: list[float], factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The product [out, in] is formed and decomposed."""
    rank = factors[0][1].shape[0]
    product = sum(w * b @ a for w, (b, a) in zip(weights, factors, strict=True))
    assert isinstance(product, Tensor)
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 2048), ("rank", 16), ("neighbors", 3), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    count = options.neighbors + 1
    weights = [1 / count] * count
    factors = [
        (
            torch.randn(options.hidden, options.rank, generator=rng),
            torch.randn(options.rank, options.hidden, generator=rng),
        )
        for _ in range(count)
    ]
    (b, a), (naive_b, naive_a) = average_product(weights, factors), naive(weights, factors)
    exact = naive_b @ naive_a
    work = {"qr": partial(average_product, weights, factors), "naive": partial(naive, weights, factors)}
    times = interleaved(work, options.repeats, torch.device("cpu"))
    finish(
        "decaf",
        {
            **vars(options),
            "qr": times["qr"],
            "naive": times["naive"],
            "qr_over_naive_cpu": times["qr"]["cpu_s"] / times["naive"]["cpu_s"],
            "relative_difference": float((b @ a - exact).norm() / exact.norm()),
        },
    )


if __name__ == "__main__":
    main()
