"""Does descent-ascent on Bellman residuals converge, and how fast? Lemma 2, measured.

``python -m benchmarks.bellman_convergence.run [--jobs 1] [--minutes 60]``. Finished cells are kept
in ``results.json`` and not run again; stop it at any time and start it again. ``--plot`` only draws
what is there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from benchmarks.bellman_convergence import dynamics, stochastic
from benchmarks.pool import run_jobs
from benchmarks.results import Results, bootstrap_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DISCOUNTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
RATIOS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
FAMILIES = {"plain": 200, "sharp": 100, "sparse": 100, "skewed": 100, "all": 100}
FUNNELS = (4, 10, 40, 100)
SEARCHED = 4000
SEARCH_RATIOS = (0.5, 0.9, 0.99, 1.0, 1.1, 1.5, 3.0, 10.0, 100.0)
FLOWS = {"models": 50, "step": 0.25, "steps": 80_000, "steps_from_0": 20_000}
BALL = 2.0
"""Radius of the projection, in norms of the saddle."""
RATES = {0.5: 50_000, 0.8: 100_000, 0.9: 100_000, 0.95: 100_000, 0.99: 100_000}
"""Steps of the runs with single samples, by discount."""
OWN = {"1": (0.5, 0.8), "1/b^2": tuple(RATES)}
"""Discounts at which ratios other than 4 also run with steps from their own margins."""
SEEDS = 20


def share_unstable(family: str, discount: float) -> dict[str, Any]:
    """Share of random models whose saddle repels, by ratio, and in the form with ``h``."""
    models = dynamics.draw(FAMILIES[family], 5, 3, discount, family=family)

    def share(margins: dynamics.Array) -> float:
        return float((margins <= 0).mean())

    return {
        "ratios": {f"{ratio:g}": share(models.margins(ratio)) for ratio in RATIOS},
        "inverse_square": share(models.margins(discount**-2)),
        "h": share(dynamics.least_real_part(models.jacobian_of_h(1.0))),
        "median_margin": float(np.median(models.margins(4.0))),
    }


def named_ratios(discount: float) -> dict[str, float]:
    """The three ratios of all runs: one common step, the usual, and one of ``discount * zeta``."""
    return {"1": 1.0, "4": 4.0, "1/b^2": discount**-2}


def margins(discount: float) -> dict[str, Any]:
    """Median margins of plain models, by ratio and in units of ``1 / discount^2``."""
    models = dynamics.draw(FAMILIES["plain"], 5, 3, discount)

    def median(ratio: float) -> float:
        return float(f"{np.median(models.margins(ratio)):.4g}")

    return {
        **{name: median(ratio) for name, ratio in named_ratios(discount).items()},
        "10": median(10.0),
        "multiples": {f"{m:g}": median(m / discount**2) for m in (1.01, 1.1, 1.5, 2.0, 4.0)},
        "bound": 2 * float(models.law.min()) * (1 - discount),
    }


def critical(discount: float) -> dict[str, float]:
    """The least ratio at which a funnel is stable, by number of pairs."""
    found = {n: dynamics.critical_ratio(dynamics.funnel(n, discount))[0] for n in FUNNELS}
    return {str(n): float(f"{value:.4g}") for n, value in found.items()}


def search(count: int) -> dict[str, Any]:
    """Unstable ones among random chains of pairs, by ratio in units of ``1 / discount^2``."""
    rng = np.random.default_rng(0)
    unstable = dict.fromkeys(SEARCH_RATIOS, 0)
    for _ in range(count):
        k, discount = int(rng.integers(2, 12)), rng.choice([0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
        moves = rng.dirichlet(np.full(k, rng.choice([0.02, 0.1, 1.0])), size=k)
        if rng.random() < 0.3:  # All but a funnel.
            moves = 0.9 * moves[:1] + 0.1 * moves
        law = rng.dirichlet(np.full(k, rng.choice([0.1, 0.3, 1.0, 10.0]))) + 1e-3
        back = discount * moves.T * law
        d = np.diag(law)
        first = np.hstack([d - back - back.T, back])
        second = np.hstack([-back.T, d])
        for ratio in SEARCH_RATIOS:
            matrix = np.vstack([first, ratio * second])
            unstable[ratio] += int(dynamics.least_real_part(matrix[None])[0] < 0)
    return {f"{ratio:g}": number for ratio, number in unstable.items()}


def flow(discount: float, ratio: float, step: float) -> dict[str, Any]:
    """Full gradients from nearby: who comes back, and at the rate of the eigenvalues?"""
    models = dynamics.draw(FLOWS["models"], 5, 3, discount)
    noise = 1e-3 * np.random.default_rng(0).standard_normal((2, *models.w.shape))
    steps = int(FLOWS["steps"] * FLOWS["step"] / step)
    keep = sorted({int(t) for t in np.geomspace(10, steps, 24)})
    start = (models.w + noise[0], models.v + noise[1])
    distances = models.descend(start, ratio, step, keep)
    margins = models.margins(ratio)
    first = models.distance(*start)
    farther = distances[-1] > first
    with np.errstate(all="ignore"):
        rate = np.log(distances[-2] / distances[-1]) / (step * (keep[-1] - keep[-2]))
    # A rate can be read off only between the transient and the last digits.
    read = (distances[-1] > 1e-10) & (distances[-1] < 0.1 * first)
    return {
        "unstable": float((margins <= 0).mean()),
        "farther": float(farther.mean()),
        "agree": float((farther == (margins <= 0)).mean()),
        "rate_over_margin": (rate / margins)[read].tolist(),
        "time": [step * t for t in keep],
        "median": [float(f"{x:.6g}") for x in np.minimum(np.median(distances, 1), 1e300)],
    }


def from_zero(discount: float) -> dict[str, Any]:
    """Full gradients from 0: share of models that end farther than twice the start, by ratio.

    ``projected``: share that do not end within a tenth of the start, on a ball.
    """
    models = dynamics.draw(FLOWS["models"], 5, 3, discount)
    zero = np.zeros_like(models.w)
    first = models.distance(zero, zero)
    settings = {"step": FLOWS["step"], "keep": [FLOWS["steps_from_0"]]}
    ratios = {f"{ratio:g}": ratio for ratio in RATIOS} | {"1/b^2": discount**-2}

    def end(ratio: float, ball: float | None = None) -> dynamics.Array:
        return models.descend((zero, zero), ratio, ball=ball, **settings)[0] / first

    return {
        "gone": {name: float((end(ratio) > 2.0).mean()) for name, ratio in ratios.items()},
        "median_left": float(f"{np.median(end(discount**-2)):.3g}"),
        "projected": {
            name: float((end(ratios[name], BALL) > 0.1).mean()) for name in ("1", "1/b^2")
        },
    }


def jobs() -> dict[str, Callable[[], Any]]:
    """Every cell by its key, cheap ones first."""
    every: dict[str, Callable[[], Any]] = {}
    for family in FAMILIES:
        for discount in DISCOUNTS:
            every[f"map | {family} | {discount:g}"] = partial(share_unstable, family, discount)
    for discount in DISCOUNTS:
        every[f"funnel | {discount:g}"] = partial(critical, discount)
        every[f"margins | {discount:g}"] = partial(margins, discount)
        every[f"from 0 | {discount:g}"] = partial(from_zero, discount)
    every["search"] = partial(search, SEARCHED)
    for discount in RATES:
        for name, ratio in named_ratios(discount).items():
            every[f"flow | {discount:g} | {name}"] = partial(flow, discount, ratio, FLOWS["step"])
    every["flow, a tenth of the step | 0.95 | 1"] = partial(flow, 0.95, 1.0, 0.1 * FLOWS["step"])
    for discount in RATES:
        key = f"soft Q-learning | {discount:g}"
        every[key] = partial(stochastic.beside_q_learning, discount, 5000)
    for discount, steps in RATES.items():
        for name in ("1", "4"):
            ratio = named_ratios(discount)[name]
            every[f"single samples | {discount:g} | {name}"] = partial(
                stochastic.run, discount, ratio, SEEDS, steps
            )
    for name, discounts in OWN.items():
        for discount in discounts:
            ratio = named_ratios(discount)[name]
            every[f"single samples, own steps | {discount:g} | {name}"] = partial(
                stochastic.run, discount, ratio, SEEDS, RATES[discount], ratio
            )
    return every


def call(job: Callable[[], Any]) -> Any:
    return job()


def told(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    kept = ("ratios", "gone", "unstable", "farther", "offset")
    return ", ".join(f"{key} {values[key]}" for key in kept if key in values) or str(values)


def summarise(cells: Mapping[str, Any]) -> dict[str, Any]:
    """What README.md quotes."""
    summary: dict[str, Any] = {"share_unstable": {}, "single_samples": {}}
    for key, cell in cells.items():
        kind, *rest = key.split(" | ")
        if kind == "map":
            summary["share_unstable"].setdefault(rest[0], {})[rest[1]] = {
                **cell["ratios"],
                "1/b^2": cell["inverse_square"],
                "h": cell["h"],
            }
        elif kind == "funnel":
            summary.setdefault("critical_ratio_of_a_funnel", {})[rest[0]] = cell
        elif kind == "margins":
            summary.setdefault("median_margins", {})[rest[0]] = cell
        elif kind == "from 0":
            summary.setdefault("from_0", {})[rest[0]] = cell
        elif kind == "soft Q-learning":
            summary.setdefault("difference_from_q_learning", {})[rest[0]] = cell
        elif kind == "search":
            summary["unstable_of_random_chains"] = {"of": SEARCHED, **cell}
        elif kind.startswith("flow"):
            rates = cell["rate_over_margin"]
            entry = {name: cell[name] for name in ("unstable", "farther", "agree")}
            entry["rate_over_margin"] = [
                float(f"{x:.4g}") for x in (np.quantile(rates, [0, 0.5, 1]) if rates else ())
            ]
            summary.setdefault("full_gradients", {})[key] = entry
        else:
            summary["single_samples"][key] = rates_of(cell)
    return summary


def rates_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Slopes of the runs that came nearer, and how many did not."""
    squared = np.array(cell["squared"])
    margins = np.array(cell["margins"])
    farther = squared[-1] > np.array(cell["start"])
    entry: dict[str, Any] = {
        "offset": float(f"{cell['offset']:.3g}"),
        "steps": cell["at"][-1],
        "median_margin": float(f"{np.median(margins):.3g}"),
        "unstable": int((margins <= 0).sum()),
        "farther_than_the_start": int(farther.sum()),
        "share_left": float(f"{np.median(squared[-1] / np.array(cell['start'])):.3g}"),
    }
    attracted = margins > 0
    if attracted.sum() > 1:
        for name, since in (("slope", 0.5), ("last_slope", 0.8)):
            slopes = stochastic.slope(dict(cell), since)[attracted]
            if np.isfinite(slopes).all():  # Two marks at least lie in the window.
                low, high = bootstrap_interval(slopes, np.mean)
                entry[name] = [round(float(x), 3) for x in (slopes.mean(), low, high)]
    return entry


