"""Objectives of a policy that is linear in its parameters, for many runs at once.

``π_θ(y | x) ∝ exp(θ · φ(x, y))`` over a finite set of answers. Both objectives are then convex in
``θ``, and losses, gradients and Hessians have short closed forms. ``runs`` parameter vectors are
evaluated together; every array is float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from holdfast.joint import Schedule

Array = NDArray[np.float64]
Rows = NDArray[np.int64]


def sigmoid(x: Array) -> Array:
    # Through tanh, which overflows at neither end.
    return 0.5 * (1.0 + np.tanh(0.5 * x))


class LinearObjective(Protocol):
    """A convex mean loss over ``rows`` data rows."""

    @property
    def rows(self) -> int: ...

    def loss(self, theta: Array) -> Array:
        """Mean loss, ``(runs,)``, at ``theta``, ``(runs, features)``."""
        ...

    def gradient(self, theta: Array, row: Rows | None = None) -> Array:
        """Gradient, ``(runs, features)``, of the mean loss, or of one row per run."""
        ...

    def hessian(self, theta: Array) -> Array:
        """Hessian of the mean loss, ``(features, features)``, at one ``theta``, ``(features,)``."""
        ...


class Likelihood:
    """Negative log-likelihood of demonstrated answers to one prompt.

    Parameters
    ----------
    answers : array, (answers, features)
        ``φ(x, y)`` of every possible answer.
    targets : array, (rows, features)
        ``φ(x, y)`` of the answer that each row demonstrates.
    """

    def __init__(self, answers: Array, targets: Array) -> None:
        self.answers = np.asarray(answers, dtype=np.float64)
        self.targets = np.asarray(targets, dtype=np.float64)
        self.mean_target = self.targets.mean(axis=0)

    @property
    def rows(self) -> int:
        return len(self.targets)

    def _probabilities(self, logits: Array) -> Array:
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def loss(self, theta: Array) -> Array:
        logits = theta @ self.answers.T
        return np.logaddexp.reduce(logits, axis=-1) - theta @ self.mean_target

    def gradient(self, theta: Array, row: Rows | None = None) -> Array:
        target = self.mean_target if row is None else self.targets[row]
        return self._probabilities(theta @ self.answers.T) @ self.answers - target

    def hessian(self, theta: Array) -> Array:
        probabilities = self._probabilities(self.answers @ theta)
        centred = self.answers - probabilities @ self.answers
        return (centred.T * probabilities) @ centred


class Preference:
    """DPO: ``-log σ(β (θ - θ_ref) · δ)`` with ``δ = φ(x, y_w) - φ(x, y_l)``.

    The normalisers of chosen and rejected answer are those of the same prompt and cancel.

    Parameters
    ----------
    differences : array, (rows, features)
        ``δ`` of every pair.
    reference : array, (features,)
        Parameters of the reference policy.
    beta : float
        Strength of the pull towards the reference.
    """

    def __init__(self, differences: Array, reference: Array, beta: float) -> None:
        self.differences = np.asarray(differences, dtype=np.float64)
        self.reference = np.asarray(reference, dtype=np.float64)
        self.beta = beta

    @property
    def rows(self) -> int:
        return len(self.differences)

    def _margins(self, theta: Array) -> Array:
        return self.beta * ((theta - self.reference) @ self.differences.T)

    def loss(self, theta: Array) -> Array:
        return np.logaddexp(0.0, -self._margins(theta)).mean(axis=-1)

    def gradient(self, theta: Array, row: Rows | None = None) -> Array:
        if row is None:
            return -self.beta * sigmoid(-self._margins(theta)) @ self.differences / self.rows
        delta = self.differences[row]
        margin = self.beta * ((theta - self.reference) * delta).sum(axis=-1, keepdims=True)
        return -self.beta * sigmoid(-margin) * delta

    def hessian(self, theta: Array) -> Array:
        p = sigmoid(self._margins(theta))
        return self.beta**2 * (self.differences.T * (p * (1 - p))) @ self.differences / self.rows


def minimiser(
    objectives: Mapping[str, LinearObjective],
    weights: Mapping[str, float],
    start: Array,
    tolerance: float = 1e-13,
) -> Array:
    """Where ``sum_i w_i f_i`` is smallest, by Newton's method with a backtracking line search.

    Parameters
    ----------
    objectives, weights : mappings with the same names
        A strictly convex weighted sum whose minimum is attained.
    start : array, (features,)
        Starting point.
    tolerance : float
        Norm of the gradient at which to stop.

    Raises
    ------
    ArithmeticError
        If 100 iterations do not reach the tolerance.
    """

    def loss(theta: Array) -> float:
        return sum(w * float(objectives[name].loss(theta)) for name, w in weights.items())

    theta = np.array(start, dtype=np.float64)
    for _ in range(100):
        gradient = sum(w * objectives[name].gradient(theta) for name, w in weights.items())
        norm = float(np.linalg.norm(gradient))
        if norm <= tolerance:
            return theta
        hessian = sum(w * objectives[name].hessian(theta) for name, w in weights.items())
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        # Close to the minimum the decrease drowns in rounding, and the full step is right.
        while scale > 1e-8 and loss(theta - scale * step) > loss(theta) + 1e-12:
            scale /= 2
        theta = theta - scale * step
    raise ArithmeticError(f"no minimum found: the gradient still has norm {norm:.1e}")


def turn_weights(
    schedules: Sequence[Schedule], objectives: Mapping[str, LinearObjective], theta: Array
) -> Array:
    """Ask one schedule per run for its turn.

    Parameters
    ----------
    schedules : sequence of Schedule
        One per run.
    objectives : mapping of str to LinearObjective
        Their order is the order of the result's columns.
    theta : array, (runs, features)
        Where losses are evaluated, if a schedule asks for them.

    Returns
    -------
    array, (runs, objectives)
        All zeros for a run whose schedule has ended.
    """
    known: dict[str, Array] = {}

    def probe(run: int, name: str) -> float:
        if name not in known:  # One evaluation serves every run.
            known[name] = objectives[name].loss(theta)
        return float(known[name][run])

    weights = np.zeros((len(schedules), len(objectives)))
    for run, schedule in enumerate(schedules):
        turn = schedule.next(partial(probe, run))
        weights[run] = [turn.weights.get(name, 0.0) for name in objectives]
    return weights
