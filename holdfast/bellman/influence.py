"""What single observations do to an estimate: replace one, estimate again, and look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.bellman.networks import Tables
from holdfast.bellman.problem import Batch, SaddleProblem
from holdfast.bellman.sgda import Iterates, Sgda, descend_ascend

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Influence:
    """What single observations do to an estimate.

    Attributes
    ----------
    states : NDArray
        ``(k,)``, or observations ``(k, features)``: where the estimate is looked at.
    estimate : Array
        ``(k, actions)``: the reward with an anchor action, else Q.
    shift : Array
        ``(k, actions)``: mean absolute change of each entry as one random row is replaced.
    interval : Array
        ``(2, k, actions)``: the middle 95 % of the signed change.
    influence : Array
        ``(rows,)``: largest change of any entry as that row is replaced, mean over replacements.
        NaN for rows that were not tried. Infinite for the only row of a pair of a table, without
        which there is no estimate; such rows are left out of ``shift`` and ``interval``.
    ranking : NDArray
        ``(tried,)``: the rows tried by influence, the largest first.
    control : float
        Largest change of any entry between two estimates from the same data: 0, bit for bit.
    """

    states: NDArray[Any]
    estimate: Array
    shift: Array
    interval: Array
    influence: Array
    ranking: NDArray[np.int64]
    control: float = 0.0


def rank_influence(
    problem: SaddleProblem, *, rows: int | None = None, draws: int = 8, seed: int = 0
) -> Influence:
    """Replace each row by others of the same data, and solve again exactly. Tables only.

    Parameters
    ----------
    problem : SaddleProblem
        With tables; see :meth:`SaddleProblem.tabular`.
    rows : int, optional
        Try that many, drawn at random. By default all.
    draws : int
        Replacements tried for each different row; the same for all.
    seed : int
        Of the replacements.

    Raises
    ------
    ValueError
        If the functions are no tables, or all rows are the only ones of their pair.
    """
    data = problem.transitions
    base = _exact(problem)
    rng = np.random.default_rng(seed)
    substitutes = rng.integers(len(data), size=draws)
    tried = _tried(len(data), rows, rng)
    columns = np.stack(
        [data.state, data.action, data.next_state, data.terminal, np.nan_to_num(data.reward)]
    )
    _, first, kind = np.unique(columns[:, tried], axis=1, return_index=True, return_inverse=True)
    kind = kind.ravel()
    alone = data.counts(*base.shape)[data.state[tried], data.action[tried]] == 1
    if alone.all():
        raise ValueError("every pair occurs but once: nothing can be replaced")
    changes = np.full((len(first), draws, *base.shape), np.nan)
    for i, row in enumerate(first):
        if not alone[row]:
            for k, other in enumerate(substitutes):
                neighbour = data.replaced(int(tried[row]), data[other : other + 1])
                changes[i, k] = _exact(problem.with_transitions(neighbour)) - base
    influence = np.abs(changes).max((2, 3)).mean(1)[kind]
    influence[alone] = np.inf
    each = changes[kind[~alone]].reshape(-1, *base.shape)
    return _gathered(np.arange(len(base)), base, each, influence, tried, len(data))


def measure_influence(
    problem: SaddleProblem,
    settings: Sgda,
    *,
    rows: int = 16,
    draws: int = 1,
    probe: int = 200,
    seed: int = 0,
) -> Influence:
    """Replace rows by others of the same data, and run again with everything else alike.

    For functions whose saddle is not known. Coupled runs from one start, in one order of rows: see
    :func:`~holdfast.bellman.measure_stability`.

    Parameters
    ----------
    problem : SaddleProblem
        With any functions.
    settings : Sgda
        Of the runs; all of them are one batch.
    rows, draws : int
        Rows tried, and replacements of each.
    probe : int
        At most that many states of the data are looked at; of tables, all.
    seed : int
        Of rows, replacements, probe and order.

    Raises
    ------
    ValueError
        If a number is not positive.
    TrainingError
        If the runs diverge.
    """
    for name, value in (("rows", rows), ("draws", draws), ("probe", probe)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    data = problem.transitions
    rng = np.random.default_rng(seed)
    tried = _tried(len(data), rows, rng)
    others = rng.integers(len(data), size=(len(tried), draws))
    states: NDArray[Any]
    if isinstance(problem.approximator, Tables):
        states = np.arange(problem.approximator.states)
    else:
        states = data.state[_tried(len(data), probe, rng)]
    neighbours = [
        data.replaced(int(row), data[other : other + 1])
        for row, own in zip(tried, others, strict=True)
        for other in own
    ]
    found = descend_ascend(problem, Batch.stack([data, data, *neighbours]), settings, seed=seed)
    ends = _estimates(problem, found, states)
    base, twin, changed = ends[0], ends[1], ends[2:] - ends[0]
    influence = np.abs(changed).max((1, 2)).reshape(len(tried), draws).mean(1)
    control = float(np.abs(twin - base).max())
    return _gathered(states, base, changed, influence, tried, len(data), control)


def _tried(n: int, rows: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    if rows is None or rows >= n:
        return np.arange(n)
    return np.sort(rng.choice(n, rows, replace=False))


def _gathered(
    states: NDArray[Any],
    base: Array,
    changes: Array,
    influence: Array,
    tried: NDArray[np.int64],
    n: int,
    control: float = 0.0,
) -> Influence:
    everywhere = np.full(n, np.nan)
    everywhere[tried] = influence
    return Influence(
        states,
        base,
        np.abs(changes).mean(0),
        np.quantile(changes, [0.025, 0.975], axis=0),
        everywhere,
        tried[np.argsort(-influence, kind="stable")],
        control,
    )


def _exact(problem: SaddleProblem) -> Array:
    q, zeta = problem.exact()
    return q if problem.anchor_action is None else q - problem.discount * zeta


def _estimates(problem: SaddleProblem, found: Iterates, states: NDArray[Any]) -> Array:
    """The estimate of every replica at ``states``, ``(replicas, k, actions)``."""
    replicas = len(found.primal)
    seen = torch.as_tensor(states)
    seen = seen.expand(replicas, *seen.shape)
    with torch.no_grad():
        q = problem.approximator.q(found.primal, seen)
        if problem.anchor_action is None:
            return q.numpy()
        zeta = [
            problem.approximator.zeta(found.dual, seen, torch.full(q.shape[:2], action))
            for action in range(q.shape[2])
        ]
    return (q - problem.discount * torch.stack(zeta, -1)).numpy()
