"""Room for what arrives: whose memory it is, and how it is taken."""

import ctypes
import gc
import mmap
import multiprocessing
import re
import resource
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from peertune.memory import HUGE_PAGE, available_bytes, keep_freed, release, room

LARGE = 8 * HUGE_PAGE // 4
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("size", [0, 1, 1000, HUGE_PAGE // 4, LARGE + 3])
def test_rooms_are_vectors_that_share_nothing(size: int) -> None:
    one, other = room(size), room(size)
    assert one.shape == other.shape == (size,) and one.dtype == torch.float32
    one.fill_(1.0)
    other.fill_(2.0)
    view = one.view(-1)
    del one, other
    gc.collect()
    assert bool((view == 1.0).all()), "the memory stays for as long as a part of it is held"


def test_memory_to_be_had_is_what_a_container_has_left(tmp_path: Path) -> None:
    host = available_bytes(tmp_path / "none")
    assert host is not None
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    for limit, expected in (("1000000", 400_000), ("650000", 50_000), ("500000", 0), ("max", host)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_bytes(tmp_path) == pytest.approx(expected, rel=0.2)


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the system has no huge pages")
def test_a_large_room_is_asked_for_in_huge_pages() -> None:
    """Whether there are any just then is the system's to say."""
    place = room(LARGE).data_ptr()
    found, is_there = list[str](), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ends := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(ends[1], 16) <= place < int(ends[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            found = line.split()
    assert "hg" in found


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="elsewhere the system's allocator decides")
def test_a_room_that_nobody_uses_serves_the_next_one_of_its_size() -> None:
    release()
    first = room(LARGE)
    place, part = first.data_ptr(), first[1:3].fill_(7.0)
    del first
    other = room(LARGE).fill_(1.0)
    assert other.data_ptr() != place and part.tolist() == [7.0, 7.0], "a part of the first is still held"
    del part
    again = room(LARGE)
    assert again.data_ptr() == place
    again.fill_(1.0)
    del again, other
    before = resident()
    room(2 * LARGE)  # another block's turn
    assert resident() < before - 1.5 * LARGE * 4, "what no block needs any more is given back"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def faults() -> int:
    """Page faults of taking eight times a megabyte and giving it back, again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [bytes(1 << 20) for _ in range(8)]
        blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def play(pipe: Connection) -> None:
    counts = [faults()]
    keep_freed()
    faults()
    pipe.send([*counts, faults()])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="mallopt is glibc's")
def test_what_is_freed_is_at_hand_again() -> None:
    """In a process of its own, as it holds from then on."""
    near, far = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=play, args=(far,))
    process.start()
    assert near.poll(300)
    anew, kept = near.recv()
    process.join()
    assert kept < anew / 4


def stores() -> int:
    """Stores of freed memory that this process's threads have."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile() as told:
        file = ctypes.c_void_p(libc.fopen(told.name.encode(), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        return Path(told.name).read_text().count("<heap nr=")


def play_threads(pipe: Connection, shared: bool) -> None:
    keep_freed(shared=shared)
    before, together = stores(), threading.Barrier(6)

    def take() -> None:
        held = bytes(1 << 20)
        together.wait(60)
        del held

    threads = [threading.Thread(target=take) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(stores() - before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="mallopt is glibc's")
def test_threads_share_a_store_where_they_are_told_to() -> None:
    grown = {}
    for shared in (False, True):
        near, far = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=play_threads, args=(far, shared))
        process.start()
        assert near.poll(300)
        grown[shared] = near.recv()
        process.join()
    assert grown[True] == 0 < grown[False]
