"""Speed and memory of values from logged decisions, beside d3rlpy and beside themselves.

``python -m benchmarks.bellman.run`` from the root of the repository; see README.md beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.bellman.peers import environment, interpreter, peer_versions
from benchmarks.bellman.race import BATCHES, HIDDEN, SIDES, UPDATES, Worker
from benchmarks.cost.run import median_ratio
from benchmarks.results import Results
from holdfast.bellman import Constant, Networks, SaddleProblem, Sgda, TabularMDP, mlp
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WARM_UP, BLOCKS = 2, 10
REPLICAS = (1, 10, 50, 200)
REPLICA_STEPS = 500
KINDS = ("tables", "networks, one row", "networks")
STATES = (1_000, 10_000, 100_000, 300_000)
SPARSE_DISCOUNTS = (0.95, 0.99)
TARGETS = {"transitions": 1.5, "replicas": 4.0}


def race(batch: int) -> dict[str, Any]:
    """Blocks of updates of all sides, by turns: what slows one down slows down the others."""
    commands: dict[str, list[str | Path]] = {
        "holdfast": [sys.executable, "-m", "benchmarks.bellman.worker", str(batch)]
    }
    python = interpreter("d3rlpy")
    if python is not None:
        for side in SIDES[1:]:
            commands[side] = [python, HERE / "peer_d3rlpy.py", side, str(batch)]
    times: dict[str, list[Any]] = {side: [] for side in commands}
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        workers = {}
        for side, command in commands.items():
            workers[side] = Worker(command, own if side == "holdfast" else environment(), log)
            stack.callback(workers[side].stop)
        for number in range(WARM_UP + BLOCKS):
            for side in list(workers)[:: 1 if number % 2 else -1]:
                times[side].append(workers[side].ask())
    return {
        "versions": peer_versions("d3rlpy", "torch"),
        **{
            f"{side}, {kind}": {
                clock: [round(block[kind][clock], 5) for block in blocks[WARM_UP:]]
                for clock in ("wall", "cpu")
            }
            for side, blocks in times.items()
            for kind in blocks[0]
        },
    }


def coupled(kind: str) -> dict[str, list[float]]:
    """Processor seconds of runs with more and more replicas, by turns."""
    model = TabularMDP.random(5, 3, 0.8, seed=0)
    data = model.sample(512, seed=0)
    problem = SaddleProblem.tabular(data, model.discount)
    step, batch = 0.01, 1
    if kind != "tables":
        features = np.random.default_rng(0).normal(size=(5, 4))
        data = type(data)(features[data.state], data.action, data.reward, features[data.next_state])
        nets = Networks(*(mlp(4, (10, 10), 3, seed=number) for number in range(2)))
        problem = SaddleProblem(data, model.discount, nets)
        batch = 1 if kind == "networks, one row" else 32
    settings = Sgda(steps=REPLICA_STEPS, step=Constant(step), batch_size=batch)
    stacks = {count: Batch.stack([data] * count) for count in REPLICAS}
    times: dict[str, list[float]] = {str(count): [] for count in REPLICAS}
    for number in range(1 + BLOCKS):
        for count in REPLICAS[:: 1 if number % 2 else -1]:
            started = time.process_time()
            descend_ascend(problem, stacks[count], settings)
            if number:
                times[str(count)].append(round(time.process_time() - started, 5))
    return times


def sparse(states: int, discount: float) -> Any:
    """In a process of its own, for its memory."""
    command = [sys.executable, "-m", "benchmarks.bellman.soft_vi", str(states), str(discount)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


# Reading ------------------------------------------------------------------------------------------


def read_race(cell: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Transitions per second, and how many times as many Holdfast's are.

    Holdfast draws its rows; beside ``alone`` it is so compared with an update that draws none.
    """
    ours = cell["holdfast, sampled"]
    summary = {}
    for side, theirs in cell.items():
        if side == "versions":
            continue
        entry: dict[str, Any] = {
            "transitions per second": round(UPDATES * batch / statistics.median(theirs["cpu"]))
        }
        if not side.startswith("holdfast"):
            for clock in ("wall", "cpu"):
                pairs = np.array([theirs[clock], ours[clock]]).T
                entry[f"times as many, {clock}"] = median_ratio(pairs)
        summary[side] = entry
    return summary


def read_coupled(cell: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        count: median_ratio(np.array([times, cell["1"]]).T)
        for count, times in cell.items()
        if count != "1"
    } | {"seconds of one": statistics.median(cell["1"])}


def growth(cells: Mapping[int, Mapping[str, Any]], name: str) -> float:
    """Exponent of the time in the number of states, over the last three sizes."""
    sizes = sorted(cells)[-3:]
    seconds = [cells[size][name]["seconds"] for size in sizes]
    return round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 2)


