"""Stability and sample efficiency of policy optimisation on verifiable arithmetic.

``python -m benchmarks.arithmetic.run [--jobs 2] [--minutes 60] [--inner 1]``. Finished cells are
kept in ``results.json`` and not run again; stop it at any time and start it again. ``--plot`` only
draws what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import numpy as np
from accelerate import Accelerator

from benchmarks.arithmetic import study
from benchmarks.arithmetic.analysis import analyse, chosen_strengths, finalists
from benchmarks.arithmetic.prepare import HERE, RUNS, teacher
from benchmarks.arithmetic.study import Cell
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results
from holdfast.assemble import assemble, build_trainer
from holdfast.errors import TrainingError
from holdfast.joint.record import Recorder
from holdfast.recipe import parse_recipe

SETTINGS = {
    "samples": study.SAMPLES,
    "rollouts": study.ROLLOUTS,
    "group": study.GROUP,
    "learning_rates": study.LEARNING_RATES,
    "task": 4,
}
ABOUT = {
    "command": "python -m benchmarks.arithmetic.run",
    "seeds": {"screening": len(study.SCREENED), "compared": len(study.ALL)},
    "budget": "the same number of completions for every run; one torch thread",
}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train one cell in this process."""
    recipe = parse_recipe(cell.recipe(), file=RUNS / "cell.yaml")
    folder = RUNS / "cells" / cell.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    if cell.current:
        # Without what is kept of the policy that sampled, the policy itself stands in its place.
        assembly.objectives["rl"].source.annotate.behaviour = "none"
    recorder = Recorder(folder)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=folder, recorder=recorder)
    trainer.checkpoints = None
    stopped = None
    started = time.process_time()
    try:
        trainer.train()
    except TrainingError as error:  # A policy may collapse until nothing is left to learn from.
        stopped = str(error)[:100]
    seconds = time.process_time() - started
    recorder.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line["objectives"] for line in lines if line["kind"] == "eval"]
    seen = [line["objectives"]["rl"]["metrics"] for line in train]
    norms = [norm for line in train if np.isfinite(norm := line["grad_norm"] or 0.0)]

    expected = recipe.training.max_steps // recipe.training.eval_steps + 1

    def curve(name: str) -> list[float]:
        found = [round(-evaluation[name]["loss"], 4) for evaluation in evaluations]
        # A run that stopped early ended at a policy that no longer answers.
        return found + [0.0] * (expected - len(found))

    def tenths(name: str) -> list[float]:
        values = [metrics.get(name, np.nan) for metrics in seen]
        return [round(float(np.mean(part)), 4) for part in np.array_split(values, 10) if len(part)]

    return {
        "validation": curve("rl"),
        "held_out": curve("reported"),
        "samples": [metrics.get("samples", 0) for metrics in seen[:: max(1, len(seen) // 10)]],
        "reward": tenths("reward"),
        "entropy": tenths("entropy"),
        "grad_norm": {
            "max": max(norms, default=None),
            "p99": float(np.percentile(norms, 99)) if norms else None,
            "median": float(np.median(norms)) if norms else None,
        },
        "intervened": _intervened(train, recipe.training.max_grad_norm),
        "refused": sum(line["kind"] == "event" for line in lines),
        "stopped": stopped,
        "seconds": round(seconds, 2),
    }


def _intervened(train: list[dict[str, Any]], clip: float | None) -> float | None:
    """Share of updates that a guard scaled, or of tokens that one masked; ``None`` without one."""
    shares: list[float] = []
    for line in train:
        guards = line.get("guards", {}).values()  # and the norm of the update, a number
        shares += [entry["factor"] < 1 for entry in guards if isinstance(entry, dict)]
        shares += [
            objective["metrics"]["curvature/masked"]
            for objective in line["objectives"].values()
            if "curvature/masked" in objective["metrics"]
        ]
        if clip is not None:
            shares.append((line["grad_norm"] or 0.0) > clip)
    return round(float(np.mean(shares)), 4) if shares else None


def run_cells(results: Results, cells: Iterable[Cell], workers: int, deadline: float) -> bool:
    """Run what is missing. ``False``: time ran out."""
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, Any]) -> str:
    return f"{values['validation'][-1]:.2f} of {max(values['validation']):.2f}"


def run_inner(results: Results, inner: int, workers: int, deadline: float) -> bool:
    """Everything with one number of passes, in the order in which it is needed."""
    cells = results.content["cells"]
    if not run_cells(results, study.tuning(1), workers, deadline):
        return False
    strengths = chosen_strengths(cells)
    if not run_cells(results, study.screening(inner, strengths), workers, deadline):
        return False
    return run_cells(results, finalists(cells, inner, strengths), workers, deadline)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--inner", type=int, choices=study.INNER, action="append")
    options = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    deadline = time.monotonic() + 60 * options.minutes
    if not options.plot:
        teacher()
        for inner in options.inner or study.INNER:
            if not run_inner(results, inner, options.jobs, deadline):
                break
    results.finish(analyse(results.content["cells"], HERE))


if __name__ == "__main__":
    main()
