"""Simulators that step all their environments as one batch: no Gymnasium needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.control.environments.interface import (
    Advance,
    Bools,
    EnvironmentOptions,
    Floats,
    Integers,
    VectorEnvironment,
)


@dataclass(frozen=True)
class Outcome:
    """One step of every environment; rows of environments that were not to move do not count.

    Attributes
    ----------
    rewards, terminated, success : ndarray
        ``(count,)``.
    """

    rewards: NDArray[np.floating]
    terminated: Bools
    success: Bools


class Simulator(Protocol):
    """A batch of environments, each of which can be restarted on its own."""

    observation_size: int
    action_low: Floats
    action_high: Floats
    time_limit: int

    def reset(self, slots: Integers, seeds: Integers) -> None:
        """Begin the episodes of ``seeds`` in the environments ``slots``."""
        ...

    def step(self, moving: Bools, actions: Floats) -> Outcome:
        """Move the environments ``moving`` by actions ``(count, action_size)``."""
        ...

    def observe(self) -> Floats:
        """``(count, observation_size)``, of every environment."""
        ...

    def draw(self) -> list[NDArray[np.uint8]]:
        """A picture ``(height, width, 3)`` of every environment."""
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """The whole state: nested JSON values and tensors; ``None`` if it cannot be had."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        ...


class BatchedEnvironment(VectorEnvironment):
    """Episodes, chunks and windows of observations over a :class:`Simulator`.

    Of a simulator without a state the seeds of the running episodes are saved: loading begins these
    episodes again, with a warning.
    """

    def __init__(
        self,
        name: str,
        count: int,
        simulator: Simulator,
        *,
        options: EnvironmentOptions,
        seed: int,
    ) -> None:
        super().__init__(
            name,
            count,
            observation_size=simulator.observation_size,
            action_low=simulator.action_low,
            action_high=simulator.action_high,
            options=options,
            seed=seed,
        )
        self._simulator = simulator
        self._limit = options.time_limit or simulator.time_limit
        self._success = np.zeros(count, dtype=np.bool_)
        self._window = np.zeros((count, options.history, self.observation_size), dtype=np.float32)

    @property
    def reports_success(self) -> bool:
        return True

    def render(self) -> list[NDArray[np.uint8]]:
        return self._simulator.draw()

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "simulator": self._simulator.state_dict(),
            "success": self._success.tolist(),
            "lengths": self.episode_lengths.tolist(),
            "returns": self.episode_returns.tolist(),
            "observations": torch.from_numpy(self._window.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Floats:
        self.schedule.load_state_dict(state["schedule"])
        self._started = True
        if state["simulator"] is None:
            warnings.warn(
                f"{self.name} cannot save its state: the running episodes of its {self.count} "
                "environments begin again from their seeds",
                stacklevel=2,
            )
            self.episode_lengths[:], self.episode_returns[:] = 0, 0.0
            self._enter(np.arange(self.count))
            return self._window.copy()
        self._simulator.load_state_dict(state["simulator"])
        self._success[:] = state["success"]
        self.episode_lengths[:] = state["lengths"]
        self.episode_returns[:] = state["returns"]
        self._window[:] = state["observations"].numpy()
        return self._window.copy()

    def _begin(self) -> Floats:
        self._restart(np.arange(self.count))
        return self._window.copy()

    def _advance(self, chunks: Floats) -> Advance:
        moving = self.running
        lengths = np.zeros(self.count, dtype=np.int64)
        rewards = np.zeros(self.count)
        terminated = np.zeros(self.count, dtype=np.bool_)
        truncated = np.zeros(self.count, dtype=np.bool_)
        for actions in chunks.swapaxes(0, 1):
            if not moving.any():
                break
            outcome = self._simulator.step(moving, actions)
            success = moving & outcome.success
            first = success & ~self._success
            self._success |= success
            lengths += moving
            if self.options.sparse:
                rewards += first
                terminated |= first
            else:
                rewards += np.where(moving, outcome.rewards, 0.0)
            terminated |= moving & outcome.terminated
            over = self.episode_lengths + lengths >= self._limit
            truncated |= moving & over & ~terminated
            self._see(moving)
            moving = moving & ~terminated & ~truncated
        final, succeeded = self._window.copy(), self._success.copy()
        ended = terminated | truncated
        if ended.any():
            self._restart(np.flatnonzero(ended))
        return Advance(
            observations=self._window.copy() if ended.any() else final,
            final_observations=final,
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
            success=succeeded,
            lengths=lengths,
        )

    def _restart(self, slots: Integers) -> None:
        for slot in slots:
            self.schedule.next(int(slot))
        self._enter(slots)

    def _enter(self, slots: Integers) -> None:
        """Begin the episodes that the schedule has for these environments."""
        self._success[slots] = False
        fresh = slots[self.running[slots]]
        if len(fresh):
            self._simulator.reset(fresh, self.schedule.seeds[fresh])
            self._window[fresh] = self._simulator.observe()[fresh, None]

    def _see(self, moving: Bools) -> None:
        observed = self._simulator.observe()
        self._window[moving, :-1] = self._window[moving, 1:]
        self._window[moving, -1] = observed[moving]
