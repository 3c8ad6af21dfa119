"""Ctrl-C, SIGTERM and SIGHUP end a command with one line, and with the exit code that a shell expects."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # Windows has none
    NAMES[signal.SIGHUP] = "SIGHUP"


class Interrupted(KeyboardInterrupt):
    """A signal has asked this process to end; `code` is the exit code. Caught wherever Ctrl-C is."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {NAMES[number]}")
        self.code = 128 + number


def handle_stops(handler: Callable) -> dict:
    """Install `handler(number, frame)` for those signals that are not ignored; returns the previous handlers."""
    known = [number for number in NAMES if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    return {number: signal.signal(number, handler) for number in known}


def end_at_once() -> None:
    """From now on, a signal prints one line and ends the process: during imports there is nothing to clean up."""
    handle_stops(_end)


def _end(number: int, frame) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, only the first prints
        os.write(2, f"{os.path.basename(sys.argv[0])}: error: stopped by {NAMES[number]}\n".encode())
    os._exit(128 + number)  # the code being imported could catch an exception


@contextmanager
def stops_raised() -> Iterator[None]:
    """Within this, a signal raises `Interrupted` in the main thread."""

    def interrupt(number):
        raise Interrupted(number)

    with stops_taken(interrupt):
        yield


@contextmanager
def stops_taken(handler: Callable[[int], None]) -> Iterator[None]:
    """Within this, `handler(number)` is called at a signal, in this process alone."""
    owner = os.getpid()

    def handle(number, frame):
        if os.getpid() == owner:  # not in a process that has just been forked
            handler(number)

    before = handle_stops(handle)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
