"""What the finished cells say: learning rates, the ratio, and a table of methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

from benchmarks.in_ril import study
from benchmarks.in_ril.study import Cell
from benchmarks.in_ril.tasks import TASKS, Task
from benchmarks.results import bootstrap_interval

Run = Mapping[str, Any]
Cells = Mapping[str, Run]
HERE = Path(__file__).parent
LAST = 3
"""Evaluations over which a final level is the mean."""


# What is chosen -----------------------------------------------------------------------------------


def chosen_rate(cells: Cells, task: Task, policy: str) -> float:
    """The learning rate with which RL alone ends highest, on seeds that are not reported."""
    levels = screened(cells, task, policy)
    return max(levels, key=lambda rate: levels[rate])


def screened(cells: Cells, task: Task, policy: str) -> dict[float, float]:
    """Mean final score of RL alone by learning rate, on the task on which they are chosen."""
    tuned_on = TASKS[task.tuned_on]
    found = cells if tuned_on == task else _finished(tuned_on)
    levels = {
        rate: float(np.mean([level(run) for run in runs]))
        for rate in tuned_on.rates[policy]
        if (runs := _tuned(found, tuned_on, Cell(tuned_on.name, policy, "rl", rate, 0)))
    }
    if not levels and tuned_on != task:
        raise SystemExit(f"{task.name} takes learning rates from {tuned_on.name}: run that first")
    return levels


def chosen_weight(cells: Cells, task: Task, rate: float) -> float | None:
    """The weight of imitation as a regulariser; ``None`` before it is known."""
    levels = {
        weight: float(np.mean([level(run) for run in found]))
        for weight in study.MIXED
        if (found := _tuned(cells, task, Cell(task.name, "gaussian", "mix", rate, 0, weight)))
    }
    return max(levels, key=lambda weight: levels[weight], default=None)


def chosen_ratio(task: Task) -> float:
    """m: that of the fixed ones with surgery that ends highest in the sweep of ``swept_on``.

    The sweep's own seeds: what is compared with it on them is compared with the best of three.
    """
    swept_on = TASKS[task.swept_on]
    cells = _finished(swept_on)
    levels = {}
    for m in study.RATIOS:
        runs = runs_of(cells, swept_on, "gaussian", "surgery", m) if cells else {}
        if runs:
            levels[m] = middle(np.array([level(run) for run in runs.values()]))
    if not levels:
        raise SystemExit(f"{task.name} takes m from {swept_on.name}: run that task first")
    return max(levels, key=lambda m: levels[m])


def _finished(task: Task) -> Cells:
    path = HERE / f"{task.name}.json"
    cells: Cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    return cells


def _tuned(cells: Cells, task: Task, cell: Cell) -> list[Run]:
    seeds = range(study.TUNING, study.TUNING + task.tuning_seeds)
    keys = (replace(cell, seed=seed).key for seed in seeds)
    return [cells[key] for key in keys if key in cells]


# Statistics ---------------------------------------------------------------------------------------


def level(run: Run) -> float:
    """Mean score over the last evaluations."""
    return float(np.mean(run["score"][-LAST:]))


def collapsed(run: Run) -> bool:
    """The score fell below half of its own maximum, and stayed there."""
    return level(run) < 0.5 * max(run["score"])


def middle(values: NDArray[np.float64]) -> Any:
    """Interquartile mean over seeds, the first axis."""
    return trim_mean(values, 0.25, axis=0)


def steps_to(runs: list[Run], wanted: float) -> float | None:
    """Environment steps until the middle curve first reaches a level, by line between evaluations.

    ``None``: never.
    """
    curve = middle(np.array([run["score"] for run in runs]))
    steps = np.mean([run["environment_steps"] for run in runs], axis=0)
    above = np.flatnonzero(curve >= wanted)
    if not len(above):
        return None
    last = above[0]
    if last == 0:
        return 0.0
    share = (wanted - curve[last - 1]) / (curve[last] - curve[last - 1])
    return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))


def runs_of(
    cells: Cells,
    task: Task,
    policy: str,
    method: str,
    option: float | None,
    rate: float | None = None,
) -> dict[int, Run]:
    """Finished runs of a group by seed, by default at the learning rate chosen for RL alone."""
    if rate is None:
        rate = chosen_rate(cells, task, policy)
    found = {}
    for seed in range(task.seeds):
        cell = Cell(task.name, policy, method, rate, seed, option)
        if cell.key in cells:
            found[seed] = cells[cell.key]
    return found


def groups_of(cells: Cells, task: Task) -> Iterator[tuple[str, str, float | None]]:
    """All groups with a finished run, in the order of the study."""
    reported = {
        key.rsplit("/", 2)[0] for key in cells if int(key.rsplit("seed", 1)[1]) < study.TUNING
    }
    ratios: tuple[float, ...] = study.RATIOS
    fixed = ("surgery", "alternate", "iteration", "random", "noise", "sum")
    known: list[study.Method] = [
        ("rl", None), *((name, m) for name in fixed for m in ratios), ("root", None),
        ("balance", None), *(("mix", weight) for weight in study.MIXED), ("buffer", None),
    ]  # fmt: skip
    for policy in study.POLICIES:
        for method, option in known:
            if _name(task, policy, method, option) in reported:
                yield policy, method, option


# Tables -------------------------------------------------------------------------------------------


def analyse(cells: Cells, task: Task) -> dict[str, Any]:
    """A row for every group, and what was chosen."""
    groups = list(groups_of(cells, task))
    rows = {
        _name(task, *group): _row(
            runs_of(cells, task, *group), runs_of(cells, task, group[0], "rl", None)
        )
        for group in groups
    }
    chosen: dict[str, Any] = {}
    if task.tuned_on == task.name:
        chosen["learning_rates"] = {
            policy: {f"{rate:g}": score for rate, score in screened(cells, task, policy).items()}
            for policy in study.policies(task)
        }
    highest = max(task.rates["gaussian"])
    alone = runs_of(cells, task, "gaussian", "rl", None, highest)
    rescued = {
        _name(task, *group): _row(runs, alone)
        for group in groups
        if group[0] == "gaussian" and (runs := runs_of(cells, task, *group, rate=highest))
    }
    if rescued:
        chosen["at_highest_rate"] = {"rate": highest, "groups": rescued}
    if task.whole and chosen["learning_rates"]["gaussian"]:
        rate = chosen_rate(cells, task, "gaussian")
        chosen["weights"] = {
            f"{weight:g}": float(np.mean([level(run) for run in found]))
            for weight in study.MIXED
            if (found := _tuned(cells, task, Cell(task.name, "gaussian", "mix", rate, 0, weight)))
        }
    return {**chosen, "groups": rows}


def _row(runs: dict[int, Run], alone: dict[int, Run]) -> dict[str, Any]:
    found = list(runs.values())
    finals = np.array([level(run) for run in found])
    both = [seed for seed in runs if seed in alone]  # which start from the same policy
    row: dict[str, Any] = {
        "seeds": len(found),
        "start": float(middle(np.array([run["score"][0] for run in found]))),
        **_interval("final", finals),
        "lowest": float(middle(np.array([min(run["score"]) for run in found]))),
        "collapse_rate": float(np.mean([collapsed(run) for run in found])),
        "imitation": float(middle(np.array([run["imitation"][-1] for run in found]))),
        "imitation_highest": float(middle(np.array([max(run["imitation"]) for run in found]))),
        "imitation_start": float(middle(np.array([run["imitation"][0] for run in found]))),
        "updates": {
            kind: float(np.mean([run["updates"][kind] for run in found])) for kind in ("il", "rl")
        },
        "environment_steps": float(np.mean([run["environment_steps"][-1] for run in found])),
        "seconds": float(np.mean([run["seconds"] for run in found])),
    }
    if both:
        row |= _interval("over_rl", _gains(runs, alone))
        wanted = float(middle(np.array([level(alone[seed]) for seed in both])))
        steps = steps_to([runs[seed] for seed in both], wanted)
        own = steps_to([alone[seed] for seed in both], wanted)
        row["steps_to_rl_final"] = steps
        row["share_of_rl_steps"] = steps / own if steps is not None and own else None
    geometry = [run["geometry"] for run in found if run["geometry"]]
    if geometry:
        names = geometry[0]
        row["geometry"] = {name: float(np.mean([g[name] for g in geometry])) for name in names}
    return row


def _gains(runs: dict[int, Run], alone: dict[int, Run]) -> NDArray[np.float64]:
    return np.array([level(runs[seed]) - level(alone[seed]) for seed in runs if seed in alone])


def gains(
    cells: Cells, task: Task, policy: str, method: str, option: float | None
) -> NDArray[np.float64]:
    """Final scores of a group less those of RL alone on the same seeds."""
    runs = runs_of(cells, task, policy, method, option)
    return _gains(runs, runs_of(cells, task, policy, "rl", None))


def _name(task: Task, policy: str, method: str, option: float | None) -> str:
    return Cell(task.name, policy, method, 0.0, 0, option).group


def _interval(name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    statistic: Callable[[NDArray[np.float64]], Any] = lambda rows: middle(rows)[0]  # noqa: E731
    interval = bootstrap_interval(values[:, None], statistic)
    return {name: float(middle(values)), f"{name}_interval": interval}
