"""Memory: this process's peak, resident on the host or on a GPU; what the host has to give; room that is used again."""

import contextlib
import ctypes
import gc
import mmap
import resource
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""What glibc's mallopt calls them."""
KEPT_BLOCK, KEPT_BYTES = 32 << 20, 64 << 20
"""The most that glibc comes to by itself, once a block of that size has been freed."""
_free_rooms: list[mmap.mmap] = []
"""Rooms that nobody uses any more; the system may take their pages."""


def release() -> None:
    """Give back to the system what earlier work has freed, so that the next peak is not theirs (glibc; else a part)."""
    gc.collect()
    _free_rooms.clear()
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed(*, shared: bool = False) -> None:
    """Have freed blocks of up to `KEPT_BLOCK` bytes at hand for the next ones, up to `KEPT_BYTES` of them (glibc).

    Else a megabyte that is freed may go back to the system and has to be taken anew, a page fault for each 4 KB of it.

    Args:
        shared: threads that start from now on share one store of such blocks; with one each, each keeps as much.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, KEPT_BLOCK)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        if shared:
            libc.mallopt(ARENA_MAX, 1)


def room(num_floats: int) -> Tensor:
    """An uninitialised float32 vector; a large one in huge pages where the system has them (Linux).

    A page fault takes longer than decrypting the page does; of huge pages there are 512 times fewer. The pages of a
    large one that is not used any more serve the next one of its size. Until then the system may have them back, and
    until it takes them they count as this process's memory.
    """
    size = 4 * num_floats
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_floats, dtype=torch.float32)
    pages = _free_room(size)
    if pages is None:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(pages)  # lives as long as the tensor's storage
    weakref.finalize(view, _vacate, pages).atexit = False
    return torch.frombuffer(view, dtype=torch.float32)


def _free_room(size: int) -> mmap.mmap | None:
    """A large room of that size that nobody uses. Others are let go: they were of another block's turn."""
    fitting = []
    with contextlib.suppress(IndexError):  # popped, not looked at: another thread may be here as well
        while True:
            pages = _free_rooms.pop()
            if len(pages) == size:
                fitting.append(pages)
    found = fitting.pop() if fitting else None
    _free_rooms.extend(fitting)
    return found


def _vacate(pages: mmap.mmap) -> None:
    with contextlib.suppress(OSError, AttributeError):  # a system that takes no such hint
        pages.madvise(mmap.MADV_FREE)
    _free_rooms.append(pages)


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
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Host memory to be had without swapping, within a container's limit; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))  # files that were read, and may go
    return max(0, free)
