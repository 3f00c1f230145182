"""Networks of values, and the ways in which logged decisions are fitted to them here.

Every fit is Adam on batches, with a step that falls to 0 along half a cosine, and ends with its
last parameters: no epoch is chosen, on whatever data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.bellman import (
    Transitions,
    choice_likelihood,
    dual_fit,
    gladius_of_values,
    mlp,
    recovered_reward,
    soft_value,
)
from holdfast.bellman.estimators.fitting import Columns, FitOptions, columns_of, fit_network
from holdfast.joint import LossTerms

Array = NDArray[np.float64]
STEP_RATIO = 4.0
"""Of zeta's step to that of Q."""
LIFT = 1.0
"""Share of the level's Newton step that is taken at first; it falls as the other steps do."""


class Values(nn.Module):
    """``offset + scale * network(observation * inputs)``, a value an action.

    Parameters
    ----------
    inputs : sequence of float
        What each number of an observation is multiplied by.
    hidden : sequence of int
    actions : int
    scale, offset : float
        Size and start of the values.
    seed : int
    """

    def __init__(
        self,
        inputs: Sequence[float],
        hidden: Sequence[int],
        actions: int,
        *,
        scale: float,
        offset: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.body = mlp(len(inputs), hidden, actions, seed=seed)
        self.register_buffer("inputs", torch.tensor(inputs, dtype=torch.float64))
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float64))
        self.scale = scale

    def forward(self, state: Tensor) -> Tensor:
        return self.offset + self.scale * self.body(state * self.inputs)


class Pair(nn.Module):
    """Q and zeta, on separate parameters."""

    def __init__(self, q: Values, zeta: Values, discount: float) -> None:
        super().__init__()
        self.q, self.zeta, self.discount = q, zeta, discount

    def dual(self, state: Tensor, action: Tensor) -> Tensor:
        return _at(self.zeta(state), action)

    def ahead(self, columns: Columns) -> Tensor:
        """``V(s')``, 0 where the episode ended."""
        return soft_value(self.q(columns["next_state"]), columns["terminal"])

    @torch.no_grad()
    def lift(self, columns: Columns, anchor_action: int, share: float) -> None:
        """Raise Q and zeta by a share of what would make the anchor's mean TD error 0.

        Choices do not tell the level of Q, and the anchor's term is hardly curved in it: by
        ``2 (1 - discount)²``. This is Newton's step in that one direction. Zeta goes along, since
        the values that it stands for do. ``share`` is over the slope ``1 - discount``, more where
        episodes end.
        """
        chosen = columns["action"] == anchor_action
        if chosen.any():
            q = _at(self.q(columns["state"]), columns["action"])
            delta = (columns["reward"] + self.discount * self.ahead(columns) - q)[chosen].mean()
            for each in (self.q, self.zeta):
                each.offset += share * delta

    @torch.no_grad()
    def rewards(self, data: Transitions) -> Array:
        """``Q - discount * zeta`` of the rows, ``(n,)``."""
        columns = columns_of(data, self)
        state, action = columns["state"], columns["action"]
        q, zeta = _at(self.q(state), action), self.dual(state, action)
        return recovered_reward(q, zeta, discount=self.discount).numpy()


def fit_gladius(
    pair: Pair,
    data: Transitions,
    options: FitOptions,
    *,
    anchor_action: int,
    weight: float,
    corrected: bool = True,
    step_ratio: float = STEP_RATIO,
) -> None:
    """GLADIUS by :func:`inverse_loss`, in place.

    Zeta's step is ``step_ratio`` times that of Q: one common step lets the values run away from a
    zeta that cannot catch up. The level is found by :meth:`Pair.lift`.
    """
    columns = columns_of(data, pair)
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(
        [
            {"params": pair.q.parameters()},
            {"params": pair.zeta.parameters(), "lr": step_ratio * options.learning_rate},
        ],
        lr=options.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    anchors = columns["action"] == anchor_action
    slope = 1.0 - pair.discount * float((~columns["terminal"][anchors]).double().mean())
    for _ in range(options.steps):
        index = torch.randint(len(data), (options.batch_size,), generator=generator)
        batch = {name: column[index] for name, column in columns.items()}
        terms = inverse_loss(pair, batch, anchor_action, weight, corrected)
        optimiser.zero_grad()
        (terms.total / terms.count).backward()
        optimiser.step()
        fallen = schedule.get_last_lr()[0] / options.learning_rate
        pair.lift(batch, anchor_action, LIFT * fallen / slope)
        schedule.step()


def inverse_loss(
    pair: Pair, columns: Columns, anchor_action: int, weight: float, corrected: bool
) -> LossTerms:
    """GLADIUS (Kang et al., equation 15), with or without what zeta takes off the anchor's term.

    Without it the anchor's term is the squared TD error, and holds the variance of next values.
    """
    q_row, action = pair.q(columns["state"]), columns["action"]
    ahead, zeta = pair.ahead(columns), pair.dual(columns["state"], action)
    reward, anchor = columns["reward"], action == anchor_action
    if corrected:
        return gladius_of_values(
            q_row, action, zeta, ahead, reward, anchor, discount=pair.discount, weight=weight
        )
    choices = choice_likelihood(q_row, action)
    delta = reward.masked_fill(~anchor, 0.0) + pair.discount * ahead - _at(q_row, action)
    squared = delta.masked_fill(~anchor, 0.0).square().sum()
    total = choices.total + weight * squared + dual_fit(zeta, ahead).total
    return LossTerms(total, choices.count)


def fit_dual(pair: Pair, data: Transitions, options: FitOptions) -> None:
    """Regress the next values of a Q that is finished: what reads a reward off it."""

    def loss(zeta: nn.Module, columns: Columns) -> LossTerms:
        return dual_fit(_at(zeta(columns["state"]), columns["action"]), columns["ahead"])

    columns = columns_of(data, pair)
    with torch.no_grad():
        columns["ahead"] = pair.ahead(columns)
    fit_network(pair.zeta, loss, columns, options)


def _at(rows: Tensor, action: Tensor) -> Tensor:
    return rows.gather(-1, action[:, None])[:, 0]
