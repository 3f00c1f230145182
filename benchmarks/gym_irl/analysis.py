"""Returns and rewards, by task, number of episodes and method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.gym_irl import study
from benchmarks.results import bootstrap_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"GLADIUS": "#0072B2", "IQ-Learn": "#CC79A7", "BC": "#E69F00"}


def analyse(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Means with intervals over seeds; returns in per cent from random (0) to expert (100)."""
    if not all(cell.key in cells for cell in study.tuning()):
        return {}
    chosen = study.chosen_settings(cells)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in study.evaluation(chosen):
        if cell.key in cells:
            where = found.setdefault(f"{cell.task} | {cell.episodes} episodes", {})
            where.setdefault(cell.method, []).append(cells[cell.key])
    summary: dict[str, Any] = {
        "settings": {" | ".join(key): study.GRIDS[key[1]][place] for key, place in chosen.items()},
        "expert": {name: cells[f"{name} | expert"] for name in study.tasks()},
        "found": {},
        "GLADIUS less BC": {},
    }
    for where, methods in found.items():
        name = where.split(" | ")[0]
        shares = {
            method: np.array([normalised(cells, name, run["return"]) for run in runs])
            for method, runs in methods.items()
        }
        summary["found"][where] = {
            method: {
                "return": interval(np.array([run["return"] for run in runs])),
                "share": interval(shares[method]),
                "error": interval(np.array([run["error"] for run in runs])),
                "correlation": None
                if runs[0]["correlation"] is None
                else interval(np.array([run["correlation"] for run in runs])),
            }
            for method, runs in methods.items()
        }
        if len(shares.get("BC", [])) == len(shares["GLADIUS"]):
            summary["GLADIUS less BC"][where] = interval(shares["GLADIUS"] - shares["BC"])
    for key, cell in cells.items():
        if key.startswith("imitation"):
            summary.setdefault("imitation", {})[key] = cell
    return summary


def normalised(cells: Mapping[str, Any], name: str, value: float) -> float:
    ends = cells[f"{name} | expert"]
    return 100.0 * (value - ends["random"]) / (ends["expert"] - ends["random"])


def interval(sample: np.ndarray) -> list[float]:
    values = (sample.mean(), *bootstrap_interval(sample, np.mean))
    return [round(float(v), 3) for v in values]


def table(summary: Mapping[str, Any]) -> str:
    lines = [
        "| task | episodes | method | return | % of expert | reward error | correlation |",
        "|---|---|---|---|---|---|---|",
    ]

    def shown(values: list[float] | None, digits: int) -> str:
        if values is None:
            return ""
        mean, low, high = (f"{v:.{digits}f}" for v in values)
        return f"{mean} [{low}, {high}]"

    for name, entry in summary.get("expert", {}).items():
        lines.append(
            f"| {name} | | expert | {entry['expert']} (random: {entry['random']}) | 100 | "
            f"{entry['error']:.3f} | {entry['correlation'] or ''} |"
        )
    for where, methods in summary.get("found", {}).items():
        name, episodes = where.split(" | ")
        for method, entry in methods.items():
            lines.append(
                f"| {name} | {episodes.split()[0]} | {method} | {shown(entry['return'], 1)} | "
                f"{shown(entry['share'], 0)} | {shown(entry['error'], 3)} | "
                f"{shown(entry['correlation'], 2)} |"
            )
    return "\n".join(lines)


def draw(summary: Mapping[str, Any]) -> None:
    names = list(summary.get("expert", {}))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = []
    for place, (name, episodes) in enumerate((n, e) for n in names for e in study.EPISODES):
        labels.append(f"{name.split('-')[0]}\n{episodes}")
        methods = summary["found"].get(f"{name} | {episodes} episodes", {})
        for offset, (method, colour) in enumerate(COLOURS.items()):
            if method not in methods:
                continue
            x = place + 0.25 * (offset - 1)
            for axes, kind in zip(panels, ("share", "error"), strict=True):
                mean, low, high = methods[method][kind]
                axes.plot([x, x], [low, high], color=colour)
                axes.plot(x, mean, "o", color=colour, label=method if place == 0 else None)
        panels[1].plot(
            [place - 0.4, place + 0.4], [summary["expert"][name]["error"]] * 2, ":", color="black"
        )
    for axes in panels:
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_xlabel("task, episodes demonstrated")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(100, color="grey", linewidth=0.8)
    panels[0].set(ylabel="return, % from random to expert", title="Imitation")
    panels[1].set(yscale="log", ylabel="reward error over reward")
    panels[1].set_title("Rewards of other actions (dotted: of the expert itself)")
    panels[0].legend(frameon=False)
    figure.savefig(HERE / "gym_irl.png", dpi=110)
    plt.close(figure)
