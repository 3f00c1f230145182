"""The theory of logits-convex optimisation, measured.

``python -m benchmarks.lco_theory.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.lco_theory import bounds, curvature, linear_models, rates, transformer
from benchmarks.lco_theory.losses import LCO
from benchmarks.results import Results, bootstrap_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROWS = {2: 2000, 3: 2000, 10: 2000, 100: 300}
"""Rows of logits whose Hessian is taken, by vocabulary."""
SHRINKAGE = (1.0, 0.1, 0.01, 1e-3, 1e-4)
SHARPNESS = (0, 1, 2, 4, 8, 16, 32)
RATE_VOCABS = (3, 10, 50)
SPREADS = (0.5, 2.0)
RUNS = 20
KEPT = (1, 10, 100, 1000, 10_000)
LINEAR_SEEDS = tuple(range(20))
SEEDS = tuple(range(10))
EXACT = 1e-12
"""What counts as agreement of two float64 computations."""

Summary = dict[str, Any]


def verdict(held: bool) -> str:
    return "holds" if held else "does not hold"


def derivatives(results: Results) -> dict[str, dict[int, Any]]:
    """Of SFT's loss and PPO's surrogate, by vocabulary."""
    kinds = {"sft": curvature.supervised, "ppo": curvature.policy_gradient}
    return {
        name: {
            vocab: results.cell(f"{name} | V={vocab}", partial(compute, rows, vocab, vocab))
            for vocab, rows in ROWS.items()
        }
        for name, compute in kinds.items()
    }


def equations_4_and_5(results: Results) -> Summary:
    """Gradients and Hessians in the logits against autograd and the library."""
    errors = {
        f"{name}, V={vocab}": max(x for key, x in cell.items() if key.endswith("_error"))
        for name, cells in derivatives(results).items()
        for vocab, cell in cells.items()
    }
    return {"largest_error": errors, "verdict": verdict(max(errors.values()) < EXACT)}


def proposition_4_1(results: Results) -> Summary:
    """Convex in the logits: SFT at every point, PPO's surrogate not."""
    cells = derivatives(results)
    sft = {vocab: cell["convex"] for vocab, cell in cells["sft"].items()}
    kept = ("convex", "groups", "expected", "clipped")
    ppo = {vocab: {key: cell[key] for key in kept} for vocab, cell in cells["ppo"].items()}
    fails = all(share < 1 for entry in ppo.values() for share in entry["convex"].values())
    groups = [group for entry in ppo.values() for group in entry["groups"].values()]
    return {
        "sft_convex": sft,
        "ppo": ppo,
        "verdict": verdict(all(share == 1 for share in sft.values()) and fails),
        "indefinite_wherever_A_is_not_0": verdict(all(g["indefinite"] == 1 for g in groups)),
    }


def lemmas_4_5_and_4_6(results: Results) -> Summary:
    """Convexity and strong convexity of LCO's losses."""
    found = {
        vocab: results.cell(f"moduli | V={vocab}", partial(curvature.moduli, rows, vocab, vocab))
        for vocab, rows in ROWS.items()
    }
    every = [entry[name] for entry in found.values() for name in LCO]
    convex = all(entry["indefinite"] == entry["concave"] == 0 for entry in every)
    closed = max(error for entry in every for key, error in entry.items() if key.endswith("_error"))
    between = sum(x["kl"]["below_least_p"] + x["kl"]["above_second_p"] for x in found.values())
    return {
        "vocabularies": found,
        "largest_error": closed,
        "verdict": verdict(convex and closed < EXACT and between == 0),
        "modulus_without_a_bound_on_the_logits": {
            "mse": "2 / V",
            "log_cosh": "none",
            "kl": "none, and 0 along a constant shift",
        },
    }


