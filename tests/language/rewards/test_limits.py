"""Only what a thread computes counts towards its limit."""

import hashlib
import signal
import threading
import time

import pytest

from holdfast.language.rewards.limits import cpu_limit


class TooLong(BaseException):
    pass


def test_computing_for_too_long_is_stopped():
    with pytest.raises(TooLong), cpu_limit(0.05, TooLong):
        while True:
            pass


def test_a_block_that_goes_on_is_stopped_again():
    stopped = 0
    with cpu_limit(0.05, TooLong):
        while stopped < 2:
            try:
                while True:
                    pass
            except TooLong:
                stopped += 1
    assert stopped == 2


def test_waiting_is_not_computing():
    with cpu_limit(0.05, TooLong):
        time.sleep(0.2)


def test_other_threads_do_not_count():
    def work():
        while time.thread_time() < 0.4:
            hashlib.sha256(bytes(10**6))  # computes without holding the interpreter

    thread = threading.Thread(target=work)
    with cpu_limit(0.1, TooLong):
        thread.start()
        thread.join()


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(KeyError), cpu_limit(0.05, TooLong):
        raise KeyError
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
