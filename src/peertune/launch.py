"""Chooses the runtime of `peertune run`: simulation, or torchrun's processes where it started this one."""

from __future__ import annotations

from functools import partial
from typing import Any

from peertune.algorithms import ALGORITHMS
from peertune.config import RunConfig
from peertune.errors import ConfigError
from peertune.progress import Progress, Silent
from peertune.run import run
from peertune.runtimes.distributed import DistributedGroup, is_first_rank, is_launched, local_device, process_group


def launch(config: RunConfig, *, progress: Progress, **options: Any) -> dict[str, Any]:
    """As `run`; one peer a process, or several, where torchrun started this one among others, else in simulation.

    Args:
        progress: told by rank 0 only.
    Raises:
        ConfigError: beside those of `run`, the recipe asks for what several processes cannot do.
    """
    if not is_launched():
        return run(config, progress=progress, **options)
    if ALGORITHMS[config.algorithm.name].pools_data:
        raise ConfigError(
            f"algorithm.name: got {config.algorithm.name!r} under torchrun, but it trains one model on all data; start"
            " it without torchrun"
        )
    count = config.run.ranks_per_peer
    check_ranks(config)
    device = local_device(config.run.device)
    heard = progress if is_first_rank() else Silent()
    with process_group(device):
        connect = partial(DistributedGroup, ranks_per_peer=count)
        return run(config, progress=heard, connect=connect, device=device, ranks_per_peer=count, **options)


def check_ranks(config: RunConfig) -> None:
    """Refuse what a peer of several ranks cannot do. Raises ConfigError."""
    count, method = config.run.ranks_per_peer, config.algorithm
    if count == 1:
        return
    for key, value, wrong, instead in (
        (
            "algorithm.name",
            method.name,
            not ALGORITHMS[method.name].elementwise,
            "a method that mixes element by element",
        ),
        ("algorithm.discrepancy", "trivial", getattr(method, "discrepancy", "") == "trivial", "one without a norm"),
        ("algorithm.adapter", method.adapter, method.adapter in ("prompt", "prefix"), "'none', 'lora' or 'bottleneck'"),
        ("exchange.robust", "clip", config.exchange.robust == "clip", "'trimmed_mean' or 'none'"),
        ("model.quantization", config.model.quantization, config.model.quantization != "none", "'none'"),
        ("model.compile", True, config.model.compile, "false"),
        ("data.batch_size", config.data.batch_size, config.data.batch_size < count, "a sequence for each rank"),
    ):
        if wrong:
            raise ConfigError(
                f"{key}: got {value!r} with run.ranks_per_peer = {count}, expected {instead}; change it, or set"
                " run.ranks_per_peer = 1"
            )
