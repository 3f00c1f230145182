"""Advantage-weighted regression: clone what went better than expected, and the more the better."""

from __future__ import annotations

import math

from torch import Tensor

from holdfast.control.losses.rows import check_finite, check_positive, count_of, counted, wide
from holdfast.joint import LossTerms


def advantage_weights(
    advantages: Tensor, *, temperature: float = 0.1, cap: float = 100.0
) -> Tensor:
    """``min(exp(A / temperature), cap)``.

    Peng et al., "Advantage-Weighted Regression", algorithm 1. Which method it is
    depends on the advantages: AWR has TD(lambda) returns less a value, both of rollouts; AWC, that
    is weighted cloning, has a learnt critic's ``Q - V`` of any logged action. Normalise advantages
    first if the temperature is to mean the same for every scale of reward.

    Parameters
    ----------
    advantages : Tensor
        ``(...)``. Constants.
    temperature : float
        In (0, inf): small for greedy weights.
    cap : float
        The largest weight. Positive.

    Returns
    -------
    Tensor
        ``(...)``, at least float32, without a graph, in [0, cap].

    Raises
    ------
    ValueError
        For a number out of range.
    """
    check_positive("temperature", temperature)
    check_positive("cap", cap)
    exponents = wide(advantages.detach()) / temperature
    return exponents.clamp(max=math.log(cap)).exp().clamp(max=cap)


def weighted_regression(losses: Tensor, weights: Tensor, mask: Tensor | None = None) -> LossTerms:
    """A cloning loss of each row times its weight.

    Parameters
    ----------
    losses : Tensor
        ``(...)``: of each row, such as the negative log-likelihood of its action, or the denoising
        error of its chunk.
    weights : Tensor
        ``(...)``: constants, finite and at least 0 in rows that count.
    mask : Tensor, optional
        ``(...)``, bool: the rows that count, by default all.

    Returns
    -------
    LossTerms
        Summed over rows and counted over rows, not over weights: where nothing is worth cloning,
        nothing is learnt. At least in float32. Metrics, as sums over rows: ``unweighted_loss``,
        ``weight`` and ``weight_squared``; with the means of the latter two, ``weight^2 /
        weight_squared`` is the share of rows that effectively takes part.

    Raises
    ------
    ValueError
        For a bad shape, dtype or weight.
    """
    each, scale = counted(mask, losses=losses, weights=weights)
    check_finite("weights", scale)
    if bool((scale < 0).any()):
        raise ValueError(f"weights has {float(scale.min())}: weights must be at least 0")
    metrics = {
        "unweighted_loss": each.detach().sum(),
        "weight": scale.sum(),
        "weight_squared": scale.square().sum(),
    }
    return LossTerms((scale * each).sum(), count_of(each, mask), metrics)
