"""The study's files: demonstrations, the same with shuffled actions, and cloned policies."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from benchmarks.in_ril.study import cloned, imitation
from benchmarks.in_ril.tasks import Task
from holdfast.assemble import assemble, build_trainer
from holdfast.control.acting import acting
from holdfast.control.demonstrations import (
    Demonstrations,
    Episode,
    record,
    write_demonstrations,
)
from holdfast.control.environments import (
    Act,
    EnvironmentOptions,
    make_environments,
    scripted_expert,
)
from holdfast.control.policies import load_policy
from holdfast.recipe import parse_recipe

HERE = Path(__file__).parent
RUNS = HERE / "runs"
LEARNING_RATE = 1e-3
"""Of cloning."""
MEDIUM_POLICY = {
    "kind": "gaussian",
    "hidden": [64, 64],
    "activation": "tanh",
    "std": 0.5,
    "learn_std": True,
    "std_range": [0.1, 1.0],
    "critic": {"hidden": [64, 64], "activation": "tanh"},
}
MEDIUM_RL = {
    "kind": "control_ppo",
    "steps": 256,
    "batch_size": 256,
    "epochs": 10,
    "scale_rewards": True,
    "critic_warmup": 0,
}


def demonstrations(task: Task) -> tuple[Path, Path]:
    """Of an expert; and with the actions of those that are trained on shuffled.

    Held-out episodes come first in both files, and are the same.
    """
    true, random = (RUNS / task.name / f"{name}.npz" for name in ("expert", "shuffled"))
    if not random.exists():
        true.parent.mkdir(parents=True, exist_ok=True)
        options = EnvironmentOptions(sparse=task.sparse, time_limit=task.time_limit)
        episodes = task.held_out + task.demonstrations
        worlds = make_environments(task.environment, min(task.count, episodes), options=options)
        expert = scripted_expert(task.environment) if task.medium is None else _medium(task)
        found = record(expert, worlds, episodes, seed=1, keep_failures=not worlds.reports_success)
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


def _medium(task: Task) -> Act:
    """A policy of single actions, trained from nothing until it is good enough, but no better."""
    assert task.medium is not None
    folder = RUNS / task.name / "medium"
    if not folder.exists():
        values = {
            "name": "medium",
            "policy": MEDIUM_POLICY,
            "objectives": {
                "rl": MEDIUM_RL | {"environment": task.environments, "episodes": task.episodes}
            },
            "schedule": {"kind": "mix", "weights": {"rl": 1.0}},
            "training": {"max_steps": 10**6, "learning_rate": 3e-4},
        }
        recipe = parse_recipe(values, file=RUNS / "medium.yaml")
        accelerator = Accelerator(cpu=True)
        assembly = assemble(recipe, accelerator)
        trainer = build_trainer(recipe, assembly, {}, accelerator, folder=RUNS, recorder=None)
        trainer.checkpoints = None
        objective = assembly.objectives["rl"]
        reached = 0.0
        while reached < task.medium:
            for _ in range(5 * objective.source.updates):
                trainer.train_step()
            reached = trainer.evaluate(objective, objective.held_out).metrics["reward"]
            print(f"{task.name}, {objective.source.environment_steps} steps: {reached:.0f}")
        assembly.policy.save_pretrained(folder)
    return acting(load_policy(folder), seed=0)


def base(task: Task, policy: str, seed: int) -> Path:
    """The policy that a run starts from: cloned once for each seed; a residual's is Gaussian."""
    name = "gaussian" if policy == "residual" else policy
    folder = RUNS / task.name / f"{name}-{seed}"
    if folder.exists():
        return folder
    start = cloned(task, policy)
    updates = task.cloning[start["kind"]]
    values = {
        "name": "base",
        "policy": start,
        "objectives": {"il": imitation(task, demonstrations(task)[0])},
        "schedule": {"kind": "mix", "weights": {"il": 1.0}},
        "training": {
            "max_steps": updates,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "cosine",
            "eval_steps": updates,
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
