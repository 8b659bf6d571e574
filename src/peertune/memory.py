"""Memory: this process's peak, resident on the host or allocated on a GPU; and what the host has to give."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


def release() -> None:
    """Give back to the system what earlier work has freed, so that the next peak is not theirs (glibc; else a part)."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Start measuring anew, where the system can (Linux; CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Without such a file, or the right to write it, the peak is that of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: allocated on the GPU, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int | None:
    """Host memory to be had without swapping, within a container's limit; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
