"""Theorems 3.3 and 4.1 of Fernando et al. on a constructed pair of data sets.

``python -m benchmarks.forgetting_rate.run`` from the root of the repository; see README.md beside
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache, partial
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
    minimiser,
    turn_weights,
)
from benchmarks.results import Results, bootstrap_interval
from holdfast.joint import Alright, Maxright, Mix, Schedule, Sequential

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BUDGETS = [2**power for power in range(6, 17)]
LAMBDAS = (0.25, 0.5, 0.75)
SEEDS = list(range(20))
RADIUS = 3.0
STEP = 1.0
FIT_FROM = 2**10
ITERATES = ("average", "last")

# Three answers to one prompt, on a circle of radius 1.
A, B, C = np.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
DEMONSTRATIONS = {"A": 7, "B": 2, "C": 1}
PREFERENCES = {"B>A": 4, "A>B": 1, "B>C": 3, "C>B": 2, "C>A": 2, "A>C": 1}
# |φ_y - φ_y'| ≤ √3 bounds every stochastic gradient of both objectives (β = 1).
GRADIENT_BOUND = 3.0**0.5


@cache
def pair() -> dict[str, LinearObjective]:
    """Demonstrators mostly answer A; judges prefer B to it. The reference is uniform, β is 1."""
    phi = {"A": A, "B": B, "C": C}
    targets = [phi[answer] for answer, count in DEMONSTRATIONS.items() for _ in range(count)]
    differences = [
        phi[names[0]] - phi[names[2]] for names, count in PREFERENCES.items() for _ in range(count)
    ]
    return {
        "dpo": Preference(np.array(differences), np.zeros(2), beta=1.0),
        "sft": Likelihood(np.array([A, B, C]), np.array(targets)),
    }


def weights_of(share: float) -> dict[str, float]:
    """λ goes to DPO, 1 - λ to SFT."""
    return {"dpo": share, "sft": 1.0 - share}


def minimum(weights: Mapping[str, float]) -> Array:
    """The minimiser of the weighted sum, which lies inside the ball."""
    theta = minimiser(pair(), weights, np.zeros(2))
    if np.linalg.norm(theta) >= RADIUS:
        raise ArithmeticError("the minimum lies outside the ball: enlarge RADIUS")
    return theta


@cache
def optima() -> dict[str, float]:
    return {name: float(pair()[name].loss(minimum({name: 1.0}))) for name in pair()}


def weighted_gaps(theta: Array, share: float) -> Array:
    """``w_i (f_i - f_i*)`` at ``theta``, ``(..., 2)``, as ``(..., objectives)``."""
    gaps = [
        weight * (pair()[name].loss(theta) - optima()[name])
        for name, weight in weights_of(share).items()
    ]
    return np.stack(gaps, axis=-1)


def least_largest_gap(share: float) -> Array:
    """Where the larger weighted gap is smallest: both are equal on a minimiser of some mixture."""
    low, high = 0.0, 1.0
    theta = minimum(weights_of(share))
    for _ in range(60):
        tilt = (low + high) / 2
        weights = {"dpo": share * tilt, "sft": (1 - share) * (1 - tilt)}
        theta = minimiser(pair(), weights, theta)
        dpo, sft = weighted_gaps(theta, share)
        low, high = (tilt, high) if dpo > sft else (low, tilt)
    return theta


def descend(
    schedules: Sequence[Schedule],
    generators: Sequence[np.random.Generator],
    start: Array,
    updates: Sequence[int],
) -> dict[str, Array]:
    """Projected stochastic gradient descent, one row a step, with steps ``α_t = α_0 / √t``.

    Parameters
    ----------
    schedules, generators : sequences
        One of each per run; the generators draw the rows.
    start : array, (runs, 2)
        Starting points.
    updates : increasing sequence of int
        Numbers of updates after which the iterates are kept.

    Returns
    -------
    dict of array, (kept, runs, 2)
        ``last``: the iterate. ``average``: the iterates so far, weighted by their step sizes.
    """
    objectives = pair()
    rows = [
        np.stack([g.integers(objective.rows, size=updates[-1]) for g in generators], axis=1)
        for objective in objectives.values()
    ]
    theta, average, total = start.copy(), np.zeros_like(start), 0.0
    kept: dict[str, list[Array]] = {"average": [], "last": []}
    for t in range(1, updates[-1] + 1):
        weights = turn_weights(schedules, objectives, theta)
        size = STEP / t**0.5
        total += size
        average = average + size / total * (theta - average)
        step = np.zeros_like(theta)
        for column, objective in enumerate(objectives.values()):
            gradient = objective.gradient(theta, rows[column][t - 1])
            step += weights[:, [column]] * gradient
        theta = theta - size * step
        norm = np.sqrt((theta * theta).sum(axis=1, keepdims=True))
        theta = theta * np.minimum(1.0, RADIUS / np.maximum(norm, 1e-300))
        if t in updates:
            kept["average"].append(average)
            kept["last"].append(theta)
    return {name: np.array(thetas) for name, thetas in kept.items()}


def build(method: str, share: float, seed: int) -> Schedule:
    weights = weights_of(share)
    if method == "ALRIGHT":
        return Alright(weights, seed)
    return Maxright(weights, optima()) if method == "MAXRIGHT" else Mix(weights)


def joint_run(method: str, share: float) -> dict[str, Any]:
    """ALRIGHT, MAXRIGHT or Mix: one run per seed passes through every budget."""
    schedules = [build(method, share, seed) for seed in SEEDS]
    generators = [np.random.default_rng(seed) for seed in SEEDS]
    kept = descend(schedules, generators, np.zeros((len(SEEDS), 2)), BUDGETS)
    return {name: thetas.round(12).tolist() for name, thetas in kept.items()}


def sequential_run(order: Sequence[str], budget: int) -> dict[str, Any]:
    """Two stages of half the budget; the iterates are those of the second."""
    half = budget // 2
    schedules = [Sequential([(name, half) for name in order]) for _ in SEEDS]
    generators = [np.random.default_rng(seed) for seed in SEEDS]
    first = descend(schedules, generators, np.zeros((len(SEEDS), 2)), [half])
    # The second call begins the step sizes and the average anew.
    second = descend(schedules, generators, first["last"][-1], [half])
    return {name: thetas[-1].round(12).tolist() for name, thetas in second.items()}


def bound(iterate: str, updates: Array) -> Array:
    """What the mixed gap of ALRIGHT cannot exceed in expectation; derived in README.md."""
    diameter, t = 2 * RADIUS, updates
    if iterate == "last":
        return (diameter**2 / STEP + STEP * GRADIENT_BOUND**2) * (2 + np.log(t)) / np.sqrt(t)
    steps = 2 * (np.sqrt(t + 1) - 1)
    return (diameter**2 / STEP + STEP * GRADIENT_BOUND**2 * (1 + np.log(t))) / (2 * steps)


METHODS = ("DPO→SFT", "SFT→DPO", "ALRIGHT", "MAXRIGHT", "Mix")


def iterates(results: Results, method: str, share: float) -> dict[str, Array]:
    """Iterates of a method, ``(budgets, seeds, 2)``, computed where they are not known yet."""
    if "→" in method:
        order = method.lower().split("→")
        cells = [
            results.cell(f"{method} | {budget}", partial(sequential_run, order, budget))
            for budget in BUDGETS
        ]
        return {name: np.array([cell[name] for cell in cells]) for name in ITERATES}
    cell = results.cell(f"{method} | λ={share:g}", partial(joint_run, method, share))
    return {name: np.array(cell[name]) for name in ITERATES}


def slope(gaps: Array) -> float:
    """Slope of ``log(mean gap)`` over ``log T`` from ``FIT_FROM`` on; ``(seeds, budgets)`` in."""
    start = BUDGETS.index(FIT_FROM)
    fit = np.polyfit(np.log(BUDGETS[start:]), np.log(gaps.mean(axis=0)[start:]), 1)
    return float(fit[0])


def measure(gaps: Array) -> dict[str, Any]:
    """Means, intervals and slope of gaps, ``(seeds, budgets)``."""
    means = gaps.mean(axis=0)
    return {
        "gap": [float(f"{mean:.4g}") for mean in means],
        "interval": [
            [float(f"{end:.4g}") for end in bootstrap_interval(column, np.mean)]
            for column in gaps.T
        ],
        "slope": round(slope(gaps), 3),
        "slope_interval": [round(end, 3) for end in bootstrap_interval(gaps, slope)],
    }


def summarise(results: Results, share: float) -> dict[str, Any]:
    """For one λ: the mixed gap of every method and iterate, and what it must tend to."""
    weights = weights_of(share)
    best = minimum(weights)
    floor = weighted_gaps(best, share).sum()
    meeting = least_largest_gap(share)
    limits = {
        "DPO→SFT": minimum({"sft": 1.0}),
        "SFT→DPO": minimum({"dpo": 1.0}),
        "MAXRIGHT": meeting,
        "ALRIGHT": best,
        "Mix": best,
    }
    summary: dict[str, Any] = {}
    for method in METHODS:
        thetas = iterates(results, method, share)
        limit = float(weighted_gaps(limits[method], share).sum() - floor)
        summary[method] = {"limit": float(f"{limit:.6g}")}
        for name in ITERATES:
            gaps = weighted_gaps(thetas[name], share)
            summary[method][name] = measure((gaps.sum(axis=-1) - floor).T)
            if method == "MAXRIGHT":
                largest = gaps.max(axis=-1) - weighted_gaps(meeting, share).max()
                summary[method][name]["largest_gap"] = measure(largest.T)
    for name in ITERATES:
        ratio = np.array(summary["ALRIGHT"][name]["gap"]) * np.sqrt(BUDGETS) / np.log(BUDGETS)
        summary["ALRIGHT"][name]["gap_over_rate"] = [float(f"{r:.4g}") for r in ratio]
        within = summary["ALRIGHT"][name]["gap"] <= bound(name, np.array(BUDGETS, dtype=float))
        summary["ALRIGHT"][name]["within_bound"] = bool(within.all())
    return summary


COLOURS = {
    "DPO→SFT": "#D55E00",
    "SFT→DPO": "#E69F00",
    "ALRIGHT": "#0072B2",
    "MAXRIGHT": "#009E73",
    "Mix": "#333333",
}


def draw_landscape(axes: Axes, share: float) -> None:
    """The mixed objective, its minimum, and the minima that the other methods go to."""
    x, y = np.linspace(-1.3, 1.6, 120), np.linspace(-0.45, 1.1, 120)
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    floor = weighted_gaps(minimum(weights_of(share)), share).sum()
    mixed = weighted_gaps(grid.reshape(-1, 2), share).sum(axis=-1).reshape(grid.shape[:2]) - floor
    levels = [0.003, 0.01, 0.03, 0.1, 0.2, 0.4]
    contour = axes.contour(x, y, mixed, levels, colors="#999999", linewidths=0.7)
    axes.clabel(contour, levels[2:], fmt="%g", fontsize=8)
    front = np.array([minimum(weights_of(float(part))) for part in np.linspace(0, 1, 60)])
    axes.plot(*front.T, color="#BBBBBB", linewidth=3, zorder=1)
    end = tuple(front[-2])
    axes.annotate("Pareto set", end, (-14, -14), textcoords="offset points", fontsize=8)
    for point, text, colour, offset in (
        (minimum({"sft": 1.0}), "SFT optimum", COLOURS["DPO→SFT"], (-4, 10)),
        (minimum({"dpo": 1.0}), "DPO optimum", COLOURS["SFT→DPO"], (-22, 10)),
        (minimum(weights_of(share)), "mixed optimum", COLOURS["ALRIGHT"], (-44, 12)),
        (least_largest_gap(share), "equal gaps", COLOURS["MAXRIGHT"], (-44, -20)),
    ):
        axes.plot(*point, "o", color=colour, zorder=5)
        note = axes.annotate(
            text, tuple(point), offset, textcoords="offset points", color=colour, fontsize=9
        )
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
    axes.plot(0, 0, "ks", markersize=5)
    axes.annotate("start", (0, 0), (6, -10), textcoords="offset points", fontsize=9)
    axes.set(xlabel="θ₁", ylabel="θ₂", title=f"Mixed gap, λ = {share:g}")


def draw(summary: Mapping[str, Any], share: float, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(14.5, 4.9), layout="constrained")
    draw_landscape(panels[0], share)
    updates = np.array(BUDGETS, dtype=float)
    for axes, name in zip(panels[1:], ITERATES, strict=True):
        for method, colour in COLOURS.items():
            line = summary[method][name]
            ends = np.array(line["interval"]).T
            style = {"linestyle": "--", "marker": "x"} if method == "Mix" else {"marker": "o"}
            axes.plot(updates, line["gap"], color=colour, markersize=4, label=method, **style)
            axes.fill_between(updates, *ends, color=colour, alpha=0.2, linewidth=0)
            if summary[method]["limit"] > 0:
                axes.axhline(summary[method]["limit"], color=colour, linewidth=0.8, linestyle=":")
        axes.plot(updates, bound(name, updates), color="#B0508A", label="bound for ALRIGHT")
        scale = summary["ALRIGHT"][name]["gap"][0] * updates[0] ** 0.5 / np.log(updates[0])
        rate = scale * np.log(updates) / np.sqrt(updates)
        axes.plot(updates, rate, color="#B0508A", linestyle="--", label="log T / √T, scaled")
        axes.set(yscale="log", ylim=(1e-5, 60), xlabel="updates T", ylabel="mixed gap")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{name.capitalize()} iterate")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(summary: Mapping[str, Any]) -> str:
    first, last = BUDGETS[0], BUDGETS[-1]
    lines = [f"{'method':<10}{'iterate':<9}{f'T={first}':>10}{f'T={last}':>11}  {'limit':<10}slope"]
    for method, entry in summary.items():
        for name in ITERATES:
            line = entry[name]
            low, high = line["slope_interval"]
            lines.append(
                f"{method:<10}{name:<9}{line['gap'][0]:>10.3g}{line['gap'][-1]:>11.3g}"
                f"  {entry['limit']:<10.3g}{line['slope']:.2f} [{low:.2f}, {high:.2f}]"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="recompute finished cells")
    options = parser.parse_args(arguments)
    results = Results(
        HERE / "results.json",
        settings={
            "demonstrations": DEMONSTRATIONS,
            "preferences": PREFERENCES,
            "beta": 1.0,
            "radius": RADIUS,
            "step": STEP,
            "updates": BUDGETS,
            "slopes_from": FIT_FROM,
            "lambdas": LAMBDAS,
            "seeds": SEEDS,
        },
        about={
            "study": "Theorems 3.3 and 4.1 of Fernando et al., arXiv 2410.15483",
            "command": "python -m benchmarks.forgetting_rate.run",
            "budget": "2 to 5 minutes on one core",
        },
        fresh=options.fresh,
    )
    summary: dict[str, Any] = {}
    for share in LAMBDAS:
        summary[f"λ={share:g}"] = summarise(results, share)
        print(f"λ = {share:g}: mixed gap\n{table(summary[f'λ={share:g}'])}\n")
    draw(summary["λ=0.5"], 0.5, HERE / "forgetting_rate.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
