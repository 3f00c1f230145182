"""What is compared on gymnasium's tasks, and how each method is tuned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gym_irl.expert import TASKS, Task, available, expert, play
from benchmarks.simulated_bus.networks import Array, Pair, Values, fit_gladius
from holdfast.bellman import Transitions, soft_value
from holdfast.bellman.estimators.cloning import clone
from holdfast.bellman.estimators.fitting import FitOptions, columns_of
from holdfast.bellman.estimators.iq_learn import iq_learn

ANCHOR = 0
"""The action whose rewards are known."""
EPISODES = (1, 10)
"""Demonstrated."""
SEEDS = tuple(range(10))
TUNING_SEEDS = (1000, 1001)
TUNED = 10
"""Episodes with which settings are chosen."""
TESTS = 20
"""Episodes for a return, and episodes of the expert for a reward."""
HIDDEN = (64, 64)
STEPS, BATCH = 2000, 128
RATES = (1e-3, 3e-3)
GRIDS: dict[str, list[dict[str, float]]] = {
    "GLADIUS": [{"rate": r, "weight": w} for r in RATES for w in (3e-3, 0.1)],
    "IQ-Learn": [{"rate": r, "scale": s} for r in RATES for s in (1.0, 30.0)],
    "BC": [{"rate": r} for r in (3e-4, 1e-3, 3e-3, 1e-2)],
}


@dataclass(frozen=True)
class Cell:
    """One fit. ``setting`` is a place in the method's grid."""

    task: str
    method: str
    episodes: int
    seed: int
    setting: int

    @property
    def key(self) -> str:
        return (
            f"{self.task} | {self.method} | {self.episodes} episodes | setting {self.setting} | "
            f"seed {self.seed}"
        )


def tasks() -> list[str]:
    """Those whose dependencies are installed."""
    return [name for name, task in TASKS.items() if available(task)]


def tuning() -> Iterator[Cell]:
    for task in tasks():
        for method, grid in GRIDS.items():
            for setting in range(len(grid)):
                for seed in TUNING_SEEDS:
                    yield Cell(task, method, TUNED, seed, setting)


def chosen_settings(cells: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """By task and method: the largest mean return."""
    returns: dict[tuple[str, str], dict[int, list[float]]] = {}
    for cell in tuning():
        of_method = returns.setdefault((cell.task, cell.method), {})
        of_method.setdefault(cell.setting, []).append(cells[cell.key]["return"])
    return {
        key: max(found, key=lambda setting: float(np.mean(found[setting])))
        for key, found in returns.items()
    }


def evaluation(chosen: Mapping[tuple[str, str], int]) -> Iterator[Cell]:
    for seed in SEEDS:
        for task in tasks():
            for episodes in EPISODES:
                for method in GRIDS:
                    yield Cell(task, method, episodes, seed, chosen[task, method])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Imitate, act, and read rewards off other episodes of the expert."""
    task = TASKS[cell.task]
    teacher = expert(task)
    shown, _ = play(task, teacher, cell.episodes, seed=10_000 + cell.seed)
    started = time.process_time()
    pair = fit(cell, task, shown)
    seconds = time.process_time() - started
    _, returns = play(task, pair.q, TESTS, seed=20_000 + cell.seed)
    held_out, _ = play(task, teacher, TESTS, seed=30_000 + cell.seed)
    return {
        "return": round(float(returns.mean()), 3),
        "demonstrated": len(shown),
        "seconds": round(seconds, 2),
        **reward_errors(rewards_of(pair.q, held_out, task.discount), held_out),
    }


def baseline(name: str) -> dict[str, Any]:
    """What the expert earns, what acting at random does, and how far the expert is from optimal."""
    task = TASKS[name]
    teacher = expert(task)
    data, returns = play(task, teacher, 100, seed=40_000)
    _, by_chance = play(task, lambda state: torch.zeros(len(state), task.actions), 100, seed=40_001)
    return {
        "expert": round(float(returns.mean()), 3),
        "random": round(float(by_chance.mean()), 3),
        "length": round(len(data) / 100, 1),
        **reward_errors(rewards_of(teacher, data, task.discount), data),
    }


def fit(cell: Cell, task: Task, shown: Transitions) -> Pair:
    setting = GRIDS[cell.method][cell.setting]
    q, zeta = (
        Values(
            task.inputs,
            HIDDEN,
            task.actions,
            scale=task.scale,
            offset=0.0,
            seed=2 * cell.seed + number,
        )
        for number in range(2)
    )
    pair = Pair(q, zeta, task.discount)
    options = FitOptions(STEPS, BATCH, setting["rate"], seed=cell.seed)
    if cell.method == "GLADIUS":
        fit_gladius(pair, shown, options, anchor_action=ANCHOR, weight=setting["weight"])
    elif cell.method == "IQ-Learn":
        iq_learn(q, shown, discount=task.discount, scale=setting["scale"], options=options)
    else:
        clone(q, shown, options=options)
    return pair


@torch.no_grad()
def rewards_of(q: torch.nn.Module, data: Transitions, discount: float) -> Array:
    """``Q(s, a) - discount * V(s')``: what is known to follow needs no expectation."""
    columns = columns_of(data, q)
    chosen = q(columns["state"]).gather(1, columns["action"][:, None])[:, 0]
    ahead = soft_value(q(columns["next_state"]), columns["terminal"])
    return (chosen - discount * ahead).double().numpy()


def reward_errors(guess: Array, data: Transitions) -> dict[str, float | None]:
    """Of actions other than the anchor: mean error over mean size, and correlation.

    The correlation is ``None`` where the true reward is one number.
    """
    other = data.action != ANCHOR
    guess, truth = guess[other], data.reward[other]
    varies = truth.std() > 1e-9 * abs(truth).max()
    return {
        "error": round(float(abs(guess - truth).mean() / abs(truth).mean()), 4),
        "correlation": round(float(np.corrcoef(guess, truth)[0, 1]), 4) if varies else None,
    }
