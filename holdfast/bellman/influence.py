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
        If the functions are no tables, or a pair occurs but once: without it there is no answer.
    """
    data = problem.transitions
    base = _estimate(problem)
    rng = np.random.default_rng(seed)
    substitutes = rng.integers(len(data), size=draws)
    columns = np.stack(
        [data.state, data.action, data.next_state, data.terminal, np.nan_to_num(data.reward)]
    )
    _, first, kind = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    changes = np.array(
        [
            [
                _estimate(problem.with_transitions(data.replaced(row, data[other : other + 1])))
                - base
                for other in substitutes
            ]
            for row in first
        ]
    )
    kind = kind.ravel()
    influence = np.abs(changes).max((2, 3)).mean(1)[kind]
    each = changes[kind].reshape(-1, *base.shape)
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
