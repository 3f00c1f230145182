"""Errors of the simulated bus, beside those that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.results import bootstrap_interval
from benchmarks.simulated_bus import study

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "sizes": {
        "NFXP": (3.62, 1.37, 0.90, 0.71, 0.68, 0.40),
        "GLADIUS": (3.44, 0.84, 0.55, 0.52, 0.13, 0.12),
        "IQ-Learn": (114.13, 112.86, 113.27, 112.98, 111.77, 119.18),
        "BC": (80.55, 72.04, 71.92, 72.17, 62.61, 46.45),
    },
    "dummies": {
        "GLADIUS": (1.24, 2.51, 6.07, 9.76, 11.35),
        "IQ-Learn": (112.0, 192.2, 180.1, 282.2, 321.1),
        "BC": (150.9, 171.1, 180.0, 205.1, 288.8),
    },
}
"""Kang et al., tables 2 and of dummies: mean absolute percentage errors."""
COLOURS = {
    "GLADIUS": "#0072B2",
    "without zeta": "#D55E00",
    "IQ-Learn": "#CC79A7",
    "BC": "#E69F00",
    "NFXP": "#333333",
    "CCP": "#999999",
}


def analyse(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Means, standard errors and intervals of what is finished, and the slope over sizes."""
    tuned = all(cell.key in cells for cell in study.tuning())
    if not tuned:
        return {}
    chosen = study.chosen_settings(dict(cells))
    found: dict[str, dict[str, list[float]]] = {}
    for cell in study.evaluation(chosen):
        if cell.key in cells:
            where = f"{cell.task} | {cell.size} buses | {cell.dummies} dummies"
            of_method = found.setdefault(where, {})
            of_method.setdefault(cell.method, []).append(cells[cell.key]["error"])
    summary: dict[str, Any] = {
        "settings": {
            " | ".join(map(str, key)): study.GRIDS[key[1]][place] for key, place in chosen.items()
        },
        "error": {
            where: {method: spread(errors) for method, errors in methods.items()}
            for where, methods in found.items()
        },
        "slope": {},
        "difference": {},
    }
    for task, sizes in ((study.TASKS[0], study.SIZES), (study.TASKS[1], study.RANDOM_SIZES)):
        for method in (*study.compared(task), *study.ORACLES):
            rows = [
                found.get(f"{task} | {size} buses | 0 dummies", {}).get(method, [])
                for size in sizes
            ]
            if len({len(row) for row in rows}) == 1 and rows[0]:
                summary["slope"][f"{task} | {method}"] = slope(sizes, np.array(rows).T)
    for where, methods in found.items():
        for other in ("NFXP", "without zeta"):
            if len(methods.get(other, [])) == len(methods["GLADIUS"]) > 1:
                less = np.array(methods["GLADIUS"]) - np.array(methods[other])
                summary["difference"][f"{where} | GLADIUS less {other}"] = [
                    round(float(v), 3) for v in (less.mean(), *bootstrap_interval(less, np.mean))
                ]
    return summary


def spread(errors: Sequence[float]) -> dict[str, Any]:
    sample = np.array(errors)
    return {
        "mean": round(float(sample.mean()), 3),
        "standard error": round(float(sample.std(ddof=1) / np.sqrt(len(sample))), 3)
        if len(sample) > 1
        else None,
        "interval": [round(v, 3) for v in bootstrap_interval(sample, np.mean)],
        "seeds": len(sample),
    }


def slope(sizes: Sequence[int], errors: np.ndarray) -> list[float]:
    """Of the log mean error ``(seeds, sizes)`` on the log size, with its interval."""
    x = np.log(sizes) - np.log(sizes).mean()

    def statistic(sample: np.ndarray) -> float:
        return float(np.log(sample.mean(0)) @ x / (x @ x))

    interval = bootstrap_interval(errors, statistic)
    return [round(v, 2) for v in (statistic(errors), *interval)]


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: mean and standard error, and in brackets what the paper has."""
    methods = list(COLOURS)
    lines = [f"| task | buses | dummies | {' | '.join(methods)} |", "|---" * 9 + "|"]
    for where, found in summary.get("error", {}).items():
        task, size, dummies = where.split(" | ")
        number, noise = int(size.split()[0]), int(dummies.split()[0])
        shown = []
        for method in methods:
            entry = found.get(method)
            if entry is None:
                shown.append("")
                continue
            text = f"{entry['mean']:.2f}"
            if entry["standard error"] is not None:
                text += f" ± {entry['standard error']:.2f}"
            printed = published(task, method, number, noise)
            shown.append(text if printed is None else f"{text} ({printed:g})")
        lines.append(f"| {task} | {number:,} | {noise} | {' | '.join(shown)} |")
    return "\n".join(lines)


def published(task: str, method: str, size: int, dummies: int) -> float | None:
    """The paper's figure, where it has one."""
    if task != study.TASKS[0]:
        return None
    row, places, value = (
        (PAPER["dummies"], study.DUMMIES, dummies)
        if dummies
        else (PAPER["sizes"], study.SIZES, size)
    )
    return row[method][places.index(value)] if method in row else None


def draw(summary: Mapping[str, Any]) -> None:
    errors = summary.get("error", {})
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    first, second = study.TASKS
    for axes, title, label, places, key in (
        (panels[0], "The paper's task", "buses", study.SIZES, f"{first} | {{}} buses | 0 dummies"),
        (
            panels[1],
            f"Dummies, {study.DUMMY_SIZE:,} buses",
            "dummies",
            study.DUMMIES,
            f"{first} | {study.DUMMY_SIZE} buses | {{}} dummies",
        ),
        (
            panels[2],
            "Random anchor",
            "buses",
            study.RANDOM_SIZES,
            f"{second} | {{}} buses | 0 dummies",
        ),
    ):
        for method, colour in COLOURS.items():
            points = [
                (place, errors[key.format(place)][method])
                for place in places
                if method in errors.get(key.format(place), {})
            ]
            if points:
                x = [place for place, _ in points]
                axes.plot(x, [e["mean"] for _, e in points], "o-", color=colour, label=method, ms=4)
                low, high = np.array([e["interval"] for _, e in points]).T
                axes.fill_between(x, low, high, color=colour, alpha=0.2)
        for method, values in PAPER[label if label == "dummies" else "sizes"].items():
            if title != "Random anchor":
                axes.plot(places, values, ":", color=COLOURS[method])
        axes.set(xscale="log", yscale="log", xlabel=label, title=title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean absolute percentage error (dotted: paper)")
    panels[0].legend(frameon=False, fontsize=8)
    panels[2].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "simulated_bus.png", dpi=110)
    plt.close(figure)
