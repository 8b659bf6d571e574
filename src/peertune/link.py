"""Simulated time: what the rounds of a run would take if each peer had a machine and a link of its own.

    seconds of a round = max_i local_i + sum over hops of (latency + max_i bytes_i * 8 / bandwidth)

local_i is what peer i's local phase takes, which one process can measure as its peers take turns: by the clock; where
one thread does it (run.threads = 1, or run.parallel_peers), its CPU time, which does not hang on what else the machine
does. bytes_i is what peer i sends in the hop to all its targets, headers included, over one uplink. A round waits for
its slowest peer. Mixing and evaluation are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from peertune.config import LinkSection


def hop_seconds(bytes_sent: Sequence[int], link: LinkSection) -> float:
    """Seconds of one hop.

    Args:
        bytes_sent: by peer, what it puts on its uplink.
    Returns:
        0 where nobody sends anything.
    """
    largest = max(bytes_sent, default=0)
    if largest == 0:
        return 0.0
    return link.latency_ms / 1e3 + largest * 8 / (link.bandwidth_mbit * 1e6)


class Clock:
    """Simulated seconds of the run so far."""

    def __init__(self, link: LinkSection) -> None:
        self.link = link
        self.simulated_s = 0.0

    def local(self, wall_s: Sequence[float]) -> None:
        """Count a round's local phases, seconds by peer."""
        self.simulated_s += max(wall_s)

    def hop(self, bytes_sent: Sequence[int]) -> None:
        """Count one hop, bytes by peer."""
        self.simulated_s += hop_seconds(bytes_sent, self.link)
