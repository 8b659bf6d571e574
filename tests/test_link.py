"""The link model: what simulated time is made of, and that runs keep it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peertune.algorithms.base import LocalReport
from peertune.config import LinkSection
from peertune.link import Clock, hop_seconds
from peertune.run import run
from peertune.run_folder import RunFolder
from peertune.runtimes import Member, play_round
from peertune.runtimes.simulation import Mailbox
from tests.recipes import killed_after, recipe

LINK = LinkSection(bandwidth_mbit=8.0, latency_ms=250.0)  # a megabyte a second


def test_a_hop_takes_its_latency_and_the_largest_message() -> None:
    assert hop_seconds([1_000_000, 3_000_000, 0], LINK) == pytest.approx(3.25)
    assert hop_seconds([0, 0], LINK) == hop_seconds([], LINK) == 0.0


def test_a_round_waits_for_its_slowest_peer() -> None:
    clock = Clock(LINK)
    clock.local([0.5, 2.0, 1.0])
    clock.hop([500_000, 500_000, 0])
    clock.local([1.0, 0.0, 0.0])
    assert clock.simulated_s == pytest.approx(2.0 + 0.75 + 1.0)


def test_a_run_counts_each_hop_of_training_and_agreement(tmp_path: Path, micro_model: Path) -> None:
    """On a ring of equal messages the time without computing is known: 16 gossip hops, and the final agreement's."""
    slow = {"bandwidth_mbit": 1e-3, "latency_ms": 0.0}
    summary = run(recipe(tmp_path, micro_model, link=slow))
    cpu = summary["cpu_s_per_peer"]
    assert len(cpu) == 4 and all(spent > 0 for spent in cpu) and summary["cpu_s"] == pytest.approx(sum(cpu))
    # Gossip sends alike from all peers; in the agreement the busiest of each hop counts.
    pairs = zip(summary["bytes_sent_per_peer"], summary["header_bytes_sent_per_peer"], strict=True)
    sent = [payload + header for payload, header in pairs]
    assert max(sent) <= summary["simulated_s"] * 1e3 / 8 <= sum(sent)


@pytest.mark.parametrize(("threads", "seconds"), [(1, 5.0), (2, 7.0)])
def test_a_local_phase_of_several_threads_takes_what_the_clock_says(
    threads: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process's CPU time is that of all of them; of one, it is what a busy machine does not lengthen."""
    done, peer = [0], SimpleNamespace(device=torch.device("cpu"))

    def local(round: int) -> LocalReport:
        done[0] += 1
        return LocalReport(torch.tensor(1.0), torch.tensor(1.0), 0.1)

    method: Any = SimpleNamespace(local=local, hops=lambda round: (), peer=SimpleNamespace(model=peer, batches=()))
    clocks = SimpleNamespace(process_time=lambda: 5.0 * done[0], perf_counter=lambda: 7.0 * done[0])
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("peertune.runtimes.rounds.time", clocks)
    [report] = play_round(0, [Member(method, Mailbox().endpoint(0))])
    assert report is not None and (report.cpu_s, report.wall_s) == (5.0, seconds)


def test_simulated_time_goes_on_over_an_interruption(tmp_path: Path, micro_model: Path) -> None:
    """Over so slow a link that computing takes no share of it, an interrupted run has the time of a whole one."""
    link = {"bandwidth_mbit": 1e-3, "latency_ms": 0.0}
    whole = run(recipe(tmp_path, micro_model, link=link, run={"out": str(tmp_path / "whole")}))
    with killed_after(8):
        run(recipe(tmp_path, micro_model, link=link))
    resumed = run(recipe(tmp_path, micro_model, link=link), resume=True)
    assert resumed["simulated_s"] == pytest.approx(whole["simulated_s"], rel=1e-2)
    assert len(resumed["cpu_s_per_peer"]) == 4


def test_the_link_is_no_part_of_what_a_resumed_run_must_repeat(tmp_path: Path, micro_model: Path) -> None:
    run(recipe(tmp_path, micro_model))
    other = recipe(tmp_path, micro_model, link={"bandwidth_mbit": 1.0, "latency_ms": 0.0})
    RunFolder(tmp_path / "out").check(other.to_dict(), resume=True)