def proposition_4_4_linear(results: Results) -> Summary:
    """Share of steps that point to the optimum, on linear models."""
    cells = []
    for seed in LINEAR_SEEDS:
        cells.append(results.cell(f"linear model | seed {seed}", partial(linear_seed, seed)))
    summary: Summary = {}
    for method in linear_models.METHODS:
        runs = [cell[method] for cell in cells]
        entry: Summary = {
            kind: interval([run[kind]["optimum"] for run in runs]) for kind in ("full", "minibatch")
        }
        if method == "ppo":
            entry["full, own end"] = interval([run["full"]["own_end"] for run in runs])
            entry["minibatch, own end"] = interval([run["minibatch"]["own_end"] for run in runs])
        else:
            entry["least_slack"] = min(
                run[kind]["least_slack"] for run in runs for kind in ("full", "minibatch")
            )
        entry["anywhere"] = {
            distance: interval([run["anywhere"][distance] for run in runs])
            for distance in runs[0]["anywhere"]
        }
        summary[method] = entry
    convex = [summary[method] for method in ("sft", *LCO)]
    summary["verdict"] = verdict(
        all(entry["full"][0] == 1 and entry["least_slack"] > -EXACT for entry in convex)
        and all(share[0] == 1 for entry in convex for share in entry["anywhere"].values())
    )
    return summary


def linear_seed(seed: int) -> dict[str, Any]:
    problem = linear_models.draw_problem(seed)
    return {
        method: {
            "full": linear_models.trajectory(problem, method, False, seed),
            "minibatch": linear_models.trajectory(problem, method, True, seed),
            "anywhere": linear_models.anywhere(problem, method, 20, seed),
        }
        for method in linear_models.METHODS
    }


def proposition_4_4_transformer(results: Results) -> Summary:
    """The same on a small transformer, towards where training ends."""
    cells = [
        results.cell(f"transformer | seed {seed}", partial(transformer.run_seed, seed))
        for seed in SEEDS
    ]
    summary: Summary = {"teacher": interval([cell["teacher"] for cell in cells])}
    for key in cells[0]["runs"]:
        runs = [cell["runs"][key] for cell in cells]
        summary[key] = {
            name: interval([run[name] for run in runs]) for name in ("own", "other", "cosine")
        }
        summary[key]["judged"] = sum(run["judged"] for run in runs)
        summary[key]["right"] = [interval([run["right"][end] for run in runs]) for end in (0, 1)]
    less: dict[str, Any] = {}
    for renew in transformer.RENEW:
        for method in ("sft", *LCO):
            pairs = [
                cell["runs"][f"{method} | {renew}"]["other"]
                - cell["runs"][f"ppo | {renew}"]["other"]
                for cell in cells
            ]
            less[f"{method} | {renew}"] = interval(pairs)
    summary["other, less PPO's"] = less
    # Whether LCO's steps point to the end more often than PPO's, beyond what seeds explain.
    above = [less[f"{method} | {renew}"][1] > 0 for renew in transformer.RENEW for method in LCO]
    summary["verdict"] = "holds in part" if any(above) and not all(above) else verdict(all(above))
    return summary


def proposition_4_7(results: Results) -> Summary:
    """Gradient norms in the logits against the distance to the target, and PPO's beside them."""
    found = results.cell("bounds", partial(bounds.check, 250, 0))
    near = results.cell("near the target", partial(bounds.near_the_target, 1000, 10, SHRINKAGE))
    own = results.cell(
        "near PPO's own optimum", partial(bounds.near_its_own_optimum, 1000, 10, SHARPNESS)
    )
    return {
        "bounds": found,
        "near_the_target": near,
        "near_its_own_optimum": own,
        "verdict": verdict(all(entry["violations"] == 0 for entry in found.values())),
    }


def propositions_4_8_and_4_9(results: Results) -> Summary:
    """Measured linear rates against ``1 - ημ``."""
    summary: Summary = {
        "contraction_error": {
            vocab: results.cell(
                f"contraction | V={vocab}",
                partial(rates.squared_error_contraction, 100, vocab, 0, 0.3),
            )
            for vocab in RATE_VOCABS
        }
    }
    held = True
    for name in LCO:
        entries = []
        for vocab in RATE_VOCABS:
            for spread in SPREADS:
                compute = partial(rates.linear, name, RUNS, vocab, spread, 0, 0.5, 4000)
                cell = results.cell(f"rate | {name} | V={vocab} | spread {spread:g}", compute)
                held &= cell["held"] == cell["runs"]
                entries.append(
                    {
                        "vocab": vocab,
                        "spread": spread,
                        "held": f"{cell['held']} of {cell['runs']}",
                        "converged": cell["converged"],
                        "last_share": cell["last_share"],
                        "over_ahead": middle(cell["over_ahead"]),
                        "log10_over_start": middle(cell["log10_over_start"]),
                        "over_final": middle(cell["over_final"]),
                    }
                )
        summary[name] = entries
    for name, regularised in (("plain", False), ("with a KL term", True)):
        compute = partial(rates.mean_policy_gradient, 100, 10, 0, 1.0, KEPT, regularised)
        summary[f"policy gradient, {name}"] = results.cell(f"policy gradient | {name}", compute)
    exact = max(summary["contraction_error"].values()) < 1e-9
    summary["verdict"] = verdict(held and exact)
    return summary


