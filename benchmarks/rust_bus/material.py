"""Rust's data as transitions, and the inverse problem that descent-ascent is asked to solve.

The problem has no cost function in it. The value of driving on is a polynomial of the mileage, that
of replacing one number, since a replaced engine has no past; so there is no mileage at which an
action must have been seen. The reward of replacing is known, and the monthly cost of driving on is
what is sought.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.polynomial.legendre import legvander
from numpy.typing import NDArray

from holdfast.bellman import Linear, SaddleProblem, Transitions
from holdfast.bellman.bus import KEEP, REPLACE
from holdfast.bellman.estimators.newton import Curve, maximise

Array = NDArray[np.float64]
FILE = Path(__file__).parents[3] / "shared" / "data" / "rust1987_bus_groups1-4.csv.gz"
BINS = 90
DEGREE = 2
"""Of the polynomial of the mileage."""
ANCHOR = REPLACE


def read(groups: Sequence[int]) -> pd.DataFrame:
    """The rows of some groups of buses."""
    frame = pd.read_csv(FILE)
    return frame[frame["group"].isin(groups)].reset_index(drop=True)


def transitions_of(frame: pd.DataFrame, replacement_cost: float) -> Transitions:
    """A row a month, but for each bus's first, and its last, after which nothing was seen."""
    bus = frame.groupby(["group", "bus_id"], sort=False).ngroup().to_numpy()
    state, action = frame["state"].to_numpy(), frame["replace"].to_numpy()
    here = np.flatnonzero((bus[:-2] == bus[1:-1]) & (bus[1:-1] == bus[2:])) + 1
    reward = np.where(action[here] == ANCHOR, -replacement_cost, np.nan)
    return Transitions(state[here], action[here], reward, state[here + 1], trajectory=bus[here])


def features(data: Transitions, bins: int = BINS, degree: int = DEGREE) -> Array:
    """``(bins, 2, degree + 2)``: polynomials of the mileage where driven on, one number elsewhere.

    Uncorrelated over the rows of ``data``, with second moments of one: replacing is so rare that
    descent would otherwise hardly see it.
    """
    table = np.zeros((bins, 2, degree + 2))
    table[:, KEEP, :-1] = legvander(np.linspace(-1.0, 1.0, bins), degree)
    table[:, REPLACE, -1] = 1.0
    rows = table[data.state, data.action]
    root = np.linalg.cholesky(rows.T @ rows / len(rows))
    return table @ np.linalg.inv(root).T


def inverse_problem(data: Transitions, discount: float) -> SaddleProblem:
    return SaddleProblem(data, discount, Linear(features(data)), anchor_action=ANCHOR)


def exact_saddle(problem: SaddleProblem) -> tuple[Array, Array]:
    """Parameters of Q and of zeta at the saddle, without descent.

    Choices depend on differences of values only, and the anchor's mean TD error on their level as
    well: so the differences are a logit's, the level makes that error 0, and zeta is a regression
    of the next values.
    """
    data, discount = problem.transitions, problem.discount
    assert isinstance(problem.approximator, Linear)
    table = problem.approximator.features.numpy()
    kept = table[data.state, KEEP][:, :-1]
    drove = data.action == KEEP

    def logit(theta: Array) -> Curve:
        """Of driving on, with the value of replacing at 0."""
        gap = kept @ theta
        chance = 1.0 / (1.0 + np.exp(-gap))
        curvature = (kept * (chance * (1.0 - chance))[:, None]).T @ kept
        value = float(np.where(drove, -np.logaddexp(0, -gap), -np.logaddexp(0, gap)).sum())
        return Curve(value, kept.T @ (drove - chance), -curvature, curvature)

    theta = maximise(logit, np.zeros(kept.shape[1])).parameters
    ahead = np.logaddexp(0.0, table[data.next_state, KEEP][:, :-1] @ theta)
    anchored = ~drove
    level = (data.reward[anchored].mean() + discount * ahead[anchored].mean()) / (1.0 - discount)
    primal = np.append(theta, 0.0) + level * _everywhere(table)
    chosen = table[data.state, data.action]
    dual = np.linalg.lstsq(chosen, ahead + level, rcond=None)[0]
    return primal, dual


def _everywhere(table: Array) -> Array:
    """Parameters of the function that is 1 for every pair."""
    pairs = table.reshape(-1, table.shape[-1])
    return np.linalg.lstsq(pairs, np.ones(len(pairs)), rcond=None)[0]


def start(problem: SaddleProblem) -> tuple[Array, Array]:
    """Where descent begins: values that give every month the shares of all, and zeta 0.

    Where all is 0, replacing is as likely as not, and the likelihood so curved that steps which
    suit the saddle diverge.
    """
    assert isinstance(problem.approximator, Linear)
    table = problem.approximator.features.numpy()
    share = np.bincount(problem.transitions.action, minlength=2) / len(problem.transitions)
    pairs = table.reshape(-1, table.shape[-1])
    values = np.tile(np.log(share), len(table))
    primal = np.linalg.lstsq(pairs, values, rcond=None)[0]
    return primal, np.zeros(len(primal))


def recovered(problem: SaddleProblem, primal: Array, dual: Array) -> Array:
    """``(..., states, actions)``: ``Q - discount * zeta`` of parameters ``(..., features)``.

    The difference is taken before the features are applied, so that large levels cancel exactly.
    """
    assert isinstance(problem.approximator, Linear)
    weights = primal - problem.discount * dual
    return np.einsum("sak,...k->...sa", problem.approximator.features.numpy(), weights)


def slope_of(reward: Array, visits: Array) -> Array:
    """Rust's cost slope that fits a reward of driving on ``(..., bins)`` best, by ``visits``.

    The cost of an empty mileage is left free: it is what the anchor's level stands in for.
    """
    mileage = 0.001 * np.arange(len(visits))
    share = visits / visits.sum()
    centred = mileage - share @ mileage
    return -(reward @ (share * centred)) / (share @ centred**2)


def gradient_at(problem: SaddleProblem, primal: Array, dual: Array) -> float:
    """Largest entry of the update at a point: 0 at the saddle."""
    first = torch.as_tensor(primal)[None].requires_grad_()
    second = torch.as_tensor(dual)[None].requires_grad_()
    moves = problem.directions(first, second, problem.compact())
    return max(float(each.abs().max()) for each in moves)
