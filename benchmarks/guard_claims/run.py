"""Claims about guards that need no language model: Lite PPO, SAFE and SSO on small problems.

``python -m benchmarks.guard_claims.run``. Finished cells are kept in ``results.json``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt

from benchmarks.guard_claims import hacking, inner_loops, normalisers
from benchmarks.results import Results, bootstrap_interval

HERE = Path(__file__).parent
SEEDS = 10


def _told(values: Any, digits: int = 4) -> list[float]:
    """Mean and interval over seeds."""
    sample = np.asarray(values, dtype=np.float64)
    ends = bootstrap_interval(sample[:, None], np.mean)
    return [round(float(x), digits) for x in (sample.mean(), *ends)]


def of_normalisers(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Lite PPO: directions, final solve rates at the best rate, and drifts of length."""
    trained = {}
    for scale, by_rate in cell["trained"].items():
        best = max(by_rate, key=lambda rate: np.mean(by_rate[rate]))
        trained[scale] = {"rate": float(best), "mean": _told(by_rate[best])}
    drifts = {
        name: {
            "length": _told([run["last"] - run["first"] for run in runs], 3),
            "updates": _told([run["updates"] for run in runs], 0),
        }
        for name, runs in cell["lengths"].items()
    }
    return {"directions": cell["directions"], "trained": trained, "lengths": drifts}


def of_hacking(cell: Mapping[str, Any]) -> dict[str, Any]:
    """SAFE: by arm, where it ends, and the true reward at equal KL."""
    found = {}
    for name, rows in cell.items():
        at = {
            kl: _told(seen)
            for kl in rows[0]["at_kl"]
            if len(seen := [r["at_kl"][kl] for r in rows if r["at_kl"][kl] is not None]) > 1
        }
        found[name] = {
            key: _told([r[key] for r in rows]) for key in ("kl", "true", "proxy", "best")
        }
        found[name]["at_kl"] = at
    return found


def of_inner_loops(cell: Mapping[str, Any]) -> dict[str, Any]:
    """SSO: share of rounds that raise the objective, and where it ends."""
    return {
        name: {
            "rises": _told([run["rises"] / inner_loops.ROUNDS for run in runs]),
            "rejected": _told([run["rejected"] / inner_loops.ROUNDS for run in runs]),
            "last": _told([min(run["last"], 1e6) for run in runs]),
        }
        for name, runs in cell.items()
    }


PARTS = {
    "normalisers": (normalisers.every, of_normalisers),
    "hacking": (hacking.every, of_hacking),
    "inner loops": (inner_loops.every, of_inner_loops),
}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    names = list(summary["normalisers"]["directions"])
    rates = list(summary["normalisers"]["directions"][names[0]])
    for i, name in enumerate(names):
        of = summary["normalisers"]["directions"][name]
        places = np.arange(len(rates)) + 0.25 * (i - 1)
        axes[0].bar(places, [of[rate]["over_true"] for rate in rates], 0.25, label=name)
    axes[0].axhline(1.0, color="grey", linewidth=0.8)
    axes[0].set_xticks(range(len(rates)), rates)
    axes[0].set(title="Gradient over the true one, relative to .5", xlabel="solve rate")
    axes[0].legend(title="divided by the deviation of", fontsize=8)
    for kind, marker in (("none", "k*"), ("fixed", "o-"), ("adaptive", "s-"), ("safe", "^")):
        rows = {n: r for n, r in summary["hacking"].items() if n.split()[0] == kind}
        for silent in (False, True):
            chosen = [r for n, r in rows.items() if n.endswith("no gradient") == silent]
            if chosen:
                chosen.sort(key=lambda r: r["kl"][0])
                label = kind + (", no gradient" if silent else "")
                style = "x" if silent else marker
                axes[1].plot(
                    [r["kl"][0] for r in chosen], [r["true"][0] for r in chosen], style, label=label
                )
    axes[1].set(title="A reward that can be hacked", xlabel="KL at the end", ylabel="true reward")
    axes[1].set_xscale("symlog", linthresh=0.1)
    axes[1].legend(fontsize=8)
    for kind, style in (("linear", "-"), ("network", "--")):
        for i, steps in enumerate(inner_loops.STEPS):
            keys = [f"{kind}, w = {w:g}, m = {steps}" for w in inner_loops.WEIGHTS]
            rises = [summary["inner loops"][key]["rises"][0] for key in keys]
            axes[2].plot(
                inner_loops.WEIGHTS, rises, style, marker="o", color=f"C{i}",
                label=f"{kind}, m = {steps}",
            )  # fmt: skip
    axes[2].axvline(0.25, color="grey", linewidth=0.8)
    axes[2].set(
        title="Rounds that raise the objective", xlabel="weight (grey: L/2)", ylabel="share",
        xscale="log",
    )  # fmt: skip
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(
        HERE / "results.json",
        settings={
            "seeds": SEEDS,
            "normalisers": [normalisers.SOLVE_RATES, normalisers.RATES, normalisers.STEPS],
            "hacking": [hacking.ARMS, hacking.UPDATES, hacking.RATE, hacking.COEFFICIENTS],
            "inner loops": [inner_loops.WEIGHTS, inner_loops.STEPS, inner_loops.ROUNDS],
        },
        about={"command": "python -m benchmarks.guard_claims.run", "seeds": SEEDS},
        fresh=options.fresh,
    )
    summary = {
        name: told(results.cell(name, partial(compute, SEEDS)))
        for name, (compute, told) in PARTS.items()
    }
    results.finish(summary)
    for name, part in summary.items():
        print(name)
        for key, row in part.items():
            print(f"  {key}: {row}")
    draw(summary, HERE / "guard_claims.png")


if __name__ == "__main__":
    main()
