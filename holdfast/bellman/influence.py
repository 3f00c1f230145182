"""What single observations do to an estimate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman.problem import SaddleProblem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Influence:
    """What single observations do to an estimate.

    Attributes
    ----------
    estimate : Array
        ``(states, actions)``: the reward with an anchor action, else Q.
    shift : Array
        ``(states, actions)``: mean absolute change of each entry as one random row is replaced.
    interval : Array
        ``(2, states, actions)``: the middle 95 % of the signed change.
    influence : Array
        ``(rows,)``: largest change of any entry as that row is replaced, mean over replacements.
        Infinite for the only row of a pair, without which there is no estimate; such rows are left
        out of ``shift`` and ``interval``.
    ranking : NDArray
        ``(rows,)``: rows by influence, the largest first.
    """

    estimate: Array
    shift: Array
    interval: Array
    influence: Array
    ranking: NDArray[np.int64]


def rank_influence(problem: SaddleProblem, *, draws: int = 8, seed: int = 0) -> Influence:
    """Replace each row by others of the same data, and solve again exactly. Tables only.

    Parameters
    ----------
    problem : SaddleProblem
        With tables; see :meth:`SaddleProblem.tabular`.
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
    base = _estimate(problem)
    rng = np.random.default_rng(seed)
    substitutes = rng.integers(len(data), size=draws)
    columns = np.stack(
        [data.state, data.action, data.next_state, data.terminal, np.nan_to_num(data.reward)]
    )
    _, first, kind = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    alone = data.counts(*base.shape)[data.state, data.action] == 1
    if alone.all():
        raise ValueError("every pair occurs but once: nothing can be replaced")
    changes = np.full((len(first), draws, *base.shape), np.nan)
    for i, row in enumerate(first):
        if not alone[row]:
            for k, other in enumerate(substitutes):
                neighbour = data.replaced(row, data[other : other + 1])
                changes[i, k] = _estimate(problem.with_transitions(neighbour)) - base
    kind = kind.ravel()
    influence = np.abs(changes).max((2, 3)).mean(1)[kind]
    influence[alone] = np.inf
    each = changes[kind[~alone]].reshape(-1, *base.shape)
    return Influence(
        base,
        np.abs(each).mean(0),
        np.quantile(each, [0.025, 0.975], axis=0),
        influence,
        np.argsort(-influence, kind="stable"),
    )


def _estimate(problem: SaddleProblem) -> Array:
    q, zeta = problem.exact()
    return q if problem.anchor_action is None else q - problem.discount * zeta
