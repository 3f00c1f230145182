"""Evaluation on fixed seeds, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.control.environments.interface import Act, Bools, Integers, VectorEnvironment
from holdfast.control.environments.keyed import episode_seeds
from holdfast.joint.intervals import Interval, normal_quantile, wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """What a policy achieved in each of a fixed set of episodes.

    Attributes
    ----------
    seeds : list of int
        The episodes' seeds.
    returns : ndarray
        ``(episodes,)``: undiscounted sums of rewards.
    lengths : ndarray
        ``(episodes,)``: environment steps.
    success : ndarray, optional
        ``(episodes,)``; ``None`` where the task does not say what success is.
    """

    seeds: list[int]
    returns: NDArray[np.float64]
    lengths: Integers
    success: Bools | None

    @property
    def success_rate(self) -> float | None:
        """Share of episodes that succeeded."""
        return None if self.success is None else float(self.success.mean())

    def success_interval(self, confidence: float = 0.95) -> Interval | None:
        """Wilson's interval of the success rate."""
        if self.success is None:
            return None
        return wilson_interval(int(self.success.sum()), len(self.success), confidence)

    @property
    def mean_return(self) -> float:
        return float(self.returns.mean())

    def return_interval(self, confidence: float = 0.95) -> Interval:
        """Bootstrap interval of the mean return."""
        return bootstrap_interval(self.returns, confidence=confidence)

    @property
    def mean_length(self) -> float:
        return float(self.lengths.mean())

    def as_record(self) -> dict[str, object]:
        """As JSON values: means and 95 % intervals."""
        return {
            "episodes": len(self.seeds),
            "success_rate": self.success_rate,
            "success_interval": self.success_interval(),
            "mean_return": self.mean_return,
            "return_interval": self.return_interval(),
            "mean_length": self.mean_length,
        }


def evaluate(
    act: Act,
    environments: VectorEnvironment,
    episodes: int | Sequence[int],
    seed: int = 0,
    *,
    begin: Callable[[Bools], None] | None = None,
) -> Evaluation:
    """Run one episode of every one of a fixed set of seeds.

    The result does not depend on the number of environments, if ``act`` answers each row by itself
    and takes whatever noise it needs from :meth:`VectorEnvironment.noise`. (A network may round
    differently in batches of another size, and a chaotic simulator may show it.)

    Parameters
    ----------
    act : callable
        Observations to chunks of actions.
    environments : VectorEnvironment
        Reset by this: use others than those that a policy is trained in.
    episodes : int or sequence of int
        The first so many, at least 1, of the set; or the numbers of those that are wanted.
    seed : int
        Of the set of episodes. Never the seeds of training or of recorded demonstrations.
    begin : callable, optional
        Told before ``act`` is asked in which environments ``(count,)`` an episode has just begun,
        for policies that remember.

    Raises
    ------
    ValueError
        If there are no episodes, or ``act`` answers in a wrong shape.
    SimulatorError
        If an action is not finite.
    """
    numbers = range(episodes) if isinstance(episodes, int) else episodes
    if not len(numbers):
        raise ValueError(f"episodes is {episodes}: it must be at least 1")
    known = episode_seeds(seed, max(numbers) + 1, stream="evaluation")
    seeds = [known[number] for number in numbers]
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=np.int64)
    success = np.zeros(len(seeds), dtype=np.bool_)
    observations = environments.reset(seeds)
    begun = environments.running
    while environments.running.any():
        if begin is not None and begun.any():
            begin(begun)
        step = environments.step(act(observations))
        which = step.episodes[step.ended]
        returns[which] = step.episode_returns[step.ended]
        lengths[which] = step.episode_lengths[step.ended]
        success[which] = step.success[step.ended]
        observations, begun = step.observations, step.ended & environments.running
    return Evaluation(seeds, returns, lengths, success if environments.reports_success else None)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` ``(n,)``.

    Raises
    ------
    ValueError
        If there are no values, or ``confidence`` is not between 0 and 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 1:
        raise ValueError(f"values has shape {values.shape}: it must be (n,) with n at least 1")
    normal_quantile(confidence)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
