"""What is compared: tasks, sizes, methods, and the grid that each method is tuned on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.simulated_bus.networks import Pair, Values, fit_dual, fit_gladius
from holdfast.bellman import TabularMDP
from holdfast.bellman.estimators.ccp import conditional_choice_probabilities
from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.cloning import clone
from holdfast.bellman.estimators.fitting import FitOptions
from holdfast.bellman.estimators.iq_learn import iq_learn
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.bellman.simulated_bus import ANCHOR, SimulatedBuses, reward_error, simulate_buses

TASKS = ("fixed anchor", "random anchor")
SIZES = (50, 250, 500, 1000, 2500, 5000)
RANDOM_SIZES = (50, 500, 5000)
DUMMIES = (2, 5, 20, 50, 100)
DUMMY_SIZE = 1000
"""Trajectories where there are dummies."""
SEEDS = tuple(range(10))
TUNING_SEEDS = (1000, 1001)
TUNING_SIZE = 250
TUNED_DUMMIES = (0, 20)
"""Settings are chosen without dummies, and with as many for all numbers of dummies."""

HIDDEN = (10, 10)
STEPS, BATCH = 2000, 256
RATES = (3e-3, 1e-2)
GRIDS: dict[str, list[dict[str, float]]] = {
    "GLADIUS": [{"rate": r, "weight": w} for r in RATES for w in (0.01, 0.1, 1.0)],
    "without zeta": [{"rate": r, "weight": w} for r in RATES for w in (0.01, 0.1, 1.0)],
    "IQ-Learn": [{"rate": r, "scale": s} for r in RATES for s in (0.5, 5.0, 50.0)],
    "BC": [{"rate": r} for r in (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)],
}
"""Six settings for everyone that has any."""
ORACLES = ("NFXP", "CCP")
"""They know the mileage, the form of the cost and that of the increments."""


@dataclass(frozen=True)
class Cell:
    """One fit.

    ``setting`` is a place in the method's grid.
    """

    task: str
    method: str
    size: int
    dummies: int
    seed: int
    setting: int = 0

    @property
    def key(self) -> str:
        return (
            f"{self.task} | {self.method} | {self.size} buses | {self.dummies} dummies | "
            f"setting {self.setting} | seed {self.seed}"
        )


def compared(task: str) -> tuple[str, ...]:
    """Methods with a grid."""
    return ("GLADIUS", "IQ-Learn", "BC") if task == TASKS[0] else ("GLADIUS", "without zeta")


def tuning() -> Iterator[Cell]:
    for task in TASKS:
        for dummies in TUNED_DUMMIES if task == TASKS[0] else (0,):
            for method in compared(task):
                for setting in range(len(GRIDS[method])):
                    for seed in TUNING_SEEDS:
                        yield Cell(task, method, TUNING_SIZE, dummies, seed, setting)


def chosen_settings(cells: dict[str, Any]) -> dict[tuple[str, str, int], int]:
    """By task, method and whether there are dummies (0 or 20): the least mean error."""
    errors: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for cell in tuning():
        place = errors.setdefault((cell.task, cell.method, cell.dummies), {})
        place.setdefault(cell.setting, []).append(cells[cell.key]["error"])
    return {
        key: min(found, key=lambda setting: float(np.mean(found[setting])))
        for key, found in errors.items()
    }


def evaluation(chosen: dict[tuple[str, str, int], int]) -> Iterator[Cell]:
    for seed in SEEDS:
        for task in TASKS:
            for size in SIZES if task == TASKS[0] else RANDOM_SIZES:
                for method in compared(task):
                    yield Cell(task, method, size, 0, seed, chosen[task, method, 0])
                for method in ORACLES:
                    yield Cell(task, method, size, 0, seed)
        for dummies in DUMMIES:
            for method in compared(TASKS[0]):
                setting = chosen[TASKS[0], method, TUNED_DUMMIES[1]]
                yield Cell(TASKS[0], method, DUMMY_SIZE, dummies, seed, setting)


def run_cell(cell: Cell) -> dict[str, float]:
    """Fit on four fifths of the buses; the error is that on the rest."""
    buses = simulate_buses(
        cell.size,
        seed=cell.seed,
        dummies=cell.dummies,
        random_anchor=cell.task == TASKS[1],
    )
    train, test = buses.split()
    started = time.process_time()
    if cell.method in ORACLES:
        guess = oracle(cell.method, train)[test.table.state, test.table.action]
    else:
        guess = fit(cell, train).rewards(test.observed)
    kept = test.table.action != ANCHOR
    return {
        "error": round(reward_error(guess, test.reward), 4),
        "error where kept": round(reward_error(guess[kept], test.reward[kept]), 4),
        "seconds": round(time.process_time() - started, 2),
    }


def fit(cell: Cell, train: SimulatedBuses) -> Pair:
    """One of the methods on networks, by its setting."""
    setting = GRIDS[cell.method][cell.setting]
    pair = start(train, cell.dummies, cell.seed)
    options = FitOptions(STEPS, BATCH, setting["rate"], seed=cell.seed)
    data = train.observed
    if cell.method in ("GLADIUS", "without zeta"):
        corrected = cell.method == "GLADIUS"
        fit_gladius(
            pair,
            data,
            options,
            anchor_action=ANCHOR,
            weight=setting["weight"],
            corrected=corrected,
        )
        return pair
    if cell.method == "IQ-Learn":
        scale = setting["scale"]
        iq_learn(pair.q, data, discount=pair.discount, scale=scale, options=options)
    else:
        clone(pair.q, data, options=options)
    fit_dual(pair, data, replace(options, learning_rate=1e-2, seed=cell.seed + 1))
    return pair


def start(train: SimulatedBuses, dummies: int, seed: int) -> Pair:
    """Networks that start at the value of replacing for ever, which the anchor's reward gives."""
    problem = train.problem
    known = train.observed.reward[train.observed.action == ANCHOR]
    level = float(known.mean()) / (1.0 - problem.discount)
    inputs = [1.0 / problem.states] + [0.1] * dummies
    q, zeta = (
        Values(inputs, HIDDEN, 2, scale=10.0, offset=level, seed=2 * seed + number)
        for number in range(2)
    )
    return Pair(q, zeta, problem.discount)


def oracle(method: str, train: SimulatedBuses) -> Any:
    """Rewards ``(states, actions)`` by an estimator that is told the model's form."""
    problem, data = train.problem, train.table
    grown = (data.next_state - data.state)[data.action != ANCHOR]
    # At the cap an increment is cut short.
    free = data.state[data.action != ANCHOR] < problem.states - 4
    shares = np.bincount(grown[free], minlength=5) / free.sum()
    # A replaced bus that drives on leaves mileage 1 at once.
    drives_on = bool((data.next_state[data.action == ANCHOR] > 0).any())
    guessed = TabularMDP.bus(increments=shares.tolist(), drives_on=drives_on)
    mileage = np.arange(1.0, problem.states + 1)
    features = np.zeros((problem.states, 2, 2))
    features[:, 1 - ANCHOR, 0], features[:, ANCHOR, 1] = -mileage, -1.0
    model = ChoiceModel(features, guessed.transitions, problem.discount)
    counts = data.counts(problem.states, 2)
    estimator = nested_fixed_point if method == "NFXP" else conditional_choice_probabilities
    return estimator(model, counts).rewards
