"""How far do the results move with one observation, and how well do they generalise?

``python -m benchmarks.bellman_stability.run [--jobs 1] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again; stop it at any time and start it again. ``--plot`` only draws
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
import torch
from matplotlib.axes import Axes

from benchmarks.bellman_stability import bed, coupled, steps
from benchmarks.bellman_stability.coupled import Setting
from benchmarks.pool import run_jobs
from benchmarks.results import Results, bootstrap_interval
from holdfast.bellman import Sgda, measure_generalization
from holdfast.bellman.stability import fit_slope

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
CONTROL_SIZES = (64, 128, 256, 512, 1024)
DATASETS, REPLACED = 10, 24
CAP = 60_000
SETTINGS = {
    "bed": Setting(cap=CAP),
    "discount 0.5, ratio 4": Setting(ratio=4.0, scale=16.0, cap=CAP),
    "discount 0.8, ratio 1.5625": Setting(discount=0.8, ratio=0.8**-2, cap=CAP),
    "discount 0.95, ratio 1.108": Setting(discount=0.95, ratio=0.95**-2, scale=160.0, cap=CAP),
    "ten models, ratio 1": Setting(models=10),
    "ten models, ratio 4": Setting(models=10, ratio=4.0, scale=16.0),
    "discount 0.8, ratio 8": Setting(discount=0.8, ratio=8.0),
    "discount 0.95, ratio 1": Setting(discount=0.95),
    "discount 0.95, ratio 8": Setting(discount=0.95, ratio=8.0),
    "constant step": Setting(scale=0.25, constant=True),
    "small steps": Setting(scale=4.0),
    "not coupled": Setting(coupled=False),
}
GENERALISED = ("bed", "discount 0.5, ratio 4")
CONTROLS = tuple(SETTINGS)[6:]
GENERALISATION = {"sizes": (64, 256, 1024, 4096), "datasets": 400, "max_steps": 40_960}


def sizes(name: str) -> tuple[int, ...]:
    return CONTROL_SIZES if name in CONTROLS else SIZES


def known() -> dict[str, Any]:
    """The constants of the theorems on the bed, and how tight two of them are."""
    one = bed.model()
    return {
        **bed.constants(one),
        **{f"{name}_least_ratio": x for name, x in bed.pl_check(one, 4000).items()},
        "c2": bed.offset(one, bed.SCALE),
    }


def generalisation(setting: Setting) -> dict[str, Any]:
    """Theorems 6 and 7: risks on fresh data sets, and the weak gap."""
    one = bed.model(setting.discount)
    found = measure_generalization(
        one,
        sizes=GENERALISATION["sizes"],
        datasets=GENERALISATION["datasets"],
        passes=10,
        max_steps=GENERALISATION["max_steps"],
        settings=Sgda(steps=1, step=setting.step(), step_ratio=setting.ratio),
        seed=0,
    )

    def line(values: np.ndarray) -> list[list[float]]:
        """Times ``n``: mean and interval for each size."""
        scaled = np.array(found.sizes)[:, None] * values
        rows = [[x.mean(), *bootstrap_interval(x, np.mean)] for x in scaled]
        return [[float(f"{x:.5g}") for x in row] for row in rows]

    def slopes(values: np.ndarray) -> list[float]:
        slope, interval = fit_slope(found.sizes, values, np.random.default_rng(0))
        return rounded([slope, *interval], 3)

    return {
        "sizes": found.sizes,
        "steps": found.steps,
        "gap": line(found.risk - found.empirical_risk),
        "risk": line(found.risk),
        "empirical_risk": line(found.empirical_risk),
        "optimum_on_data": line(found.optimum_empirical_risk),
        "weak_gap": (found.weak_gap * found.sizes).tolist(),
        "empirical_weak_gap": (found.empirical_weak_gap * found.sizes).tolist(),
        "gap_slope": slopes(found.risk - found.empirical_risk),
        "risk_slope": slopes(found.risk),
    }


def jobs() -> dict[str, Callable[[], Any]]:
    """Every cell by its key, cheap ones first."""
    every: dict[str, Callable[[], Any]] = {"constants": known, "steps of the proofs": steps.every}
    for n in SIZES:
        for name, setting in SETTINGS.items():
            if n in sizes(name):
                every[f"{name} | {n}"] = partial(
                    coupled.measure, setting, n, DATASETS, REPLACED, seed=0
                )
    for name in GENERALISED:
        every[f"generalisation | {name}"] = partial(generalisation, SETTINGS[name])
    return every


def call(job: Callable[[], Any]) -> Any:
    torch.set_num_threads(1)
    return job()


def told(values: Mapping[str, Any]) -> str:
    if "10n" not in values:
        return "done"
    return f"10n: {np.mean(values['10n']['distance']):.4g}, shift {np.mean(values['shift']):.4g}"


def summarise(cells: Mapping[str, Any]) -> dict[str, Any]:
    """What README.md quotes."""
    whole = ("constants", "steps of the proofs")
    summary: dict[str, Any] = {key: cells[key] for key in whole if key in cells}
    found = {name: f"generalisation | {name}" for name in GENERALISED}
    summary["generalisation"] = {n: cells[key] for n, key in found.items() if key in cells}
    summary["stability"] = {}
    for name in SETTINGS:
        found = {n: cells[f"{name} | {n}"] for n in sizes(name) if f"{name} | {n}" in cells}
        if len(found) > 1:
            summary["stability"][name] = line_of(found)
    if "bed" in summary["stability"] and "constants" in cells:
        summary["against_the_theorems"] = against(summary, cells["constants"])
    return summary


def line_of(found: Mapping[int, Any]) -> dict[str, Any]:
    """Slopes and tables of one setting over its sizes."""
    ns = np.array(list(found))
    entry: dict[str, Any] = {
        "control": max(cell["control"] for cell in found.values()),
        "rejected": {str(n): cell["rejected"] for n, cell in found.items()},
        "shift": describe(ns, np.array([cell["shift"] for cell in found.values()])),
        "marks": {},
    }
    for mark in next(iter(found.values()))["marks"]:
        distance = np.array([cell[mark]["distance"] for cell in found.values()])
        entry["marks"][mark] = {
            **describe(ns, distance),
            "steps": [cell["marks"][mark] for cell in found.values()],
            "error": rounded(np.array([cell[mark]["error"] for cell in found.values()]).mean(1)),
            "same": rounded([cell[mark]["same"] for cell in found.values()]),
            "same_expected": rounded(
                [
                    cell["same_shift"]
                    + (1 - cell["same_shift"]) * (1 - 1 / n) ** cell["marks"][mark]
                    for n, cell in found.items()
                ]
            ),
        }
    return entry


def describe(ns: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Means, means times ``n``, slopes over all sizes and over the last four."""
    rng = np.random.default_rng(0)
    kept = np.minimum(values, 1e100)
    slope, interval = fit_slope(ns, kept, rng)
    late, late_interval = fit_slope(ns[-4:], kept[-4:], rng)
    return {
        "mean": rounded(kept.mean(1)),
        "n_times": rounded(ns * kept.mean(1)),
        "slope": rounded([slope, *interval], 3),
        "late_slope": rounded([late, *late_interval], 3),
    }


