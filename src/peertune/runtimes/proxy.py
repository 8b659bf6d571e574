"""The HTTP proxy through which gRPC reaches an address, by the rules of gRPC's own `http_proxy_mapper`."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from peertune.logfields import text

NAMES, EXEMPTIONS = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")
"""Environment variables; the first that is set counts, also where it is empty."""
LOOPBACK = "localhost,127.0.0.1,[::1],::1"
MAX_HEADERS = 16 << 10
THE_PROXY = "the HTTP proxy "
"""How a `ProxyError` begins."""


class ProxyError(Exception):
    """The proxy does not let this site through."""


@dataclass(frozen=True)
class Proxy:
    host: str
    port: int
    source: str
    """The environment variable that names it."""
    credentials: str = field(default="", repr=False)
    """USER:PASSWORD; empty: none."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port} ({self.source})"

    async def open(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to an address. Raises ProxyError."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, limit=MAX_HEADERS)
        except OSError as error:
            raise ProxyError(f"{THE_PROXY}{self} cannot be reached: {error.strerror or error}") from error
        try:
            request = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n"
            if self.credentials:
                request += f"Proxy-Authorization: Basic {base64.b64encode(self.credentials.encode()).decode()}\r\n"
            writer.write(f"{request}\r\n".encode())
            said = await reader.readuntil(b"\r\n\r\n")
            version, _, status = said.partition(b"\r\n")[0].decode(errors="replace").partition(" ")
            if not version.startswith("HTTP/"):
                raise ProxyError(f"{THE_PROXY}{self} is none: it does not speak HTTP")
            if not status.startswith("2"):
                login = "; give it as USER:PASSWORD@ before its host, special characters as %40" * (status[:3] == "407")
                raise ProxyError(f"{THE_PROXY}{self} refuses: {text(status, 100)}{login}")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            writer.transport.abort()
            raise ProxyError(f"{THE_PROXY}{self} ends the connection without an answer") from error
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer


def take_upper_case() -> None:
    """Have gRPC use HTTPS_PROXY, which it does not know, where no variable names a proxy that it does."""
    if not os.environ.get("HTTPS_PROXY") or any(name in os.environ for name in NAMES):
        return
    os.environ[NAMES[0]] = os.environ["HTTPS_PROXY"]
    if not any(name in os.environ for name in EXEMPTIONS):
        os.environ[EXEMPTIONS[0]] = ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK)))


def proxy_for(address: str) -> Proxy | None:
    """The proxy that gRPC goes through to HOST:PORT; None: it goes there by itself."""
    source = next((name for name in NAMES if name in os.environ), "")
    try:
        found = urlsplit(os.environ.get(source, ""))
        host, port = found.hostname, found.port or 443
    except ValueError:
        return None
    if found.scheme != "http" or not host or _is_exempt(address.rpartition(":")[0].strip("[]")):
        return None
    login = found.netloc.rpartition("@")[0]
    if source == "grpc_proxy" and os.environ[source] == os.environ.get("HTTPS_PROXY"):
        source = "HTTPS_PROXY"
    return Proxy(host, port, source, unquote(login))


def _is_exempt(host: str) -> bool:
    told = next((os.environ[name] for name in EXEMPTIONS if name in os.environ), "")
    for entry in filter(None, map(str.strip, told.split(","))):
        if host.lower().endswith(entry.lower()) or _is_within(host, entry):
            return True
    return False


def _is_within(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
