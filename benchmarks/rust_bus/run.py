"""Rust's bus engines: the nested fixed point, and how far descent-ascent gets.

``python -m benchmarks.rust_bus.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.bellman.peers import ask_peer, peer_versions
from benchmarks.results import Results, bootstrap_interval
from benchmarks.rust_bus import material
from benchmarks.rust_bus.material import BINS, FILE
from holdfast.bellman import Harmonic, Sgda, Transitions, nfxp, stability_margin
from holdfast.bellman.bus import bus_transitions
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.sgda import descend_ascend

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SAMPLES = {"group 4": (4,), "groups 1 to 3": (1, 2, 3), "groups 1 to 4": (1, 2, 3, 4)}
PUBLISHED = {
    "group 4": (10.075, 2.293, -163.584),
    "groups 1 to 3": (11.727, 4.826, None),
    "groups 1 to 4": (9.756, 2.628, None),
}
"""Rust (1987), Table IX, to as many digits as are compared."""

DISCOUNT = 0.9999
DISCOUNTS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
SEEDS = 10
STEPS = 10_000
KEPT = (100, 1_000, 10_000)
BATCH = 256
RATIO = 4.0
RESAMPLES = 200
METHODS = {
    "all rows, heavy ball": "SGDA with step and momentum tuned to the linearised dynamics",
    "all rows, Adam": "Adam descent-ascent, steps falling linearly to 0",
    "batches, SGDA": "plain SGDA, harmonic steps",
    "batches, Adam": "Adam descent-ascent, steps falling linearly to 0",
}


def estimate(groups: Sequence[int]) -> dict[str, Any]:
    """Rust's own estimator."""
    started = time.perf_counter()
    found = nfxp(material.read(groups), discount=DISCOUNT, bins=BINS)
    return {
        "replacement_cost": found.replacement_cost,
        "cost_slope": found.cost_slope,
        "log_likelihood": found.log_likelihood,
        "standard_errors": found.standard_errors.tolist(),
        "observations": found.observations,
        "seconds": round(time.perf_counter() - started, 2),
    }


def estimate_by_peer(groups: Sequence[int]) -> dict[str, Any] | None:
    """The same sample and the same transitions, by econirl."""
    frame = material.read(groups)
    ours = nfxp(frame, discount=DISCOUNT, bins=BINS)
    kernel = bus_transitions(ours.probabilities, BINS).transpose(1, 0, 2)
    bus = frame.groupby(["group", "bus_id"], sort=False).ngroup()
    counted = bus.eq(bus.shift())
    rows = {
        "bus": bus[counted].tolist(),
        "state": frame.loc[counted, "state"].tolist(),
        "action": frame.loc[counted, "replace"].tolist(),
    }
    question = {"discount": DISCOUNT, "bins": BINS, "transitions": kernel.tolist(), **rows}
    answer = ask_peer("econirl", HERE / "peer_econirl.py", question)
    return answer and answer | peer_versions("econirl")


def problem_at(discount: float) -> tuple[SaddleProblem, float]:
    """The inverse problem, with the replacement cost that the nested fixed point finds there."""
    frame = material.read(SAMPLES["groups 1 to 4"])
    cost = nfxp(frame, discount=discount, bins=BINS).replacement_cost
    return material.inverse_problem(material.transitions_of(frame, cost), discount), cost


def target(discount: float) -> dict[str, Any]:
    """The answer, how sure the data are of it, and what descent is up against."""
    problem, cost = problem_at(discount)
    primal, dual = material.exact_saddle(problem)
    point = torch.as_tensor(primal), torch.as_tensor(dual)
    margin = stability_margin(problem, RATIO, at=point)
    visits = problem.transitions.counts(BINS, 2)[:, 0]
    reward = material.recovered(problem, primal, dual)[:, 0]
    drawn = []
    for seed in range(RESAMPLES):
        other = material.inverse_problem(resampled(problem.transitions, seed), discount)
        drawn.append(material.recovered(other, *material.exact_saddle(other))[:, 0])
    structural = nfxp(material.read(SAMPLES["groups 1 to 4"]), discount=discount, bins=BINS)
    return {
        "replacement_cost": cost,
        "nfxp_slope": structural.cost_slope,
        "slope": float(material.slope_of(reward, visits)),
        "slope_interval": np.percentile(
            [float(material.slope_of(each, visits)) for each in drawn], [2.5, 97.5]
        ).tolist(),
        "gradient": material.gradient_at(problem, primal, dual),
        "margin": margin.margin,
        "condition": float(np.abs(margin.eigenvalues).max() / max(margin.margin, 1e-300)),
        "standard_error": root_mean(np.std(drawn, axis=0), visits),
    }


def resampled(data: Transitions, seed: int) -> Transitions:
    """As many buses, drawn with replacement."""
    assert data.trajectory is not None
    buses = np.unique(data.trajectory)
    chosen = np.random.default_rng(seed).choice(buses, size=len(buses))
    rows = {bus: np.flatnonzero(data.trajectory == bus) for bus in buses}
    return data[np.concatenate([rows[bus] for bus in chosen])]


