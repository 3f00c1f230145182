"""Single-sample descent-ascent with harmonic steps: how fast does it come to the saddle?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from holdfast.bellman import Harmonic, SaddleProblem, Sgda, TabularMDP, stability_margin
from holdfast.bellman.draws import covered_dataset, drawer
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend, harmonic

STATES, ACTIONS, ROWS = 5, 3, 512
COMMON = 4.0
"""Ratio whose margins set the steps, so that those of the primal are equal throughout."""
MARKS = 16


def run(
    discount: float, ratio: float, models: int, steps: int, tuned_to: float = COMMON
) -> dict[str, Any]:
    """One problem a model, each with its own data and order of rows, all in one batch.

    The steps are harmonic, from the median margin at the ratio ``tuned_to``.

    Returns
    -------
    dict
        ``steps`` of the harmonic rule, ``at``: the marks; ``squared``: ``(marks, models)``,
        squared distances to the exact saddle of the data; ``start``: those of the start;
        ``margins``: of each problem at this ratio.
    """
    problems = []
    for seed in range(models):
        model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
        rng = np.random.default_rng([seed, 1])
        data, _, _ = covered_dataset(drawer(model, ROWS, None), ROWS, None, model, rng)
        problems.append(SaddleProblem.tabular(data, discount, states=STATES, actions=ACTIONS))
    exact = np.array([[each.ravel() for each in problem.exact()] for problem in problems])
    margins = [stability_margin(problem, ratio).margin for problem in problems]
    usual = float(np.median([stability_margin(problem, tuned_to).margin for problem in problems]))
    step = harmonic(discount, tuned_to, usual)
    at = sorted({int(t) for t in np.geomspace(10, steps, MARKS)})
    found = descend_ascend(
        problems[0],
        Batch.stack([problem.transitions for problem in problems]),
        Sgda(steps=steps, step=step, step_ratio=ratio),
        groups=range(models),
        record=at,
        may_diverge=True,
    )
    squared = [squared_distance(found.record[t], exact) for t in at]
    return {
        "scale": step.scale,
        "offset": step.offset,
        "at": at,
        "start": (exact**2).sum((1, 2)).tolist(),
        "squared": squared,
        "margins": margins,
    }


def squared_distance(point: Sequence[Any], exact: np.ndarray) -> list[float]:
    """``|w - w*|^2 + |v - v*|^2``, ``(models,)``; very large once no longer finite."""
    ended = np.stack([each.numpy() for each in point], axis=1)
    with np.errstate(all="ignore"):
        apart = ((ended - exact) ** 2).sum((1, 2))
    return [float(f"{x:.6g}") for x in np.nan_to_num(apart, nan=1e300, posinf=1e300)]


def slope(cell: dict[str, Any], since: float = 0.5) -> np.ndarray:
    """Slope of the log of the squared distance over ``log(offset + t)``, for each model.

    Fitted to the marks in the last ``1 - since`` of the range of ``log(offset + t)``.
    """
    logs = np.log(cell["offset"] + np.array(cell["at"], dtype=float))
    kept = logs >= logs[0] + since * (logs[-1] - logs[0])
    values = np.log(np.array(cell["squared"]))[kept]
    centred = logs[kept] - logs[kept].mean()
    return centred @ values / (centred @ centred)


def beside_q_learning(discount: float, steps: int) -> float:
    """With the ratio ``1 / discount^2`` and ``w = r + discount * v``, descent-ascent is Q-learning.

    Returns
    -------
    float
        Largest difference from soft Q-learning written out, over the table and its size.
    """
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=0)
    data = model.sample(steps, seed=0)
    problem = SaddleProblem.tabular(data, discount, states=STATES, actions=ACTIONS)
    step = Harmonic(100.0, 400.0)
    dual = torch.as_tensor(-model.rewards.ravel() / discount)
    found = descend_ascend(
        problem,
        Batch.stack([data]),
        Sgda(steps=steps, step=step, step_ratio=discount**-2, replacement=False),
        seed=7,
        start=(torch.zeros_like(dual), dual),
    )
    q = np.zeros((STATES, ACTIONS))
    # One pass without replacement: the order is that of the seed's first permutation.
    for t, row in enumerate(np.random.default_rng([7, 0]).permutation(steps)):
        s, a, ahead = data.state[row], data.action[row], data.next_state[row]
        target = data.reward[row] + discount * np.log(np.exp(q[ahead]).sum())
        q[s, a] += 2 * step(t) * (target - q[s, a])
    return float(np.abs(found.primal[0].numpy() - q.ravel()).max() / np.abs(q).max())
