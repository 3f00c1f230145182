"""Identities of the Bellman saddle to 1e-9.

``python -m benchmarks.bellman_identities.run`` from the root of the repository; see README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.bellman_identities import checks
from benchmarks.results import Results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DISCOUNTS = (0.0, 0.5, 0.9, 0.99)
SEEDS = tuple(range(10))
TOLERANCE = 1e-9
CHECKS: dict[str, Callable[[int, float], float]] = {
    "Lemma 1: unbiased at the best dual": checks.unbiased,
    "TD error: biased by discount² Var V": checks.bias,
    "population form, variances cancel": checks.population,
    "bi-conjugate form, row by row": checks.biconjugate,
    "best dual is E[V(s')]": checks.best_dual,
    "saddle = soft value iteration on the data": checks.saddle,
    "inverse solution recovers rewards": checks.inverse,
    "inverse objective is stationary there": checks.inverse_saddle,
    "discount 0 is regression": checks.regression,
    "deterministic: the dual is irrelevant": checks.deterministic,
    "shaping by a potential": checks.shaping,
    "wrong anchor moves rewards as predicted": checks.wrong_anchor,
    "gradients of the saddle objective": partial(checks.gradients, "saddle"),
    "gradients of the TD error": partial(checks.gradients, "td"),
    "gradients of the inverse objective": partial(checks.gradients, "gladius"),
    "the same by finite differences": checks.differences,
}


def measure(check: Callable[[int, float], float]) -> dict[str, float]:
    """Largest deviation over seeds, by discount."""
    return {f"{discount:g}": max(check(seed, discount) for seed in SEEDS) for discount in DISCOUNTS}


def summarise(cells: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    largest = {name: max(cell.values()) for name, cell in cells.items()}
    return {
        "largest": largest,
        "verdict": "holds" if max(largest.values()) < TOLERANCE else "does not hold",
    }


def draw(cells: Mapping[str, Mapping[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colours = ("#999999", "#0072B2", "#E69F00", "#D55E00")
    names = list(cells)[::-1]
    for discount, colour in zip(DISCOUNTS, colours, strict=True):
        # Exact zeros stand at the left edge.
        values = [max(cells[name][f"{discount:g}"], 1e-18) for name in names]
        axes.plot(values, range(len(names)), "o", color=colour, label=f"{discount:g}")
    axes.axvline(TOLERANCE, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xscale="log", xlabel="largest deviation over ten seeds", xlim=(5e-19, 1e-8))
    axes.legend(title="discount", frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="recompute finished cells")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(
        HERE / "results.json",
        settings={
            "discounts": DISCOUNTS,
            "seeds": SEEDS,
            "states": checks.STATES,
            "actions": checks.ACTIONS,
        },
        about={
            "study": "Kang and Jang, Stability and Generalization for Bellman Residuals: "
            "Lemma 1 and equations 1 to 5",
            "command": "python -m benchmarks.bellman_identities.run",
            "budget": "seconds of one core",
        },
        fresh=options.fresh,
    )
    for name, check in CHECKS.items():
        cell = results.cell(name, partial(measure, check))
        print(f"{name:<45}" + "  ".join(f"{value:.1e}" for value in cell.values()))
    cells = results.content["cells"]
    draw(cells, HERE / "bellman_identities.png")
    results.finish(summarise(cells))
    print(results.content["summary"]["verdict"])


if __name__ == "__main__":
    main()
