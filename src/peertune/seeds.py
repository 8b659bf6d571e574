"""Seeds of every random draw, derived from (run seed, who, what for) and never from global state.

Two runtimes that ask for the same purpose get the same numbers, whatever else they drew before.
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(run_seed, peer_index, "batches", epoch)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_rng(seed: int, *purpose: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def torch_rng(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU torch generator for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
