"""Maths of likelihood ratios that policy-gradient losses share, whatever the actions are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Beyond it the exponential of a log-ratio is continued by its tangent.

It is then a ratio of 4.9e8, at which nothing is learnt any more, but its gradient still points the
right way and neither overflows nor turns into NaN where it is multiplied by 0.
"""


Bound = TypeVar("Bound", float, Tensor)


def exponential(log_ratio: Tensor, function: Callable[[Tensor], Tensor] = torch.exp) -> Tensor:
    """``exp``, or ``expm1`` as ``function``, continued by its tangent.

    Parameters
    ----------
    log_ratio : Tensor
        ``(...)``, in nats. Beyond :data:`MAX_LOG_RATIO` the tangent there is followed.
    function : callable
        ``torch.exp`` or ``torch.expm1``.

    Returns
    -------
    Tensor
        ``(...)``, differentiable.
    """
    excess = torch.relu(log_ratio - MAX_LOG_RATIO)
    return function(log_ratio.clamp(max=MAX_LOG_RATIO)) + math.exp(MAX_LOG_RATIO) * excess


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: Bound, high: Bound) -> Tensor:
    """``-min(r A, clip(r, low, high) A)``.

    Schulman et al., "Proximal Policy Optimization Algorithms", equation 7, to be minimised.

    Parameters
    ----------
    ratio, advantages : Tensor
        ``(...)``.
    low, high : float, or Tensor ``(...)``
        Ratios outside of them are clipped where that makes the loss larger.

    Returns
    -------
    Tensor
        ``(...)``, differentiable.
    """
    return -torch.minimum(ratio * advantages, torch.clamp(ratio, low, high) * advantages)


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimate of ``KL(policy || reference)`` from a sampled action, never negative.

    ``exp(d) - d - 1`` with ``d = log pi_ref - log pi`` (Schulman, "Approximating KL Divergence",
    estimator k3), unbiased where the policy drew the action. Beyond ``d =`` :data:`MAX_LOG_RATIO`
    it grows along its tangent, so it cannot overflow.

    Parameters
    ----------
    logps, reference_logps : Tensor
        ``(...)``: log-probabilities of the action under both, in nats.

    Returns
    -------
    Tensor
        ``(...)``, in nats, at least float32; differentiable in both.

    Raises
    ------
    ValueError
        For shapes that differ.
    """
    if logps.shape != reference_logps.shape:
        raise ValueError(
            f"logps has shape {tuple(logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)}: they must be the same"
        )
    difference = _wide(reference_logps) - _wide(logps)
    return exponential(difference, torch.expm1) - difference


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
