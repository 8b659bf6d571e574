"""Whether a port can be opened, in the words of the operating system; gRPC's own say neither why nor what to do."""

from __future__ import annotations

import errno
import socket

from peertune.errors import IdentityError


def check_port(listen: str) -> None:
    """Open a port and close it again, as gRPC would have it.

    Args:
        listen: HOST:PORT; empty: none.
    Raises:
        IdentityError: it cannot be opened, and why.
    """
    host, _, port = listen.rpartition(":")
    if not listen:
        return
    try:
        try:
            _bind(host.strip("[]"), int(port))
        except OSError as error:
            if host != "[::]" or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            _bind("0.0.0.0", int(port))  # a machine without IPv6
    except OSError as error:
        advice = "name an address and a port that this machine has with --listen"
        if error.errno == errno.EADDRINUSE:
            advice = "end what uses it, perhaps another `join` or `doctor` of this site, or name another with --listen"
        reason = "already in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise IdentityError(f"--listen: {listen} cannot be opened: {reason}; {advice}") from error


def _bind(host: str, port: int) -> None:
    """Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(address)
