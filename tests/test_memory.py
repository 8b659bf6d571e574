"""Room for what arrives: whose memory it is, and how it is taken."""

import ctypes
import gc
import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from peertune.memory import HUGE_PAGE, keep_freed, room

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


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the system has no huge pages")
def test_a_large_room_takes_few_page_faults() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    room(LARGE).fill_(1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < LARGE * 4 // 4096 // 4


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
    assert near.poll(120)
    anew, kept = near.recv()
    process.join()
    assert kept < anew / 4
