"""Reinforcement alone against interleaved imitation (IN-RIL).

``python -m benchmarks.in_ril.run --task point-mass [--jobs 2] [--minutes 60]``. Finished cells are
kept in ``TASK.json`` and not run again; stop it at any time and start it again. ``--plot`` only
draws what is there.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core, one thread a run

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.in_ril import noise, study
from benchmarks.in_ril.analysis import analyse, chosen_rate, chosen_ratio, chosen_weight
from benchmarks.in_ril.picture import draw
from benchmarks.in_ril.prepare import HERE, RUNS, base, demonstrations
from benchmarks.in_ril.study import Cell
from benchmarks.in_ril.tasks import TASKS, Task
from benchmarks.pool import arguments, run_jobs
from benchmarks.results import Results
from holdfast.assemble import assemble, build_trainer
from holdfast.control.replay import ReplaySource
from holdfast.joint.geometry import Gradient
from holdfast.joint.schedules import Schedule, Watching
from holdfast.joint.turn import Probe, Turn
from holdfast.recipe import parse_recipe

ABOUT = {
    "command": "python -m benchmarks.in_ril.run",
    "budget": "the same number of batches of rollouts for every method; one torch thread",
}


class Watched:
    """A schedule, and the two gradients on the policy's own parameters, without the critic's.

    Where a turn holds imitation alone, it is compared with reinforcement's latest gradient.

    Parameters
    ----------
    schedule : Schedule
    mine : sequence of bool
        Which of the trained parameters are the policy's.
    """

    gaps: dict[str, float] = {}
    estimates: dict[str, float] = {}

    def __init__(self, schedule: Schedule, mine: Sequence[bool]) -> None:
        self.schedule = schedule
        self.mine = mine
        self.seen: list[tuple[float, float, float]] = []
        """Of every update by imitation: cosine, norm of imitation, norm of reinforcement."""
        self._latest: Tensor | None = None

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.schedule.objectives

    def next(self, probe: Probe) -> Turn:
        return self.schedule.next(probe)

    def observe(self, name: str, loss: float) -> None:
        self.schedule.observe(name, loss)

    def watch(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> None:
        if isinstance(self.schedule, Watching):
            self.schedule.watch(gradients, parameters)
        if "rl" in gradients:
            self._latest = self._vector(gradients["rl"], parameters)
        if "il" in gradients:
            il = self._vector(gradients["il"], parameters)
            rl = torch.zeros_like(il) if self._latest is None else self._latest
            norms = float(il.norm()), float(rl.norm())
            product = math.prod(norms)
            self.seen.append((float(il @ rl) / product if product else math.nan, *norms))

    def _vector(self, gradient: Gradient, parameters: Sequence[Tensor]) -> Tensor:
        columns = zip(gradient, parameters, self.mine, strict=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p, mine in columns if mine]
        return torch.cat([part.detach().flatten() for part in parts])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train one cell in this process."""
    task = TASKS[cell.task]
    true, shuffled = demonstrations(task)
    values = cell.recipe(
        base(task, cell.policy, cell.seed), shuffled if cell.method == "random" else true
    )
    recipe = parse_recipe(values, file=RUNS / "cell.yaml")
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    objectives = assembly.objectives
    if cell.method == "noise":
        objectives["il"] = noise.in_place_of(objectives["il"], cell.seed)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=RUNS, recorder=None)
    trainer.checkpoints = None
    named = [name for name, p in assembly.policy.named_parameters() if p.requires_grad]
    watched = Watched(trainer.schedule, [name.startswith("actor.") for name in named])
    trainer.schedule = watched
    source = objectives["rl"].source
    off_policy = isinstance(source, ReplaySource)
    # As many chunks, whatever is collected at a time.
    pieces = task.steps // task.replay.steps if off_policy else 1
    updates = source.options.updates if off_policy else source.updates
    curve: dict[str, list[float]] = {"environment_steps": [], "score": [], "imitation": []}
    scales: list[float] = []
    started, wall = time.process_time(), time.perf_counter()
    while True:
        used_up = source.round == 0 or source.used == updates
        if used_up and source.round == task.every * pieces * len(curve["score"]):
            seen = {name: trainer.evaluate(o, o.held_out) for name, o in objectives.items()}
            curve["environment_steps"].append(source.environment_steps)
            curve["score"].append(round(seen["rl"].metrics[task.score], 4))
            curve["imitation"].append(round(seen["il"].loss, 5))
        if used_up and source.round == task.rounds * pieces:
            break
        trainer.train_step()
        if "scale" in trainer.combiner.used:
            scales.append(trainer.combiner.used["scale"])
    return {
        **curve,
        "updates": {"il": len(watched.seen), "rl": source.round * updates},
        "geometry": _geometry(watched.seen, scales),
        "seconds": round(time.process_time() - started, 1),
        "wall": round(time.perf_counter() - wall, 1),
    }


