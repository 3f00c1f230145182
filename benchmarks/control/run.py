"""What reinforcement learning of a robot policy costs, beside public implementations.

``python -m benchmarks.control.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.control import updates
from benchmarks.control.loops import (
    CONTENDERS,
    PER_ITERATION,
    SETTINGS,
    TASK,
    cleanrl_arguments,
)
from benchmarks.control.updates import Timed
from benchmarks.results import Results, bootstrap_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WARM_UP = 2
"""Iterations and updates that are not counted."""
DPPO = {"rows": 2500, "hidden": [512, 512, 512]}
SURGERY = (256, 2048)
"""Rows of each of the two batches."""
TARGETS = {"holdfast over sb3": 1.3, "holdfast over cleanrl": 1.3, "dppo": 1.0, "upgrad": 1.1}
"""The first two at least, the others at most."""

Seconds = dict[str, list[float]]


def race(rounds: int, iterations: int, cleanrl: Path | None, packages: Path | None) -> Seconds:
    """Seconds of an iteration of the whole loop; contenders take turns, a process each."""
    module = [sys.executable, "-m", "benchmarks.control.loops"]
    commands = {name: [*module, name, str(WARM_UP + iterations)] for name in CONTENDERS}
    if cleanrl is not None:
        arguments = cleanrl_arguments(WARM_UP + iterations)
        commands["cleanrl"] = [sys.executable, str(cleanrl.resolve()), *arguments]
    found: Seconds = {name: [] for name in commands}
    for number in range(rounds):
        for name in _turned(list(commands), number):
            paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            if name == "cleanrl" and packages is not None:
                paths.insert(0, str(packages.resolve()))
            found[name].append(_seconds(commands[name], name, paths) / iterations)
            print(
                f"round {number}, {name}: {PER_ITERATION / found[name][-1]:.0f} steps/s", flush=True
            )
    return found


def _seconds(command: list[str], name: str, paths: list[str]) -> float:
    """From the end of the warm-up to the end of the last iteration."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    mark = "SPS:" if name == "cleanrl" else "iteration"
    moments = []
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith(mark):
                moments.append(time.perf_counter())
        errors = process.stderr.read()
    if process.returncode or len(moments) <= WARM_UP:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return moments[-1] - moments[WARM_UP - 1]


def updated(timed: Mapping[str, Timed], rounds: int) -> Seconds:
    """Seconds of an update; contenders take turns."""
    found: Seconds = {name: [] for name in timed}
    for number in range(WARM_UP + rounds):
        for name in _turned(list(timed), number):
            seconds = timed[name]()
            if number >= WARM_UP:
                found[name].append(seconds)
    return found


def _turned(names: list[str], number: int) -> list[str]:
    """Nobody is always first."""
    start = number % len(names)
    return names[start:] + names[:start]


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median of the ratios of each round, with its interval."""
    ratios = np.array(over) / np.array(under)
    ends = bootstrap_interval(ratios, np.median)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "interval": [round(end, 3) for end in ends],
    }


def summarised(cells: Mapping[str, Seconds]) -> dict[str, Any]:
    """What the targets are about."""
    summary: dict[str, Any] = {}
    loop = cells.get("loop", {})
    if loop:
        rates = {name: PER_ITERATION / float(np.median(each)) for name, each in loop.items()}
        summary["steps_per_second"] = {name: round(rate) for name, rate in rates.items()}
        # Seconds the other way round: how many times the steps of the other.
        for one, other in (
            ("holdfast", "sb3"),
            ("holdfast", "cleanrl"),
            ("holdfast", "bare"),
            ("bare", "sb3"),
        ):
            if {one, other} <= set(loop):
                summary[f"{one} over {other}"] = ratio(loop[other], loop[one])
    if "dppo" in cells:
        summary["dppo"] = ratio(cells["dppo"]["holdfast"], cells["dppo"]["plain"])
    for rows in SURGERY:
        cell = cells.get(f"upgrad, {rows} rows", {})
        for name in ("holdfast", "torchjd"):
            if name in cell:
                summary[f"upgrad, {rows} rows, {name}"] = ratio(cell[name], cell["sum"])
    return summary


def draw(summary: Mapping[str, Any], path: Path) -> None:
    shown = {name: entry for name, entry in summary.items() if "ratio" in entry}
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(shown) + 1), layout="constrained")
    names = list(shown)
    values = np.array([shown[name]["ratio"] for name in names])
    ends = np.array([shown[name]["interval"] for name in names])
    axis.barh(names, values, xerr=np.abs(ends.T - values), color="#4e79a7")
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(title="Loops: times the steps a second of the other. Updates: times its time")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "gymnasium", "mujoco", "stable_baselines3", "torchjd"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="of every comparison")
    parser.add_argument("--iterations", type=int, default=10, help="of a loop, in every round")
    parser.add_argument("--cleanrl", type=Path, help="CleanRL's ppo_continuous_action.py")
    parser.add_argument("--cleanrl-packages", type=Path, help="a folder of packages it needs")
    parser.add_argument("--output", type=Path, default=HERE, help="where results are written")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(
        options.output / "results.json",
        settings={
            "rounds": options.rounds,
            "iterations": options.iterations,
            "loop": {"task": TASK, **SETTINGS},
            "contenders": [*CONTENDERS, *(["cleanrl"] if options.cleanrl else [])],
            "dppo": DPPO,
            "surgery": list(SURGERY),
        },
        about={
            "command": "python -m benchmarks.control.run",
            "targets": TARGETS,
            "packages": versions(),
        },
        fresh=options.fresh,
    )
    many = 5 * options.rounds
    work = {
        "loop": partial(
            race, options.rounds, options.iterations, options.cleanrl, options.cleanrl_packages
        ),
        "dppo": lambda: updated(updates.dppo_updates(**DPPO), many),  # type: ignore[arg-type]
        **{
            f"upgrad, {rows} rows": lambda rows=rows: updated(updates.surgery_updates(rows), many)
            for rows in SURGERY
        },
    }
    cells = {name: results.cell(name, compute) for name, compute in work.items()}
    summary = summarised(cells)
    results.finish(summary)
    for name, entry in summary.items():
        print(f"{name}: {entry}")
    draw(summary, options.output / "control.png")


if __name__ == "__main__":
    main()
