"""Meta-World: fifty manipulation tasks of a Sawyer arm, each with a scripted expert.

Three things are not as they look. ``reset(seed=...)`` does nothing there, and a task set in the
usual way draws its goals from fifty fixed ones: here goals are continuous and drawn from the
episode's seed. The observation space is cached before the goal is made visible, and would clip the
goal to zero: the cache is emptied. An episode never ends at success, and a step after the 500th
raises: the time limit is at most 500.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.control.environments.interface import EnvironmentOptions, Floats
from holdfast.control.environments.optional import SimulatorError, require
from holdfast.control.environments.synchronous import GymnasiumEnvironment, prepare_rendering
from holdfast.errors import nearest

if TYPE_CHECKING:
    from holdfast.control.environments.interface import Act

PREFIX = "metaworld/"
TIME_LIMIT = 500


def make_metaworld(
    name: str, count: int, *, options: EnvironmentOptions, seed: int
) -> GymnasiumEnvironment:
    """A task such as ``metaworld/peg-insert-side``.

    Raises
    ------
    SimulatorError
        If there is no such task, Meta-World is missing, or the time limit is above 500.
    """
    tasks = require("metaworld.env_dict", name).ALL_V3_ENVIRONMENTS
    task = _known(name, tasks)
    limit = options.time_limit or TIME_LIMIT
    if limit > TIME_LIMIT:
        raise SimulatorError(
            f"{name}: time_limit is {limit}, but Meta-World stops at {TIME_LIMIT} steps"
        )
    return GymnasiumEnvironment(
        name, count, partial(_make, tasks[task], options, limit), options=options, seed=seed
    )


def metaworld_expert(name: str) -> Act:
    """The scripted expert of a task; its actions are clipped to [-1, 1].

    It acts on the newest observation alone and answers with chunks of one action.
    """
    policies = require("metaworld.policies", name).ENV_POLICY_MAP
    policy = policies[_known(name, policies)]()

    def act(observations: Floats) -> Floats:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that an action will be clipped
            actions = [policy.get_action(row.astype(np.float64)) for row in observations[:, -1]]
        return np.clip(np.stack(actions), -1.0, 1.0).astype(np.float32)[:, None]

    return act


def _known(name: str, tasks: Any) -> str:
    task = name.removeprefix(PREFIX).removesuffix("-v3")
    known = [key.removesuffix("-v3") for key in tasks]
    if task not in known:
        raise SimulatorError(f"Meta-World has no task '{task}'{nearest(task, known)}")
    return f"{task}-v3"


def _make(task: Any, options: EnvironmentOptions, limit: int) -> Any:
    import gymnasium

    class Seeded(gymnasium.Wrapper):
        """Draws the goal from the seed that ``reset`` is given."""

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            self.env.seed(seed)
            return self.env.reset()

    if options.render:
        prepare_rendering()
    # The size in pixels that it has by default takes a quarter of a second to draw.
    size = {"width": 240, "height": 240} if options.render else {}
    env = task(render_mode="rgb_array" if options.render else None, **{**size, **options.keywords})
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    return gymnasium.wrappers.TimeLimit(Seeded(env), limit)
