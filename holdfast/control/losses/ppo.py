"""Proximal policy optimisation: several updates from one set of rollouts, none of them far."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.control.losses.rows import (
    check_finite,
    check_positive,
    count_of,
    counted,
    total_of,
)
from holdfast.joint import LossTerms
from holdfast.joint.likelihood_ratio import Bound, clipped_surrogate, exponential, kl_k3


def ppo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon: float = 0.2,
) -> LossTerms:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)`` with ``r`` the ratio of policies.

    Schulman et al., "Proximal Policy Optimization Algorithms", equation 7. With action chunks, a
    row is a chunk and its log-probability the sum over the chunk's actions.

    Parameters
    ----------
    log_probs : Tensor
        ``(...)``: log-probabilities of the actions under the policy, in nats.
    old_log_probs : Tensor
        ``(...)``: the same when the actions were drawn. A constant.
    advantages : Tensor
        ``(...)``: constants, finite in rows that count.
    mask : Tensor, optional
        ``(...)``, bool: the rows that count, by default all.
    epsilon : float
        Ratios above ``1 + epsilon`` are clipped where the advantage is positive, those below
        ``1 - epsilon`` where it is negative. Positive.

    Returns
    -------
    LossTerms
        Summed over rows, at least in float32. Metrics, as sums over rows: ``approx_kl`` (of the old
        policy to the new one, estimator k3, in nats), ``clip_fraction`` (the ratio is outside of
        its range, whether or not that changes the loss) and ``ratio``.

    Raises
    ------
    ValueError
        For a bad shape, dtype or bound, or an advantage that is not finite.
    """
    check_positive("epsilon", epsilon)
    new, old, gains = counted(
        mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    return surrogate(new, old, gains, mask, 1.0 - epsilon, 1.0 + epsilon)


def surrogate(
    new: Tensor, old: Tensor, gains: Tensor, mask: Tensor | None, low: Bound, high: Bound
) -> LossTerms:
    """The loss of :func:`ppo`, of tensors as :func:`~rows.counted` makes them.

    The range ``low`` to ``high`` of ratios is the same for all rows or, ``(...)``, each row's own.
    """
    check_finite("advantages", gains)
    ratio = exponential(new - old)
    losses = clipped_surrogate(ratio, gains, low, high)
    seen = ratio.detach()  # 1, and in its range, where a row does not count
    metrics = {
        "approx_kl": kl_k3(old, new.detach()).sum(),
        "clip_fraction": ((seen < low) | (seen > high)).sum().float(),
        "ratio": total_of(seen, mask),
    }
    return LossTerms(losses.sum(), count_of(losses, mask), metrics)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    epsilon: float | None = None,
) -> LossTerms:
    """``(v - R)^2 / 2``, or that of the clipped value where it is the larger.

    With ``epsilon``, ``max((v - R)^2, (clip(v, v_old - epsilon, v_old + epsilon) - R)^2) / 2``: a
    value earns nothing by moving further than ``epsilon`` from where it was at the rollout.

    Parameters
    ----------
    values : Tensor
        ``(...)``: of the observations acted on, in the units of ``returns``.
    returns : Tensor
        ``(...)``: the targets. Constants, finite in rows that count.
    mask : Tensor, optional
        ``(...)``, bool: the rows that count, by default all.
    old_values : Tensor, optional
        ``(...)``: the values at the rollout, in the same units. Given together with ``epsilon``.
    epsilon : float, optional
        Positive; without it nothing is clipped.

    Returns
    -------
    LossTerms
        Summed over rows, at least in float32. Metrics, as sums over rows: ``value`` and, where
        values are clipped, ``value_clip_fraction`` (the clipped square is the larger).

    Raises
    ------
    ValueError
        For a bad shape, dtype or bound, a return that is not finite, or only one of ``old_values``
        and ``epsilon``.
    """
    if (old_values is None) != (epsilon is None):
        raise ValueError(
            "old_values and epsilon belong together: give both to clip values, neither not to"
        )
    given = {"values": values, "returns": returns}
    if old_values is not None:
        given["old_values"] = old_values
    found, goals, *old = counted(mask, **given)
    check_finite("returns", goals)
    squares = (found - goals).square()
    metrics = {"value": found.detach().sum()}
    if epsilon is not None:
        check_positive("epsilon", epsilon)
        held = found.clamp(old[0] - epsilon, old[0] + epsilon)
        clipped = (held - goals).square()
        metrics["value_clip_fraction"] = (clipped > squares).sum().float()
        squares = torch.maximum(squares, clipped)
    return LossTerms(0.5 * squares.sum(), count_of(squares, mask), metrics)
