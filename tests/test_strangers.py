"""Who connects to a port and shows no member's key."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from peertune.runtimes import strangers as module
from peertune.runtimes.strangers import Strangers

PATIENCE_S = 5.0


class Door:
    """A port that is open, with the connections that came to it."""

    def __init__(self, stack: ExitStack, host: str) -> None:
        self._stack = stack
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = stack.enter_context(socket.create_server((host, 0), family=family))
        self.lines: list[dict[str, Any]] = []
        self.strangers = Strangers(lambda event, **about: self.lines.append({"event": event, **about}), PATIENCE_S)
        self.strangers.port = self._listener.getsockname()[1]

    def come(self) -> int:
        """Somebody connects. Returns the port at its end."""
        near = self._stack.enter_context(socket.create_connection(self._listener.getsockname()[:2]))
        self._stack.enter_context(self._listener.accept()[0])
        return int(near.getsockname()[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def door() -> Iterator[Door]:
    with ExitStack() as stack:
        yield Door(stack, "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_makes_no_call_in_time_is_written_down(host: str, clock: list[float]) -> None:
    with ExitStack() as stack:
        try:
            door = Door(stack, host)
        except OSError:
            pytest.skip("this machine has no IPv6")
        member, stranger = door.come(), door.come()
        door.strangers.knocked()
        # As gRPC writes it.
        door.strangers.is_member(f"ipv4:{host}:{member}" if host != "::1" else f"ipv6:%5B::1%5D:{member}")
        clock[0] += PATIENCE_S
        door.strangers.look(clock[0])
        assert door.lines == []
        clock[0] += 0.1
        door.strangers.look(clock[0])
        door.strangers.look(clock[0])
    where = f"{'[::1]' if ':' in host else host}:{stranger}"
    assert door.lines == [{"event": "stranger", "peer": where, "reason": "showed no member's key"}]


def test_a_member_whose_call_comes_before_it_is_seen_is_none(door: Door, clock: list[float]) -> None:
    door.strangers.is_member(f"ipv4:127.0.0.1:{door.come()}")
    door.strangers.knocked()
    door.strangers.look(clock[0] + 2 * PATIENCE_S)
    assert door.lines == []


def test_a_host_is_written_down_once_then_now_and_then_with_how_often_it_came(door: Door, clock: list[float]) -> None:
    for _ in range(4):
        door.come()
        door.strangers.knocked()
        clock[0] += PATIENCE_S + 0.1
        door.strangers.look(clock[0])
    assert len(door.lines) == 1
    clock[0] += module.AGAIN_S
    port = door.come()
    door.strangers.knocked()
    door.strangers.look(clock[0] + PATIENCE_S + 0.1)
    assert [line.get("repeated") for line in door.lines] == [None, 3]
    assert door.lines[1]["peer"] == f"127.0.0.1:{port}"


def test_many_who_connect_cost_a_part_of_the_time_only(
    door: Door, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def slow(port: int) -> set[module.Address]:
        looks.append(clock[0])
        clock[0] += 0.1
        return set()

    monkeypatch.setattr(module, "_peers", slow)
    began = clock[0]
    while clock[0] < began + 10:
        door.strangers.knocked()
        clock[0] += 0.01
    assert len(looks) <= 11


def test_what_is_remembered_is_bounded(door: Door, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = {(f"10.0.{i >> 8}.{i & 255}", 1) for i in range(3 * module.MAX_KNOWN)}
    monkeypatch.setattr(module, "_peers", lambda port: crowd)
    door.strangers.knocked()
    door.strangers.look(clock[0] + PATIENCE_S + 0.1)
    assert len(door.lines) == module.MAX_KNOWN


def test_a_look_that_fails_makes_no_stranger_of_a_member(
    door: Door, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One takes a descriptor, and who floods the port may have taken the last."""
    door.strangers.is_member(f"ipv4:127.0.0.1:{door.come()}")

    def none_left(path: str) -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "listdir", none_left)
        door.strangers.knocked()
    door.strangers.knocked()
    door.strangers.look(clock[0] + PATIENCE_S + 0.1)
    assert door.lines == []


def test_nobody_elses_socket_is_changed(door: Door) -> None:
    """A default timeout, which a plugin may set, is one for each socket that Python takes in hand."""
    near, far = socket.socketpair()
    with near, far:
        socket.setdefaulttimeout(5.0)
        try:
            door.strangers.knocked()
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(near.fileno())
        door.strangers.knocked()
        assert os.get_blocking(near.fileno())