COLOURS = {0.5: "#0072B2", 0.8: "#009E73", 0.9: "#E69F00", 0.95: "#D55E00", 0.99: "#B0508A"}


def draw_map(axes: Axes, cells: Mapping[str, Any], of: str, entry: str, title: str) -> None:
    keys = [f"{of} | {discount:g}" for discount in DISCOUNTS]
    if not all(key in cells for key in keys):
        return
    names = [f"{ratio:g}" for ratio in RATIOS]
    shares = np.array([[cells[key][entry][name] for name in names] for key in keys])
    axes.imshow(shares.T, origin="lower", aspect="auto", cmap="Reds", vmin=0, vmax=1)
    for (i, j), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.6 else "black"
            text = f"{100 * share:.3g}"
            axes.text(i, j, text, ha="center", va="center", fontsize=8, color=colour)
    safe = np.interp(np.log([b**-2 for b in DISCOUNTS]), np.log(RATIOS), range(len(RATIOS)))
    axes.step(
        np.arange(len(DISCOUNTS) + 1) - 0.5,
        [*safe, safe[-1]],
        where="post",
        color="#0072B2",
        linewidth=1.5,
    )
    axes.set_xticks(range(len(DISCOUNTS)), [f"{b:g}" for b in DISCOUNTS])
    axes.set_yticks(range(len(RATIOS)), names)
    axes.set(xlabel="discount", ylabel="dual step / primal step")
    axes.set_title(title, fontsize=10)


