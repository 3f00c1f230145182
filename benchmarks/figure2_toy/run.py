"""Figure 2 of Fernando et al.: one preference pair, one demonstration, two parameters.

``python -m benchmarks.figure2_toy.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from benchmarks.linear_softmax import (
    Array,
    Likelihood,
    LinearObjective,
    Preference,
    turn_weights,
)
from benchmarks.results import Results, bootstrap_interval
from holdfast.joint import Alright, Maxright, Mix, Schedule, Sequential, Stage

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = ("dpo", "sft")
START = np.array([5.0, -9.9])
CHOSEN, REJECTED = np.array([1.0, 1.0]), np.array([0.5, 0.5])
TARGET, ALTERNATIVE = np.array([1.0, 0.5]), np.array([0.5, 0.5])
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.001
REFERENCE_EPOCHS = 1_000
STAGE_EPOCHS = 10_000
JOINT_EPOCHS = 2 * STAGE_EPOCHS
THRESHOLD = 0.05
WEIGHTS = {"dpo": 0.5, "sft": 0.5}
SEEDS = list(range(20))
KEEP_EVERY = 100


@dataclass(frozen=True)
class Reading:
    """What the setting of the figure does not fix.

    Attributes
    ----------
    beta : float
        Strength of DPO's pull towards the reference.
    reference : {"sft, from 0", "sft, from start", "chosen, from start"}
        What the reference was trained on, and from which parameters. ``chosen`` is maximum
        likelihood of the preferred answer.
    optima : {"infimum", "trained"}
        ``f*``: the infimum 0 of both losses, or the loss after training that objective alone for
        as many updates as the joint methods take.
    """

    beta: float
    reference: str
    optima: str

    @property
    def label(self) -> str:
        return f"β={self.beta:g}; reference: {self.reference}; f*: {self.optima}"


CHOICE = Reading(1.0, "sft, from 0", "infimum")
READINGS = (
    CHOICE,
    Reading(1.0, "chosen, from start", "infimum"),
    Reading(1.0, "sft, from start", "infimum"),
    Reading(1.0, "sft, from 0", "trained"),
    Reading(0.1, "sft, from 0", "infimum"),
    Reading(0.1, "sft, from 0", "trained"),
)


@dataclass(frozen=True)
class Outcome:
    """Where some runs went.

    Attributes
    ----------
    theta : array, (runs, 2)
        Final parameters.
    updates : array, (runs, objectives)
        Updates of each objective, in shares of its weight, before the schedule ended.
    path : array, (kept, 3)
        ``(update, θ_1, θ_2)`` of the first run.
    """

    theta: Array
    updates: Array
    path: Array


def descend(
    objectives: Mapping[str, LinearObjective],
    schedules: Sequence[Schedule],
    start: Array,
    updates: int,
) -> Outcome:
    """Full-batch gradient descent with L2 weight decay, one run per schedule."""
    theta = np.tile(start, (len(schedules), 1))
    made = np.zeros((len(schedules), len(objectives)))
    path = [[0.0, *theta[0]]]
    for step_number in range(1, updates + 1):
        weights = turn_weights(schedules, objectives, theta)
        active = weights.sum(axis=1) > 0
        if not active.any():
            break
        step = WEIGHT_DECAY * theta
        for column, objective in enumerate(objectives.values()):
            step = step + weights[:, [column]] * objective.gradient(theta)
        # A run that has ended is left alone by weight decay too.
        theta = theta - LEARNING_RATE * active[:, None] * step
        made += weights
        if active[0] and step_number % KEEP_EVERY == 0:
            path.append([step_number, *theta[0]])
    last = float(made[0].sum())
    if path[-1][0] != last:
        path.append([last, *theta[0]])
    return Outcome(theta, made, np.array(path))


def build(reading: Reading) -> dict[str, LinearObjective]:
    """The two objectives under a reading."""
    sft = Likelihood(np.array([TARGET, ALTERNATIVE]), TARGET[None])
    taught, origin = reading.reference.split(", from ")
    teacher = sft if taught == "sft" else Likelihood(np.array([CHOSEN, REJECTED]), CHOSEN[None])
    reference = descend(
        {"sft": teacher},
        [Sequential({"sft": REFERENCE_EPOCHS})],
        np.zeros(2) if origin == "0" else START,
        REFERENCE_EPOCHS,
    ).theta[0]
    return {"dpo": Preference((CHOSEN - REJECTED)[None], reference, reading.beta), "sft": sft}


def optima(reading: Reading, objectives: Mapping[str, LinearObjective]) -> dict[str, float]:
    if reading.optima == "infimum":
        return dict.fromkeys(NAMES, 0.0)
    return {
        name: float(
            objectives[name].loss(
                descend(objectives, [Mix({name: 1.0})], START, JOINT_EPOCHS).theta
            )[0]
        )
        for name in NAMES
    }


def schedules(method: str, best: Mapping[str, float]) -> list[Schedule]:
    """The schedules of a method: one, or one per seed where the method draws."""
    if method == "ALRIGHT":
        return [Alright(WEIGHTS, seed) for seed in SEEDS]
    if method == "MAXRIGHT":
        return [Maxright(WEIGHTS, best)]
    if method == "Mix":
        return [Mix(WEIGHTS)]
    order, _, rule = method.partition(", ")
    return [
        Sequential(
            Stage(
                {name: 1.0},
                steps=STAGE_EPOCHS,
                loss_below=best[name] + THRESHOLD if rule != "no threshold" else None,
            )
            for name in order.lower().split("→")
        )
    ]


UNSTOPPED = ("DPO→SFT, no threshold", "SFT→DPO, no threshold")
METHODS = ("DPO→SFT", "SFT→DPO", *UNSTOPPED, "ALRIGHT", "MAXRIGHT", "Mix")


def compute(reading: Reading, method: str) -> dict[str, Any]:
    """One cell: final gaps and updates of every seed, and the path of the first."""
    objectives = build(reading)
    best = optima(reading, objectives)
    outcome = descend(objectives, schedules(method, best), START, JOINT_EPOCHS)
    gaps = {name: objectives[name].loss(outcome.theta) - best[name] for name in NAMES}
    cell = {
        "ideal_distance": np.hypot(*gaps.values()).round(8).tolist(),
        "gaps": {name: gap.round(8).tolist() for name, gap in gaps.items()},
        "updates": dict(zip(NAMES, outcome.updates.T.tolist(), strict=True)),
    }
    if reading is CHOICE:
        losses = [objectives[name].loss(outcome.path[:, 1:]) for name in NAMES]
        cell["path"] = {
            "columns": ["update", "theta_1", "theta_2", *NAMES],
            "rows": np.column_stack([outcome.path, *losses]).round(6).tolist(),
        }
    return cell


def summarise(cell: Mapping[str, Any]) -> dict[str, Any]:
    distances = np.array(cell["ideal_distance"])
    line: dict[str, Any] = {
        "ideal_distance": round(float(distances.mean()), 5),
        "gaps": {name: round(float(np.mean(v)), 5) for name, v in cell["gaps"].items()},
        "updates": {name: round(float(np.mean(v))) for name, v in cell["updates"].items()},
    }
    if len(distances) > 1:
        line["interval"] = [round(v, 5) for v in bootstrap_interval(distances, np.mean)]
    return line


STYLE: dict[str, dict[str, Any]] = {
    # Wide and pale where another line runs over it.
    "DPO→SFT": {"color": "#D55E00", "linewidth": 5, "alpha": 0.45},
    "SFT→DPO": {"color": "#E69F00"},
    "DPO→SFT, no threshold": {"color": "#D55E00", "linestyle": ":"},
    "SFT→DPO, no threshold": {"color": "#E69F00", "linestyle": ":"},
    "ALRIGHT": {"color": "#56B4E9", "linewidth": 3.5},
    "MAXRIGHT": {"color": "#009E73"},
    "Mix": {"color": "#333333", "linestyle": "--", "linewidth": 1.2},
}


def draw_contours(axes: Axes, objectives: Mapping[str, LinearObjective]) -> None:
    """Level sets of both losses, labelled where no path runs."""
    x, y = np.linspace(3.5, 13, 160), np.linspace(-11, 0.5, 160)
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    for name, colour, levels, labels in (
        ("dpo", "#B0508A", (0.02, 0.05, 0.2, 1), [(12, -2), (12, -4), (12, -7), (6, -5)]),
        ("sft", "#2F7FB8", (0.005, 0.02, 0.1), [(10.6, -10), (7.8, -10), (4.5, -8)]),
    ):
        values = objectives[name].loss(grid.reshape(-1, 2)).reshape(grid.shape[:2])
        contour = axes.contour(x, y, values, levels, colors=colour, linewidths=0.7)
        axes.clabel(contour, fmt=lambda v, name=name: f"{name} {v:g}", fontsize=8, manual=labels)


def draw(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Weight space, loss space, and the distance to the ideal point over updates."""
    figure, (weight, loss, time) = plt.subplots(1, 3, figsize=(14.5, 5), layout="constrained")
    inset = loss.inset_axes((0.53, 0.1, 0.46, 0.46))
    draw_contours(weight, build(CHOICE))
    for method, style in STYLE.items():
        rows = np.array(cells[method]["path"]["rows"])
        update, theta, losses = rows[:, 0], rows[:, 1:3], rows[:, 3:]
        time.plot(update, np.hypot(*losses.T), **style, label=method)
        if method in UNSTOPPED:
            continue  # Their first part is drawn already; the rest would hide the end points.
        for axes, points in ((weight, theta), (loss, losses[:, ::-1]), (inset, losses[:, ::-1])):
            axes.plot(*points.T, **style)
            axes.plot(*points[-1], "o", color=style["color"], markersize=6, zorder=4)
    weight.plot(*START, "ks", markersize=6)
    weight.annotate("start", tuple(START), (8, -3), textcoords="offset points", fontsize=9)
    weight.set(xlabel="θ₁", ylabel="θ₂", title="Weight space")

    for axes in (loss, inset):
        axes.plot(0, 0, "*", color="black", markersize=13, clip_on=False, zorder=5)
    loss.set(xlim=(0, 0.085), ylim=(0, 3.6), title="Loss space (★ ideal point; inset: near it)")
    loss.set(xlabel="SFT loss", ylabel="DPO loss")
    inset.set(xlim=(0, 0.008), ylim=(0, 0.06))
    inset.tick_params(labelsize=8)

    time.axhline(THRESHOLD, color="#999999", linewidth=0.8)
    time.annotate("threshold", (300, THRESHOLD * 0.95), va="top", fontsize=8, color="#666666")
    time.set(yscale="log", xlabel="updates", ylabel="√(DPO gap² + SFT gap²)")
    time.set(xlim=(0, JOINT_EPOCHS), title="Distance to the ideal point")
    for axes in (weight, loss, time):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STYLE), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'method':<24}{'ideal distance':<26}{'gap DPO':<10}SFT{'updates DPO':>18}{'SFT':>7}"]
    for method, line in summary.items():
        distance = f"{line['ideal_distance']:.4f}"
        if "interval" in line:
            distance += " [{:.4f}, {:.4f}]".format(*line["interval"])
        gaps, updates = line["gaps"], line["updates"]
        lines.append(
            f"{method:<24}{distance:<26}{gaps['dpo']:<10.4f}{gaps['sft']:<7.4f}"
            f"{updates['dpo']:>14}{updates['sft']:>7}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="recompute finished cells")
    options = parser.parse_args(arguments)
    results = Results(
        HERE / "results.json",
        settings={
            "start": START.tolist(),
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "reference_epochs": REFERENCE_EPOCHS,
            "stage_epochs": STAGE_EPOCHS,
            "joint_epochs": JOINT_EPOCHS,
            "threshold": THRESHOLD,
            "weights": WEIGHTS,
            "seeds": SEEDS,
        },
        about={
            "study": "Figure 2 of Fernando et al., arXiv 2410.15483",
            "command": "python -m benchmarks.figure2_toy.run",
            "budget": "2 to 5 minutes on one core",
        },
        fresh=options.fresh,
    )
    summary: dict[str, dict[str, Any]] = {}
    for reading in READINGS:
        cells = {
            method: results.cell(
                f"{reading.label} | {method}",
                partial(compute, reading, method),
            )
            for method in METHODS
        }
        summary[reading.label] = {method: summarise(cell) for method, cell in cells.items()}
        print(f"{reading.label}\n{table(summary[reading.label])}\n")
        if reading is CHOICE:
            draw(cells, HERE / "figure2.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