def interval(values: Sequence[float]) -> list[float]:
    """Mean and 95 % bootstrap interval over seeds."""
    sample = np.array(values)
    return [round(float(x), 4) for x in (sample.mean(), *bootstrap_interval(sample, np.mean))]


def middle(values: Sequence[float]) -> list[float]:
    """Least, median and largest."""
    if not values:
        return []
    return [float(f"{x:.4g}") for x in (min(values), np.median(values), max(values))]


COLOURS = {
    "sft": "#333333",
    "mse": "#0072B2",
    "log_cosh": "#56B4E9",
    "kl": "#009E73",
    "ppo": "#D55E00",
    "ppo, random signs": "#CCBBAA",
}
LABELS = {"sft": "SFT", "mse": "LCO-MSE", "log_cosh": "LCO-log-cosh", "kl": "LCO-KL", "ppo": "PPO"}


def draw_curvature(axes: Axes, cell: Mapping[str, Any]) -> None:
    points = np.array(cell["points"])
    for sign, colour, name in ((1, "#0072B2", "A > 0"), (-1, "#D55E00", "A < 0")):
        chosen = points[points[:, 1] == sign]
        axes.plot(chosen[:, 0], chosen[:, 2], ".", color=colour, label=name, markersize=5)
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(
        xlabel="probability of the sampled token",
        ylabel="least eigenvalue / largest |eigenvalue|",
        title="Hessian of PPO's surrogate, V = 10",
    )
    axes.legend(frameon=False, fontsize=9, loc="center right")


def draw_near_the_target(axes: Axes, near: Mapping[str, list[float]]) -> None:
    for name in LCO:
        axes.plot(
            SHRINKAGE, near[name], "o-", color=COLOURS[name], label=LABELS[name], markersize=4
        )
    for name, label, style in (
        ("ppo_sample", "PPO, a sample", "-"),
        ("ppo_mean", "PPO, mean", "--"),
        ("ppo_sample_kl", "PPO with KL term, a sample", ":"),
    ):
        axes.plot(
            SHRINKAGE,
            near[name],
            style,
            marker="x",
            color=COLOURS["ppo"],
            label=label,
            markersize=4,
        )
    axes.set(xscale="log", yscale="log", xlabel="distance to the target (×)")
    axes.set(ylabel="gradient norm, median", title="Near the target of LCO")
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8)


def draw_own_optimum(axes: Axes, own: Mapping[str, list[float]]) -> None:
    for name, label, style in (
        ("worst", "a sample of the worst token", "-"),
        ("best", "a sample of the best token", ":"),
        ("mean", "mean gradient", "--"),
    ):
        axes.plot(SHARPNESS, own[name], style, marker="x", color=COLOURS["ppo"], label=label)
    axes.plot(SHARPNESS, own["negative_share"], color="#999999", label="probability that A < 0")
    axes.set(yscale="log", ylim=(1e-7, 20), xlabel="sharpness κ of the policy, z = κ A")
    axes.set(title="PPO near its own optimum")
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def draw_bounds(axes: Axes, found: Mapping[str, Any]) -> None:
    keys = list(found)[::-1]
    for row, key in enumerate(keys):
        low, median, high = found[key]["quantiles"]
        colour = COLOURS[key.split(" | ")[0]]
        axes.plot([low, high], [row, row], color=colour, linewidth=6, alpha=0.35)
        axes.plot(median, row, "o", color=colour)
        axes.plot(found[key]["largest"], row, "|", color=colour, markersize=12)
    names = [key.split(" | ") for key in keys]
    axes.set_yticks(range(len(keys)), [f"{LABELS[name]}, {of}" for name, of in names])
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="gradient norm / bound", title="Tightness of the bounds")


