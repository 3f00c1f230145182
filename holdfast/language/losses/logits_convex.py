"""Logits-convex optimisation: match the logits of the optimal policy.

Source: Chen et al., "Stabilizing Policy Optimization via Logits Convexity". With behaviour policy
``pi_old``, advantage ``A`` over the vocabulary and KL strength ``beta``, the maximiser of
``E[A] - beta KL(pi || pi_old)`` is ``pi* ~ pi_old exp(A / beta)`` (equation 6), whose logits are
``z* = z_old + A / beta`` (equation 7). The losses are convex in the policy's logits.

Here from logits; :mod:`holdfast.language.head` has the same from hidden states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.language.head.divergences import ForwardKl, LogCosh, SquaredError
from holdfast.language.head.matching import dense_match


def optimal_logits(behaviour_logits: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """Logits of the optimal policy, ``z* = z_old + A / beta`` (equation 7).

    Parameters
    ----------
    behaviour_logits : Tensor
        ``(..., vocab)``: logits of the policy that sampled. Fixed for all passes over its samples.
    advantages : Tensor
        ``(..., vocab)``: advantage of every token of the vocabulary. Finite.
    beta : float
        KL strength, in (0, inf).

    Returns
    -------
    Tensor
        ``(..., vocab)``, detached.

    Raises
    ------
    ValueError
        If ``beta`` is not positive and finite, or ``advantages`` has another shape or a value that
        is not finite.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}: it must be positive and finite")
    if advantages.shape != behaviour_logits.shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, not that of behaviour_logits "
            f"{tuple(behaviour_logits.shape)}: one advantage for every token of the vocabulary"
        )
    if not bool(torch.isfinite(advantages).all()):
        raise ValueError("advantages has values that are not finite")
    return (behaviour_logits + advantages / beta).detach()


def lco_mse(logits: Tensor, target_logits: Tensor, mask: Tensor) -> LossTerms:
    """``(1 / vocab) sum_a (z_a - z*_a)^2`` at every counted token.

    Parameters
    ----------
    logits, target_logits : Tensor
        ``(..., time, vocab)``: of the policy, and of the optimal policy (no gradient flows there).
    mask : Tensor
        ``(..., time)``, bool: the counted tokens.

    Returns
    -------
    LossTerms
        Summed over tokens, at least in float32.

    Raises
    ------
    ValueError
        For a bad shape, or logits that are not finite at a counted token.
    """
    return dense_match(SquaredError, logits, target_logits, mask)


def lco_log_cosh(logits: Tensor, target_logits: Tensor, mask: Tensor) -> LossTerms:
    """``(1 / vocab) sum_a log cosh(z_a - z*_a)`` at every counted token.

    Its derivative is bounded by ``1 / vocab`` for every logit. Otherwise as :func:`lco_mse`.
    """
    return dense_match(LogCosh, logits, target_logits, mask)


def lco_kl(logits: Tensor, target_logits: Tensor, mask: Tensor) -> LossTerms:
    """``KL(pi* || pi)`` at every counted token, in nats.

    Adding a constant to either row of logits changes nothing. Otherwise as :func:`lco_mse`.
    """
    return dense_match(ForwardKl, logits, target_logits, mask)