def rounded(values: Any, digits: int = 4) -> list[float]:
    return [float(f"{x:.{digits}g}") for x in np.asarray(values)]


def against(summary: Mapping[str, Any], constants: Mapping[str, float]) -> dict[str, Any]:
    """Bounds over what was measured on the bed."""
    line = summary["stability"]["bed"]
    shift = line["shift"]["n_times"]
    distance = line["marks"]["10n"]["n_times"]
    entry: dict[str, Any] = {
        "sensitivity_over_shift": rounded([constants["sensitivity"] / x for x in shift]),
        "sensitivity_per_sample_over_shift": rounded(
            [constants["sensitivity_per_sample"] / x for x in shift]
        ),
        "shift_over_distance": rounded([x / y for x, y in zip(shift, distance, strict=True)]),
        "fall_from_first_to_last": {
            "measured": shift[0] / shift[-1] * SIZES[-1] / SIZES[0]
            if len(shift) == len(SIZES)
            else None,
            "1/n": SIZES[-1] / SIZES[0],
            "1/sqrt(n)": (SIZES[-1] / SIZES[0]) ** 0.5,
        },
        "triangle_over_distance": rounded(
            [
                (2 * error + moved) / far
                for error, moved, far in zip(
                    line["marks"]["10n"]["error"],
                    line["shift"]["mean"],
                    line["marks"]["10n"]["mean"],
                    strict=True,
                )
            ]
        ),
    }
    if "bed" in summary["generalisation"] and len(shift) == len(SIZES):
        # Lei et al. (2021): the gap of the primal risk is at most (1 + L / rho) G epsilon.
        factor = (1 + constants["L"] / constants["rho"]) * constants["G"]
        pairs = zip(GENERALISATION["sizes"], summary["generalisation"]["bed"]["gap"], strict=True)
        entry["transfer_over_gap"] = rounded(
            [factor * distance[SIZES.index(n)] / gap[0] for n, gap in pairs]
        )
    return entry


COLOURS = {"n": "#E69F00", "10n": "#0072B2", "n2": "#009E73"}
LABELS = {"n": "T = n", "10n": "T = 10 n", "n2": "T = min(n²/4, 60,000)"}


