"""What both sides of the race for transitions per second share: data, and how they are stepped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

FEATURES, ACTIONS, ROWS = 8, 4, 10_000
HIDDEN = (64, 64)
BATCHES = (32, 256)
DISCOUNT = 0.99
UPDATES = 100
"""In a block, which is what is timed."""
SIDES = ("holdfast", "DQN", "CQL")


class Worker:
    """A process that answers a line on its input by a line of JSON."""

    def __init__(
        self, command: Sequence[str | Path], environment: dict[str, str], log: IO[str]
    ) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"a side ended before its time: {self._log.read()[-2000:]}")
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def standard_output() -> IO[str]:
    """Standard output for what is reported; whatever libraries print goes to standard error."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return report


def report_blocks(report: IO[str], blocks: dict[str, Any]) -> None:
    """Time each of ``blocks``, name to callable, whenever a line comes; a process's whole life."""
    while sys.stdin.readline():
        times = {}
        for name, block in blocks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            block()
            times[name] = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
        report.write(json.dumps(times) + "\n")
        report.flush()
