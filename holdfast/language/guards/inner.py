"""The inner loop: several steps on one target, for the price of one look at the objective.

Source: Lavington et al., "Target-based Surrogates for Stochastic Optimization" (SSO). With outputs
``z = f(theta)`` and ``g`` the derivative of the objective with respect to them at ``z_t``, the
surrogate ``S(theta) = <g, z - z_t> + w |z - z_t|^2`` is minimised over ``theta`` by any means. Its
minimum lies at the target ``z_t - g / (2 w)``. Where the objective is ``L``-smooth in the outputs
and ``w >= L / 2``, ``l(theta) <= l(theta_t) + S(theta)``: what lowers ``S`` lowers the objective.
Cross-entropy over a softmax has ``L = 1/2``.

Logits-convex optimisation with the squared error is the same regression, on the target
``z_old + A / beta``. In a recipe the inner loop is ``num_iterations`` with ``stop_on_rise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.language.guards.controllers import check_positive


def target_surrogate(
    outputs: Tensor, anchor: Tensor, gradient: Tensor, mask: Tensor, *, weight: float
) -> LossTerms:
    """``<g, z - z_t> + w |z - z_t|^2`` at every counted token.

    Parameters
    ----------
    outputs : Tensor
        ``(..., vocab)``: logits of the policy, ``z``.
    anchor, gradient : Tensor
        ``(..., vocab)``: the logits ``z_t`` where the objective was looked at, and its derivative
        there. Constants.
    mask : Tensor
        ``(...)``, bool: the counted tokens.
    weight : float
        ``w``. Positive.

    Returns
    -------
    LossTerms
        Summed over tokens; 0 at the anchor.

    Raises
    ------
    ValueError
        For a bad shape or number.
    """
    check_positive(weight=weight)
    for name, values in (("anchor", anchor), ("gradient", gradient)):
        if values.shape != outputs.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}: it must be that of outputs "
                f"{tuple(outputs.shape)}"
            )
    if mask.shape != outputs.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: it must be bool, and "
            f"{tuple(outputs.shape[:-1])}"
        )
    away = outputs - anchor.detach()
    values = (gradient.detach() * away).sum(-1) + weight * away.square().sum(-1)
    return LossTerms(values.masked_fill(~mask, 0.0).sum(), mask.sum())


@dataclass(frozen=True)
class InnerSteps:
    """What an inner loop did.

    Attributes
    ----------
    surrogates : list of float
        The surrogate before the first step, and after each that was kept. Never rising.
    objectives : list of float
        The same of the objective, where it was looked at.
    stopped : {"steps", "stationary", "no descent", "not majorised"}
        Why it ended.
    """

    surrogates: list[float]
    objectives: list[float]
    stopped: str


def inner_loop(
    surrogate: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    steps: int,
    objective: Callable[[], Tensor] | None = None,
    step_size: float = 1.0,
    sufficient: float = 0.5,
    tolerance: float = 1e-6,
) -> InnerSteps:
    """Gradient descent on a surrogate, with Armijo's rule for the size of a step.

    Parameters
    ----------
    surrogate : callable
        The surrogate at the parameters as they stand: a differentiable scalar. Any loss on logits
        with a fixed target serves.
    parameters : sequence of Tensor
        Leaf tensors, changed in place.
    steps : int
        The most steps, at least 1. Each costs at least two evaluations of the surrogate.
    objective : callable, optional
        The true objective, for the majorisation check: a step after which it fell by less than the
        surrogate did is undone, and ends the loop.
    step_size : float
        First step size that is tried. Afterwards 1.8 times the one before.
    sufficient : float
        Share of ``step_size |grad|^2`` that a step must lower the surrogate by, in (0, 1).
    tolerance : float
        The loop ends at a gradient of at most this norm.

    Raises
    ------
    ValueError
        For a number out of range.
    """
    check_positive(step_size=step_size, tolerance=tolerance)
    if steps < 1 or not 0 < sufficient < 1:
        raise ValueError(
            f"steps is {steps} and sufficient {sufficient}: they must be at least 1 and in (0, 1)"
        )
    value = surrogate()
    surrogates = [value.item()]
    objectives = [] if objective is None else [objective().item()]
    for _ in range(steps):
        gradient = torch.autograd.grad(value, list(parameters))
        square = math.fsum(float(part.square().sum()) for part in gradient)
        if math.sqrt(square) <= tolerance:
            return InnerSteps(surrogates, objectives, "stationary")
        start = [part.detach().clone() for part in parameters]
        while True:
            _move(parameters, start, gradient, -step_size)
            value = surrogate()
            if value.item() <= surrogates[-1] - sufficient * step_size * square:
                break
            step_size *= 0.9
            if step_size * math.sqrt(square) < torch.finfo(start[0].dtype).tiny:
                _move(parameters, start, gradient, 0.0)
                return InnerSteps(surrogates, objectives, "no descent")
        if objective is not None:
            found = objective().item()
            bound = objectives[0] + value.item() - surrogates[0]
            if found > bound + 1e-9 * max(abs(found), abs(bound)):
                _move(parameters, start, gradient, 0.0)
                return InnerSteps(surrogates, objectives, "not majorised")
            objectives.append(found)
        surrogates.append(value.item())
        step_size *= 1.8
    return InnerSteps(surrogates, objectives, "steps")


def _move(
    parameters: Sequence[Tensor], start: Sequence[Tensor], along: Sequence[Tensor], by: float
) -> None:
    with torch.no_grad():
        for parameter, before, direction in zip(parameters, start, along, strict=True):
            parameter.copy_(before + by * direction)