def root_mean(values: np.ndarray, visits: np.ndarray) -> Any:
    """Root mean square over decisions to drive on, of ``(..., bins)``."""
    return np.sqrt((np.square(values) * visits).sum(-1) / visits.sum()).tolist()


def settings_of(method: str, problem: SaddleProblem, cost: float) -> Sgda:
    batches = method.startswith("batches")
    common: dict[str, Any] = {"steps": STEPS, "step_ratio": RATIO}
    common["batch_size"] = BATCH if batches else None
    if method.endswith("Adam"):
        spread = 0.01 * max(1.0, cost) / (1.0 - problem.discount)
        return Sgda(step=lambda t: spread * (1.0 - t / STEPS), optimiser="adam", **common)
    if batches:
        return Sgda(step=Harmonic(0.1 * STEPS / 10, STEPS / 10), **common)
    primal, dual = material.exact_saddle(problem)
    margin = stability_margin(problem, RATIO, at=(torch.as_tensor(primal), torch.as_tensor(dual)))
    step, momentum = margin.tuned()
    return Sgda(step=lambda t: 0.5 * step, momentum=momentum, **common)


def descend(discount: float, method: str) -> dict[str, Any]:
    """Errors after some steps, a row a seed."""
    problem, cost = problem_at(discount)
    primal, dual = material.exact_saddle(problem)
    visits = problem.transitions.counts(BINS, 2)[:, 0]
    exact = material.recovered(problem, primal, dual)[:, 0]
    table = material.features(problem.transitions)
    values = table @ primal
    batches = method.startswith("batches")
    data = Batch.stack([problem.transitions] * SEEDS) if batches else problem.compact()
    begin = material.start(problem)
    found = descend_ascend(
        problem,
        data,
        settings_of(method, problem, cost),
        start=(torch.as_tensor(begin[0]), torch.as_tensor(begin[1])),
        groups=range(SEEDS) if batches else None,
        record=KEPT,
        may_diverge=True,
    )
    entry: dict[str, Any] = {"steps": list(KEPT), "reward": [], "value": [], "slope": []}
    for step in KEPT:
        first, second = (each.numpy() for each in found.record[step])
        reward = material.recovered(problem, first, second)[..., 0]
        apart = np.einsum("sak,...k->...sa", table, first - primal)[..., 0]
        scale = root_mean(values[:, 0], visits)
        entry["reward"].append(root_mean(reward - exact, visits))
        entry["value"].append((np.array(root_mean(apart, visits)) / scale).tolist())
        entry["slope"].append(material.slope_of(reward, visits).tolist())
    return entry


# Reading ------------------------------------------------------------------------------------------


def summarise(cells: Mapping[str, Any]) -> dict[str, Any]:
    estimates: dict[str, Any] = {}
    for sample, published in PUBLISHED.items():
        found = cells[f"nfxp | {sample}"]
        ours = (found["replacement_cost"], found["cost_slope"], found["log_likelihood"])
        pairs = zip(ours, published, strict=True)
        estimates[sample] = {
            "found": [round(value, 4) for value in ours],
            "standard errors": [round(value, 3) for value in found["standard_errors"]],
            "to three digits": all(p is None or abs(o - p) < 1e-3 for o, p in pairs),
            "econirl": cells.get(f"econirl | {sample}"),
        }
    saddle: dict[str, Any] = {}
    for discount in DISCOUNTS:
        entry = dict(cells[f"target | {discount}"])
        for method in METHODS:
            cell = cells[f"{method} | {discount}"]
            entry[method] = {
                kind: [_interval(row) for row in cell[kind]] for kind in ("reward", "value")
            }
        saddle[str(discount)] = entry
    return {"nfxp": estimates, "saddle": saddle, "growth": growth(cells)}


def _interval(seeds: Sequence[float]) -> list[float]:
    sample = np.array(seeds)
    return [float(f"{x:.3g}") for x in (sample.mean(), *bootstrap_interval(sample, np.mean))]


def growth(cells: Mapping[str, Any]) -> dict[str, list[float]]:
    """Slope of the log error of values after all steps on ``log 1 / (1 - discount)``, from .9 on.

    With an interval over seeds where there are any.
    """
    upper = [discount for discount in DISCOUNTS if discount >= 0.9]
    x = np.log([1.0 / (1.0 - discount) for discount in upper])
    x = x - x.mean()
    slopes = {}
    for kind in ("reward", "value"):
        for method in METHODS:
            errors = np.array([cells[f"{method} | {each}"][kind][-1] for each in upper]).T

            def slope(sample: np.ndarray) -> float:
                return float(np.log(sample.mean(0)) @ x / (x @ x))

            interval = bootstrap_interval(errors, slope)
            slopes[f"{kind} | {method}"] = [round(v, 2) for v in (slope(errors), *interval)]
    x_all = [cells[f"target | {each}"]["condition"] for each in upper[:-1]]
    x = x[:-1] - x[:-1].mean()
    slopes["condition"] = [round(float(np.log(x_all) @ x / (x @ x)), 2)]
    return slopes


