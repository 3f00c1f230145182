"""How far an estimate from a user's own data would move, had one observation been another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.bellman.draws import CoverageError
from holdfast.bellman.influence import Influence, measure_influence, rank_influence
from holdfast.bellman.margin import Margin, stability_margin
from holdfast.bellman.networks import Tables
from holdfast.bellman.problem import SaddleProblem
from holdfast.bellman.sgda import CERTIFIED_SIZE, Sgda
from holdfast.bellman.stability import StabilityResult, measure_stability
from holdfast.errors import DataError


@dataclass(frozen=True)
class Sensitivity:
    """What one observation does to an estimate, entry by entry and row by row.

    Attributes
    ----------
    problem : SaddleProblem
    influence : Influence
        Solved exactly for tables, by coupled runs for other functions.
    margin : Margin or None
        Of the dynamics at the saddle, for tables of up to 200 pairs.
    curve : StabilityResult or None
        How the shift falls with the size of the data.
    """

    problem: SaddleProblem
    influence: Influence
    margin: Margin | None
    curve: StabilityResult | None

    def record(self, rows: Sequence[int]) -> dict[str, Any]:
        """As JSON values.

        ``rows`` says where each row of the problem stands in its file. Numbers that are not finite
        become ``None``; ``alone`` marks rows without which there would be no estimate.
        """
        found, data = self.influence, self.problem.transitions
        influence = [
            {
                "row": int(rows[i]),
                "influence": _number(found.influence[i]),
                "alone": bool(np.isinf(found.influence[i])),
                "state": _values(data.state[i]),
                "action": int(data.action[i]),
                "reward": _number(data.reward[i]),
                "next_state": None if data.terminal[i] else _values(data.next_state[i]),
            }
            for i in found.ranking
        ]
        entries = [
            {
                "state": _values(found.states[k]),
                "action": action,
                "estimate": _number(found.estimate[k, action]),
                "shift": _number(found.shift[k, action]),
                "interval": [_number(each[k, action]) for each in found.interval],
            }
            for k in range(len(found.states))
            for action in range(found.estimate.shape[1])
        ]
        exact = isinstance(self.problem.approximator, Tables)
        return {
            "method": "exact" if exact else "coupled",
            "quantity": "Q" if self.problem.anchor_action is None else "reward",
            "discount": self.problem.discount,
            "anchor_action": _anchor(self.problem.anchor_action),
            "rows": len(data),
            "tried": len(influence),
            "control": found.control,
            "margin": self.margin
            and {
                "step_ratio": self.margin.step_ratio,
                "margin": self.margin.margin,
                "max_step": self.margin.max_step,
            },
            "entries": entries,
            "influence": influence,
            "curve": self.curve and _curve(self.curve),
        }


def measure_sensitivity(
    problem: SaddleProblem,
    settings: Sgda,
    *,
    rows: int | None = None,
    draws: int | None = None,
    sizes: int = 4,
    seed: int = 0,
) -> Sensitivity:
    """Replace observations of the data by others of them, and estimate again.

    Parameters
    ----------
    problem : SaddleProblem
        On all the data.
    settings : Sgda
        Of the runs of functions that are no tables; its ratio is checked for tables.
    rows : int, optional
        How many observations are tried. By default 500 of a table, else 16.
    draws : int, optional
        Replacements of each. By default 4 for a table, else 1.
    sizes : int
        Sizes of the curve, each twice the one before, up to half the data: fewer where small parts
        lack pairs. 0: no curve.
    seed : int

    Raises
    ------
    ValueError
        If a number is out of range.
    TrainingError
        If ``settings`` would leave the saddle of a table, or a run diverged.
    DataError
        If every pair of a table occurs but once.
    """
    margin = None
    tables = problem.approximator
    if not isinstance(tables, Tables):
        found = measure_influence(problem, settings, rows=rows or 16, draws=draws or 1, seed=seed)
    else:
        if 2 * tables.states * tables.actions <= CERTIFIED_SIZE:
            margin = stability_margin(problem, settings.step_ratio)
            margin.check()
        try:
            found = rank_influence(problem, rows=rows or 500, draws=draws or 4, seed=seed)
        except ValueError as error:
            raise DataError(str(error)) from error
    curve = _measured_curve(problem, settings, sizes, seed) if sizes else None
    return Sensitivity(problem, found, margin, curve)


def _measured_curve(
    problem: SaddleProblem, settings: Sgda, sizes: int, seed: int
) -> StabilityResult | None:
    n = len(problem.transitions)
    wanted = sorted({n // 2**k for k in range(1, sizes + 1)} - {0, 1})
    table = isinstance(problem.approximator, Tables)
    while len(wanted) > 1:
        try:
            return measure_stability(
                problem.transitions,
                discount=problem.discount,
                sizes=wanted,
                datasets=4 if table else 2,
                replaced=4 if table else 2,
                # Of tables the default: single rows and steps of a known rate.
                settings=None if table else settings,
                passes=5.0 if table else settings.steps * (settings.batch_size or n) / n,
                max_steps=10_000,
                approximator=problem.approximator,
                anchor_action=problem.anchor_action,
                weight=problem.weight,
                seed=seed,
            )
        except CoverageError:
            wanted = wanted[1:]  # too small a part to have every pair
    return None


def _curve(found: StabilityResult) -> dict[str, Any]:
    return {
        "sizes": [{key: _number(value) for key, value in row.items()} for row in found.table()],
        "slope": _number(found.slope),
        "interval": [_number(each) for each in found.interval],
        "saddle_slope": _number(found.saddle_slope),
        "saddle_interval": [_number(each) for each in found.saddle_interval],
        "control": found.control,
    }


def _anchor(action: Any) -> int | list[int] | None:
    return None if action is None else np.asarray(action).tolist()


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _values(state: Any) -> Any:
    return state.tolist()
