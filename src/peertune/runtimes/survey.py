"""The lines between a site and its neighbours, measured one after the other before a run.

A neighbour answers while it joins, or surveys its own lines. One who opens no port comes by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import grpc

from peertune.logfields import text
from peertune.runtimes.frames import ProtocolError
from peertune.runtimes.neighbor import MAX_REASON
from peertune.runtimes.node import Node
from peertune.runtimes.probe import BUSY, CONNECT_S, TOO_OFTEN, LineQuality, diagnose


class Survey:
    """What is found out about the lines of a node; it runs in the network's thread.

    Args:
        heard: (event, peer, reason) that the node logs, as they come.
    """

    def __init__(self, node: Node, others: Sequence[int], wait_s: float, heard: Collection[tuple[str, str, str]]):
        self.node, self.others, self.wait_s, self.heard = node, others, wait_s, heard
        self.measured: dict[int, LineQuality] = {}
        self.failures: dict[int, str] = {}
        """Neighbour -> why this site could not reach it."""
        self.postponed: dict[int, str] = {}
        """Neighbour that was reached -> why it does not let itself be measured now."""

    async def ask_all(self) -> None:
        """Measure each neighbour who can be dialled, and let the others come."""
        members, probe = self.node.charter.members, self.node.probe
        end = time.monotonic() + self.wait_s
        await asyncio.gather(*(self._ask(i, end) for i in self.others if members[i].address))
        while time.monotonic() < end and any(self._may_come(i) for i in self.others):
            await asyncio.sleep(0.05)
        async with probe.slot:  # whoever is at it may finish
            self.measured = {i: probe.visits[i] for i in self.others if i in probe.visits} | self.measured

    async def _ask(self, index: int, end: float) -> None:
        """Measure one line, or say why that failed."""
        end, is_busy = max(end, time.monotonic() + CONNECT_S), False
        async with self.node.channel(index) as channel:
            while time.monotonic() < end:
                try:
                    await asyncio.wait_for(channel.channel_ready(), end - time.monotonic())
                    self.measured[index] = await self.node.probe.measure(channel)
                    return
                except TimeoutError:
                    break
                except grpc.RpcError as error:
                    code, is_busy = error.code(), error.code() is BUSY
                    if code is grpc.StatusCode.UNIMPLEMENTED:
                        self.failures[index] = "it runs another peertune, which cannot be measured"
                        return
                    if code is TOO_OFTEN:
                        self.postponed[index] = text(error.details(), MAX_REASON)
                        return
                    if code not in (BUSY, grpc.StatusCode.UNAVAILABLE):
                        self.failures[index] = f"it refuses: {text(error.details(), MAX_REASON)}"
                        return
                    # Two who ask each other at the same moment both find the other busy: not twice.
                    await asyncio.sleep(0.1 + 0.05 * self.node.index)
                except ProtocolError as error:
                    self.failures[index] = f"it {error}"
                    return
        if not is_busy:
            self.failures[index] = await diagnose(self.node.charter, index)

    def came(self, index: int) -> bool:
        """Whether the neighbour has dialled this site."""
        name = self.node.charter.members[index].name
        return index in self.node.probe.visits or any(
            peer == name and event in ("turned_away", "refused") for event, peer, _ in self.heard
        )

    def refusal(self, index: int) -> str:
        """Why the neighbour's run was refused when it dialled this site; empty: it was not."""
        name = self.node.charter.members[index].name
        return next((reason for event, peer, reason in self.heard if (event, peer) == ("refused", name)), "")

    def _may_come(self, index: int) -> bool:
        """Whether it is worth waiting for a neighbour who can dial this site, and has not."""
        if self.came(index) or not self.can_come:
            return False
        return index not in self.measured or self.measured[index].doing == "doctor"

    @property
    def can_come(self) -> bool:
        """Whether anybody can dial this site."""
        return self.node.is_open and bool(self.node.charter.members[self.node.index].address)
