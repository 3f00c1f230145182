"""What the finished cells say: options, edges, envelopes, a table and a heat map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.arithmetic.analysis import collapsed
from benchmarks.envelope import study
from benchmarks.envelope.study import Cell
from benchmarks.results import bootstrap_interval

Run = Mapping[str, Any]
Cells = Mapping[str, Run]
ENOUGH = 0.9
"""Of the best accuracy of the method without a guard: what a rate of the envelope must reach."""
CONTROLS = {"budget": "cap", "capo": study.RANDOM}
"""What a guard must beat, where it is more than the method without a guard."""


def level(run: Run, rows: str = "held_out") -> float:
    """Mean accuracy over the last three evaluations."""
    return float(np.mean(run[rows][-3:]))


def chosen_options(cells: Cells) -> dict[str, float | None]:
    """By method and guard: the option with the best mean validation accuracy at two rates."""
    scores: dict[str, dict[float, list[float]]] = {}
    for cell in study.tuning():
        if cell.key in cells:
            tried = scores.setdefault(f"{cell.method}/{cell.guard}", {})
            assert cell.option is not None
            tried.setdefault(cell.option, []).append(level(cells[cell.key], "validation"))
    return {
        name: max(tried, key=lambda option: float(np.mean(tried[option])))
        for name, tried in scores.items()
    }


def groups(options: Mapping[str, float | None]) -> Iterator[Cell]:
    """All that is compared, methods without a guard first."""
    for method in study.METHODS:
        yield Cell(method, study.NONE, 0.0, 0)
    yield from study.groups(options)


def runs_of(cells: Cells, group: Cell) -> dict[float, list[Run]]:
    """Finished runs by learning rate."""
    found = {}
    for rate in study.LEARNING_RATES:
        keys = (replace(group, learning_rate=rate, seed=seed).key for seed in study.ALL)
        runs = [cells[key] for key in keys if key in cells]
        if runs:
            found[rate] = runs
    return found


def best_rate(by_rate: Mapping[float, list[Run]]) -> float:
    """By validation accuracy."""
    return max(
        by_rate, key=lambda rate: np.mean([level(run, "validation") for run in by_rate[rate]])
    )


def envelope(by_rate: Mapping[float, list[Run]], enough: float) -> list[float]:
    """Rates of the widest unbroken range without a collapse in any seed, and accurate enough."""
    fine = [
        rate
        for rate, runs in by_rate.items()
        if not any(collapsed(run["validation"]) for run in runs)
        and np.mean([level(run, "validation") for run in runs]) >= enough
    ]
    ranges: list[list[float]] = []
    for rate in fine:
        before = list(by_rate).index(rate) - 1
        if ranges and before >= 0 and list(by_rate)[before] == ranges[-1][-1]:
            ranges[-1].append(rate)
        else:
            ranges.append([rate])
    return max(ranges, key=len, default=[])


def accuracy_needed(cells: Cells, method: str) -> float:
    """``ENOUGH`` times what the method reaches without a guard at its best rate."""
    by_rate = runs_of(cells, Cell(method, study.NONE, 0.0, 0))
    if not by_rate:
        return 0.0
    runs = by_rate[best_rate(by_rate)]
    return ENOUGH * float(np.mean([level(run, "validation") for run in runs]))


def edges(cells: Cells, options: Mapping[str, float | None]) -> Iterator[Cell]:
    """All seeds of guards at the best rate, at both ends of the envelope, and one beyond."""
    rates = list(study.LEARNING_RATES)
    wanted = []
    for group in study.groups(options):
        by_rate = runs_of(cells, group)
        if not by_rate:
            continue
        inside = envelope(by_rate, accuracy_needed(cells, group.method))
        chosen = {best_rate(by_rate)}
        if inside:
            beyond = min(rates.index(inside[-1]) + 1, len(rates) - 1)
            chosen |= {inside[0], inside[-1], rates[beyond]}
        wanted += [replace(group, learning_rate=rate) for rate in sorted(chosen)]
    for seed in study.ALL:
        for cell in wanted:
            yield replace(cell, seed=seed)


# Tables and pictures ------------------------------------------------------------------------------


def analyse(cells: Cells, picture: Path) -> dict[str, Any]:
    options = chosen_options(cells)
    rows = {}
    for group in groups(options):
        by_rate = runs_of(cells, group)
        if by_rate:
            rows[group.group] = _row(cells, group, by_rate)
            rows[group.group]["over_control"] = _over_control(cells, group, options)
    if rows:
        _draw(rows, picture)
    return {"options": options, "groups": rows}


def _row(cells: Cells, group: Cell, by_rate: Mapping[float, list[Run]]) -> dict[str, Any]:
    best = best_rate(by_rate)
    runs = by_rate[best]
    finals = np.array([level(run) for run in runs])
    inside = envelope(by_rate, accuracy_needed(cells, group.method))
    plain = runs_of(cells, replace(group, guard=study.NONE, option=None)).get(best, [])
    row: dict[str, Any] = {
        "learning_rate": best,
        "seeds": len(runs),
        "accuracy": round(float(finals.mean()), 4),
        "interval": [round(x, 4) for x in bootstrap_interval(finals[:, None], np.mean)],
        "envelope": [inside[0], inside[-1]] if inside else None,
        "width": round(float(np.log10(inside[-1] / inside[0])), 2) if inside else None,
        "collapse_rate": {
            f"{rate:g}": round(float(np.mean([collapsed(run["held_out"]) for run in found])), 3)
            for rate, found in by_rate.items()
        },
        "accuracies": {
            f"{rate:g}": round(float(np.mean([level(run) for run in found])), 4)
            for rate, found in by_rate.items()
        },
        "intervened": {
            f"{rate:g}": round(float(np.mean([run["intervened"] for run in found])), 4)
            for rate, found in by_rate.items()
            if all(run["intervened"] is not None for run in found)
        },
        "grad_norm_p99": _mean(run["grad_norm"]["p99"] for run in runs),
        "seconds": _mean(run["seconds"] for run in runs),
    }
    if plain:
        row["time"] = round(
            float(
                np.median([r["seconds"] for r in runs]) / np.median([r["seconds"] for r in plain])
            ),
            3,
        )
    return row


def _over_control(
    cells: Cells, group: Cell, options: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Paired differences of accuracy from the control, by rate, over the seeds of both."""
    name = CONTROLS.get(group.guard, study.NONE)
    source = "capo" if name == study.RANDOM else name
    control = replace(group, guard=name, option=options.get(f"{group.method}/{source}"))
    found = {}
    for rate in study.LEARNING_RATES:
        pairs = (
            [replace(cell, learning_rate=rate, seed=seed).key for cell in (group, control)]
            for seed in study.ALL
        )
        gains = [
            level(cells[own]) - level(cells[other])
            for own, other in pairs
            if own in cells and other in cells
        ]
        if gains and group.guard != study.NONE:
            interval = bootstrap_interval(np.array(gains)[:, None], np.mean)
            found[f"{rate:g}"] = {
                "seeds": len(gains),
                "difference": round(float(np.mean(gains)), 4),
                "interval": [round(x, 4) for x in interval],
            }
    return found


