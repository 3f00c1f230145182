"""What is left of a first task after reinforcement learning on a second one.

``python -m benchmarks.forgetting_rl.run [--jobs 2] [--minutes 60]``. Finished cells are kept in
``results.json`` and not run again; ``--plot`` only draws what is there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import matplotlib

matplotlib.use("Agg")

import numpy as np
from accelerate import Accelerator
from matplotlib import pyplot as plt

from benchmarks.arithmetic.prepare import COPIES, SLIPS, calculator, slip, sums
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results, bootstrap_interval
from holdfast.assemble import assemble, build_trainer
from holdfast.joint.record import Recorder
from holdfast.recipe import parse_recipe
from holdfast.run import resume, train

HERE = Path(__file__).parent
RUNS = HERE / "runs"
START = RUNS / "start"
STEPS, BATCH, EVERY = 200, 64, 20
RATES = (1e-4, 3e-4, 1e-3)
SCREENED, ALL = tuple(range(3)), tuple(range(10))
BETA = 3.0
METHODS = ("lco", "grpo", "sft-lco", "alright", "maxright", "interleave")
ALONE = ("sft", "lco")
"""Runs on one objective, from which MAXRIGHT's optima are taken."""
SETTINGS = {"steps": STEPS, "rates": RATES, "beta": BETA}
ABOUT = {
    "command": "python -m benchmarks.forgetting_rl.run",
    "seeds": {"screening": len(SCREENED), "compared": len(ALL)},
    "budget": "the same number of updates for every method; one torch thread",
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/lr{self.learning_rate:g}/seed{self.seed}"

    def recipe(self, optima: dict[str, float]) -> dict[str, Any]:
        """The recipe's values. Objectives that are never trained on are there to be evaluated."""

        def reward(task: str, part: str, kind: str = "reinforce") -> dict[str, Any]:
            own = {"beta": BETA} if kind == "lco_kl" else {}
            return {
                "kind": kind,
                "data": {
                    "path": str(RUNS / "second.jsonl"),
                    "held_out_path": str(RUNS / f"{task}_{part}.jsonl"),
                    "held_out": 0,
                    "probe": 64,
                },
                "rewards": [{"name": "exact_match"}],
                "batch_size": BATCH,
                "num_generations": 8,
                "max_completion_length": 5,
                "evaluation_temperature": 1.0,
                "optimum": optima.get("rl"),
                **own,
            }

        demonstrations = {
            "kind": "nll",
            "data": {
                "path": str(RUNS / "first.jsonl"),
                "held_out_path": str(RUNS / "first_validation.jsonl"),
                "held_out": 0,
                "probe": 64,
            },
            "batch_size": BATCH,
            "optimum": optima.get("sft"),
        }
        half = {"sft": 0.5, "rl": 0.5}
        schedules: dict[str, dict[str, Any]] = {
            "lco": {"kind": "mix", "weights": {"rl": 1.0}},
            "grpo": {"kind": "mix", "weights": {"rl": 1.0}},
            "sft": {"kind": "mix", "weights": {"sft": 1.0}},
            "sft-lco": {
                "kind": "sequential",
                "stages": [
                    {"objective": "sft", "steps": STEPS // 2},
                    {"objective": "rl", "steps": STEPS // 2},
                ],
            },
            "alright": {"kind": "alright", "weights": half},
            "maxright": {"kind": "maxright", "weights": half, "evaluate_every": 10},
            "interleave": {"kind": "interleave", "counts": {"sft": 1, "rl": 3}},
        }
        trained = "grpo" if self.method == "grpo" else "lco_kl"
        return {
            "name": "cell",
            "policy": {"model_name_or_path": str(START / "model")},
            "objectives": {
                "sft": demonstrations,
                "rl": reward("second", "validation", trained),
                "first_validation": reward("first", "validation"),
                "first_held_out": reward("first", "held_out"),
                "second_held_out": reward("second", "held_out"),
            },
            "schedule": schedules[self.method],
            "training": {
                "max_steps": STEPS,
                "learning_rate": self.learning_rate,
                "eval_steps": EVERY,
                "save_steps": STEPS,
                "seed": self.seed,
            },
            "output": str(RUNS / "cells" / self.key),
        }


def start() -> None:
    """Files of rows, and the model that every run starts from."""
    if not (RUNS / "start.jsonl").exists():
        RUNS.mkdir(exist_ok=True)
        draw = random.Random(0)
        tasks = {
            "first": [row for row in calculator() if "+" not in row[0]],
            "second": sums(),
        }
        demonstrations = []
        for task, rows in tasks.items():
            draw.shuffle(rows)
            for part in ("validation", "held_out"):
                taken = [rows.pop() for _ in range(256)]
                _write(RUNS / f"{task}_{part}.jsonl", [(p, a, a) for p, a in taken])
            known = rows[:2500]
            # Reinforcement learning asks other sums than were demonstrated.
            asked = rows[:2500] if task == "first" else rows[2500:4000]
            _write(RUNS / f"{task}.jsonl", [(p, a, a) for p, a in asked])
            slips = 0.0 if task == "first" else SLIPS
            for prompt, answer in known * COPIES:
                wrong = draw.random() < slips
                demonstrations.append(
                    (prompt, slip(prompt, answer, draw) if wrong else answer, answer)
                )
        draw.shuffle(demonstrations)
        _write(RUNS / "start.jsonl", demonstrations)
    if (START / "model").is_dir():
        return
    recipe = parse_recipe(
        {
            "name": "start",
            "output": str(START),
            "policy": {"model_name_or_path": "tiny-qwen2", "tokenizer": {"kind": "bytes"}},
            "objectives": {
                "sft": {
                    "kind": "nll",
                    "data": {"path": str(RUNS / "start.jsonl"), "held_out": 0, "probe": 0},
                    "batch_size": 128,
                }
            },
            "schedule": {"kind": "mix", "weights": {"sft": 1.0}},
            "training": {
                "max_steps": 3000,
                "learning_rate": 0.003,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 50,
                "weight_decay": 0.1,
                "eval_steps": 1000,
                "save_steps": 1000,
            },
        },
        file=RUNS / "start.yaml",
    )
    (resume(START) if (START / "run.json").exists() else train(recipe))


def _write(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    lines = (json.dumps({"prompt": p, "completion": c, "answer": a}) + "\n" for p, c, a in rows)
    path.write_text("".join(lines), encoding="utf-8")


def run_cell(job: tuple[Cell, dict[str, float]]) -> dict[str, Any]:
    """Train one cell in this process."""
    cell, optima = job
    recipe = parse_recipe(cell.recipe(optima), file=RUNS / "cell.yaml")
    folder = RUNS / "cells" / cell.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    recorder = Recorder(folder)
    trainer = build_trainer(recipe, assembly, optima, accelerator, folder=folder, recorder=recorder)
    trainer.checkpoints = None
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    recorder.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    evaluations = [line["objectives"] for line in lines if line["kind"] == "eval"]
    curves = {
        name: [round(evaluation[name]["loss"], 4) for evaluation in evaluations]
        for name in evaluations[0]
    }
    updates = sum("sft" in line["objectives"] for line in lines if line["kind"] == "train")
    return {**curves, "sft_updates": updates, "seconds": round(seconds, 2)}


def run_cells(
    results: Results,
    jobs: Iterable[tuple[Cell, dict[str, float]]],
    workers: int,
    deadline: float,
) -> bool:
    """Run what is missing. ``False``: time ran out."""
    by_key = {cell.key: (cell, optima) for cell, optima in jobs}
    return run_jobs(results, by_key, run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, Any]) -> str:
    return f"first {-values['first_validation'][-1]:.2f} second {-values['rl'][-1]:.2f}"


def optima_of(cells: dict[str, Any]) -> dict[str, float]:
    """The lowest mean validation loss of runs on one objective alone, at their best rate."""
    found = {}
    for method, objective in (("sft", "sft"), ("lco", "rl")):
        by_rate = [
            np.mean([min(run[objective]) for run in _runs(cells, Cell(method, rate, 0), SCREENED)])
            for rate in RATES
        ]
        found[objective] = float(min(by_rate))
    return found


def _runs(cells: dict[str, Any], cell: Cell, seeds: Iterable[int]) -> list[dict[str, Any]]:
    keys = (replace(cell, seed=seed).key for seed in seeds)
    return [cells[key] for key in keys if key in cells]


def best_rate(cells: dict[str, Any], method: str) -> float:
    """The rate with the best mean of both validation accuracies at the end."""

    def score(rate: float) -> float:
        runs = _runs(cells, Cell(method, rate, 0), SCREENED)
        if not runs:
            return -1.0
        return -float(np.mean([run["first_validation"][-1] + run["rl"][-1] for run in runs]))

    return max(RATES, key=score)


def finalists(cells: dict[str, Any]) -> Iterator[Cell]:
    """Ten seeds of every method at its best rate."""
    for seed in ALL:
        for method in METHODS:
            yield Cell(method, best_rate(cells, method), seed)


def analyse(cells: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on both tasks at the start and at the end, and a picture."""
    table = {}
    figure, axes = plt.subplots(figsize=(6.5, 5), constrained_layout=True)
    for method in METHODS:
        rate = best_rate(cells, method)
        runs = _runs(cells, Cell(method, rate, 0), ALL)
        if not runs:
            continue
        row: dict[str, Any] = {"learning_rate": rate, "seeds": len(runs)}
        for task in ("first", "second"):
            curves = -np.array([run[f"{task}_held_out"] for run in runs])
            row[f"{task}_start"] = float(curves[:, 0].mean())
            # The last three evaluations: one sample of a prompt is a coarse measure.
            final = curves[:, -3:].mean(1)
            row[task] = [float(final.mean()), *bootstrap_interval(final[:, None], np.mean)]
        row["sft_updates"] = float(np.mean([run["sft_updates"] for run in runs]))
        table[method] = row
        path = [-np.mean([r[f"{t}_held_out"] for r in runs], axis=0) for t in ("second", "first")]
        axes.plot(*path, marker=".", label=method)
    axes.set(xlabel="accuracy on the second task", ylabel="accuracy on the first task")
    axes.legend()
    figure.savefig(HERE / "forgetting.png", dpi=110)
    plt.close(figure)
    return {"table": table}


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    cells = results.content["cells"]
    deadline = time.monotonic() + 60 * options.minutes
    if not options.plot:
        start()
        alone = [Cell(m, rate, seed) for seed in SCREENED for rate in RATES for m in ALONE]
        if run_cells(results, [(cell, {}) for cell in alone], options.jobs, deadline):
            optima = optima_of(cells)
            screened = [Cell(m, rate, s) for s in SCREENED for rate in RATES for m in METHODS]
            jobs = [(cell, optima) for cell in screened]
            if run_cells(results, jobs, options.jobs, deadline):
                run_cells(results, [(c, optima) for c in finalists(cells)], options.jobs, deadline)
    results.finish(analyse(cells))


if __name__ == "__main__":
    main()
