"""What every environment looks like to a policy, whichever simulator is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.environments.keyed import keyed_normal
from holdfast.control.environments.optional import SimulatorError
from holdfast.control.environments.seeds import PARKED, SeedSchedule

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

Act = Callable[[Floats], Floats]
"""A policy as an environment sees it: observations ``(count, history, observation_size)`` in,
chunks of actions ``(count, horizon, action_size)`` out, any horizon of at least 1."""


@dataclass(frozen=True)
class EnvironmentOptions:
    """How a task is presented.

    Attributes
    ----------
    history : int
        Observations a policy sees: the newest and those before it. Before an episode's first
        observation stands that observation again.
    time_limit : int, optional
        Steps after which an episode is truncated; by default the task's own limit.
    sparse : bool
        Replace the reward by 1 at the first success, where the episode then terminates, and 0
        everywhere else.
    render : bool
        Whether :meth:`VectorEnvironment.render` will be called.
    keywords : mapping
        Passed on to whatever makes the task, for instance ``{"terminate_when_unhealthy": False}``.
    """

    history: int = 1
    time_limit: int | None = None
    sparse: bool = False
    render: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history is {self.history}: it must be at least 1")
        if self.time_limit is not None and self.time_limit < 1:
            raise ValueError(f"time_limit is {self.time_limit}: it must be at least 1")


@dataclass(frozen=True)
class Step:
    """What a chunk of actions led to, in every environment.

    Attributes
    ----------
    observations : ndarray
        ``(count, history, observation_size)``: what the policy acts on next. Where an episode ended
        these are the first of the next one.
    final_observations : ndarray
        As ``observations``, but always of the episode that the chunk was executed in: what a value
        is bootstrapped from. Both are equal where no episode ended.
    rewards : ndarray
        ``(count,)``: the sum over the executed actions.
    terminated, truncated : ndarray
        ``(count,)``: the episode ended by itself; it was cut by a time limit. Never both.
    success : ndarray
        ``(count,)``: whether the episode has succeeded so far.
    lengths : ndarray
        ``(count,)``: actions that were executed, which is less than the horizon where an episode
        ended within the chunk, and 0 in a parked environment.
    episodes : ndarray
        ``(count,)``: number of the episode, as in :attr:`VectorEnvironment.episodes` before.
    episode_lengths, episode_returns : ndarray
        ``(count,)``: steps and undiscounted rewards of the episode so far.
    """

    observations: Floats
    final_observations: Floats
    rewards: Floats
    terminated: Bools
    truncated: Bools
    success: Bools
    lengths: Integers
    episodes: Integers
    episode_lengths: Integers
    episode_returns: NDArray[np.float64]

    @property
    def ended(self) -> Bools:
        """``(count,)``: whether the episode ended, either way."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class Advance:
    """The part of a :class:`Step` that a simulator knows."""

    observations: Floats
    final_observations: Floats
    rewards: NDArray[np.float64]
    terminated: Bools
    truncated: Bools
    success: Bools
    lengths: Integers


