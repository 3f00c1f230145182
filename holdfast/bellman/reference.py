"""How far a table in training is from what its data determine exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.bellman.networks import Tables
from holdfast.bellman.problem import SaddleProblem
from holdfast.bellman.saddle import soft_value


class SaddleReference:
    """The exact saddle of a tabular problem, and distances to it.

    Parameters
    ----------
    problem : SaddleProblem
        With tables, on the rows that are trained on.

    Raises
    ------
    ValueError
        If the data do not determine the table.
    """

    def __init__(self, problem: SaddleProblem) -> None:
        q, zeta = problem.exact()
        assert isinstance(problem.approximator, Tables)
        size = (problem.approximator.states, problem.approximator.actions)
        self._discount, self._anchor = problem.discount, problem.anchor_action
        states = torch.arange(size[0])
        self._anchors = (states, torch.as_tensor(0 if self._anchor is None else self._anchor))
        self._q, self._zeta = torch.as_tensor(q), torch.as_tensor(zeta)
        self._seen = torch.as_tensor(problem.transitions.counts(*size) > 0)
        self._rows = problem.compact()

    def distances(self, q: Tensor, zeta: Tensor) -> dict[str, float]:
        """Distances of tables ``(states, actions)`` to the saddle, at pairs that occur.

        ``bellman/q_error`` and, with an anchor, ``bellman/reward_error``: the largest. A mean over
        rows (with an anchor, those that took it, over all rows): ``bellman/residual``, the squared
        Bellman residual of ``q`` under the empirical model, which is the saddle objective at the
        best dual.
        """
        q, zeta = q.detach().cpu().double(), zeta.detach().cpu().double()
        found = {"bellman/q_error": float((q - self._q)[self._seen].abs().max())}
        if self._anchor is not None:
            apart = (q - self._q) - self._discount * (zeta - self._zeta)
            found["bellman/reward_error"] = float(apart[self._seen].abs().max())
        rows, weight = self._rows, self._rows.weight
        assert weight is not None
        state, action = rows.state[0], rows.action[0]
        ahead = soft_value(q[rows.next_state[0]], rows.terminal[0])
        delta = rows.reward[0] + self._discount * ahead - q[state, action]
        pair = state * q.shape[1] + action
        sums = torch.zeros(2, q.numel(), dtype=q.dtype)
        sums[0].index_add_(0, pair, weight[0])
        sums[1].index_add_(0, pair, weight[0] * delta)
        # Pairs that do not occur are 0 / 0, and have no weight.
        squares = torch.nan_to_num(sums[1].square() / sums[0]).view_as(q)
        if self._anchor is not None:
            squares = squares[self._anchors]
        found["bellman/residual"] = float(squares.sum())
        return found
