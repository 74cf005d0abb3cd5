"""Signals that ask a command to end, and child processes that end with their parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ctrl-C, kill, a closed terminal, a time limit
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork, after which it is not safe


@contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Call handler(number, frame) for every signal that asks to end, while the block runs; does nothing outside of the main thread.

    A signal that the process was told to ignore stays ignored, as SIGHUP under nohup.
    """
    previous = {}
    try:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    except ValueError:  # only the main thread may handle signals
        pass
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def end_with_parent(parent: int) -> None:
    """Ask for SIGTERM when the parent ends, even by SIGKILL; end at once if it has ended. Only Linux offers this.

    It stays when the process executes another program, such as torchrun or srun, but children do not inherit it.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
