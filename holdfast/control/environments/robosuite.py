"""robosuite, the simulator behind robomimic's tasks.

It needs numpy below 2: the extra ``robosuite`` is for an environment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.environments.interface import EnvironmentOptions
from holdfast.control.environments.optional import SimulatorError, require
from holdfast.control.environments.synchronous import GymnasiumEnvironment, prepare_rendering
from holdfast.errors import nearest

PREFIX = "robosuite/"
_INSTALL = "pip install 'holdfast[robosuite]' (in an environment of its own: it needs numpy<2)"


@dataclass(frozen=True)
class _Task:
    """robosuite's name for a task, its arms, and the time limit in the fine-tuning literature."""

    name: str
    arms: int
    time_limit: int


TASKS = {
    "lift": _Task("Lift", 1, 300),
    "can": _Task("PickPlaceCan", 1, 300),
    "square": _Task("NutAssemblySquare", 1, 400),
    "transport": _Task("TwoArmTransport", 2, 800),
}


def make_robosuite(
    name: str, count: int, *, options: EnvironmentOptions, seed: int
) -> GymnasiumEnvironment:
    """``robosuite/lift``, ``can``, ``square`` or ``transport``, with Panda arms.

    Observations are, of every arm, the position and orientation of the hand and the gripper's
    joints, and then the state of the objects. Actions move the hand (position, rotation, gripper),
    20 a second. The reward is robosuite's sparse one.

    Raises
    ------
    SimulatorError
        If there is no such task, or robosuite is not installed.
    """
    key = name.removeprefix(PREFIX).lower()
    if key not in TASKS:
        raise SimulatorError(f"no robosuite task '{key}' is known here{nearest(key, TASKS)}")
    require("robosuite", name, install=_INSTALL)
    return GymnasiumEnvironment(
        name, count, partial(_make, TASKS[key], options), options=options, seed=seed
    )


def _make(task: _Task, options: EnvironmentOptions) -> Any:
    import gymnasium
    import robosuite

    if options.render:
        prepare_rendering()
    keywords = {
        "robots": ["Panda"] * task.arms,
        "has_renderer": False,
        "has_offscreen_renderer": options.render,
        "use_camera_obs": False,
        "use_object_obs": True,
        "reward_shaping": False,
        "control_freq": 20,
        # A new model at every reset would take a second; the placements are drawn anew either way.
        "hard_reset": False,
        "ignore_done": True,
        # Sizes of objects are drawn when the model is made: the same ones in every environment.
        "seed": 0,
        **options.keywords,
    }
    simulator = robosuite.make(task.name, **keywords)
    keys = [
        *(
            f"robot{arm}_{part}"
            for arm in range(task.arms)
            for part in ("eef_pos", "eef_quat", "gripper_qpos")
        ),
        "object-state",
    ]

    class Env(gymnasium.Env):
        def __init__(self) -> None:
            low, high = simulator.action_spec
            self.action_space = gymnasium.spaces.Box(
                low.astype(np.float32), high.astype(np.float32), dtype=np.float32
            )
            size = len(self._flat(simulator.reset()))
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,))
            self.render_mode = "rgb_array" if options.render else None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[NDArray[np.floating], dict[str, Any]]:
            # Every sampler of placements holds this very generator, so it is reseeded in place.
            simulator.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
            return self._flat(simulator.reset()), {}

        def step(
            self, action: Any
        ) -> tuple[NDArray[np.floating], float, bool, bool, dict[str, Any]]:
            observation, reward, _, _ = simulator.step(action)
            success = bool(simulator._check_success())
            return self._flat(observation), float(reward), False, False, {"success": success}

        def render(self) -> NDArray[np.uint8]:
            # MuJoCo's pictures come upside down.
            return simulator.sim.render(camera_name="agentview", width=240, height=240)[::-1]

        def close(self) -> None:
            simulator.close()

        @staticmethod
        def _flat(observation: Any) -> NDArray[np.floating]:
            return np.concatenate([np.ravel(observation[key]) for key in keys])

    return gymnasium.wrappers.TimeLimit(Env(), options.time_limit or task.time_limit)
