"""Losses over a real vocabulary: tiles beside plain PyTorch and beside TRL.

``python -m benchmarks.head.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np

from benchmarks.cost.run import median_ratio
from benchmarks.head.cases import CASES, TOKENS, VOCAB, WIDTH, Case
from benchmarks.results import Results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WARM_UP, STEPS = 1, 5
"""Steps of each side that are not counted, and that are."""

GRADIENT = 4 * VOCAB * WIDTH
"""Bytes of the gradient of a vocabulary matrix."""


class Worker:
    """One side in a process of its own. See worker.py for what is said."""

    def __init__(self, side: str, case: str, log: IO[str]) -> None:
        steps = str(WARM_UP + STEPS)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.head.worker", side, case, steps],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.resident: int = self._read()["resident"]

    def step(self) -> list[dict[str, float]]:
        """Times, then loss, norm and memory."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [self._read(), self._read()]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a side ended before its time")
        return json.loads(line)


def measure(name: str, case: Case) -> dict[str, Any]:
    """Both sides step in turn: what slows one down slows down the other."""
    sides = ("holdfast", case.rival)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        try:
            for side in sides:
                workers[side] = Worker(side, name, log)
                stack.callback(workers[side].stop)
            times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            last: dict[str, dict[str, float]] = {}
            for number in range(WARM_UP + STEPS):
                for side in sides[:: 1 if number % 2 else -1]:
                    time, last[side] = workers[side].step()
                    times[side].append(time)
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(log.read()[-2000:]) from error
        return {
            side: {
                **{clock: [round(t[clock], 4) for t in times[side]] for clock in ("wall", "cpu")},
                **last[side],
                "resident": workers[side].resident,
            }
            for side in sides
        }


def measure_step() -> dict[str, dict[str, list[float]]]:
    """Both whole training steps, by turns in one process."""
    command = [sys.executable, "-m", "benchmarks.head.step", str(WARM_UP + STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, dict[str, list[float]]] = json.loads(done.stdout)
    return found


def read_step(cell: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    sides = cell["holdfast"], cell["trl"]
    return {
        **{
            clock: median_ratio(np.array([side[clock] for side in sides]).T[WARM_UP:])
            for clock in ("wall", "cpu")
        },
        "seconds": [statistics.median(side["wall"][WARM_UP:]) for side in sides],
    }


def read(cell: dict[str, Any], case: Case) -> dict[str, Any]:
    ours, theirs = cell["holdfast"], cell[case.rival]
    extra = [side["peak"] - side["resident"] for side in (ours, theirs)]
    owed = GRADIENT if case.trained else 0
    return {
        **{
            clock: median_ratio(np.array([ours[clock], theirs[clock]]).T[WARM_UP:])
            for clock in ("wall", "cpu")
        },
        "seconds": [statistics.median(side["wall"][WARM_UP:]) for side in (ours, theirs)],
        "extra MB": [value / 1e6 for value in extra],
        "extra memory": extra[0] / extra[1],
        "extra memory beyond the gradient": (extra[0] - owed) / (extra[1] - owed),
        "losses differ by": abs(ours["loss"] / theirs["loss"] - 1),
        "norms differ by": abs(ours["norm"] / theirs["norm"] - 1),
    }


def table(summary: dict[str, Any]) -> str:
    lines = [
        "| case | against | time | processor time | seconds (ours, theirs) "
        "| extra MB (ours, theirs) | extra memory | the same less the matrix's gradient "
        "| loss, gradient norm differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in summary.items():
        clocks = [
            "{:.2f} [{:.2f}, {:.2f}]".format(found[clock]["ratio"], *found[clock]["interval"])
            for clock in ("wall", "cpu")
        ]
        lines.append(
            f"| {name} | {CASES[name].rival} | {' | '.join(clocks)} | {{:.1f}}, {{:.1f}} | ".format(
                *found["seconds"]
            )
            + "{:.0f}, {:.0f} | ".format(*found["extra MB"])
            + f"{found['extra memory']:.3f} | {found['extra memory beyond the gradient']:.3f} | "
            f"{found['losses differ by']:.0e}, {found['norms differ by']:.0e} |"
        )
    return "\n".join(lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    names = list(summary)
    for axes, title, bounds, values in (
        (
            panels[0],
            "time",
            [CASES[name].time for name in names],
            [summary[name]["wall"]["ratio"] for name in names],
        ),
        (
            panels[1],
            "extra memory",
            [CASES[name].memory for name in names],
            [summary[name]["extra memory beyond the gradient"] for name in names],
        ),
    ):
        for row, (name, bound, value) in enumerate(zip(names, bounds, values, strict=True)):
            colour = "tab:blue" if CASES[name].rival == "dense" else "tab:orange"
            axes.barh(row, value, height=0.5, color=colour)
            axes.plot([bound] * 2, [row - 0.4, row + 0.4], color="black", linestyle=":")
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.set_title(f"{title}, Holdfast / rival (dotted: target)")
    panels[0].set_yticks(range(len(names)), [f"{n}\n(beside {CASES[n].rival})" for n in names])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    options = parser.parse_args(arguments)
    results = Results(
        HERE / "results.json",
        settings={
            "vocab": VOCAB,
            "width": WIDTH,
            "tokens": TOKENS,
            "dtype": "float32",
            "threads": 1,
            "steps": STEPS,
            "cases": {name: asdict(case) for name, case in CASES.items()},
            "libraries": {name: version(name) for name in ("torch", "trl")},
        },
        about={
            "study": "Losses over a whole vocabulary, forward and backward",
            "command": "python -m benchmarks.head.run",
            "budget": "20 minutes on one core that is free, and 16 GB of memory",
        },
        fresh=options.fresh,
    )
    summary = {
        name: read(results.cell(name, partial(measure, name, case)), case)
        for name, case in CASES.items()
    }
    print(table(summary))
    draw(summary, HERE / "head.png")
    whole = read_step(results.cell("LCO step", measure_step))
    clocks = ["{ratio:.2f} {interval}".format(**whole[clock]) for clock in ("wall", "cpu")]
    print(
        "LCO step beside TRL's GRPO step: time {}, processor time {}, ".format(*clocks)
        + "{:.1f} s and {:.1f} s".format(*whole["seconds"])
    )
    results.finish(summary | {"LCO step": whole})


if __name__ == "__main__":
    main()