def draw_rates(axes: Axes, cells: Mapping[str, Any]) -> None:
    for name in LCO:
        cell = cells[f"rate | {name} | V=10 | spread 0.5"]
        steps = 1 + np.array(cell["steps"])
        axes.plot(steps, cell["curve"], color=COLOURS[name], label=LABELS[name])
        axes.plot(steps, cell["bound"], ":", color=COLOURS[name])
    for key, label, style in (
        ("plain", "PPO, mean surrogate", "x-"),
        ("with a KL term", "the same with a KL term", "x--"),
    ):
        cell = cells[f"policy gradient | {key}"]
        gaps = np.array([*cell["start"], *cell["gap"]]) / cell["start"][0]
        axes.plot(1 + np.array([0, *KEPT]), gaps, style, color=COLOURS["ppo"], label=label)
    axes.set(xscale="log", yscale="log", ylim=(1e-12, 2), xlabel="1 + steps")
    axes.set(
        ylabel="gap / first gap, median", title="Descent in the logits, V = 10 (dotted: bound)"
    )
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8, loc="lower right")


def draw_directions(axes: Axes, summary: Mapping[str, Any]) -> None:
    for group, renew in enumerate(transformer.RENEW):
        for place, method in enumerate(transformer.METHODS):
            entry = summary[f"{method} | {renew}"]
            x = group * 7 + place
            mean, low, high = entry["other"]
            axes.bar(x, mean, color=COLOURS[method], width=0.8)
            axes.plot([x, x], [low, high], color="black", linewidth=1)
            axes.plot(x, entry["own"][0], "_", color="black", markersize=11)
    axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    ticks = [group * 7 + place for group in range(2) for place in range(6)]
    names = ["SFT", "MSE", "l. cosh", "KL", "PPO", "noise"] * 2
    axes.set_xticks(ticks, names, rotation=60, fontsize=8)
    axes.set(ylim=(0, 1.05), ylabel="share of steps towards the end")
    first, second = transformer.RENEW
    axes.set_title(f"Transformer: new batch every {first} steps | one for {second}", fontsize=10)


def draw(results: Results, summary: Mapping[str, Any], path: Path) -> None:
    cells = results.content["cells"]
    figure, panels = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    (first, second, third), (fourth, fifth, sixth) = panels
    draw_curvature(first, cells["ppo | V=10"])
    draw_near_the_target(second, cells["near the target"])
    draw_own_optimum(third, cells["near PPO's own optimum"])
    draw_bounds(fourth, cells["bounds"])
    draw_rates(fifth, cells)
    draw_directions(sixth, summary["Proposition 4.4, transformer"])
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


MEASURES = {
    "Equations 4 and 5": equations_4_and_5,
    "Proposition 4.1": proposition_4_1,
    "Lemmas 4.5 and 4.6": lemmas_4_5_and_4_6,
    "Proposition 4.7": proposition_4_7,
    "Propositions 4.8 and 4.9": propositions_4_8_and_4_9,
    "Proposition 4.4, linear models": proposition_4_4_linear,
    "Proposition 4.4, transformer": proposition_4_4_transformer,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="recompute finished cells")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(
        HERE / "results.json",
        settings={
            "rows": ROWS,
            "scales": curvature.SCALES,
            "bounds": {"vocabularies": bounds.VOCABS, "distances": bounds.DISTANCES},
            "rates": {"vocabularies": RATE_VOCABS, "spreads": SPREADS, "runs": RUNS, "kept": KEPT},
            "linear": {
                "contexts": linear_models.CONTEXTS,
                "features": linear_models.FEATURES,
                "answers": linear_models.ANSWERS,
                "steps": linear_models.STEPS,
                "rates": linear_models.RATES,
                "seeds": LINEAR_SEEDS,
            },
            "transformer": {
                "config": transformer.CONFIG,
                "pretraining": transformer.PRETRAINING,
                "updates": transformer.UPDATES,
                "renew": transformer.RENEW,
                "rate": transformer.RATE,
                "beta": transformer.BETA,
                "seeds": SEEDS,
            },
            "libraries": {"torch": version("torch"), "transformers": version("transformers")},
        },
        about={
            "study": "Chen et al., arXiv 2603.00963: Propositions 4.1 to 4.9",
            "command": "python -m benchmarks.lco_theory.run",
            "budget": "about 4 minutes of one core",
        },
        fresh=options.fresh,
    )
    summary = {}
    for name, measure in MEASURES.items():
        summary[name] = measure(results)
        print(f"{name}: {summary[name]['verdict']}")
    draw(results, summary, HERE / "lco_theory.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
