"""Nested fixed point: maximum likelihood with the dynamic programme solved inside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.estimators.choice_model import ChoiceModel, Solution
from holdfast.bellman.estimators.newton import inverse_information, maximise

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Parameters that maximise a likelihood of choices."""

    parameters: Array
    """``(K,)``"""
    covariance: Array
    """``(K, K)``: the inverse of the observed information; transitions count as known."""
    covariance_from_scores: Array
    """``(K, K)``: the inverse of the scores' summed outer products (Berndt, Hall, Hall & Hausman,
    1974): what Rust's programs print."""
    log_likelihood: float
    """Of the choices, in nats."""
    solution: Solution
    """The fixed point at the parameters: ``q``, ``values``, ``policy``."""
    iterations: int

    @property
    def standard_errors(self) -> Array:
        """``(K,)``: roots of the diagonal of ``covariance``."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def rewards(self) -> Array:
        """``(S, A)``"""
        return self.solution.model.rewards(self.parameters)


def nested_fixed_point(
    model: ChoiceModel, counts: ArrayLike, *, start: ArrayLike | None = None
) -> Estimate:
    """Estimate a linear reward from choices by maximum likelihood (Rust, 1987, section 4).

    The likelihood is differentiated through the fixed point twice, exactly, so that Newton's
    method applies; :class:`ChoiceModel` says how.

    Parameters
    ----------
    model : ChoiceModel
        On ``S`` states with ``A`` actions and ``K`` parameters.
    counts : array
        ``(S, A)``: how often every action was chosen in every state.
    start : array, optional
        ``(K,)``. Zeros if not given.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        For counts of another shape, or negative ones.
    TrainingError
        If the choices do not determine the parameters, or no finite ones are most likely.
    """
    origin = np.zeros(model.parameters) if start is None else np.asarray(start, dtype=np.float64)
    found = maximise(lambda theta: model.likelihood(theta, counts), origin)
    solution = model.solve(found.parameters)
    return Estimate(
        parameters=found.parameters,
        covariance=inverse_information(-found.curve.hessian),
        covariance_from_scores=inverse_information(
            solution.score_products(np.asarray(counts, dtype=np.float64))
        ),
        log_likelihood=found.curve.value,
        solution=solution,
        iterations=found.iterations,
    )