def draw_flow(axes: Axes, cells: Mapping[str, Any]) -> None:
    styles = {"1": "-", "4": ":", "1/b^2": "--"}
    for discount, colour in COLOURS.items():
        for ratio, style in styles.items():
            cell = cells.get(f"flow | {discount:g} | {ratio}")
            if cell and discount in (0.5, 0.9, 0.99):
                label = f"{discount:g}" if ratio == "1" else None
                axes.plot(cell["time"], cell["median"], style, color=colour, label=label)
    axes.set(xscale="log", yscale="log", ylim=(1e-14, 1e3), xlabel="step × number of steps")
    axes.set_ylabel("distance to the saddle, median")
    axes.set_title("Full gradients; ratio 1 (line), 4 (dots), 1 / discount² (dashed)", fontsize=10)
    axes.legend(title="discount", frameon=False, fontsize=8, loc="lower left")


def draw_rates(axes: Axes, cells: Mapping[str, Any]) -> None:
    for discount, colour in COLOURS.items():
        for key, style in (
            (f"single samples | {discount:g} | 1", ":"),
            (f"single samples | {discount:g} | 4", "-"),
            (f"single samples, own steps | {discount:g} | 1/b^2", "--"),
        ):
            cell = cells.get(key)
            if cell:
                relative = np.array(cell["squared"]) / np.array(cell["start"])
                label = f"{discount:g}" if style == "-" else None
                axes.plot(cell["at"], np.median(relative, 1), style, color=colour, label=label)
    t = np.array([3e3, 5e4])
    axes.plot(t, 0.02 * t[0] / t, color="#999999", linewidth=0.8)
    axes.annotate("1 / t", (t[1], 0.02 * t[0] / t[1]), fontsize=8, color="#777777")
    axes.set(xscale="log", yscale="log", ylim=(1e-5, 1e3), xlabel="steps")
    axes.set_ylabel("squared distance / that of the start, median")
    axes.set_title(
        "Single samples, harmonic steps; ratio 1 (dots), 4 (line), 1 / discount² (dashed)",
        fontsize=10,
    )
    axes.legend(title="discount", frameon=False, fontsize=8, loc="upper left")


