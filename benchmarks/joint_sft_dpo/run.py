"""Joint SFT and DPO on real data: sequences against Mix, ALRIGHT and MAXRIGHT.

``python -m benchmarks.joint_sft_dpo.run [--jobs 2] [--minutes 60] [--mode full]``. Finished cells
are kept in ``results.json`` and not run again; stop it at any time and start it again. ``--plot``
only draws what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

from accelerate import Accelerator

from benchmarks.joint_sft_dpo import study
from benchmarks.joint_sft_dpo.analysis import Tuned, analyse, optima, tuned
from benchmarks.joint_sft_dpo.prepare import HERE, RUNS, pretrained
from benchmarks.joint_sft_dpo.study import Cell
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results
from holdfast.assemble import assemble, build_trainer
from holdfast.joint import Objective
from holdfast.joint.record import Recorder, peak_memory_bytes
from holdfast.recipe import parse_recipe

SETTINGS = {
    "steps": study.STEPS,
    "rows": {"probe": study.PROBE, "validation": study.VALIDATION, "held_out": study.HELD_OUT},
    "learning_rates": study.LEARNING_RATES,
    "lambdas": study.LAMBDAS,
    "fractions": study.FRACTIONS,
}
ABOUT = {
    "command": "python -m benchmarks.joint_sft_dpo.run",
    "seeds": {"grid": len(study.SEEDS), "compared": len(study.SEEDS + study.MORE_SEEDS)},
    "budget": "the same number of updates for every cell; one torch thread",
}


def run_cell(job: tuple[Cell, dict[str, float]]) -> dict[str, Any]:
    """Train one cell in this process."""
    cell, optima = job
    recipe = parse_recipe(cell.recipe(optima), file=RUNS / "cell.yaml")
    folder = RUNS / cell.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    validation = {}
    for name, objective in assembly.objectives.items():
        # Both are sorted by length: every fourth row is a fair part.
        rows = list(objective.probe)
        objective.probe = rows[:: 1 + study.VALIDATION // study.PROBE]
        chosen = {row.origin for row in objective.probe}
        validation[name] = [row for row in rows if row.origin not in chosen]
    seen = {name: _some(objective) for name, objective in assembly.objectives.items()}
    recorder = Recorder(folder)
    trainer = build_trainer(recipe, assembly, optima, accelerator, folder=folder, recorder=recorder)
    trainer.checkpoints = None
    trainer.train()
    recorder.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]

    def losses(rows_of: dict[str, list[Any]]) -> dict[str, float]:
        return {
            n: trainer.evaluate(trainer.objectives[n], rows).loss for n, rows in rows_of.items()
        }

    return {
        "validation": losses(validation),
        "training": losses(seen),
        "held_out": [_point(line) for line in evaluations],
        "updates": {
            name: sum(name in line["objectives"] for line in train) for name in ("sft", "dpo")
        },
        "seconds": train[-1]["seconds"],
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _some(objective: Objective) -> list[Any]:
    """A fixed part of the training rows, as many as are held out."""
    rows = sorted(objective.source.rows, key=lambda row: row.origin)
    return rows[:: max(1, len(rows) // study.HELD_OUT)][: study.HELD_OUT]


def _point(line: dict[str, Any]) -> dict[str, float]:
    losses = line["objectives"]
    # A cell that trains on one objective still reports both, for the corner of the picture.
    point = {"step": line["step"], **{name: entry["loss"] for name, entry in losses.items()}}
    point["accuracy"] = losses["dpo"]["metrics"]["rewards/accuracies"]
    return point


def run_cells(
    results: Results,
    jobs: Iterable[tuple[Cell, dict[str, float]]],
    workers: int,
    deadline: float,
) -> bool:
    """Run what is missing. ``False``: time ran out."""
    by_key = {cell.key: (cell, best) for cell, best in jobs}
    return run_jobs(
        results,
        by_key,
        run_cell,
        _told,
        workers=workers,
        deadline=deadline,
        cells_per_process=1,  # peak memory is reported
    )


def _told(values: dict[str, Any]) -> str:
    last = values["held_out"][-1]
    return f"sft {last['sft']:.4f} dpo {last['dpo']:.4f}"


def run_mode(results: Results, mode: str, workers: int, deadline: float) -> bool:
    """Everything of one mode, in the order in which it is needed. ``False``: time ran out."""
    cells = results.content["cells"]
    first, others = study.tuning(mode)
    if not run_cells(results, [(cell, {}) for cell in first], workers, deadline):
        return False
    rates = Tuned.alone(cells, mode).rates
    best = optima(cells, mode, rates, study.TUNING_SEED, "validation")
    if not run_cells(results, [(cell, best) for cell in others], workers, deadline):
        return False
    chosen = tuned(cells, mode)
    solo = study.alone(mode, chosen.rates, study.SEEDS + study.MORE_SEEDS)
    if not run_cells(results, [(cell, {}) for cell in solo], workers, deadline):
        return False
    jobs = [
        (cell, optima(cells, mode, chosen.rates, cell.seed, "validation"))
        for cell in study.grid(mode, chosen.rates, chosen.settings)
    ]
    return run_cells(results, jobs, workers, deadline)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mode", choices=study.MODES, action="append")
    options = parser.parse_args()
    results = Results(HERE / "results.json", SETTINGS, ABOUT, options.fresh)
    deadline = time.monotonic() + 60 * options.minutes
    if not options.plot:
        os.environ.setdefault("HOLDFAST_CACHE", str(RUNS / "cache"))
        pretrained()
        for mode in options.mode or study.MODES:
            if not run_mode(results, mode, options.jobs, deadline):
                break
    results.finish(analyse(results.content["cells"], HERE))


if __name__ == "__main__":
    main()
