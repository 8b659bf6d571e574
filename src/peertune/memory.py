"""Peak memory of this process: resident on the host, allocated on a GPU."""

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
