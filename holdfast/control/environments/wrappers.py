"""Wrappers of a single Gymnasium environment. Imported only once Gymnasium is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from holdfast.control.environments.optional import SimulatorError
from holdfast.control.environments.seeds import PARKED

Restored = Literal["exact", "other", "anew"]
SUCCESS_KEYS = ("success", "is_success")
"""Where a step's ``info`` tells of success: Meta-World and robosuite, gymnasium-robotics."""


def success_of(info: dict[str, Any]) -> bool | None:
    """Whether ``info`` tells of success; ``None`` where the task does not define it."""
    return next((bool(info[key]) for key in SUCCESS_KEYS if key in info), None)


class SparseSuccess(gymnasium.Wrapper):
    """Reward 1 at the first success, where the episode terminates; 0 everywhere else."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(action)
        success = success_of(info)
        if success is None:
            raise SimulatorError(
                f"{self.env} does not report success, so it has no sparse reward; leave out sparse "
                "(to record demonstrations: --dense)"
            )
        terminated = terminated or success
        return observation, float(success), terminated, truncated and not terminated, info


class Episodes(gymnasium.Wrapper):
    """Episodes from seeds, run by chunks of actions, seen through a window of observations.

    ``step`` takes a chunk ``(horizon, action_size)`` of any horizon, executes it until the episode
    ends, and returns the summed reward. The executed actions are kept, so that a running episode
    can be saved: seed and actions determine it.

    Parameters
    ----------
    env : gymnasium.Env
        With a flat observation.
    next_seed : callable
        The seed of the next episode, or ``PARKED``: then nothing moves until the next reset.
    history : int
        Observations in the window.
    """

    def __init__(self, env: gymnasium.Env, next_seed: Callable[[], int], history: int) -> None:
        super().__init__(env)
        (size,) = env.observation_space.shape or (0,)
        self.observation_space = spaces.Box(-np.inf, np.inf, (history, size), np.float32)
        self.executed = 0
        """Actions of the last chunk that were executed."""
        self.succeeded = False
        """Whether the episode of the last chunk had succeeded by its end."""
        self.reports_success = False
        self._actions: list[NDArray[np.float32]] = []
        self._next_seed = next_seed
        self._parked = False
        self._success = False
        self._window = np.zeros((history, size), dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin the next episode of the schedule; ``seed`` is not used."""
        return self._begin(self._next_seed()), {}

    def step(
        self, chunk: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.executed = 0
        total, terminated, truncated = 0.0, False, False
        if not self._parked:
            for action in chunk:
                observation, reward, terminated, truncated, info = self.env.step(action)
                self._seen(observation)
                self._actions.append(action.copy())
                self.executed += 1
                total += float(reward)
                success = success_of(info)
                self.reports_success |= success is not None
                self._success |= bool(success)
                if terminated or truncated:
                    break
        self.succeeded = self._success
        # Termination wins: where both hold, there is nothing to bootstrap from.
        truncated = truncated and not terminated
        return self._window.copy(), total, bool(terminated), bool(truncated), {}

    def saved(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides the seed."""
        actions = np.array(self._actions, dtype=np.float32)
        return {
            "actions": torch.from_numpy(actions.reshape(-1, *self.action_space.shape)),
            "success": self._success,
            "window": torch.from_numpy(self._window.copy()),
        }

    def restore(self, seed: int, saved: Mapping[str, Any]) -> tuple[NDArray[np.float32], Restored]:
        """Run the episode of ``seed`` again up to where it was saved.

        If the simulator does not repeat itself, and ends the episode before that, it begins again.

        Returns
        -------
        tuple
            The window of observations, and what it is: ``exact``, the saved one; ``other``, where
            the same actions led; ``anew``, the first of the episode.
        """
        self._begin(seed)
        for action in saved["actions"].numpy():
            observation, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                return self._begin(seed), "anew"
            self._seen(observation)
            self._actions.append(action.copy())
        self._success = bool(saved["success"])
        exact = self._parked or np.array_equal(self._window, saved["window"].numpy())
        return self._window.copy(), "exact" if exact else "other"

    def _begin(self, seed: int) -> NDArray[np.float32]:
        self._parked = seed == PARKED
        self._actions = []
        self._success = False
        if not self._parked:
            self._window[:] = self.env.reset(seed=seed)[0]
        return self._window.copy()

    def _seen(self, observation: Any) -> None:
        self._window[:-1] = self._window[1:]
        self._window[-1] = observation
