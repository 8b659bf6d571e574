"""Simulated time: what the rounds of a run would take if each peer had a machine and a link of its own.

    seconds of a round = max_i cpu_i + sum over hops of (latency + max_i bytes_i * 8 / bandwidth)

cpu_i is the process CPU time of peer i's local phase, which one process can measure although its peers take turns; on a
GPU it is the time to launch the kernels only. bytes_i is what peer i sends in the hop to all its targets, headers
included, over one uplink. A round waits for its slowest peer. Mixing and evaluation are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    """CPU seconds of each peer's local phases, and simulated seconds of the run so far."""

    def __init__(self, num_peers: int, link: LinkSection) -> None:
        self.link = link
        self.cpu_s = [0.0] * num_peers
        self.simulated_s = 0.0

    def local(self, cpu_s: Sequence[float]) -> None:
        """Count a round's local phases, CPU seconds by peer."""
        self.cpu_s = [total + spent for total, spent in zip(self.cpu_s, cpu_s, strict=True)]
        self.simulated_s += max(cpu_s)

    def hop(self, bytes_sent: Sequence[int]) -> None:
        """Count one hop, bytes by peer."""
        self.simulated_s += hop_seconds(bytes_sent, self.link)

    def state_dict(self) -> dict[str, Any]:
        return {"cpu_s": self.cpu_s, "simulated_s": self.simulated_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cpu_s, self.simulated_s = list(state["cpu_s"]), float(state["simulated_s"])
