"""Updates of every schedule beside those of Sequential, on one model, in one process.

``python -m benchmarks.cost.schedules SETTING FOLDER`` prints JSON. Each schedule has a trainer, and
so has each stage of a sequential run. Whenever a schedule updates an objective, the sequential
trainer of that objective takes its next step too: in even steps after it, in odd steps before it.
The two have the same batches in the same order, so times that are compared are milliseconds apart
and belong to the same rows. Neither drift of the machine nor the lengths of rows nor how often an
objective is chosen can tell them apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.material import BLOCK, SETTINGS, recipe_values
from holdfast.assemble import accelerator_for, assemble
from holdfast.joint import Alright, Maxright, Mix, Schedule, Sequential
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer
from holdfast.recipe import parse_recipe

WEIGHTS = {"sft": 0.5, "dpo": 0.5}
LARGE_PROBE = "MAXRIGHT, probe of 4 batches"
"""Otherwise as many rows are probed as an update takes."""

WARM_UP = 2
"""Blocks that are not counted."""


def schedules(optima: dict[str, float], steps: int) -> dict[str, Schedule]:
    """By name. The first is Sequential itself: what it differs by is the error of the method."""
    stages = [(name, BLOCK) for _ in range(steps // BLOCK) for name in WEIGHTS]
    return {
        "Sequential": Sequential(stages),
        "ALRIGHT": Alright(WEIGHTS, 0),
        "MAXRIGHT": Maxright(WEIGHTS, optima, BLOCK),
        LARGE_PROBE: Maxright(WEIGHTS, optima, BLOCK),
        "Mix": Mix(WEIGHTS),
    }


@dataclass
class Clock:
    """Wall and processor time of what ran under it, in seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def step(self, trainer: Trainer) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train_step()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


class Pair:
    """A schedule, and the sequential stages that keep step with it."""

    def __init__(self, tested: Trainer, stages: dict[str, Trainer]) -> None:
        self.tested = tested
        self.stages = stages
        self.stage_clocks: dict[str, list[Clock]] = {name: [] for name in stages}

    def block(self) -> list[float]:
        """Some steps: wall times of schedule and sequential stages, then processor times."""
        tested, sequential = Clock(), Clock()
        for step in range(BLOCK):
            if step % 2:
                self._keep_step(self._chosen_next(), sequential)
                tested.step(self.tested)
            else:
                before = self._positions()
                tested.step(self.tested)
                after = self._positions()
                self._keep_step([name for name in after if after[name] != before[name]], sequential)
        return [tested.wall, sequential.wall, tested.cpu, sequential.cpu]

    def _keep_step(self, names: list[str], clock: Clock) -> None:
        for name in names:
            one = Clock()
            one.step(self.stages[name])
            self.stage_clocks[name].append(one)
            clock.wall += one.wall
            clock.cpu += one.cpu

    def _chosen_next(self) -> list[str]:
        def probe(name: str) -> float:
            raise AssertionError("gaps are evaluated in even steps only")

        return list(copy.deepcopy(self.tested.schedule).next(probe).weights)

    def _positions(self) -> dict[str, Any]:
        return {name: o.source.state_dict() for name, o in self.tested.objectives.items()}


def measure(setting: str, folder: Path) -> dict[str, Any]:
    """Blocks of every schedule in turn, until there are as many as the setting asks for."""
    torch.set_num_threads(1)
    chosen = SETTINGS[setting]
    values = recipe_values(
        folder, setting, dict.fromkeys(WEIGHTS, 1), race=False, probe=4 * chosen.batch_size
    )
    recipe = parse_recipe(values, file=folder / "recipe.yaml")
    accelerator = accelerator_for(recipe, folder)
    assembly = assemble(recipe, accelerator)
    steps = BLOCK * (WARM_UP + chosen.blocks)

    def trainer(name: str, schedule: Schedule) -> Trainer:
        run = folder / name
        run.mkdir(parents=True)
        # Probes are sorted by length: every fourth row is a fair part.
        every = 1 if name == LARGE_PROBE else 4
        objectives = {
            key: replace(
                objective, source=copy.copy(objective.source), probe=objective.probe[::every]
            )
            for key, objective in assembly.objectives.items()
        }
        return Trainer(
            copy.deepcopy(assembly.policy),
            objectives,
            schedule,
            TrainerOptions(max_steps=steps, learning_rate=chosen.learning_rate),
            accelerator=accelerator,
            recorder=Recorder(run),
        )

    # A little below where training starts, so that MAXRIGHT finds work to do on both.
    start = trainer("start", Mix(WEIGHTS))
    optima = {
        name: start.evaluate(objective, objective.probe).loss - 0.5
        for name, objective in start.objectives.items()
    }
    pairs = {
        name: Pair(
            trainer(name, schedule),
            {stage: trainer(f"{name}-{stage}", Sequential({stage: steps})) for stage in WEIGHTS},
        )
        for name, schedule in schedules(optima, steps).items()
    }
    blocks: dict[str, list[list[float]]] = {name: [] for name in pairs}
    for number in range(WARM_UP + chosen.blocks):
        # Alternately forwards and backwards: nobody always comes first.
        for name in list(pairs)[:: 1 if number % 2 else -1]:
            block = pairs[name].block()
            if number >= WARM_UP:
                blocks[name].append(block)
    return {
        name: {
            "blocks": blocks[name],
            "updates": {stage: len(clocks) for stage, clocks in pair.stage_clocks.items()},
            "stage_seconds": {
                stage: {
                    "wall": statistics.median(clock.wall for clock in clocks),
                    "cpu": statistics.median(clock.cpu for clock in clocks),
                }
                for stage, clocks in pair.stage_clocks.items()
            },
        }
        for name, pair in pairs.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(json.dumps(measure(args.setting, args.folder)))
