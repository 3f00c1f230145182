"""Which episode an environment runs next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from holdfast.control.environments.keyed import training_seed

PARKED = -1
"""The seed of an environment that has no episode left to run."""


class SeedSchedule:
    """Hands out the seeds of episodes.

    Either without end, each environment its own row of seeds, or a given list of seeds to whichever
    environment is free, after which environments are parked.

    Parameters
    ----------
    seed : int or sequence of int
        The seed that all others are drawn from, or the list of seeds.
    count : int
        Environments.

    Attributes
    ----------
    seeds : ndarray
        ``(count,)``: seeds of the episodes that run now; ``PARKED`` where there is none.
    episodes : ndarray
        ``(count,)``: their numbers, within the environment, or in the list of seeds.
    """

    def __init__(self, seed: int | Sequence[int], count: int) -> None:
        self._seed = int(seed) if isinstance(seed, int | np.integer) else None
        self._list = [] if self._seed is not None else [int(s) for s in seed]  # type: ignore[union-attr]
        if any(s < 0 for s in self._list) or (self._seed is not None and self._seed < 0):
            raise ValueError(f"seed is {seed}: seeds must not be negative")
        self._position = 0
        self.seeds = np.full(count, PARKED, dtype=np.int64)
        self.episodes = np.full(count, -1, dtype=np.int64)

    def next(self, slot: int) -> int:
        """Begin the next episode of environment ``slot``: its seed, or ``PARKED``."""
        if self._seed is not None:
            self.episodes[slot] += 1
            self.seeds[slot] = training_seed(self._seed, slot, int(self.episodes[slot]))
        elif self._position < len(self._list):
            self.episodes[slot] = self._position
            self.seeds[slot] = self._list[self._position]
            self._position += 1
        else:
            self.seeds[slot] = PARKED
        return int(self.seeds[slot])

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "list": self._list,
            "position": self._position,
            "seeds": self.seeds.tolist(),
            "episodes": self.episodes.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["seeds"]) != len(self.seeds):
            raise ValueError(
                f"state holds {len(state['seeds'])} environments, but there are {len(self.seeds)}"
            )
        self._seed, self._list = state["seed"], list(state["list"])
        self._position = int(state["position"])
        self.seeds[:] = state["seeds"]
        self.episodes[:] = state["episodes"]