def _geometry(
    seen: Sequence[tuple[float, float, float]], scales: Sequence[float]
) -> dict[str, float] | None:
    """Means over updates by imitation in which reinforcement moved the policy, too."""
    rows = np.array([row for row in seen if math.isfinite(row[0])])
    if not len(rows):
        return None
    cosines, il, rl = rows.T
    found = {
        "cosine": float(cosines.mean()),
        "negative": float((cosines < 0).mean()),
        "norm_il": float(il.mean()),
        "norm_rl": float(rl.mean()),
    }
    if scales:  # As long as the policy's and the critic's gradient together.
        used = np.array(scales)[-len(rows) :]
        found["scaled_il_over_rl"] = float(np.median(used * il / rl))
    return found


def run_cells(results: Results, cells: Iterable[Cell], workers: int, deadline: float) -> bool:
    """Run what is missing. ``False``: time ran out."""
    jobs = {cell.key: cell for cell in cells}
    return run_jobs(results, jobs, run_cell, _told, workers=workers, deadline=deadline)


def _told(values: dict[str, Any]) -> str:
    score = values["score"]
    return f"{score[0]:.2f} to {score[-1]:.2f}, {values['wall']:.0f} s"


def run_task(results: Results, task: Task, workers: int, deadline: float) -> bool:
    """Everything on one task, in the order in which it is needed."""
    cells = results.content["cells"]

    def run(found: Iterable[Cell]) -> bool:
        return run_cells(results, found, workers, deadline)

    for policy in study.policies(task):
        if task.tuned_on == task.name and not run(study.rates(task, policy)):
            return False
        rate = chosen_rate(cells, task, policy)
        methods: tuple[study.Method, ...]
        if policy != "gaussian":
            methods = study.pair(task, policy, chosen_ratio(task))
        else:
            if not run(study.compared(task, policy, study.sweep(), rate)):
                return False
            if not run(study.weights(task, rate)):
                return False
            methods = study.controls(chosen_ratio(task), chosen_weight(cells, task, rate))
        if not run(study.compared(task, policy, methods, rate)):
            return False
    if task.whole:
        rate = chosen_rate(cells, task, "gaussian")
        saved = study.rescues(chosen_ratio(task), chosen_weight(cells, task, rate))
        return run(study.compared(task, "gaussian", saved, max(task.rates["gaussian"])))
    return True


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="default: all")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    for name in options.task or TASKS:
        task = TASKS[name]
        about = {**ABOUT, "command": f"{ABOUT['command']} --task {name}"}
        results = Results(HERE / f"{name}.json", asdict(task), about, options.fresh)
        if not options.plot:
            demonstrations(task)
            run_task(results, task, options.jobs, deadline)
        if results.content["cells"]:
            summary = analyse(results.content["cells"], task)
            if summary["groups"]:
                draw(results.content["cells"], task, summary["groups"], HERE)
            results.finish(summary)


if __name__ == "__main__":
    main()