def table(summary: Mapping[str, Any]) -> str:
    lines = [
        "| sample | replacement cost (SE) | cost slope (SE) | log-likelihood | Rust's | "
        "econirl: cost, slope, log-likelihood |",
        "|---|---|---|---|---|---|",
    ]
    for sample, entry in summary["nfxp"].items():
        cost, slope, likelihood = entry["found"]
        first, second = entry["standard errors"]
        published = ", ".join(f"{x:g}" for x in PUBLISHED[sample] if x is not None)
        peer = entry["econirl"]
        said = "not installed"
        if peer:
            said = "{replacement_cost:.4f}, {cost_slope:.4f}, {log_likelihood:.3f}".format(**peer)
        lines.append(
            f"| {sample} | {cost:.3f} ({first:.3f}) | {slope:.3f} ({second:.3f}) | "
            f"{likelihood:.3f} | {published} | {said} |"
        )
    names = " | ".join(METHODS)
    lines += ["", f"| discount | cost slope, exact [95 %] | NFXP's | standard error | {names} |"]
    lines.append("|---" * (4 + len(METHODS)) + "|")
    for discount, entry in summary["saddle"].items():
        low, high = entry["slope_interval"]
        errors = " | ".join(
            "{:.2g} [{:.2g}, {:.2g}]".format(*entry[method]["reward"][-1])
            if method.startswith("batches")
            else f"{entry[method]['reward'][-1][0]:.2g}"
            for method in METHODS
        )
        lines.append(
            f"| {discount} | {entry['slope']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{entry['nfxp_slope']:.2f} | {entry['standard_error']:.2f} | {errors} |"
        )
    lines += ["", json.dumps(summary["growth"])]
    return "\n".join(lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    horizon = [1.0 / (1.0 - discount) for discount in DISCOUNTS]
    entries = [summary["saddle"][str(discount)] for discount in DISCOUNTS]
    colours = dict(zip(METHODS, ("#333333", "#0072B2", "#D55E00", "#009E73"), strict=True))
    for axes, kind, label in (
        (panels[0], "reward", "error of the monthly cost"),
        (panels[1], "value", "relative error of the values"),
    ):
        for method, colour in colours.items():
            mean, low, high = np.array([entry[method][kind][-1] for entry in entries]).T
            axes.plot(horizon, mean, "o-", color=colour, label=method, markersize=4)
            axes.fill_between(horizon, low, high, color=colour, alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel="1 / (1 - discount)")
        axes.set(ylabel=label, title=f"After {STEPS:,} steps")
    panels[0].plot(
        horizon,
        [entry["standard_error"] for entry in entries],
        ":",
        color="black",
        label="standard error (buses)",
    )
    panels[0].legend(frameon=False, fontsize=8)
    panels[2].plot(horizon[:-1], [entry["condition"] for entry in entries][:-1], "o-", color="#333")
    panels[2].set(xscale="log", yscale="log", xlabel="1 / (1 - discount)")
    panels[2].set(title="Condition of the linearised dynamics")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=600, help="start no cell after this")
    parser.add_argument("--fresh", action="store_true", help="compute finished cells again")
    options = parser.parse_args(arguments)
    if not FILE.exists():
        raise SystemExit(
            f"rust_bus is skipped: it needs Rust's data in {FILE.name}, expected in shared/data "
            "beside the repository."
        )
    torch.set_num_threads(1)
    results = Results(
        HERE / "results.json",
        settings={
            "bins": BINS,
            "degree": material.DEGREE,
            "discounts": DISCOUNTS,
            "seeds": SEEDS,
            "steps": STEPS,
            "batch": BATCH,
            "ratio": RATIO,
            "resamples": RESAMPLES,
            "methods": METHODS,
        },
        about={
            "study": "Rust (1987): replacement of bus engines",
            "command": "python -m benchmarks.rust_bus.run",
            "budget": "15 minutes of one core",
        },
        fresh=options.fresh,
    )
    deadline = time.monotonic() + 60 * options.minutes
    jobs: dict[str, Any] = {
        f"nfxp | {sample}": partial(estimate, groups) for sample, groups in SAMPLES.items()
    }
    if peer_versions("econirl"):
        for sample, groups in SAMPLES.items():
            jobs[f"econirl | {sample}"] = partial(estimate_by_peer, groups)
    for discount in DISCOUNTS:
        jobs[f"target | {discount}"] = partial(target, discount)
        for method in METHODS:
            jobs[f"{method} | {discount}"] = partial(descend, discount, method)
    for key, compute in jobs.items():
        if key not in results.content["cells"]:
            if time.monotonic() > deadline:
                raise SystemExit("Time is up; start again to go on.")
            started = time.monotonic()
            results.cell(key, compute)
            print(f"{time.monotonic() - started:6.1f}s {key}", flush=True)
    summary = summarise(results.content["cells"])
    print(table(summary))
    draw(summary, HERE / "rust_bus.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
