"""Runs the cells of a study that are missing, one process a core."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.results import Results


def arguments(about: str | None, *, jobs: int = 2) -> argparse.ArgumentParser:
    """What every study of cells is asked on its command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time, one core each")
    parser.add_argument("--minutes", type=float, default=600, help="start no run after this")
    parser.add_argument("--fresh", action="store_true", help="forget every finished cell")
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    return parser


def run_jobs(
    results: Results,
    jobs: Mapping[str, Any],
    work: Callable[[Any], Any],
    told: Callable[[Any], str],
    *,
    workers: int,
    deadline: float,
    cells_per_process: int = 8,
) -> bool:
    """Run what is missing, and keep every cell as soon as it is there.

    Parameters
    ----------
    results : Results
    jobs : mapping
        By key of the cell, in the order in which they are wanted.
    work : callable
        From a job to the values of its cell. Called in a forked process.
    told : callable
        From these values to what is printed of them.
    workers : int
        Processes at a time.
    deadline : float
        On ``time.monotonic``: no job is started after it.
    cells_per_process : int
        With 1 every cell has a process, and so a peak memory, of its own.

    Returns
    -------
    bool
        ``False``: time ran out.
    """
    waiting = [(key, job) for key, job in jobs.items() if key not in results.content["cells"]]
    count, done, started = len(waiting), 0, time.monotonic()
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, maxtasksperchild=cells_per_process) as pool:
        running: list[tuple[str, Any]] = []
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                key, job = waiting.pop(0)
                running.append((key, pool.apply_async(work, (job,))))
            if not running:
                return False
            for entry in [entry for entry in running if entry[1].ready()]:
                running.remove(entry)
                key, values = entry[0], entry[1].get()
                results.cell(key, lambda values=values: values)
                done += 1
                seconds = time.monotonic() - started
                print(f"{done}/{count} {seconds:6.0f}s {key}: {told(values)}", flush=True)
            time.sleep(0.02)
    return True
