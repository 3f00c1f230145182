"""Intervals of what was counted or averaged, where nothing but the sums is known."""

from __future__ import annotations

from statistics import NormalDist

Interval = tuple[float, float]


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Interval of a proportion (Wilson 1927): sound for few trials and at 0 and 1.

    Raises
    ------
    ValueError
        Unless ``0 <= successes <= trials``, ``trials >= 1`` and ``0 < confidence < 1``.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes is {successes} of trials {trials}")
    z = normal_quantile(confidence)
    rate, scale = successes / trials, 1 + z**2 / trials
    middle = (rate + z**2 / (2 * trials)) / scale
    half = z / scale * (rate * (1 - rate) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(
    mean: float, mean_square: float, trials: int, confidence: float = 0.95
) -> Interval:
    """Normal interval of a mean, from the means of the values and of their squares.

    A single value has no width that could be known: both ends are the mean.

    Raises
    ------
    ValueError
        Unless ``trials >= 1`` and ``0 < confidence < 1``.
    """
    if trials < 1:
        raise ValueError(f"trials is {trials}: it must be at least 1")
    z = normal_quantile(confidence)
    variance = max(mean_square - mean**2, 0.0) * trials / max(trials - 1, 1)
    half = z * (variance / trials) ** 0.5
    return mean - half, mean + half


def normal_quantile(confidence: float) -> float:
    """Deviations on either side of the mean that hold the share ``confidence``.

    Raises
    ------
    ValueError
        Unless it lies between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must be between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
