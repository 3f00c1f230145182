"""From finished cells to optima, tuned options, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.joint_sft_dpo import study
from benchmarks.joint_sft_dpo.study import Cell
from benchmarks.results import bootstrap_interval

Cells = Mapping[str, Any]
NAMES = ("sft", "dpo")
COLOURS = {
    "sft-dpo": "#56B4E9",
    "dpo-sft": "#0072B2",
    "mix": "#999999",
    "alright": "#E69F00",
    "maxright": "#009E73",
}
LABELS = {
    "sft-dpo": "SFT, then DPO",
    "dpo-sft": "DPO, then SFT",
    "mix": "Mix",
    "alright": "ALRIGHT",
    "maxright": "MAXRIGHT",
}


@dataclass(frozen=True)
class Tuned:
    """Learning rate of every method, and the share of the first stage of the sequences."""

    rates: dict[str, float]
    settings: dict[str, float]

    @classmethod
    def alone(cls, cells: Cells, mode: str) -> Tuned:
        """Of each objective alone: the lowest loss on validation rows."""
        first, _ = study.tuning(mode)
        rates = {}
        for name in NAMES:
            mine = [cell for cell in first if cell.method == name]
            best = min(mine, key=lambda cell: cells[cell.key]["validation"][cell.method])
            rates[name] = best.learning_rate
        return cls(rates, {})


def tuned(cells: Cells, mode: str) -> Tuned:
    """Of every method: the smallest ideal distance on validation rows."""
    found = Tuned.alone(cells, mode)
    _, others = study.tuning(mode)
    best = optima(cells, mode, found.rates, study.TUNING_SEED, "validation")
    for method in study.SEQUENCES + study.JOINT:
        mine = [cell for cell in others if cell.method == method]
        chosen = min(mine, key=lambda c: ideal_distance(cells[c.key]["validation"], best))
        found.rates[method], found.settings[method] = chosen.learning_rate, chosen.setting
    return found


def optima(
    cells: Cells, mode: str, rates: Mapping[str, float], seed: int, rows: str
) -> dict[str, float]:
    """Losses of each objective trained alone.

    ``rows``: ``held_out`` (the lowest along the run), ``validation`` or ``training`` (the last).
    """
    found = {}
    for name in NAMES:
        cell = cells[Cell(mode, name, 0, rates[name], seed).key]
        points = cell["held_out"]
        found[name] = min(p[name] for p in points) if rows == "held_out" else cell[rows][name]
    return found


def ideal_distance(losses: Mapping[str, float], best: Mapping[str, float]) -> float:
    """Euclidean norm of the optimality gaps; doing better than the optimum is no distance."""
    return float(np.hypot(*(max(losses[name] - best[name], 0.0) for name in NAMES)))


def analyse(cells: Cells, folder: Path) -> dict[str, Any]:
    """Tables of all modes that are tuned, and their pictures in ``folder``."""
    summary: dict[str, Any] = {}
    for mode in study.MODES:
        try:
            chosen = tuned(cells, mode)
        except KeyError:
            continue  # not tuned yet
        rows = _rows(cells, mode, chosen)
        summary[mode] = {
            "tuned": {"learning_rate": chosen.rates, "first_stage": chosen.settings},
            "table": rows,
            "differences": _differences(cells, mode, chosen),
        }
        if rows:
            _picture(cells, mode, chosen, rows, folder / f"{mode}.png")
        if mode == "full":
            summary["evaluate_every"] = _staleness(cells, chosen, folder / "evaluate_every.png")
    return summary


def _measure(cells: Cells, mode: str, rates: Mapping[str, float], cell: Cell) -> list[float]:
    """The values of ``COLUMNS``."""
    values = cells[cell.key]
    last = values["held_out"][-1]
    best = optima(cells, mode, rates, cell.seed, "held_out")
    return [
        *(last[name] - best[name] for name in NAMES),
        ideal_distance(last, best),
        last["accuracy"],
        ideal_distance(values["training"], optima(cells, mode, rates, cell.seed, "training")),
        values["seconds"] / study.STEPS,
        values["peak_memory_bytes"] / 2**20,
    ]


COLUMNS = (
    "gap_sft",
    "gap_dpo",
    "ideal_distance",
    "accuracy",
    "ideal_distance_training_rows",
    "seconds_per_update",
    "peak_mib",
)
"""Of the last update, on held-out rows unless it says otherwise."""


def _statistics(samples: np.ndarray) -> dict[str, Any]:
    """Mean of every column with its 95 % bootstrap interval over seeds."""
    found: dict[str, Any] = {"seeds": len(samples)}
    for index, column in enumerate(COLUMNS):
        values = samples[:, index]
        found[column] = [round(float(values.mean()), 5)]
        if len(values) > 1:
            low, high = bootstrap_interval(values[:, None], lambda part: part.mean())
            found[column] += [round(low, 5), round(high, 5)]
    return found


def _present(cells: Cells, mode: str, rates: Mapping[str, float], wanted: Iterable[Cell]) -> Any:
    rows = [
        _measure(cells, mode, rates, cell)
        for cell in wanted
        if cell.key in cells and Cell(mode, "dpo", 0, rates["dpo"], cell.seed).key in cells
    ]
    return np.array(rows)


def _rows(cells: Cells, mode: str, chosen: Tuned) -> list[dict[str, Any]]:
    rows = []
    seeds = study.SEEDS + study.MORE_SEEDS
    for method in study.SEQUENCES + study.JOINT:
        settings = study.FRACTIONS if method in study.SEQUENCES else study.LAMBDAS
        for setting in settings:
            wanted = [Cell(mode, method, setting, chosen.rates[method], seed) for seed in seeds]
            samples = _present(cells, mode, chosen.rates, wanted)
            if len(samples):
                rows.append({"method": method, "setting": setting, **_statistics(samples)})
    return rows


def _differences(cells: Cells, mode: str, chosen: Tuned) -> list[dict[str, Any]]:
    """Paired by seed: joint methods at λ = 0.5, less the tuned sequences and less each other."""
    seeds = study.SEEDS + study.MORE_SEEDS
    measured = {}
    for method in study.SEQUENCES + study.JOINT:
        setting = chosen.settings[method] if method in study.SEQUENCES else 0.5
        measured[method] = {
            seed: _measure(cells, mode, chosen.rates, cell)
            for seed in seeds
            if (cell := Cell(mode, method, setting, chosen.rates[method], seed)).key in cells
        }
    found = []
    for one, other in (
        *((joint, sequence) for joint in study.JOINT for sequence in study.SEQUENCES),
        ("alright", "mix"),
        ("maxright", "mix"),
        ("maxright", "alright"),
    ):
        both = sorted(set(measured[one]) & set(measured[other]))
        if len(both) < 2:
            continue
        samples = np.array([measured[one][s] for s in both]) - [measured[other][s] for s in both]
        entry: dict[str, Any] = {"of": one, "minus": other, "seeds": len(both)}
        for index, column in enumerate(COLUMNS[:5]):
            low, high = bootstrap_interval(samples[:, [index]], lambda part: part.mean())
            mean = float(samples[:, index].mean())
            entry[column] = [round(mean, 5), round(low, 5), round(high, 5)]
        found.append(entry)
    return found


def _staleness(cells: Cells, chosen: Tuned, path: Path) -> list[dict[str, Any]]:
    """Figure 4: how often MAXRIGHT's gaps are evaluated."""
    rows = []
    for every in study.EVALUATE_EVERY:
        wanted = [
            Cell("full", "maxright", 0.5, chosen.rates["maxright"], seed, every)
            for seed in study.SEEDS
        ]
        samples = _present(cells, "full", chosen.rates, wanted)
        if len(samples):
            rows.append({"evaluate_every": every, **_statistics(samples)})
    if len(rows) == len(study.EVALUATE_EVERY):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = range(len(rows))
        for axes, column, text in (
            (left, "ideal_distance", "ideal distance (held out)"),
            (right, "seconds_per_update", "seconds an update"),
        ):
            values = np.array([row[column] for row in rows])
            errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
            axes.errorbar(x, values[:, 0], errors, marker="o", color=COLOURS["maxright"], capsize=3)
            axes.set_xticks(x, [str(row["evaluate_every"]) for row in rows])
            axes.set_xlabel("evaluate_every")
            axes.set_ylabel(text)
            axes.set_ylim(bottom=0)
        figure.suptitle("MAXRIGHT, λ = 0.5: how often the gaps are evaluated")
        figure.savefig(path, dpi=150)
    return rows


