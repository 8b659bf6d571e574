"""Chooses the runtime of `peertune run`: simulation, or one peer a process where torchrun started this one."""

from __future__ import annotations

from typing import Any

from peertune.algorithms import ALGORITHMS
from peertune.config import RunConfig
from peertune.errors import ConfigError
from peertune.run import Progress, Silent, run
from peertune.runtimes.distributed import DistributedGroup, is_first_rank, is_launched, local_device, process_group


def launch(config: RunConfig, *, progress: Progress, **options: Any) -> dict[str, Any]:
    """As `run`; one peer a process where torchrun started this one among others, else in simulation.

    Args:
        progress: told by rank 0 only.
    """
    if not is_launched():
        return run(config, progress=progress, **options)
    if ALGORITHMS[config.algorithm.name].pools_data:
        raise ConfigError(
            f"algorithm.name: got {config.algorithm.name!r} under torchrun, but it trains one model on all data; start"
            " it without torchrun"
        )
    device = local_device(config.run.device)
    heard = progress if is_first_rank() else Silent()
    with process_group(device):
        return run(config, progress=heard, connect=DistributedGroup, device=device, **options)
