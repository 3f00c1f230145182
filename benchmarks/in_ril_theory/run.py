"""What the theory of IN-RIL says of m, efficiency and rates, on problems with known constants.

``python -m benchmarks.in_ril_theory.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from benchmarks.in_ril_theory.descent import C_RL, Descent, Ratio, descend
from benchmarks.in_ril_theory.problems import Array, Bandits, Pair, Quadratics
from benchmarks.results import Results, bootstrap_interval
from holdfast.joint.progress import efficiency_ratio

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PROBLEMS = 200
UPDATES = 240
HORIZONS = (24, UPDATES)
"""Updates after which ratios are compared."""
LONG = 4 * UPDATES
BATCH = 8
"""Samples of an imitation gradient."""
LEVELS = {"quadratic": 0.02, "bandit": 0.3}
"""Share of the first gap that a descent is to come down to."""
FAMILIES: dict[str, Callable[[np.random.Generator], Pair]] = {
    **{
        f"quadratic, distance {d:g}": partial(Quadratics.drawn, PROBLEMS, d)
        for d in (0.0, 0.1, 0.3, 1.0)
    },
    **{f"bandit, skill {s:g}": partial(Bandits.drawn, PROBLEMS, s) for s in (0.9, 0.5, 0.0)},
}
"""From demonstrations of the optimum to useless ones."""
RATIOS: tuple[Ratio, ...] = (0.2, 0.5, 1, 2, 5, 15, math.inf, "root", "balance")
EFFICIENCIES = (1, 5, 15)
EXACT = 1e-10

Summary = dict[str, Any]


@cache
def descent(family: str, ratio: Ratio, batch: int = BATCH, updates: int = UPDATES) -> Descent:
    """The same problems and draws for every ratio."""
    pair = FAMILIES[family](np.random.default_rng(0))
    return descend(pair, ratio, updates, batch=batch, draw=np.random.default_rng(1))


# Theorem 1 ----------------------------------------------------------------------------------------


def gaps_left(family: str, updates: int) -> dict[str, list[float]]:
    """By ratio: the gap after so many updates over the first, of each problem."""
    found = {}
    for ratio in RATIOS:
        gaps = descent(family, ratio).gaps
        found[str(ratio)] = [float(f"{x:.4g}") for x in gaps[updates] / gaps[0]]
    return found


def theorem_1(results: Results) -> Summary:
    """Which fixed m is best in hindsight, and what the two forms of m cost beside it."""
    summary = {}
    fixed = [str(ratio) for ratio in RATIOS if not isinstance(ratio, str)]
    for family, updates in itertools.product(FAMILIES, HORIZONS):
        key = f"{family}, {updates} updates"
        cell = results.cell(f"gaps | {key}", partial(gaps_left, family, updates))
        table = np.array([cell[name] for name in fixed])
        # Of equally good ratios the largest: imitation must earn its place.
        best = len(fixed) - 1 - table[::-1].argmin(axis=0)
        at_least_one = np.array([float(name) >= 1 for name in fixed])[best].astype(float)
        lowest = np.maximum(table.min(axis=0), 1e-12)
        summary[key] = {
            "best": {name: int((best == i).sum()) for i, name in enumerate(fixed)},
            "best_is_at_least_1": _mean(at_least_one),
            "best_is_finite": _mean((best < len(fixed) - 1).astype(float)),
            "gap_over_best": {
                name: _median(np.maximum(np.array(cell[name]), 1e-12) / lowest)
                for name in (*fixed, "root", "balance")
            },
        }
    return summary


# Theorem 2 ----------------------------------------------------------------------------------------


def efficiency(family: str, ratio: float) -> dict[str, list[float | None]]:
    """By problem: updates RL alone needs over those of the cycle, beside what is predicted of it.

    Predicted from the gains of the updates that were taken until the level was reached
    (``realised``), and from what smoothness promised of them (``promised``).
    """
    alone, cycles = (descent(family, m, updates=LONG) for m in (math.inf, ratio))
    found: dict[str, list[float | None]] = {"observed": [], "realised": [], "promised": []}
    for i in range(PROBLEMS):
        level = LEVELS[family.partition(",")[0]]
        needed = [_reached(d.gaps[:, i], level) for d in (alone, cycles)]
        if None in needed or not all(needed):
            for column in found.values():
                column.append(None)
            continue
        found["observed"].append(needed[0] / needed[1])  # type: ignore[operator]
        taken = slice(0, needed[1])
        by_il = cycles.imitated[taken, i]
        for name, gains in (("realised", cycles.gained), ("promised", cycles.promised)):
            own = gains[taken, i]
            if by_il.all() or not by_il.any():
                found[name].append(None)
                continue
            predicted = efficiency_ratio(ratio, own[~by_il].mean(), own[by_il].mean())
            found[name].append(float(predicted) if math.isfinite(predicted) else None)
    return found


def theorem_2(results: Results) -> Summary:
    """Whether the predicted ratio is what is observed, or a lower bound of it."""
    summary = {}
    for family in FAMILIES:
        for ratio in EFFICIENCIES:
            key = f"{family}, m = {ratio}"
            cell = results.cell(f"efficiency | {key}", partial(efficiency, family, ratio))
            observed = np.array(cell["observed"], dtype=np.float64)
            entry: Summary = {
                "reached": int(np.isfinite(observed).sum()),
                "observed": _median(observed[np.isfinite(observed)]),
            }
            for name in ("realised", "promised"):
                predicted = np.array(cell[name], dtype=np.float64)
                both = np.isfinite(predicted) & np.isfinite(observed)
                x, y = predicted[both], observed[both]
                entry[name] = {
                    "predicted": _median(x),
                    "observed_is_at_least_predicted": _mean((y >= x - EXACT).astype(float)),
                    "same_side_of_1": _mean(((y > 1) == (x > 1)).astype(float)),
                    "rank_correlation": _correlation(x, y),
                }
            summary[key] = entry
    return summary


# Theorems 3 and 4 ---------------------------------------------------------------------------------


def violations(family: str, ratio: Ratio) -> dict[str, float]:
    """How often a bound is broken, and how close the closest case comes (1: equality)."""
    run = descent(family, ratio)
    exact = descent(family, ratio, batch=0)
    gained, by_il = run.gained, run.imitated
    pair = FAMILIES[family](np.random.default_rng(0))
    # RL turns: bound = coefficient ‖g‖², so ‖g‖² follows from it.
    coefficient = C_RL * (1 - C_RL / 2) / pair.smoothness_rl
    squares = np.where(by_il, np.inf, run.bound / coefficient)
    smallest = np.minimum.accumulate(squares, axis=0)
    turns = np.cumsum(~by_il, axis=0)
    # What RL turns can have used up: the first gap, and what imitation put on top of it.
    added = np.cumsum(np.where(by_il, -run.bound, 0.0), axis=0)
    rate = (run.gaps[0] + added) / coefficient / np.maximum(turns, 1)
    begun = (turns > 0) & np.isfinite(smallest)
    printed = exact.imitated
    harmed = exact.promised > exact.gained + EXACT
    return {
        "steps": int(by_il.size),
        "descent": int((gained < run.bound - EXACT).sum()),
        "rate": int((smallest[begun] > rate[begun] + EXACT).sum()),
        "rate_closest": float((smallest[begun] / np.maximum(rate[begun], 1e-300)).max()),
        "printed_steps": int(printed.sum()),
        "printed": int((harmed & printed).sum()),
    }


def theorems_3_and_4(results: Results) -> Summary:
    """The descent of each update, the rate of RL alone, and that of RL in cycles."""
    summary = {}
    for family in FAMILIES:
        for ratio in (math.inf, 1, 5, "balance"):
            key = f"{family}, m = {ratio}"
            summary[key] = results.cell(f"bounds | {key}", partial(violations, family, ratio))
    return summary


# Numbers ------------------------------------------------------------------------------------------


def _reached(gaps: Array, level: float) -> int | None:
    there = np.flatnonzero(gaps <= level * gaps[0])
    return int(there[0]) if len(there) else None


def _mean(sample: Array) -> list[float] | None:
    if not len(sample):
        return None
    return [round(float(v), 3) for v in (sample.mean(), *bootstrap_interval(sample, np.mean))]


def _median(sample: Array) -> list[float] | None:
    if not len(sample):
        return None
    ends = bootstrap_interval(sample, np.median)
    return [float(f"{v:.3g}") for v in (np.median(sample), *ends)]


def _correlation(x: Array, y: Array) -> float | None:
    if len(x) < 10 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return round(float(stats.spearmanr(x, y).statistic), 3)


# Pictures -----------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    one = {
        key.removesuffix(f", {HORIZONS[0]} updates"): entry
        for key, entry in results.content["summary"]["theorem_1"].items()
        if key.endswith(f", {HORIZONS[0]} updates")
    }
    names = list(one[next(iter(one))]["best"])
    left = np.zeros(len(one))
    for i, name in enumerate(names):
        shares = np.array([entry["best"][name] for entry in one.values()]) / PROBLEMS
        colour = plt.get_cmap("viridis")(i / (len(names) - 1))
        axes[0, 0].barh(list(one), shares, left=left, color=colour, label=f"m = {name}")
        left += shares
    axes[0, 0].set(title=f"Best m after {HORIZONS[0]} updates, share of problems")
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize=7, ncols=2)
    for name in ("1", "5", "inf", "root", "balance"):
        gaps = [entry["gap_over_best"][name][0] for entry in one.values()]
        axes[0, 1].plot(gaps, list(one), "o", label=f"m = {name}" if name[0] in "15i" else name)
    axes[0, 1].set(title=f"Median gap after {HORIZONS[0]} updates, over the best m's", xscale="log")
    axes[0, 1].invert_yaxis()
    axes[0, 1].legend(fontsize=7)
    for axis, kind in zip(axes[1], ("realised", "promised"), strict=True):
        for family in FAMILIES:
            cell = results.content["cells"][f"efficiency | {family}, m = 5"]
            pairs = np.array([cell[kind], cell["observed"]], dtype=np.float64)
            axis.plot(*pairs, ".", alpha=0.5, label=family)
        axis.plot([0.05, 20], [0.05, 20], color="grey", linewidth=0.8)
        axis.set(
            title=f"Efficiency ratio, m = 5, from {kind} gains",
            xlabel="predicted",
            ylabel="observed",
            xlim=(0, 4),
            ylim=(0, 4),
        )
    axes[1, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(summary: Mapping[str, Any]) -> str:
    lines = ["Theorem 1: family, best m at least 1, best m finite, root and balance over best"]
    for family, entry in summary["theorem_1"].items():
        over = entry["gap_over_best"]
        lines.append(
            f"  {family:42} {entry['best_is_at_least_1']} {entry['best_is_finite']} "
            f"{over['root']} {over['balance']}"
        )
    lines.append("Theorem 2: family and m, observed; realised and promised prediction")
    for key, entry in summary["theorem_2"].items():
        told = [
            f"{kind} {entry[kind]['predicted']} at least "
            f"{entry[kind]['observed_is_at_least_predicted']} rank "
            f"{entry[kind]['rank_correlation']}"
            for kind in ("realised", "promised")
        ]
        lines.append(f"  {key:34} {entry['observed']} {'; '.join(told)}")
    lines.append("Theorems 3 and 4: broken bounds")
    for key, entry in summary["theorems_3_and_4"].items():
        lines.append(f"  {key:38} {entry}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    options = parser.parse_args()
    results = Results(
        HERE / "results.json",
        settings={
            "problems": PROBLEMS,
            "updates": [UPDATES, LONG],
            "batch": BATCH,
            "levels": LEVELS,
            "families": list(FAMILIES),
            "ratios": [str(ratio) for ratio in RATIOS],
        },
        about={
            "command": "python -m benchmarks.in_ril_theory.run",
            "source": "Gao et al., IN-RIL, arXiv 2505.10442: theorems 1 to 4, as read here",
            "scipy": version("scipy"),
        },
        fresh=options.fresh,
    )
    parts = (theorem_1, theorem_2, theorems_3_and_4)
    summary = {part.__name__: part(results) for part in parts}
    results.finish(summary)
    print(table(summary))
    draw(results, HERE / "in_ril_theory.png")


if __name__ == "__main__":
    main()