class VectorEnvironment(ABC):
    """Several environments of one task, stepped together.

    An episode is a function of its seed and of the actions: not of the number of environments, nor
    of the episodes before it. An environment whose episode ended begins the next one in the same
    step.

    Parameters
    ----------
    name : str
        As it was asked for.
    count : int
        Environments, at least 1.
    observation_size : int
        Entries of an observation.
    action_low, action_high : ndarray
        ``(action_size,)``. Actions beyond are clipped.
    options : EnvironmentOptions
        How the task is presented.
    seed : int
        Used by :meth:`reset` when it is not given another.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        observation_size: int,
        action_low: Floats,
        action_high: Floats,
        options: EnvironmentOptions,
        seed: int,
    ) -> None:
        self.name = name
        self.count = count
        self.observation_size = observation_size
        self.action_low = np.asarray(action_low, dtype=np.float32)
        self.action_high = np.asarray(action_high, dtype=np.float32)
        self.action_size = len(self.action_low)
        self.options = options
        self.seed = seed
        self.schedule = SeedSchedule(seed, count)
        self.episode_lengths: Integers = np.zeros(count, dtype=np.int64)
        self.episode_returns = np.zeros(count)
        self._started = False

    @property
    def seeds(self) -> Integers:
        """``(count,)``: seeds of the episodes that run now; -1 where an environment is parked."""
        return self.schedule.seeds.copy()

    @property
    def episodes(self) -> Integers:
        """``(count,)``: numbers of the episodes that run now, within their environment, or in the
        list of seeds that :meth:`reset` was given."""
        return self.schedule.episodes.copy()

    @property
    def running(self) -> Bools:
        """``(count,)``: whether an environment has an episode to run."""
        return self.schedule.seeds != PARKED

    @property
    @abstractmethod
    def reports_success(self) -> bool:
        """Whether the task says what success is; known once an episode has made a step."""

    def reset(self, seed: int | Sequence[int] | None = None) -> Floats:
        """Begin anew in every environment.

        Parameters
        ----------
        seed : int or sequence of int, optional
            An integer: episodes without end, each with a seed drawn from this one. A list: an
            episode for every seed in it, taken in turn by whichever environment is free; then the
            environments are parked and no longer move.

        Returns
        -------
        ndarray
            ``(count, history, observation_size)``.
        """
        self.schedule = SeedSchedule(self.seed if seed is None else seed, self.count)
        self.episode_lengths[:] = 0
        self.episode_returns[:] = 0.0
        self._started = True
        return self._begin()

    def step(self, chunks: Floats) -> Step:
        """Execute a chunk of actions, or what part of it an episode lasts.

        Parameters
        ----------
        chunks : ndarray
            ``(count, horizon, action_size)``; any horizon of at least 1.

        Raises
        ------
        ValueError
            For another shape.
        SimulatorError
            If an action is not finite, or :meth:`reset` was never called.
        """
        chunks = self._checked(chunks)
        episodes = self.episodes
        advance = self._advance(chunks)
        self.episode_lengths += advance.lengths
        self.episode_returns += advance.rewards
        step = Step(
            observations=advance.observations,
            final_observations=advance.final_observations,
            rewards=advance.rewards.astype(np.float32),
            terminated=advance.terminated,
            truncated=advance.truncated,
            success=advance.success,
            lengths=advance.lengths,
            episodes=episodes,
            episode_lengths=self.episode_lengths.copy(),
            episode_returns=self.episode_returns.copy(),
        )
        self.episode_lengths[step.ended] = 0
        self.episode_returns[step.ended] = 0.0
        return step

    def noise(self, *shape: int) -> Floats:
        """Standard normal noise ``(count, *shape)`` for the coming action.

        A function of each episode's seed and step, so that a stochastic policy that uses it acts
        alike however many environments there are.
        """
        keys = np.stack([self.schedule.seeds, self.episode_lengths], axis=1)
        drawn = keyed_normal(keys, int(np.prod(shape)))
        return drawn.reshape(self.count, *shape).astype(np.float32)

    @abstractmethod
    def render(self) -> list[NDArray[np.uint8]]:
        """A picture ``(height, width, 3)`` of every environment."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state: nested JSON values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> Floats:
        """Continue from ``state``; returns the observations ``(count, history, size)`` there."""

    def close(self) -> None:  # noqa: B027
        """Free what the simulator holds, if anything."""

    @abstractmethod
    def _begin(self) -> Floats:
        """Begin an episode everywhere, with seeds from the schedule."""

    @abstractmethod
    def _advance(self, chunks: Floats) -> Advance:
        """Execute chunks of valid actions, and begin the next episode where one ended."""

    def _checked(self, chunks: Floats) -> Floats:
        chunks = np.asarray(chunks, dtype=np.float32)
        wanted = (self.count, "horizon", self.action_size)
        if chunks.ndim != 3 or chunks.shape[::2] != wanted[::2] or chunks.shape[1] < 1:
            raise ValueError(f"chunks has shape {chunks.shape}: it must be {wanted}")
        if not self._started:
            raise SimulatorError(f"{self.name} was stepped before it was reset")
        if not np.isfinite(chunks).all():
            slot, step, entry = np.argwhere(~np.isfinite(chunks))[0]
            raise SimulatorError(
                f"{self.name}: entry {entry} of action {step} of the chunk for environment {slot} "
                f"is {chunks[slot, step, entry]}, not a finite number"
            )
        return np.clip(chunks, self.action_low, self.action_high)
