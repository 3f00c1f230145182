"""Would gradient descent-ascent settle at the saddle? The linearised dynamics answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import root
from torch import Tensor

from holdfast.bellman.networks import Linear, Tables
from holdfast.bellman.problem import SaddleProblem
from holdfast.errors import TrainingError

RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
"""Ratios that are tried when one is sought, from the mildest on."""
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Margin:
    """The flow ``x' = -J (x - x*)`` around the saddle, with ``J`` the derivative of the update.

    Attributes
    ----------
    eigenvalues : NDArray
        ``(parameters,)``, complex, of ``J``, for steps of size one. Directions that the data leave
        free, which never move, are left out.
    step_ratio : float
        Of the dual to the primal step.
    margin : float
        The least real part. Negative: unstable at any step size.
    max_step : float
        Constant full-batch steps below this converge from near by. 0 if unstable.
    working_ratio : float or None
        The mildest of :data:`RATIOS`, or ``step_ratio`` itself, with a positive margin.
    """

    eigenvalues: NDArray[np.complex128]
    step_ratio: float
    margin: float
    max_step: float
    working_ratio: float | None

    @property
    def stable(self) -> bool:
        return self.margin > 0.0

    def check(self, step: float | None = None) -> None:
        """Refuse a setting that diverges.

        Raises
        ------
        TrainingError
            With the reason, and a ratio or step that works.
        """
        if not self.stable:
            advice = (
                f"set step_ratio to {self.working_ratio:g} or more"
                if self.working_ratio
                else "no ratio of those tried is stable: lower the discount, or use features"
            )
            raise TrainingError(
                f"descent-ascent with step_ratio {self.step_ratio:g} leaves the saddle at every "
                "step size: an eigenvalue of the linearised dynamics has the real part "
                f"{self.margin:.3g}, and it must be positive; {advice}."
            )
        if step is not None and step >= self.max_step:
            raise TrainingError(
                f"step {step:.3g} is too large: with step_ratio {self.step_ratio:g}, constant "
                f"full-batch steps converge below {self.max_step:.3g}; take half of that."
            )

    def tuned(self) -> tuple[float, float]:
        """The step and momentum with which the slowest direction shrinks fastest."""
        scale = 2.0 / np.abs(self.eigenvalues).max()
        best = (np.inf, 0.0, 0.0)
        for momentum in MOMENTA:
            for step in scale * np.geomspace(0.01, 1.0 + momentum, 60):
                radius = _radius(self.eigenvalues, step, momentum)
                best = min(best, (radius, step, momentum))
        return best[1], best[2]


def stability_margin(
    problem: SaddleProblem,
    step_ratio: float = 4.0,
    *,
    at: tuple[Tensor, Tensor] | None = None,
) -> Margin:
    """Eigenvalues of full-batch descent-ascent, linearised at the saddle.

    With one common step the saddle of a Bellman residual repels for most problems with a discount
    near 1, since the objective is concave in ``Q`` along the constant once the discount passes 1/2.

    Parameters
    ----------
    problem : SaddleProblem
        With tables or linear functions.
    step_ratio : float
        Of the dual to the primal step, positive.
    at : pair of Tensor, optional
        Parameters ``(primal,)`` and ``(dual,)`` to linearise at. By default the saddle.

    Raises
    ------
    ValueError
        For networks without ``at``, or a ratio that is not positive.
    TrainingError
        If the saddle of a linear problem was not found.
    """
    _check_ratio(step_ratio)
    primal, dual = saddle_point(problem) if at is None else at
    jacobian = _jacobian(problem, primal, dual)
    moving = np.abs(jacobian).sum(0) + np.abs(jacobian).sum(1) > 0
    split = int(moving[: len(primal)].sum())
    jacobian = jacobian[np.ix_(moving, moving)]

    def spectrum(ratio: float) -> NDArray[np.complex128]:
        scaled = jacobian.copy()
        scaled[split:] *= ratio
        return np.linalg.eigvals(scaled).astype(np.complex128)

    eigenvalues = spectrum(step_ratio)
    # Rounding leaves the real part of a zero eigenvalue on either side.
    noise = 1e-12 * float(np.abs(eigenvalues).max())
    margin = float(eigenvalues.real.min())
    stable = margin > noise
    working: float | None = step_ratio
    if not stable:
        margin = min(margin, 0.0)
        settles = (ratio for ratio in RATIOS if spectrum(ratio).real.min() > noise)
        working = next(settles, None)
    max_step = float((2.0 * eigenvalues.real / np.abs(eigenvalues) ** 2).min()) if stable else 0.0
    return Margin(eigenvalues, step_ratio, margin, max_step, working)


def saddle_point(
    problem: SaddleProblem, *, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Parameters of the saddle, ``(primal,)`` and ``(dual,)``.

    Exact for tables; for linear functions a root of the gradients, found from ``start``, by default
    0.
    """
    if isinstance(problem.approximator, Tables):
        q, zeta = problem.exact()
        return torch.as_tensor(q.ravel()), torch.as_tensor(zeta.ravel())
    if not isinstance(problem.approximator, Linear):
        raise ValueError(
            "networks have no known saddle: say where to linearise, with at=(primal, dual)"
        )
    primal, dual = problem.approximator.initial() if start is None else start
    split = len(primal)

    def field(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        point = torch.as_tensor(x)
        return (
            _field(problem, point[:split], point[split:])[2].detach().numpy(),
            _jacobian(problem, point[:split], point[split:]),
        )

    found = root(field, torch.cat([primal, dual]).numpy(), jac=True, tol=1e-12)
    if np.abs(found.fun).max() > 1e-8:
        raise TrainingError(
            f"no saddle of the linear problem was found: gradients of {np.abs(found.fun).max():.3g}"
            " are left; use other features."
        )
    point = torch.as_tensor(found.x)
    return point[:split], point[split:]


def _field(problem: SaddleProblem, primal: Tensor, dual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two arguments, ready to be differentiated by, and the update at them."""
    primal = primal.detach().clone().requires_grad_()
    dual = dual.detach().clone().requires_grad_()
    moves = problem.directions(primal[None], dual[None], problem.compact(), differentiable=True)
    return primal, dual, torch.cat([each[0] for each in moves])


def _jacobian(problem: SaddleProblem, primal: Tensor, dual: Tensor) -> NDArray[np.float64]:
    primal, dual, field = _field(problem, primal, dual)
    rows = [
        torch.cat(
            torch.autograd.grad(each, (primal, dual), retain_graph=True, materialize_grads=True)
        )
        for each in field
    ]
    return torch.stack(rows).numpy()


def _radius(eigenvalues: NDArray[np.complex128], step: float, momentum: float) -> float:
    """Largest root of ``z^2 - (1 + m - step * lambda) z + m``: shrinkage a step, heavy ball."""
    middle = 0.5 * (1.0 + momentum - step * eigenvalues)
    spread = np.sqrt(middle**2 - momentum)
    return float(np.maximum(np.abs(middle + spread), np.abs(middle - spread)).max())


def _check_ratio(step_ratio: float) -> None:
    if not (np.isfinite(step_ratio) and step_ratio > 0):
        raise ValueError(f"step_ratio is {step_ratio}: it must be positive and finite")
