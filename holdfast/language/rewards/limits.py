"""A limit on computing time that does not depend on how busy the machine is."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

_LOOK_AGAIN = 0.1
"""Seconds of the process's time after which the clock is read again."""


@contextlib.contextmanager
def cpu_limit(seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise in the block once this thread has computed for so long inside it.

    Time spent waiting does not count, nor does the work of other threads: a limit on the wall clock
    would give other results on a loaded machine. For POSIX systems and the main thread.

    Parameters
    ----------
    seconds : float
        Positive.
    error : exception class
        Raised without arguments.

    Raises
    ------
    ValueError
        Outside the main thread.
    """
    start = time.thread_time()

    def look(signum: int, frame: FrameType | None) -> None:
        if time.thread_time() - start >= seconds:
            raise error

    previous = signal.signal(signal.SIGVTALRM, look)
    # It counts the whole process, so it comes no later than this thread's time is up.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _LOOK_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
