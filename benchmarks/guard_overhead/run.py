"""What guards cost: steps with one beside steps without, taken in turn.

``python -m benchmarks.guard_overhead.run`` from the root of the repository; see README.md.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.cost.run import median_ratio
from benchmarks.guard_overhead.material import (
    COMPARISONS,
    LEARNING_RATE,
    LENGTH,
    PROMPT,
    ROWS,
    SETTINGS,
    TARGETS,
    mean_loss,
    pair,
    trainers,
)
from benchmarks.results import Results
from holdfast.joint.combine import Surgery
from holdfast.joint.geometry import Geometry

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WARM_UP, ROUNDS = 3, 40
"""Rounds that are not counted, and that are. In a round every side takes a step."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

Times = dict[str, dict[str, list[float]]]
"""By side and clock: seconds of every round."""


class Watch:
    """Adds up times by side."""

    def __init__(self, sides: Sequence[str]) -> None:
        self.times: Times = {side: {clock: [] for clock in CLOCKS} for side in sides}

    def time(self, side: str, work: Callable[[], Any]) -> Any:
        started = {clock: now() for clock, now in CLOCKS.items()}
        done = work()
        for clock, now in CLOCKS.items():
            self.times[side][clock].append(round(now() - started[clock], 6))
        return done


def compare(name: str, setting: str, rounds: int) -> Times:
    """Whole optimiser steps, side after side, in an order that is drawn anew every time."""
    sides = trainers(name, SETTINGS[setting])
    watch, draw = Watch(list(sides)), random.Random(0)
    for _ in range(rounds):
        for side in draw.sample(list(sides), len(sides)):
            watch.time(side, sides[side].train_step)
    return watch.times


def compare_combiner(setting: str, rounds: int) -> Times:
    """The backward passes of two objectives, and what UPGrad does with their gradients."""
    policy, objectives = pair(SETTINGS[setting])
    surgery, weights = Surgery("upgrad"), dict.fromkeys(objectives, 0.5)
    watch = Watch(["forward", "backward", "upgrad"])
    for _ in range(rounds):
        losses, gradients = {}, {}

        def forward(losses: dict[str, Any] = losses) -> None:
            for name, objective in objectives.items():
                losses[name] = mean_loss(objective.loss(policy, objective.source.next()))

        def backward(
            losses: dict[str, Any] = losses, gradients: dict[str, Any] = gradients
        ) -> None:
            for name, loss in losses.items():
                policy.zero_grad(set_to_none=True)
                loss.backward()
                gradients[name] = [parameter.grad for parameter in policy.parameters()]

        def combine(gradients: dict[str, Any] = gradients) -> None:
            surgery(gradients, weights, Geometry.of(gradients))

        watch.time("forward", forward)
        watch.time("backward", backward)
        watch.time("upgrad", combine)
    return watch.times


# Reading ------------------------------------------------------------------------------------------


def read(times: Times, plain: str) -> dict[str, Any]:
    """Every side over the plain one, round by round."""
    return {
        side: {
            clock: median_ratio(np.array([found[clock], times[plain][clock]]).T[WARM_UP:])
            for clock in CLOCKS
        }
        | {"milliseconds": 1e3 * statistics.median(found["wall"][WARM_UP:])}
        for side, found in times.items()
    }


def read_combiner(times: Times) -> dict[str, Any]:
    """Backward passes with the combination, over backward passes alone."""
    summary: dict[str, Any] = {}
    for clock in CLOCKS:
        forward, backward, upgrad = (np.array(times[part][clock]) for part in times)
        both = np.stack([backward + upgrad, backward], axis=1)[WARM_UP:]
        summary[clock] = median_ratio(both)
        whole = forward + backward
        summary[f"{clock}, forward passes included"] = median_ratio(
            np.stack([whole + upgrad, whole], axis=1)[WARM_UP:]
        )
    summary["milliseconds"] = 1e3 * statistics.median(times["upgrad"]["wall"][WARM_UP:])
    return {"upgrad": summary}


# Showing ------------------------------------------------------------------------------------------


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def rows_of(summary: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Model, comparison, side and what was found, without the sides that others are compared to."""
    return [
        (setting, name, side, entry)
        for setting, comparisons in summary.items()
        for name, sides in comparisons.items()
        for side, entry in sides.items()
        if side != "none"
    ]


def table(summary: dict[str, Any]) -> str:
    lines = [
        "| model | of | guard | time | processor time | target | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, name, side, entry in rows_of(summary):
        target = TARGETS.get(side)
        kept = "" if target is None else ("yes" if entry["wall"]["ratio"] <= target else "no")
        lines.append(
            f"| {setting} | {name} | {side} | {_ratio(entry['wall'])} | {_ratio(entry['cpu'])} | "
            f"{'' if target is None else target} | {kept} |"
        )
    return "\n".join(lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    names = list(dict.fromkeys((name, side) for _, name, side, _ in rows_of(summary)))
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    colours = dict(zip(SETTINGS, ("tab:blue", "tab:orange"), strict=True))
    labelled: set[str] = set()
    for setting, name, side, entry in rows_of(summary):
        row = names.index((name, side)) + (-0.12 if setting == next(iter(SETTINGS)) else 0.12)
        (low, high), ratio = entry["wall"]["interval"], entry["wall"]["ratio"]
        axes.plot([low, high], [row, row], color=colours[setting])
        label = None if setting in labelled else setting
        axes.plot(ratio, row, "o", color=colours[setting], label=label)
        labelled.add(setting)
        if side in TARGETS:
            at = names.index((name, side))
            axes.plot([TARGETS[side]] * 2, [at - 0.35, at + 0.35], color="black", linestyle=":")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"{name}: {side}" for name, side in names])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step with the guard / without (dotted: target)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that are counted")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results and plot")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = WARM_UP + options.rounds
    results = Results(
        options.output / "results.json",
        settings={
            "models": {name: asdict(setting) for name, setting in SETTINGS.items()},
            "comparisons": COMPARISONS,
            "prompt": PROMPT,
            "completion": LENGTH,
            "rows": ROWS,
            "learning_rate": LEARNING_RATE,
            "dtype": "float32",
            "threads": 1,
            "rounds": options.rounds,
            "libraries": {name: version(name) for name in ("torch", "transformers")},
        },
        about={
            "study": "What a guard adds to the time of a step",
            "command": "python -m benchmarks.guard_overhead.run",
            "budget": "25 minutes on one core that is free",
        },
        fresh=options.fresh,
    )
    summary: dict[str, Any] = {}
    for setting in SETTINGS:
        summary[setting] = {
            name: read(
                results.cell(f"{setting} | {name}", partial(compare, name, setting, rounds)),
                sides[0],
            )
            for name, sides in COMPARISONS.items()
        }
        times = results.cell(f"{setting} | combiner", partial(compare_combiner, setting, rounds))
        summary[setting]["two backward passes"] = read_combiner(times)
    print(table(summary))
    draw(summary, options.output / "guard_overhead.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
