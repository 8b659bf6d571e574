"""What a site's machine has to give: its port, a device, the run's folder, room on the disk and in memory."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import Algorithm
from peertune.config import RunConfig
from peertune.doctor.finding import Finding, problem
from peertune.errors import IdentityError, InputError
from peertune.formatting import memory, plural, traffic
from peertune.prepare import resolve_device
from peertune.run_folder import RunFolder
from peertune.runtimes.node import Node
from peertune.storage import nearest_existing
from peertune.workload import foreseen_bytes, needed_bytes


def check_port(node: Node) -> Finding:
    """Start this site's end of the lines; whether its port can be opened, where it has one."""
    try:
        node.start([])
    except IdentityError as error:
        return problem("port", error, "name another with --listen")
    if not node.listen:
        return Finding("port", "ok", "none: this site only dials out")
    return Finding("port", "ok", f"{node.listen} can be opened")


def check_device(config: RunConfig) -> tuple[torch.device, list[Finding]]:
    """Where the site would train; the CPU where that is not to be had."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    try:
        device = resolve_device(config.run.device)
    except InputError as error:
        return torch.device("cpu"), [problem("device", error, "set run.device")]
    if device.type == "cpu":
        return device, [Finding("device", "ok", f"no GPU in use: the CPU, {plural(torch.get_num_threads(), 'thread')}")]
    free, total = torch.cuda.mem_get_info(device)
    text = f"{torch.cuda.get_device_name(device)}, {memory(free)} of {memory(total)} free"
    return device, [Finding("device", "ok", text, values={"free_bytes": free})]


def check_folder(config: RunConfig, site: int) -> list[Finding]:
    """What is wrong with the run's folder. It is made and removed again where it is not there: only that tells."""
    folder = RunFolder(Path(config.run.out))
    path = folder.path
    made: list[Path] = []
    try:
        folder.check(config.to_dict(), folder.holds_run, site)
        made = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except InputError as error:
        return [problem("folder", error, "name another with --out")]
    except OSError as error:
        return [Finding("folder", "problem", f"{path} cannot be made: {error.strerror}", "name another with --out")]
    finally:
        for each in made:
            with suppress(OSError):  # it was not made, or is in use already
                each.rmdir()
    return []


def check_disk(config: RunConfig, algorithm: Algorithm) -> Finding:
    """Whether there is room for what the run writes."""
    folder, need = RunFolder(Path(config.run.out)), foreseen_bytes(algorithm, 1)
    try:
        folder.require_space(need)
    except InputError as error:
        return problem("disk", error, "name another folder with --out")
    free = shutil.disk_usage(nearest_existing(folder.path)).free
    text = f"{traffic(free)} free for {folder.path}, the run needs about {traffic(need)}"
    text += "; it holds this run already, which goes on" * folder.holds_run
    return Finding("disk", "ok", text, values={"free_bytes": free, "need_bytes": need})


def check_memory(algorithm: Algorithm, num_neighbors: int, device: torch.device, available: int | None) -> Finding:
    """Whether there is room for weights, optimiser and messages.

    Args:
        available: bytes the host had to give before the base was loaded; None: not known.
    """
    weights, messages = needed_bytes(algorithm, num_neighbors)
    need = weights + messages
    text = f"about {memory(need)} needed: {memory(weights)} for weights and optimiser, {memory(messages)} for messages"
    text += "; a batch's activations come on top"
    values: dict[str, Any] = {"need_bytes": need, "available_bytes": available}
    room = available
    if device.type == "cuda":
        held = sum(p.numel() * p.element_size() for p in algorithm.peer.model.module.parameters())
        room, need = torch.cuda.mem_get_info(device)[0] + held, weights
        text += f"; the GPU has {memory(room)}"
        if available is not None and available < messages:
            return Finding("memory", "problem", f"{text}; the host {memory(available)}", "free some memory", values)
    elif room is None:
        return Finding("memory", "warning", text, "see that there is so much: this system does not say", values)
    else:
        text += f"; {memory(room)} available"
    if room < need:
        advice = "free some, take a machine with more, or agree on smaller blocks, an adapter, or bfloat16"
        return Finding("memory", "problem", text, advice, values)
    if room < 1.5 * need:
        return Finding("memory", "warning", text, "watch it while the first rounds go on", values)
    return Finding("memory", "ok", text, values=values)
