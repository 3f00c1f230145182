"""Joining imitation and reinforcement on the task of forgetting, at equal samples and gradients.

``python -m benchmarks.mixing.run [--jobs 2] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again; ``--plot`` only draws what is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.forgetting_rl.run import run_cells
from benchmarks.mixing import study
from benchmarks.mixing.study import Cell
from benchmarks.pool import arguments
from benchmarks.results import Results, bootstrap_interval

HERE = Path(__file__).parent
Cells = Mapping[str, Any]


def optima_of(cells: Cells) -> dict[str, float]:
    """The lowest mean validation loss of runs on one objective alone, at their best rate."""
    return {
        objective: min(
            float(np.mean([min(run[objective]) for run in _runs(cells, method, rate)]))
            for rate in study.SINGLE_RATES
        )
        for method, objective in (("sft", "sft"), ("rl", "rl"))
    }


def best_rates(cells: Cells) -> dict[str, float]:
    """By method: the rate with the best sum of both validation accuracies at the end."""
    found = {}
    for method in study.METHODS:
        scores = {
            rate: -float(np.mean([run["first_validation"][-1] + run["rl"][-1] for run in runs]))
            for rate in study.RATES
            if (runs := _runs(cells, method, rate))
        }
        if scores:
            found[method] = max(scores, key=lambda rate: scores[rate])
    return found


def _runs(cells: Cells, method: str, rate: float, seeds: Iterable[int] = study.SCREENED) -> list:
    keys = (Cell(method, rate, seed).key for seed in seeds)
    return [cells[key] for key in keys if key in cells]


def analyse(cells: Cells) -> dict[str, Any]:
    """Held-out accuracy on both tasks at the end, and a picture."""
    table = {}
    figure, axes = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for i, (method, rate) in enumerate(best_rates(cells).items()):
        runs = _runs(cells, method, rate, study.ALL)
        # The last three evaluations: one sample of a prompt is a coarse measure.
        ends = {
            task: -np.array([run[f"{task}_held_out"] for run in runs])[:, -3:].mean(1)
            for task in ("first", "second")
        }
        ends["mean"] = (ends["first"] + ends["second"]) / 2
        table[method] = {
            "learning_rate": rate,
            "seeds": len(runs),
            **{
                task: [
                    round(float(x), 4)
                    for x in (values.mean(), *bootstrap_interval(values[:, None], np.mean))
                ]
                for task, values in ends.items()
            },
            "sft_updates": float(np.mean([run["sft_updates"] for run in runs])),
        }
        x, y = table[method]["second"], table[method]["first"]
        axes.errorbar(
            x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            fmt="os^"[i % 3], color=f"C{i % 10}", label=method,
        )  # fmt: skip
    axes.set(xlabel="accuracy on the second task", ylabel="accuracy on the first task")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "mixing.png", dpi=110)
    plt.close(figure)
    return table


def told(table: Mapping[str, Any]) -> str:
    lines = []
    for method, row in table.items():
        parts = (
            f"{task} {row[task][0]:.3f} [{row[task][1]:.3f}, {row[task][2]:.3f}]"
            for task in ("first", "second", "mean")
        )
        lines.append(f"{method:<20}{row['learning_rate']:<8g}{'  '.join(parts)}")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    results = Results(
        HERE / "results.json",
        settings={
            "gradients": study.GRADIENTS,
            "rates": study.RATES,
            "methods": {name: vars(method) for name, method in study.METHODS.items()},
        },
        about={
            "command": "python -m benchmarks.mixing.run",
            "seeds": {"screening": len(study.SCREENED), "compared": len(study.ALL)},
            "budget": "the same number of gradients on as many samples; one torch thread",
        },
        fresh=options.fresh,
    )
    cells = results.content["cells"]
    deadline = time.monotonic() + 60 * options.minutes
    workers = options.jobs
    if not options.plot:
        study.prepare()
        if run_cells(results, [(cell, {}) for cell in study.single()], workers, deadline):
            optima = optima_of(cells)
            jobs = [(cell, optima) for cell in study.screened()]
            if run_cells(results, jobs, workers, deadline):
                chosen = study.finalists(best_rates(cells))
                run_cells(results, [(cell, optima) for cell in chosen], workers, deadline)
    table = analyse(cells)
    results.finish(table)
    print(told(table))


if __name__ == "__main__":
    main()