def _picture(
    cells: Cells, mode: str, chosen: Tuned, rows: list[dict[str, Any]], path: Path
) -> None:
    """Trajectories in objective space, and gaps and ideal distances as bars."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    seed = study.SEEDS[0]
    for method in study.SEQUENCES + study.JOINT:
        setting = chosen.settings[method] if method in study.SEQUENCES else 0.5
        cell = Cell(mode, method, setting, chosen.rates[method], seed)
        if cell.key not in cells:
            continue
        points = cells[cell.key]["held_out"]
        x, y = ([point[name] for point in points] for name in NAMES)
        left.plot(x, y, marker=".", color=COLOURS[method], label=LABELS[method])
        left.plot(x[-1], y[-1], marker="o", color=COLOURS[method])
    best = optima(cells, mode, chosen.rates, seed, "held_out")
    left.plot(best["sft"], best["dpo"], marker="*", markersize=14, color="black", ls="none")
    left.annotate("ideal point", (best["sft"], best["dpo"]), (6, 6), textcoords="offset points")
    left.set_xlabel("SFT loss (nats a token, held out)")
    left.set_ylabel("DPO loss (nats a pair, held out)")
    left.set_title(f"Objective space, {mode}, seed {seed}")
    left.legend(frameon=False)

    ticks, labels = [], []
    position = 0.0
    for method in study.SEQUENCES + study.JOINT:
        for row in (row for row in rows if row["method"] == method):
            value = row["ideal_distance"]
            error = [[value[0] - value[1]], [value[2] - value[0]]] if len(value) == 3 else None
            right.bar(position, value[0], yerr=error, color=COLOURS[method], capsize=2)
            ticks.append(position)
            labels.append(f"{row['setting']:g}")
            position += 1
        position += 0.8
    right.set_xticks(ticks, labels, fontsize=8, rotation=60)
    right.set_xlabel("share of the first stage (sequences) or λ (joint)")
    right.set_ylabel("ideal distance (held out)")
    right.set_title("Ideal distance after equal updates")
    handles = [
        right.bar(0, 0, color=COLOURS[method], label=LABELS[method])
        for method in study.SEQUENCES + study.JOINT
    ]
    right.legend(handles=handles, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
