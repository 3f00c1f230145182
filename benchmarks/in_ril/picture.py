"""Draws a task's finished cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.in_ril.analysis import Cells, groups_of, middle, runs_of
from benchmarks.in_ril.study import Cell
from benchmarks.in_ril.tasks import Task


class Panel(NamedTuple):
    """Curves on one pair of axes.

    Attributes
    ----------
    title : str
    policies, methods : tuple of str
        Whose groups are drawn; without methods, all of them.
    what : "score" or "imitation"
    highest : bool
        At the highest learning rate rather than the one chosen for RL alone.
    """

    title: str
    policies: tuple[str, ...]
    methods: tuple[str, ...] = ()
    what: str = "score"
    highest: bool = False


PLAIN = ("gaussian",)
PANELS = (
    Panel("m", PLAIN, ("rl", "surgery", "root", "balance")),
    Panel("how the two are kept apart", PLAIN, ("rl", "alternate", "iteration", "sum", "mix")),
    Panel("what is imitated", PLAIN, ("rl", "random", "noise")),
    Panel("at the highest learning rate", PLAIN, highest=True),
    Panel("held-out demonstrations", PLAIN, ("rl", "alternate", "surgery"), "imitation"),
    Panel("residual PPO", ("residual",)),
    Panel("DPPO", ("diffusion",)),
    Panel("IDQL", ("implicit",)),
)


Curve = tuple[Any, Any, dict[str, Any]]
"""Steps, the interquartile mean over seeds, and how it is drawn."""


def panels(cells: Cells, task: Task) -> list[tuple[Panel, list[Curve]]]:
    """Those with something to compare, and their curves."""
    found = ((panel, list(_curves(cells, task, panel))) for panel in PANELS)
    return [(panel, curves) for panel, curves in found if len(curves) > 1]


def draw(cells: Cells, task: Task, rows: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """All panels, and final levels with their intervals, as ``NAME.png``."""
    drawn = panels(cells, task)
    columns = 3 if len(drawn) > 3 else 2
    lines = -(-(len(drawn) + 1) // columns)
    size = (16 * columns / 3, 4.2 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for axis, (panel, curves) in zip(axes, drawn, strict=False):
        for steps, values, style in curves:
            axis.plot(steps / 1000, values, **style)
        label = "imitation loss" if panel.what == "imitation" else task.score
        axis.set(title=panel.title, ylabel=label, xlabel="thousands of environment steps")
        axis.legend(fontsize=7)
    finals, *empty = axes[len(drawn) :]
    for axis in empty:
        axis.remove()
    names = list(rows)[::-1]
    centers = [rows[name]["final"] for name in names]
    ends = np.array([rows[name]["final_interval"] for name in names]).T
    finals.errorbar(centers, names, xerr=np.abs(ends - centers), fmt="o", color="#4e79a7")
    finals.set(title=f"final {task.score}", xlabel="interquartile mean, 95 %")
    finals.tick_params(labelsize=7)
    figure.savefig(folder / f"{task.name}.png", dpi=90)
    plt.close(figure)


def _curves(cells: Cells, task: Task, panel: Panel) -> Iterator[Curve]:
    for policy, method, option in groups_of(cells, task):
        if policy not in panel.policies or (panel.methods and method not in panel.methods):
            continue
        rate = max(task.rates[policy]) if panel.highest else None
        runs = list(runs_of(cells, task, policy, method, option, rate).values())
        if not runs:
            continue
        style: dict[str, Any] = {"label": Cell(task.name, policy, method, 0.0, 0, option).label}
        if method == "rl":
            style |= {"color": "black", "linewidth": 2.5}
        steps = np.mean([run["environment_steps"] for run in runs], axis=0)
        yield steps, middle(np.array([run[panel.what] for run in runs])), style
