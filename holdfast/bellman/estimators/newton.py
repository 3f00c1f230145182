"""Newton's method for log-likelihoods of a few parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import TrainingError

Array = NDArray[np.float64]

# Least eigenvalue of an information matrix scaled to a unit diagonal.
_IDENTIFIED = 1e-11
# Least root of a parameter's information, as a share of the largest: below it is rounding error,
# of values that may be 1e4 times the rewards.
_SEEN = 1e-10
# When Newton's method is a step from the end: the gain it predicts, and its relative length.
_DECREMENT = 1e-8
_STEP = 1e-4


class Curve(NamedTuple):
    """A function of ``k`` parameters at one point."""

    value: float
    gradient: Array
    """``(k,)``"""
    hessian: Array
    """``(k, k)``"""
    information: Array
    """``(k, k)``, positive semidefinite: stands in for ``-hessian`` where that is not convex."""


class Maximum(NamedTuple):
    """Where a function is largest, and what it is like there."""

    parameters: Array
    curve: Curve
    iterations: int


def maximise(evaluate: Callable[[Array], Curve], start: Array, *, iterations: int = 200) -> Maximum:
    """Climb by Newton steps where the function is concave and by scoring steps where it is not.

    Both are ascent directions, and a step is halved until it climbs. At the end the predicted gain
    must be small *and* the step be short: on a likelihood that has no maximum (choices that a
    threshold separates) the gain dies out while the steps stay long.

    Parameters
    ----------
    evaluate : callable
        ``(k,)`` to the :class:`Curve` there.
    start : array
        ``(k,)``.
    iterations : int
        Steps allowed.

    Returns
    -------
    Maximum

    Raises
    ------
    TrainingError
        If the data do not determine the parameters, or the function has no maximum.
    """
    point = np.asarray(start, dtype=np.float64)
    curve = evaluate(point)
    for iteration in range(iterations):
        step = _direction(curve)
        gain = float(curve.gradient @ step)
        if gain < _DECREMENT and bool((abs(step) < _STEP * (1 + abs(point))).all()):
            # One more step, unsearched: the value no longer resolves what the gradient does.
            return Maximum(point + step, evaluate(point + step), iteration + 1)
        for _ in range(60):
            ahead = evaluate(point + step)
            if ahead.value >= curve.value + 1e-4 * gain:
                break
            step, gain = step / 2, gain / 2
        else:
            raise TrainingError(
                f"no step from the parameters {np.array2string(point, precision=4)} raises the "
                f"likelihood, though its gradient is {np.array2string(curve.gradient, precision=4)}"
                ". Rewards of this size leave no digits for it: rescale the features."
            )
        point, curve = point + step, ahead
    raise TrainingError(
        f"the likelihood has no maximum within {iterations} Newton steps (parameters "
        f"{np.array2string(point, precision=4)}, value {curve.value:.6g}). Choices that a "
        "threshold in the features separates without error have none: add data or drop a feature."
    )


def inverse_information(information: Array) -> Array:
    """Inverse of an information matrix ``(k, k)``, in which parameters may differ in scale.

    Raises
    ------
    TrainingError
        If it is singular: the data do not determine the parameters.
    """
    scale = np.sqrt(np.clip(np.diag(information), 0, None))
    blank = ~(scale > _SEEN * scale.max())
    if blank.any():
        _not_identified(np.flatnonzero(blank))
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    if values[0] < _IDENTIFIED:
        _not_identified(np.flatnonzero(abs(vectors[:, 0]) > 0.1))
    return (vectors / values) @ vectors.T / np.outer(scale, scale)


def _direction(curve: Curve) -> Array:
    try:
        return inverse_information(-curve.hessian) @ curve.gradient
    except TrainingError:
        return inverse_information(curve.information) @ curve.gradient


def _not_identified(which: NDArray[np.intp]) -> None:
    raise TrainingError(
        "the choices do not determine the parameters: they are as likely after a change of "
        f"{'parameter' if len(which) == 1 else 'the parameters'} {', '.join(map(str, which))} "
        "(counted from 0). Fix one of them, drop a feature, or observe more states."
    )
