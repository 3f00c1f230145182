"""Any Gymnasium task, through Gymnasium's own vector environment.

One process: for cheap simulators the pipes of several cost more than they win.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.environments.interface import (
    Advance,
    EnvironmentOptions,
    Floats,
    VectorEnvironment,
)
from holdfast.control.environments.optional import SimulatorError, require

_INEXACT = {
    "other": "they go on from where the same actions led",
    "anew": "the same actions ended them early, so they begin again",
}
"""By what became of an episode that was not restored: what is said of it."""


class GymnasiumEnvironment(VectorEnvironment):
    """Gymnasium environments that are stepped one after another, with same-step autoreset.

    The state of a simulator is not saved. What is saved are the seeds of the running episodes and
    the actions executed in them; loading runs those episodes again up to the same step. This is
    exact where an episode is a function of its seed and actions, which holds for Gymnasium's
    MuJoCo tasks, Meta-World, Fetch and robosuite. Where it does not hold, loading warns, and the
    episode goes on from wherever the same actions led; if they ended it early, it begins again.

    Parameters
    ----------
    name, count, options, seed
        As in :class:`VectorEnvironment`.
    make : callable
        Makes one environment, with a flat observation and any time limit.

    Raises
    ------
    SimulatorError
        If actions are not a vector of numbers, or the task does not know a keyword.
    """

    def __init__(
        self,
        name: str,
        count: int,
        make: Callable[[], Any],
        *,
        options: EnvironmentOptions,
        seed: int,
    ) -> None:
        gymnasium = require("gymnasium", name)
        from holdfast.control.environments.wrappers import Episodes, SparseSuccess

        def episodes(slot: int) -> Any:
            try:
                env = make()
            except TypeError as error:
                raise SimulatorError(f"{name} cannot be made: {error}") from error
            if options.sparse:
                env = SparseSuccess(env)
            return Episodes(env, lambda: self.schedule.next(slot), options.history)

        self._vector = gymnasium.vector.SyncVectorEnv(
            [partial(episodes, slot) for slot in range(count)],
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        )
        self._envs: list[Episodes] = self._vector.envs
        space = self._vector.single_action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise SimulatorError(
                f"{name} has actions {space}; only vectors of numbers (Box of one dimension) work"
            )
        super().__init__(
            name,
            count,
            observation_size=self._vector.single_observation_space.shape[-1],
            action_low=space.low,
            action_high=space.high,
            options=options,
            seed=seed,
        )

    @property
    def reports_success(self) -> bool:
        return any(env.reports_success for env in self._envs)

    def render(self) -> list[NDArray[np.uint8]]:
        return [np.asarray(env.render(), dtype=np.uint8) for env in self._envs]

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "episodes": [env.saved() for env in self._envs],
            "lengths": self.episode_lengths.tolist(),
            "returns": self.episode_returns.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Floats:
        self.schedule.load_state_dict(state["schedule"])
        restored = [
            env.restore(int(seed), saved)
            for env, seed, saved in zip(
                self._envs, self.schedule.seeds, state["episodes"], strict=True
            )
        ]
        self.episode_lengths[:] = state["lengths"]
        self.episode_returns[:] = state["returns"]
        self._started = True
        found = {how: [s for s, (_, h) in enumerate(restored) if h == how] for how in _INEXACT}
        for slot in found["anew"]:
            self.episode_lengths[slot], self.episode_returns[slot] = 0, 0.0
        for how, slots in found.items():
            if slots:
                warnings.warn(
                    f"{self.name}: the running episodes of environments {slots} were not restored "
                    f"exactly, because the simulator does not repeat itself; {_INEXACT[how]}",
                    stacklevel=2,
                )
        return np.stack([window for window, _ in restored])

    def close(self) -> None:
        self._vector.close()

    def _begin(self) -> Floats:
        return np.asarray(self._vector.reset()[0])

    def _advance(self, chunks: Floats) -> Advance:
        observations, rewards, terminated, truncated, infos = self._vector.step(chunks)
        final = observations.copy()
        for slot in np.flatnonzero(terminated | truncated):
            final[slot] = infos["final_obs"][slot]
        return Advance(
            observations=observations,
            final_observations=final,
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
            success=np.array([env.succeeded for env in self._envs]),
            lengths=np.array([env.executed for env in self._envs], dtype=np.int64),
        )


def make_gymnasium(
    name: str, count: int, *, options: EnvironmentOptions, seed: int
) -> GymnasiumEnvironment:
    """A task by its Gymnasium id, such as ``Hopper-v5``; ``module:id`` imports the module first.

    Raises
    ------
    SimulatorError
        If the id is not known, what it needs is not installed, or it has no time limit.
    """
    require("gymnasium", name)
    return GymnasiumEnvironment(
        name, count, partial(_registered, name, options), options=options, seed=seed
    )


def _registered(name: str, options: EnvironmentOptions) -> Any:
    import gymnasium

    if name.startswith("Fetch"):
        from holdfast.control.environments.fetch import register

        register(name)
    keywords = dict(options.keywords)
    if options.render:
        prepare_rendering()
        keywords["render_mode"] = "rgb_array"
    if options.time_limit is not None:
        keywords["max_episode_steps"] = options.time_limit
    try:
        env = gymnasium.make(name, disable_env_checker=True, **keywords)
    except gymnasium.error.DependencyNotInstalled as error:
        raise SimulatorError(
            f"{name}: {error}; install it with: pip install 'holdfast[control]'"
        ) from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise SimulatorError(f"{name} cannot be made: {error}") from error
    if env.spec is not None and env.spec.max_episode_steps is None:
        raise SimulatorError(f"{name} has no time limit; set time_limit to a number of steps")
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        env = gymnasium.wrappers.FlattenObservation(env)
    return env


def prepare_rendering() -> None:
    """Let MuJoCo draw without a display, unless the user has chosen how it draws.

    Elsewhere than on Linux it knows no EGL, and would refuse the word.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    # First, for where EGL is missing: told to use it, MuJoCo could not even be imported.
    with contextlib.suppress(ImportError):
        importlib.import_module("mujoco")
    os.environ["MUJOCO_GL"] = "egl"
