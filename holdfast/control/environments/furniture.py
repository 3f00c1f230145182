"""FurnitureBench's simulated tasks, through its own vector environment. Not measured here.

FurnitureSim runs on Isaac Gym, which is distributed by hand, needs an NVIDIA GPU and Python 3.8.
This adapter follows the interface of ``FurnitureSimEnv``: tensors ``(count, ...)`` in dictionaries,
``step`` without reset, ``reset_env(index)``, and ``furnitures[index].all_assembled()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.control.environments.batched import BatchedEnvironment, Outcome
from holdfast.control.environments.interface import Bools, EnvironmentOptions, Floats, Integers
from holdfast.control.environments.optional import SimulatorError, require

PREFIX = "furniture/"
TIME_LIMIT = 700
_INSTALL = (
    "Isaac Gym by hand from NVIDIA, then pip install -e of a checkout of furniture-bench, "
    "both with Python 3.8 and an NVIDIA GPU"
)
_OBSERVATIONS = (
    "robot_state/ee_pos",
    "robot_state/ee_quat",
    "robot_state/ee_pos_vel",
    "robot_state/ee_ori_vel",
    "robot_state/gripper_width",
    "parts_poses",
)


def make_furniture(
    name: str, count: int, *, options: EnvironmentOptions, seed: int
) -> BatchedEnvironment:
    """A task such as ``furniture/one_leg``.

    Raises
    ------
    SimulatorError
        If Isaac Gym or FurnitureBench is not installed.
    """
    for module in ("isaacgym", "gym", "furniture_bench"):
        require(module, name, install=_INSTALL)
    import gym

    vector = gym.make(
        "FurnitureSim-v0",
        furniture=name.removeprefix(PREFIX),
        num_envs=count,
        obs_keys=list(_OBSERVATIONS),
        concat_robot_state=True,
        headless=not options.render,
        # Its own limit would look like a termination; ours is counted outside.
        max_env_steps=10**9,
        **options.keywords,
    ).unwrapped
    simulator = FurnitureSimulator(vector, count)
    return BatchedEnvironment(name, count, simulator, options=options, seed=seed)


class FurnitureSimulator:
    """FurnitureSim as a batch of environments.

    The reward is 1 for every pair of parts that is assembled; an episode terminates in success when
    all are. All environments move in one simulation: one that is not to move gets an action of
    zero, and its outcome does not count.
    """

    time_limit = TIME_LIMIT

    def __init__(self, vector: Any, count: int) -> None:
        self._vector = vector
        space = vector.action_space
        self.action_low = np.asarray(space.low, dtype=np.float32).reshape(count, -1)[0]
        self.action_high = np.asarray(space.high, dtype=np.float32).reshape(count, -1)[0]
        self._observed = _flat(vector.reset())
        self.observation_size = self._observed.shape[1]

    def reset(self, slots: Integers, seeds: Integers) -> None:
        for slot, seed in zip(slots, seeds, strict=True):
            with _numpy_seeded(int(seed)):
                self._vector.reset_env(int(slot))
            # Without this, the next reset would undo this one.
            self._vector.refresh()
        self._observed = _flat(self._vector.get_observation())

    def step(self, moving: Bools, actions: Floats) -> Outcome:
        device = self._vector.device
        still = torch.zeros(())
        chosen = torch.where(torch.from_numpy(moving)[:, None], torch.from_numpy(actions), still)
        observation, rewards, _, _ = self._vector.step(chosen.to(device))
        self._observed = _flat(observation)
        assembled = np.array([bool(f.all_assembled()) for f in self._vector.furnitures])
        return Outcome(_numpy(rewards).reshape(-1), assembled, assembled)

    def observe(self) -> Floats:
        return self._observed

    def draw(self) -> list[NDArray[np.uint8]]:
        return [np.asarray(image, dtype=np.uint8) for image in self._vector.render("rgb_array")]

    def state_dict(self) -> None:
        """FurnitureSim cannot save its state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise SimulatorError("FurnitureSim has no state to load")


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """FurnitureBench draws placements from NumPy's global state: lend it one, give ours back."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _flat(observation: Mapping[str, Any]) -> Floats:
    parts = [_numpy(observation[key]) for key in ("robot_state", "parts_poses")]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _numpy(values: Any) -> Floats:
    return torch.as_tensor(values).detach().cpu().numpy().astype(np.float32)
