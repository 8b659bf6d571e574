"""What ends a command beside Ctrl-C: signals of services, containers and terminals that are closed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)
"""What ends a service, and a terminal that is closed."""
AGAIN_S = 2.0
"""Seconds after which one of them is taken for lost, and counts again."""


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Context in which what else asks a process to end does what Ctrl-C does, also in a container's first process, that
    would not hear it. Where somebody else has decided on it, as `nohup` does, it stays so.
    """

    def interrupt(number: int, frame: Any) -> None:
        # Nobody presses a second time, and what is raised while Python does away with an object goes nowhere.
        signal.signal(signal.SIGALRM, lambda *_: interrupt(number, frame))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise KeyboardInterrupt(signal.Signals(number).name)

    taken, alarm = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL], signal.SIGALRM
    before = signal.getsignal(alarm)
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(alarm) is not before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(alarm, before)
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
