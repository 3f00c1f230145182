"""A step at a thousand times the learning rate: what do guards make of it?

``python -m benchmarks.lr_spike.run [--jobs 2] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again. ``--plot`` only draws what is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.arithmetic.prepare import base
from benchmarks.lr_spike.spikes import FACTOR, LENGTHS, Cell, run_cell
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results, bootstrap_interval

HERE = Path(__file__).parent
SEEDS, TUNING = tuple(range(10)), (100, 101, 102)
RATES = {"digits": (1e-4, 1e-3, 1e-2), "sft": (1e-3,), "grpo": (3e-4,)}
OPTIONS = {"clip": (0.1, 1.0), "cap": (0.03, 0.1, 0.3, 1.0)}
"""Tuned for each task and rate, on seeds of their own."""
RADII = (0.06, 0.5, 1.0)
"""Of the budget: one for all tasks and rates."""


def tuning() -> Iterator[Cell]:
    for seed in TUNING:
        for task, rates in RATES.items():
            for rate in rates:
                for guard, options in OPTIONS.items():
                    for option in options:
                        yield Cell(task, guard, option, rate, seed)


def chosen(cells: Mapping[str, Any], task: str, rate: float, guard: str) -> float:
    """The option with the best final score."""

    def level(option: float) -> float:
        keys = (Cell(task, guard, option, rate, seed).key for seed in TUNING)
        return float(np.mean([final(cells[key]) for key in keys if key in cells]))

    return max(OPTIONS[guard], key=level)


def compared(cells: Mapping[str, Any]) -> Iterator[Cell]:
    for seed in SEEDS:
        for task, rates in RATES.items():
            for rate in rates:
                yield Cell(task, "none", 0.0, rate, seed, spike=False)
                yield Cell(task, "none", 0.0, rate, seed)
                for guard in OPTIONS:
                    yield Cell(task, guard, chosen(cells, task, rate, guard), rate, seed)
                for share in RADII:
                    yield Cell(task, "budget", share, rate, seed)


def final(run: Mapping[str, Any]) -> float:
    """Mean score over the last three evaluations."""
    return float(np.nan_to_num(np.mean(run["curve"][-3:]), nan=-10.0))


def run_cells(results: Results, cells: Iterable[Cell], workers: int, deadline: float) -> bool:
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, run_cell, _told, workers=workers, deadline=deadline)


def _told(values: Mapping[str, Any]) -> str:
    return f"{values['curve'][0]:.3f} to {values['curve'][-1]:.3f}"


def analyse(cells: Mapping[str, Any]) -> dict[str, Any]:
    """By task and rate: final score of each arm, and the lowest after the spike."""
    tables: dict[str, Any] = {}
    for cell in compared(cells):
        if cell.seed or cell.key not in cells:
            continue
        keys = [cell.key.replace("/seed0", f"/seed{seed}") for seed in SEEDS]
        runs = [cells[key] for key in keys if key in cells]
        finals = np.array([final(run) for run in runs])
        after = LENGTHS[cell.task].at // LENGTHS[cell.task].every + 1
        name = cell.guard if cell.spike else "no spike"
        if cell.guard == "budget":
            name = f"budget {cell.option:g}"
        tables.setdefault(f"{cell.task}, rate {cell.learning_rate:g}", {})[name] = {
            "option": cell.option or None,
            "seeds": len(runs),
            "final": round(float(np.median(finals)), 4),
            "interval": [round(x, 4) for x in bootstrap_interval(finals[:, None], np.median)],
            "lowest": round(float(np.median([min(run["curve"][after:]) for run in runs])), 4),
            "moved": _median([run["moved"] for run in runs if run["moved"] is not None]),
        }
    return tables


def _median(values: list[float]) -> float | None:
    return float(f"{np.median(values):.3g}") if values else None


def draw(tables: Mapping[str, Any], path: Path) -> None:
    names = ["no spike", "none", *OPTIONS, *(f"budget {share:g}" for share in RADII)]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, (task, rates) in zip(axes, RATES.items(), strict=True):
        for i, name in enumerate(names):
            rows = [tables.get(f"{task}, rate {rate:g}", {}).get(name) for rate in rates]
            for j, row in enumerate(rows):
                if row is None:
                    continue
                low, high = row["interval"]
                middle = row["final"]
                axis.errorbar(
                    j + 0.1 * (i - 3),
                    middle,
                    yerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                    fmt="o",
                    markersize=4,
                    color=f"C{i}",
                    label=name if j == 0 else None,
                )
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        score = "held-out log-likelihood a token" if task == "sft" else "held-out accuracy"
        axis.set(title=task, xlabel="learning rate", ylabel=f"final {score}")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(tables: Mapping[str, Any]) -> str:
    lines = []
    for key, rows in tables.items():
        lines.append(key)
        for name, row in rows.items():
            low, high = row["interval"]
            lines.append(
                f"  {name:<12}{row['option'] or '':>6}  {row['final']:.3f} [{low:.3f}, {high:.3f}]"
                f"  lowest {row['lowest']:.3f}  moved {row['moved']}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    results = Results(
        HERE / "results.json",
        settings={
            "factor": FACTOR,
            "lengths": {name: vars(length) for name, length in LENGTHS.items()},
            "rates": RATES,
            "options": OPTIONS,
            "radii": RADII,
        },
        about={
            "command": "python -m benchmarks.lr_spike.run",
            "seeds": {"tuning": len(TUNING), "compared": len(SEEDS)},
            "budget": "the same steps for every arm; one torch thread",
        },
        fresh=options.fresh,
    )
    cells = results.content["cells"]
    deadline = time.monotonic() + 60 * options.minutes
    if not options.plot:
        base()
        if not run_cells(results, tuning(), options.jobs, deadline):
            raise SystemExit("Time is up; start again to go on.")
        run_cells(results, compared(cells), options.jobs, deadline)
    tables = analyse(cells)
    results.finish(tables)
    print(table(tables))
    draw(tables, HERE / "lr_spike.png")


if __name__ == "__main__":
    main()
