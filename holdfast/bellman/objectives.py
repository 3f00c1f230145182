"""Losses of logged decisions bound to a soft Q-function and to rows of transitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.bellman.reference import SaddleReference
from holdfast.bellman.saddle import (
    anchor_bellman,
    ascend,
    choice_likelihood,
    dual_fit,
    saddle_of_values,
    soft_value,
    td_error_of_values,
)
from holdfast.bellman.soft_q import SoftQ
from holdfast.bellman.transitions import Transitions
from holdfast.joint.batches import Batches
from holdfast.joint.objective import LossTerms
from holdfast.joint.table import Table

Kind = Literal["bellman_saddle", "td_error", "choice_likelihood", "anchor_bellman"]


def rows_of(transitions: Transitions, anchor_action: int | None = None) -> Table:
    """Transitions as a table; with an anchor action, which rows took it."""
    columns = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(transitions, name)))
        for name in ("state", "action", "reward", "next_state", "terminal")
    }
    if anchor_action is not None:
        columns["anchor"] = columns["action"] == anchor_action
    return Table(columns)


class TransitionBatches:
    """Shuffled batches of transitions, without end; every row once an epoch.

    Parameters
    ----------
    rows : Table
    batch_size : int
    seed : int
    """

    def __init__(self, rows: Table, batch_size: int, *, seed: int) -> None:
        self.rows = rows
        self._indices = Batches(range(len(rows)), batch_size, seed=seed)

    def next(self) -> Table:
        return self.rows.take(torch.tensor(self._indices.next()))

    def state_dict(self) -> dict[str, Any]:
        return self._indices.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._indices.load_state_dict(state)


@dataclass
class DecisionLoss:
    """One of the losses of logged decisions.

    Attributes
    ----------
    kind : str
        ``bellman_saddle``: the Bellman residual, descended in Q and ascended in zeta.
        ``td_error``: the squared TD error, which is biased. ``choice_likelihood``: of the actions
        under ``softmax Q``. ``anchor_bellman``: the Bellman residual of the anchor's rows, with the
        dual fitted on all rows; beside ``choice_likelihood`` it is offline inverse RL (GLADIUS).
    discount : float
        In [0, 1).
    reference : SaddleReference, optional
        What the data determine exactly. Evaluations, which alone pay for it, then have its
        distances among their metrics.
    """

    kind: Kind
    discount: float
    reference: SaddleReference | None = None

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        return policy(lambda inner: self._with_distances(inner, rows.to(inner.device).columns))

    def _with_distances(self, inner: SoftQ, rows: Mapping[str, Tensor]) -> LossTerms:
        terms = self._terms(inner, rows)
        if self.reference is None or torch.is_grad_enabled():
            return terms
        distances = self.reference.distances(*inner.tables())
        # A metric is a sum over rows, and these do not depend on the row.
        sums = {name: terms.count * value for name, value in distances.items()}
        return LossTerms(terms.total, terms.count, {**terms.metrics, **sums})

    def _terms(self, inner: SoftQ, rows: Mapping[str, Tensor]) -> LossTerms:
        action = rows["action"]
        q_row = inner.q(_seen(inner, rows["state"]))
        if self.kind == "choice_likelihood":
            return choice_likelihood(q_row, action)
        q = q_row.gather(-1, action[:, None])[:, 0]
        next_value = soft_value(inner.q(_seen(inner, rows["next_state"])), rows["terminal"])
        reward = rows["reward"].to(q.dtype)
        if self.kind == "td_error":
            return td_error_of_values(q, next_value, reward, discount=self.discount)
        zeta = inner.zeta(_seen(inner, rows["state"])).gather(-1, action[:, None])[:, 0]
        if self.kind == "bellman_saddle":
            return saddle_of_values(q, ascend(zeta), next_value, reward, discount=self.discount)
        anchored = anchor_bellman(
            q, zeta.detach(), next_value, reward, rows["anchor"], discount=self.discount
        )
        dual = dual_fit(zeta, next_value)
        return LossTerms(
            anchored.total + dual.total, dual.count, {**anchored.metrics, **dual.metrics}
        )


def _seen(inner: SoftQ, states: Tensor) -> Tensor:
    if inner.hidden is None:
        return states
    observations = states.double()
    return observations[:, None] if observations.ndim == 1 else observations
