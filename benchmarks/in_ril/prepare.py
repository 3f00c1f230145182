"""The study's files: demonstrations, the same with shuffled actions, and cloned policies."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from benchmarks.in_ril.study import Task, cloned, imitation
from holdfast.assemble import assemble, build_trainer
from holdfast.control.demonstrations import (
    Demonstrations,
    Episode,
    record,
    write_demonstrations,
)
from holdfast.control.environments import (
    EnvironmentOptions,
    make_environments,
    scripted_expert,
)
from holdfast.recipe import parse_recipe

HERE = Path(__file__).parent
RUNS = HERE / "runs"
LEARNING_RATE = 1e-3
"""Of cloning."""


def demonstrations(task: Task) -> tuple[Path, Path]:
    """Of the scripted expert; and with the actions of those that are trained on shuffled.

    Held-out episodes come first in both files, and are the same.
    """
    true, random = (RUNS / task.name / f"{name}.npz" for name in ("expert", "shuffled"))
    if not random.exists():
        true.parent.mkdir(parents=True, exist_ok=True)
        options = EnvironmentOptions(sparse=True, time_limit=task.time_limit)
        episodes = task.held_out + task.demonstrations
        worlds = make_environments(task.environment, min(task.count, episodes), options=options)
        found = record(scripted_expert(task.environment), worlds, episodes, seed=1)
        write_demonstrations(found, true)
        write_demonstrations(_shuffled(found, task.held_out), random)
    return true, random


def _shuffled(found: Demonstrations, kept: int) -> Demonstrations:
    """Every action at a step of another one, whatever its episode; the first ``kept`` as they are.

    So the actions are distributed as before, but say nothing of the observation.
    """
    episodes = found.episodes[kept:]
    actions = np.concatenate([episode.actions for episode in episodes])
    actions = np.random.default_rng(0).permutation(actions)
    ends = np.cumsum([len(episode) for episode in episodes])[:-1]
    parts: list[Episode] = [
        replace(episode, actions=part)
        for episode, part in zip(episodes, np.split(actions, ends), strict=True)
    ]
    return replace(found, episodes=(*found.episodes[:kept], *parts))


def base(task: Task, policy: str, seed: int) -> Path:
    """The policy that a run starts from: cloned once for each kind and seed."""
    kind = "diffusion" if policy == "diffusion" else "gaussian"
    folder = RUNS / task.name / f"{kind}-{seed}"
    if folder.exists():
        return folder
    values = {
        "name": "base",
        "policy": cloned(task, kind),
        "objectives": {"il": imitation(task, demonstrations(task)[0])},
        "schedule": {"kind": "mix", "weights": {"il": 1.0}},
        "training": {
            "max_steps": task.cloning[kind],
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "cosine",
            "eval_steps": task.cloning[kind],
            "seed": seed,
        },
    }
    recipe = parse_recipe(values, file=RUNS / "base.yaml")
    accelerator = Accelerator(cpu=True)
    assembly = assemble(recipe, accelerator)
    trainer = build_trainer(recipe, assembly, {}, accelerator, folder=RUNS, recorder=None)
    trainer.checkpoints = None
    trainer.train()
    # Another process may be at the same one: whoever is first leaves a whole folder.
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    assembly.policy.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
    return folder
