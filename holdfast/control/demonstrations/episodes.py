"""Demonstrations in memory: one form, whichever file they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Episode:
    """One episode.

    Attributes
    ----------
    observations : ndarray
        ``(T + 1, observation_size)``, or ``(T, observation_size)`` where the last was not kept.
    actions : ndarray
        ``(T, action_size)``.
    rewards : ndarray, optional
        ``(T,)``; ``None`` where the source has none.
    terminated, truncated : bool
        How it ended. Neither: the recording was cut short.
    success : bool, optional
        ``None`` where the source does not say.
    seed : int, optional
        From which the environment repeats the episode, given the actions.
    """

    observations: Floats
    actions: Floats
    rewards: Floats | None
    terminated: bool
    truncated: bool
    success: bool | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def total_reward(self) -> float | None:
        """The undiscounted return, where rewards are known."""
        return None if self.rewards is None else float(self.rewards.sum(dtype=np.float64))


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of one task.

    Attributes
    ----------
    episodes : tuple of Episode
        At least one when they come from a file.
    source : str
        Where they come from, for messages.
    environment : str, optional
        The task, as :func:`~holdfast.control.environments.make_environments` takes it.
    details : mapping
        How they were made: JSON values.
    """

    episodes: tuple[Episode, ...]
    source: str
    environment: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)

    @property
    def observation_size(self) -> int:
        return self.episodes[0].observations.shape[1]

    @property
    def action_size(self) -> int:
        return self.episodes[0].actions.shape[1]

    @property
    def steps(self) -> int:
        """Actions in all episodes."""
        return sum(len(episode) for episode in self)

    @property
    def observations(self) -> Floats:
        """``(steps, observation_size)``: those that an action follows. What to normalise with."""
        return np.concatenate([e.observations[: len(e)] for e in self])

    @property
    def actions(self) -> Floats:
        """``(steps, action_size)``."""
        return np.concatenate([episode.actions for episode in self])

    def select(self, indices: Sequence[int]) -> Demonstrations:
        """The episodes ``indices``, in that order."""
        return replace(self, episodes=tuple(self.episodes[index] for index in indices))

    def split(self, held_out: float, *, seed: int) -> tuple[Demonstrations, Demonstrations]:
        """Cut off a share of the episodes, drawn from ``seed``, to evaluate on.

        Whole episodes: neighbouring steps are so alike that a split within one would hide
        over-fitting.

        Parameters
        ----------
        held_out : float
            Share between 0 and 1; rounded to episodes, at least one of either part.

        Raises
        ------
        ValueError
            If the share is out of range, or there is but one episode.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}: it must be between 0 and 1")
        if len(self) < 2:
            raise ValueError("one episode cannot be split: record at least two")
        count = min(max(round(held_out * len(self)), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))
