"""What the finished cells say: options, finalists, envelopes, and a table of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.arithmetic import study
from benchmarks.arithmetic.study import Cell
from benchmarks.results import bootstrap_interval

Cells = Mapping[str, Mapping[str, Any]]
REACHED = (0.25, 0.30, 0.35)
"""Accuracies whose cost in completions is reported."""


def chosen_strengths(cells: Cells) -> dict[str, float]:
    """Each method's own option: the best mean validation accuracy over the second half of a run."""
    chosen = {}
    for name, strengths in study.STRENGTHS.items():
        advantage, method = name.split("/")
        scores = {}
        for strength in strengths:
            runs = _runs(cells, Cell(method, advantage, 1, study.TUNED_AT, 0, strength))
            if runs:
                scores[strength] = float(np.mean([_level(run) for run in runs]))
        if scores:
            chosen[name] = max(scores, key=lambda strength: scores[strength])
    return chosen


def finalists(cells: Cells, inner: int, strengths: Mapping[str, float]) -> Iterator[Cell]:
    """All seeds at a group's best learning rate and at both edges of its envelope."""
    for seed in study.ALL:
        for cell in study.groups(inner, strengths):
            for rate in _interesting(cells, cell):
                yield replace(cell, learning_rate=rate, seed=seed)


def _interesting(cells: Cells, cell: Cell) -> list[float]:
    screened = {rate: _runs(cells, cell, rate, study.SCREENED) for rate in study.LEARNING_RATES}
    screened = {rate: runs for rate, runs in screened.items() if runs}
    if not screened:
        return []
    levels = {rate: np.mean([_level(run) for run in runs]) for rate, runs in screened.items()}
    best = max(levels, key=lambda rate: levels[rate])
    stable = _envelope(screened, float(levels[best]))
    return sorted({best, *([min(stable), max(stable)] if stable else [])})


def _envelope(by_rate: Mapping[float, list[Mapping[str, Any]]], best: float) -> list[float]:
    """Learning rates with no collapse in any seed and 90 % of the method's best accuracy."""
    return [
        rate
        for rate, runs in by_rate.items()
        if not any(collapsed(run["validation"]) for run in runs)
        and np.mean([_level(run) for run in runs]) >= 0.9 * best
    ]


def collapsed(curve: list[float]) -> bool:
    """Accuracy fell below half of its own maximum, and stayed there."""
    return curve[-1] < 0.5 * max(curve)


def _level(run: Mapping[str, Any], rows: str = "validation") -> float:
    """Mean accuracy over the last three evaluations."""
    return float(np.mean(run[rows][-3:]))


def _runs(
    cells: Cells, cell: Cell, rate: float | None = None, seeds: tuple[int, ...] = study.ALL
) -> list[Mapping[str, Any]]:
    rate = cell.learning_rate if rate is None else rate
    keys = (replace(cell, learning_rate=rate, seed=seed).key for seed in seeds)
    return [cells[key] for key in keys if key in cells]


def _samples_to(curves: np.ndarray, level: float) -> float | None:
    """Completions until the mean curve first reaches a level, between evaluations by line."""
    mean = curves.mean(0)
    above = np.flatnonzero(mean >= level)
    if not len(above):
        return None
    if above[0] == 0:
        return 0.0
    low, high = mean[above[0] - 1], mean[above[0]]
    return float(study.EVERY * (above[0] - 1 + (level - low) / (high - low)))


def analyse(cells: Cells, folder: Path) -> dict[str, Any]:
    """Tables by number of passes, and pictures into ``folder``."""
    strengths = chosen_strengths(cells)
    tables = {}
    for inner in study.INNER:
        rows = {}
        for cell in study.groups(inner, strengths):
            row = _row(cells, cell)
            if row:
                rows[cell.group] = row
        if rows:
            tables[f"inner{inner}"] = rows
            _draw(cells, inner, strengths, folder / f"inner{inner}.png")
    return {"strengths": strengths, "tables": tables}


def _row(cells: Cells, cell: Cell) -> dict[str, Any] | None:
    by_rate = {rate: _runs(cells, cell, rate) for rate in study.LEARNING_RATES}
    by_rate = {rate: runs for rate, runs in by_rate.items() if runs}
    if not by_rate:
        return None
    screened = {rate: _runs(cells, cell, rate, study.SCREENED) for rate in by_rate}
    levels = {rate: float(np.mean([_level(r) for r in runs])) for rate, runs in screened.items()}
    best = max(levels, key=lambda rate: levels[rate])
    runs = by_rate[best]
    finals = np.array([_level(run, "held_out") for run in runs])
    curves = np.array([run["held_out"] for run in runs])
    stable = _envelope(by_rate, levels[best])
    everything = [run for group in screened.values() for run in group]
    norms = [run["grad_norm"] for run in runs]
    return {
        "learning_rate": best,
        "seeds": len(runs),
        "accuracy": float(finals.mean()),
        "interval": bootstrap_interval(finals[:, None], np.mean),
        "samples_to": {str(level): _samples_to(curves, level) for level in REACHED},
        "collapse_rate": {
            "best": float(np.mean([collapsed(run["held_out"]) for run in runs])),
            "all_rates": float(np.mean([collapsed(run["held_out"]) for run in everything])),
        },
        "envelope": [min(stable), max(stable)] if stable else None,
        "ratio": max(stable) / min(stable) if stable else None,
        "grad_norm_max": max((n["max"] for n in norms if n["max"] is not None), default=None),
        "grad_norm_p99": float(np.mean([n["p99"] for n in norms if n["p99"] is not None])),
        "drawn": float(np.mean([run["samples"][-1] for run in runs])),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
    }


def _draw(cells: Cells, inner: int, strengths: Mapping[str, float], path: Path) -> None:
    """Left: accuracy over completions at the best rate. Right: accuracy over learning rates."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    for (left, right), advantage in zip(axes, ("sparse", "dense"), strict=True):
        for index, cell in enumerate(
            c for c in study.groups(inner, strengths) if c.advantage == advantage and c.clip
        ):
            row = _row(cells, cell)
            if row is None:
                continue
            style = {
                "color": plt.get_cmap("tab20")(index % 20),
                "linewidth": 2.5 if cell.method.startswith("lco") else 1.2,
                "linestyle": "-" if cell.method.startswith("lco") else "--",
                "label": cell.method + (" (current)" if cell.current else ""),
            }
            runs = _runs(cells, cell, row["learning_rate"])
            mean = np.mean([run["held_out"] for run in runs], axis=0)
            left.plot(study.EVERY * np.arange(len(mean)), mean, **style)
            levels = {
                rate: np.mean([_level(run, "held_out") for run in found])
                for rate in study.LEARNING_RATES
                if (found := _runs(cells, cell, rate, study.SCREENED))
            }
            right.plot(list(levels), list(levels.values()), marker=".", **style)
        left.set(xlabel="completions", ylabel="held-out accuracy", title=f"{advantage}: best rate")
        right.set(xlabel="learning rate", xscale="log", title=f"{advantage}: {inner} pass(es)")
        left.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
