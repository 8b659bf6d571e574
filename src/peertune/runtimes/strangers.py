"""Who connects to a site's port and shows no member's key.

gRPC ends such a connection within the TLS handshake and tells nobody, but as one begins it asks which certificate to
show. Who is there then is read from the sockets that this process has open; who makes no member's call in time after
that is a stranger.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

LOOK_S = 1.0
"""Seconds between looks at who has not made a call in time."""
SHARE = 10
"""Of the time, one part in so many goes into finding out who is there, however many connect."""
AGAIN_S = 600.0
"""Seconds after which a host is written down again."""
MAX_KNOWN = 1024
"""Connections, and hosts, that are remembered."""

Address = tuple[str, int]
"""Host and port."""


class Strangers:
    """Connections to one port that have not made a member's call yet.

    Args:
        log: told of a stranger's host once, and after `AGAIN_S` once more, with how often it was `repeated` meanwhile.
        patience_s: in which a member makes a call.
    """

    def __init__(self, log: Callable[..., None], patience_s: float) -> None:
        self.port = 0
        """The one that is open."""
        self._log, self._patience_s = log, patience_s
        self._open: set[Address] = set()
        """As they were found at the last look."""
        self._since: dict[Address, float] = {}
        self._hosts: dict[str, tuple[float, int]] = {}
        """When a host was written down last, and its connections since."""
        self._next_look = 0.0
        self._lock = threading.Lock()

    def knocked(self) -> None:
        """A connection begins. In any thread of gRPC's."""
        with self._lock:
            now = time.monotonic()
            if now < self._next_look:
                return  # the next look finds it, if it is still there
            here = _peers(self.port)
            if here is None:
                return  # else all who are there would look new at the next look
            for address in here - self._open:
                if len(self._since) < MAX_KNOWN:
                    self._since[address] = now
            self._open = here
            self._next_look = now + SHARE * (time.monotonic() - now)

    def is_member(self, peer: str) -> None:
        """A member makes a call.

        Args:
            peer: where from, as gRPC writes it.
        """
        host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
        with self._lock, suppress(ValueError):
            address = _address(host.strip("[]"), int(port))
            self._since.pop(address, None)
            self._open.add(address)  # where no look has found it yet

    async def watch(self) -> None:
        """Write down who has not made a call in time, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.knocked()
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Write down who has not made a call in time."""
        with self._lock:
            strangers = [address for address, since in self._since.items() if now - since > self._patience_s]
            for address in strangers:
                del self._since[address]
        for host, port in strangers:
            written, count = self._hosts.pop(host, (-AGAIN_S, 0))
            if now - written < AGAIN_S:
                self._hosts[host] = written, count + 1
                continue
            more = {"repeated": count} if count else {}
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._log("stranger", peer=where, reason="showed no member's key", **more)
            if len(self._hosts) >= MAX_KNOWN:
                del self._hosts[next(iter(self._hosts))]
            self._hosts[host] = now, 0


def _peers(port: int) -> set[Address] | None:
    """Who is at the other end of this process's connections to one of its ports; None: no system says it, or not now,
    as where the process has no descriptor left to ask with.
    """
    if socket.getdefaulttimeout() is not None:
        return None  # Python would take it for all that are looked at, and make others' sockets non-blocking
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return None
    found: set[Address] = set()
    for name in names:
        with suppress(OSError, ValueError):  # no socket, no connection, or just closed
            connection = socket.socket(fileno=int(name))
            try:
                is_ip = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_ip and connection.getsockname()[1] == port:
                    found.add(_address(*connection.getpeername()[:2]))
            finally:
                connection.detach()  # it is gRPC's
    return found


def _address(host: str, port: int) -> Address:
    """As the same host and port always look. Raises ValueError."""
    ip = ip_address(host.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return str(ip), port