def _mean(values: Iterator[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(float(np.mean(found)), 3) if found else None


def table(summary: Mapping[str, Any]) -> str:
    """In Markdown; the last columns are shares of seeds that collapse, by learning rate."""
    titles = ["method", "guard", "best rate", "accuracy", "envelope", "decades", "time"]
    titles += [_power(rate) for rate in study.GUARDED_RATES]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in summary["groups"].items():
        method, guard = name.split("/")
        low, high = row["interval"]
        inside = " … ".join(_power(rate) for rate in row["envelope"] or ()) or "none"
        width = "" if row["width"] is None else f"{row['width']:.1f}"
        shown = [
            method,
            guard.replace("-", " "),
            _power(row["learning_rate"]),
            _fraction(row["accuracy"]) + f" [{_fraction(low)}, {_fraction(high)}]",
            inside,
            width,
            f"{row['time']:.2f}",
            *(_fraction(row["collapse_rate"][f"{rate:g}"], 1) for rate in study.GUARDED_RATES),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _power(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _fraction(value: float, digits: int = 3) -> str:
    """Without the zero before the point."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if value else "0"


def _draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Heat maps: accuracy, and the share of seeds that collapse."""
    names = list(rows)
    rates = [f"{rate:g}" for rate in study.LEARNING_RATES]
    figure, axes = plt.subplots(
        1, 2, figsize=(14, 1.5 + 0.28 * len(names)), sharey=True, layout="constrained"
    )
    panels = (("accuracies", "held-out accuracy", "viridis", None), (
        "collapse_rate", "share of seeds that collapse", "Reds", 1.0))  # fmt: skip
    for axis, (key, title, colours, top) in zip(axes, panels, strict=True):
        values = np.array([[row[key].get(rate, np.nan) for rate in rates] for row in rows.values()])
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0.0, vmax=top)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if np.isfinite(value):
                    dark = value > 0.5 * np.nanmax(values)
                    bright = (colours == "Reds") == dark
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6.5,
                              color="white" if bright else "black")  # fmt: skip
        axis.set_xticks(range(len(rates)), rates)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set(title=title, xlabel="learning rate")
        figure.colorbar(image, ax=axis, fraction=0.03)
    figure.savefig(path, dpi=90)
    plt.close(figure)