def draw_margins(axes: Axes, cells: Mapping[str, Any]) -> None:
    found = {b: cells[f"margins | {b:g}"] for b in DISCOUNTS if f"margins | {b:g}" in cells}
    for name, colour in (
        ("1", "#D55E00"),
        ("4", "#E69F00"),
        ("10", "#999999"),
        ("1/b^2", "#0072B2"),
    ):
        pairs = [(1 - b, cell[name]) for b, cell in found.items() if cell[name] > 0]
        if pairs:
            label = name.replace("1/b^2", "1 / discount²")
            axes.plot(*zip(*pairs, strict=True), "o-", color=colour, markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="1 − discount", ylabel="margin, median")
    axes.set_title("Rate at which the saddle attracts (where it does)", fontsize=10)
    axes.legend(title="dual step / primal step", frameon=False, fontsize=8)


def draw(cells: Mapping[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(2, 3, figsize=(17, 9.5), layout="constrained")
    (first, second, third), (fourth, fifth, last) = panels
    draw_map(first, cells, "map | plain", "ratios", "Saddles that repel, %: rewards in [0, 1)")
    draw_map(second, cells, "map | all", "ratios", "The same: greedy, sparse, skewed")
    draw_map(
        third, cells, "from 0", "gone", "Lost from 0 with full gradients, %: rewards in [0, 1)"
    )
    draw_flow(fourth, cells)
    draw_rates(fifth, cells)
    draw_margins(last, cells)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    parser.add_argument("--minutes", type=float, default=600, help="start no cell after this")
    parser.add_argument("--fresh", action="store_true", help="forget every finished cell")
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    options = parser.parse_args(arguments)
    results = Results(
        HERE / "results.json",
        settings={
            "discounts": DISCOUNTS,
            "ratios": RATIOS,
            "families": FAMILIES,
            "funnels": FUNNELS,
            "searched": SEARCHED,
            "flows": FLOWS,
            "rates": RATES,
            "rows": stochastic.ROWS,
            "seeds": SEEDS,
        },
        about={
            "study": "Kang and Jang, Stability and Generalization for Bellman Residuals: Lemma 2",
            "command": "python -m benchmarks.bellman_convergence.run",
            "budget": "about 12 minutes of one core",
        },
        fresh=options.fresh,
    )
    if not options.plot:
        deadline = time.monotonic() + 60 * options.minutes
        run_jobs(results, jobs(), call, told, workers=options.jobs, deadline=deadline)
    draw(results.content["cells"], HERE / "bellman_convergence.png")
    results.finish(summarise(results.content["cells"]))


if __name__ == "__main__":
    main()