def table(summary: Mapping[str, Any]) -> str:
    lines = ["| batch | side | transitions / s | Holdfast has times as many (processor time) |"]
    lines.append("|---|---|---|---|")
    for batch, sides in summary["race"].items():
        for side, entry in sides.items():
            times = entry.get("times as many, cpu")
            shown = (
                ""
                if times is None
                else "{:.2f} [{:.2f}, {:.2f}]".format(times["ratio"], *times["interval"])
            )
            lines.append(f"| {batch} | {side} | {entry['transitions per second']:,} | {shown} |")
    lines += ["", "| functions | replicas | time over one run |", "|---|---|---|"]
    for kind, found in summary["replicas"].items():
        for count, entry in found.items():
            if isinstance(entry, dict):
                low, high = entry["interval"]
                lines.append(f"| {kind} | {count} | {entry['ratio']:.2f} [{low:.2f}, {high:.2f}] |")
    lines += [
        "",
        "| states | discount | value iteration s (sweeps) | policy iteration s (solves) "
        "| model MB | extra MB |",
        "|---|---|---|---|---|---|",
    ]
    for key, entry in summary["sparse"].items():
        states, discount = key.split(" | ")
        first, second = entry["value iteration"], entry["policy iteration"]
        lines.append(
            f"| {int(states):,} | {discount} | {first['seconds']:.2f} ({first['iterations']}) | "
            f"{second['seconds']:.2f} ({second['iterations']}) | {entry['kernel MB']:.0f} | "
            f"{first['extra MB']:.0f} |"
        )
    lines += ["", f"Growth exponents: {json.dumps(summary['growth'])}"]
    return "\n".join(lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = [
        (f"{side}\nbatch {batch}", entry["times as many, cpu"])
        for batch, sides in summary["race"].items()
        for side, entry in sides.items()
        if "times as many, cpu" in entry
    ]
    for row, (_, entry) in enumerate(rows):
        panels[0].plot(entry["interval"], [row, row], color="tab:blue")
        panels[0].plot(entry["ratio"], row, "o", color="tab:blue")
    panels[0].set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    panels[0].axvline(TARGETS["transitions"], color="black", linestyle=":")
    panels[0].set(xscale="log", title="Transitions / s, Holdfast over d3rlpy")
    for kind, found in summary["replicas"].items():
        ratios = [1.0, *(found[str(count)]["ratio"] for count in REPLICAS[1:])]
        panels[1].plot(REPLICAS, ratios, "o-", label=kind)
    panels[1].axhline(TARGETS["replicas"], color="black", linestyle=":")
    panels[1].set(xscale="log", xlabel="replicas", title="Time over that of one run")
    panels[1].legend(frameon=False)
    for discount in SPARSE_DISCOUNTS:
        for name, style in (("value iteration", "o-"), ("policy iteration", "s--")):
            seconds = [summary["sparse"][f"{s} | {discount}"][name]["seconds"] for s in STATES]
            panels[2].plot(STATES, seconds, style, label=f"{name}, {discount}", markersize=4)
    panels[2].set(xscale="log", yscale="log", xlabel="states", title="Soft solution to 1e-10, s")
    panels[2].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if interpreter("d3rlpy") is None:
        print("d3rlpy is not installed: see peers.py. Its side of the race is left out.")
    results = Results(
        HERE / "results.json",
        settings={
            "hidden": HIDDEN,
            "batches": BATCHES,
            "updates": UPDATES,
            "blocks": BLOCKS,
            "replicas": [REPLICAS, REPLICA_STEPS],
            "states": [STATES, SPARSE_DISCOUNTS],
            "libraries": {"torch": version("torch")},
        },
        about={
            "study": "Speed and memory of values from logged decisions",
            "command": "python -m benchmarks.bellman.run",
            "budget": "10 minutes of one core that is free",
        },
        fresh=options.fresh,
    )
    summary: dict[str, Any] = {
        "race": {
            str(batch): read_race(results.cell(f"race | {batch}", partial(race, batch)), batch)
            for batch in BATCHES
        },
        "replicas": {
            kind: read_coupled(results.cell(f"replicas | {kind}", partial(coupled, kind)))
            for kind in KINDS
        },
        "sparse": {
            f"{states} | {discount}": results.cell(
                f"sparse | {states} | {discount}", partial(sparse, states, discount)
            )
            for states in STATES
            for discount in SPARSE_DISCOUNTS
        },
    }
    summary["growth"] = {
        f"{name} | {discount}": growth(
            {states: summary["sparse"][f"{states} | {discount}"] for states in STATES}, name
        )
        for name in ("value iteration", "policy iteration")
        for discount in SPARSE_DISCOUNTS
    }
    print(table(summary))
    draw(summary, HERE / "bellman.png")
    results.finish(summary)


if __name__ == "__main__":
    main()
