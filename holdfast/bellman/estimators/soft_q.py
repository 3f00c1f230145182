"""Fitted soft Q-iteration: regressing on the soft Bellman target, again and again.

Each round fits ``Q(s, a)`` to ``r + discount * V(s')`` of the round before (Ernst, Geurts &
Wehenkel, 2005, with the maximum replaced by the log-sum-exp). The target is a constant of the
regression, so the variance of the next state does no harm; what may is a class of functions that
the targets leave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from holdfast.bellman.estimators.fitting import Columns, Fit, FitOptions, columns_of, fit_network
from holdfast.bellman.mdp import check_discount
from holdfast.bellman.saddle import soft_value
from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError
from holdfast.joint import LossTerms

Array = NDArray[np.float64]
Basis = Callable[[NDArray[Any]], Array]
"""From states ``(n,)`` or observations ``(n, features)`` to ``(n, basis)``."""


def one_hot(states: int) -> Basis:
    """A basis with a function for every state: fitted Q-iteration is then exact on the data."""
    return lambda state: np.eye(states)[state]


@dataclass(frozen=True)
class LinearQ:
    """Soft values that are linear in a basis, with weights of its own for every action."""

    weights: Array
    """``(basis, actions)``"""
    basis: Basis
    iterations: int
    change: float
    """By how much the last round moved Q at the data, at most."""

    def __call__(self, state: NDArray[Any]) -> Array:
        """``Q(s, .)``, ``(n, actions)``."""
        return self.basis(state) @ self.weights


def fitted_soft_q(
    transitions: Transitions,
    *,
    actions: int,
    discount: float,
    basis: Basis,
    ridge: float = 0.0,
    tolerance: float = 1e-10,
    iterations: int = 100_000,
) -> LinearQ:
    """Fitted soft Q-iteration by least squares.

    Parameters
    ----------
    transitions : Transitions
        With every reward observed.
    actions : int
        How many there are; each must occur.
    discount : float
        In [0, 1).
    basis : callable
        :func:`one_hot` for a table: the result is soft value iteration on the empirical model.
    ridge : float
        Weight of the squared weights against the sum of squares, at least 0. Needed where the data
        do not determine all weights.
    tolerance : float
        Stop where no value at the data moves by more.
    iterations : int
        Rounds allowed.

    Raises
    ------
    ValueError
        For a number out of range, an action outside the set, an unobserved reward, or data that do
        not determine the weights.
    TrainingError
        If the iteration diverges or does not settle: a projection on the basis need not contract.
    """
    check_discount(discount)
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}: it must not be negative")
    _check(transitions, actions)
    seen = basis(transitions.state)
    ahead = basis(transitions.next_state)
    rows = [np.flatnonzero(transitions.action == action) for action in range(actions)]
    solvers = [_solver(seen[each], action, ridge) for action, each in enumerate(rows)]
    weights = np.zeros((seen.shape[1], actions))
    change = np.inf
    for iteration in range(1, iterations + 1):
        value = np.where(transitions.terminal, 0.0, np.logaddexp.reduce(ahead @ weights, axis=1))
        target = transitions.reward + discount * value
        moved = np.stack(
            [solve @ target[each] for solve, each in zip(solvers, rows, strict=True)], axis=1
        )
        change = float(abs(seen @ (moved - weights)).max())
        weights = moved
        if change <= tolerance:
            return LinearQ(weights, basis, iteration, change)
        if not change < 1e100:
            raise TrainingError(
                f"fitted soft Q-iteration diverges: round {iteration} moves a value by "
                f"{change:.3g}. Least squares on this basis do not contract at discount "
                f"{discount:g}: choose another basis, more ridge, or a smaller discount."
            )
    raise TrainingError(
        f"fitted soft Q-iteration did not settle in {iterations} rounds: the last moves a value by "
        f"{change:.3g}, and tolerance is {tolerance:.3g}."
    )


def fit_soft_q_network(
    network: nn.Module,
    transitions: Transitions,
    *,
    discount: float,
    rounds: int,
    options: FitOptions | None = None,
) -> list[Fit]:
    """Fitted soft Q-iteration of a network, in place.

    Parameters
    ----------
    network : nn.Module
        From states ``(n,)`` or observations ``(n, features)`` to ``(n, actions)``.
    transitions : Transitions
        With every reward observed.
    discount : float
        In [0, 1).
    rounds : int
        How often the target is renewed. Its error falls as ``discount ** rounds`` at best.
    options : FitOptions, optional
        Of each round's regression, which starts from the round before.

    Returns
    -------
    list of Fit
        One a round; the loss is the mean squared error to that round's target.
    """
    check_discount(discount)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    options = options or FitOptions()
    columns = columns_of(transitions, network)
    with torch.no_grad():
        _check(transitions, network(columns["state"][:1]).shape[-1])
    fits = []
    for number in range(rounds):
        before = copy.deepcopy(network)
        with torch.no_grad():
            ahead = soft_value(before(columns["next_state"]), columns["terminal"])
        target = columns["reward"] + discount * ahead
        seeded = replace(options, seed=options.seed + number)
        fits.append(fit_network(network, _squares, {**columns, "target": target}, seeded))
    return fits


def _squares(network: nn.Module, columns: Columns) -> LossTerms:
    q = network(columns["state"]).gather(-1, columns["action"][:, None])[:, 0]
    return LossTerms((q - columns["target"]).square().sum(), torch.tensor(len(q)))


def _check(transitions: Transitions, actions: int) -> None:
    outside = np.flatnonzero((transitions.action < 0) | (transitions.action >= actions))
    if len(outside):
        row = outside[0]
        raise ValueError(
            f"action is {transitions.action[row]} in row {row}: it must lie in 0 ... {actions - 1}"
        )
    unseen = np.flatnonzero(np.isnan(transitions.reward))
    if len(unseen):
        raise ValueError(f"reward is not observed in row {unseen[0]}: all must be")


def _solver(features: Array, action: int, ridge: float) -> Array:
    """``(basis, n)``: from targets to weights."""
    gram = features.T @ features + ridge * np.eye(features.shape[1])
    if np.linalg.matrix_rank(gram, hermitian=True) < len(gram):
        raise ValueError(
            f"the {len(features)} rows with action {action} do not determine its {len(gram)} "
            "weights: give more transitions or a ridge"
        )
    return np.asarray(np.linalg.solve(gram, features.T), dtype=np.float64)