def draw_bed(axes: Axes, summary: Mapping[str, Any]) -> None:
    line = summary["stability"].get("bed")
    if not line:
        return
    ns = np.array(SIZES[: len(line["shift"]["mean"])], dtype=float)
    for mark, colour in COLOURS.items():
        entry = line["marks"][mark]
        label = f"{LABELS[mark]}: {entry['slope'][0]:.2f}"
        axes.plot(ns, entry["mean"], "o-", color=colour, markersize=4, label=label)
        axes.plot(ns, entry["error"], "x:", color=colour, markersize=4)
    shift = line["shift"]
    axes.plot(ns, shift["mean"], "k--", label=f"exact saddles: {shift['slope'][0]:.2f}")
    axes.plot(ns, shift["mean"][0] * (ns / ns[0]) ** -0.5, color="#BBBBBB", label="1 / √n")
    axes.set(xscale="log", yscale="log", xlabel="n", ylabel="distance")
    axes.set_title("The bed, one step for both players\n(dots: to the own saddle)", fontsize=10)
    axes.legend(frameon=False, fontsize=8, title="one row replaced, slope")


def draw_others(axes: Axes, summary: Mapping[str, Any]) -> None:
    colours = plt.get_cmap("tab10").colors
    names = [name for name in SETTINGS if name not in ("bed", "ten models, ratio 1")]
    for name, colour in zip(names, colours, strict=False):
        line = summary["stability"].get(name)
        if not line:
            continue
        entry = line["marks"]["10n"]
        ns = np.array(sizes(name)[: len(entry["mean"])], dtype=float)
        label = f"{name}: {entry['slope'][0]:.2f}"
        axes.plot(ns, entry["mean"], "o-", color=colour, markersize=3, label=label)
        axes.plot(ns, line["shift"]["mean"], "--", color=colour, linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylim=(3e-4, 1e4), xlabel="n", ylabel="distance")
    axes.set_title("Other settings and controls, T = 10 n\n(dashed: exact saddles)", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, title="setting, slope")


def draw_generalisation(axes: Axes, summary: Mapping[str, Any]) -> None:
    found = summary["generalisation"].get("bed")
    if not found:
        return
    ns = np.array(found["sizes"], dtype=float)
    for name, label, colour in (
        ("risk", "risk", "#333333"),
        ("gap", "risk − risk on the data", "#0072B2"),
        ("optimum_on_data", "the truth's risk on the data", "#D55E00"),
    ):
        mean, low, high = np.array(found[name]).T
        axes.plot(ns, mean, "o-", color=colour, markersize=4, label=label)
        axes.fill_between(ns, low, high, color=colour, alpha=0.2, linewidth=0)
    theory = summary["constants"]["theory_optimum_gap"]
    axes.axhline(theory, color="#D55E00", linestyle=":", label="Σ discount² Var(V)")
    axes.set(xscale="log", xlabel="n", ylabel="n × risk", ylim=(0, None))
    axes.set_title("The bed: risks of 400 data sets, T = 10 n", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    draw_bed(panels[0], summary)
    draw_others(panels[1], summary)
    draw_generalisation(panels[2], summary)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(summary: Mapping[str, Any]) -> str:
    lines = [f"{'setting':<28}{'T':<6}{'slope':<24}n × distance"]
    for name, line in summary["stability"].items():
        for mark, entry in {**line["marks"], "exact": line["shift"]}.items():
            slope, low, high = entry["slope"]
            values = "  ".join(f"{x:.3g}" for x in entry["n_times"])
            lines.append(f"{name:<28}{mark:<6}{f'{slope:.2f} [{low:.2f}, {high:.2f}]':<24}{values}")
    return "\n".join(lines)


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
            "bed": {"states": bed.STATES, "actions": bed.ACTIONS, "discount": bed.DISCOUNT},
            "sizes": SIZES,
            "control_sizes": CONTROL_SIZES,
            "datasets": DATASETS,
            "replaced": REPLACED,
            "settings": {name: vars(setting) for name, setting in SETTINGS.items()},
            "generalisation": GENERALISATION,
        },
        about={
            "study": "Kang and Jang, Stability and Generalization for Bellman Residuals: "
            "Theorems 3, 6 and 7, Corollary 4",
            "command": "python -m benchmarks.bellman_stability.run",
            "budget": "about 10 minutes of one core",
        },
        fresh=options.fresh,
    )
    if not options.plot:
        deadline = time.monotonic() + 60 * options.minutes
        run_jobs(results, jobs(), call, told, workers=options.jobs, deadline=deadline)
    summary = summarise(results.content["cells"])
    draw(summary, HERE / "bellman_stability.png")
    results.finish(summary)
    print(table(summary))


if __name__ == "__main__":
    main()
