"""Fetch, a second simulator of manipulation: tasks of gymnasium-robotics, and an expert for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from holdfast.control.environments.interface import Floats
from holdfast.control.environments.optional import require

if TYPE_CHECKING:
    from holdfast.control.environments.interface import Act

_GAIN = 10.0  # Actions a metre of error: an action of 1 moves the gripper by about 5 cm.
_NEAR = 0.012  # metres
_HOVER = 0.06  # metres above the block before descending
_GRIPPED = 0.055  # metres between the fingers, a little more than the block is wide
_OPEN, _CLOSED = 1.0, -1.0


def register(name: str) -> None:
    """Make the Fetch tasks known to Gymnasium."""
    gymnasium = require("gymnasium", name)
    robotics = require("gymnasium_robotics", name)
    gymnasium.register_envs(robotics)


def fetch_expert(name: str) -> Act:
    """Picks the block up and carries it to the goal, in ``FetchPickAndPlace``.

    A function of the newest observation (achieved goal, desired goal, observation) alone.
    """

    def act(observations: Floats) -> Floats:
        newest = observations[:, -1].astype(np.float64)
        goal, gripper, block = newest[:, 3:6], newest[:, 6:9], newest[:, 9:12]
        width = newest[:, 15] + newest[:, 16]
        offset = block - gripper
        sideways = np.linalg.norm(offset[:, :2], axis=1)
        around = (sideways < _NEAR) & (np.abs(offset[:, 2]) < _NEAR)
        held = around & (width < _GRIPPED)
        above = sideways < _NEAR

        hover = offset + np.array([0.0, 0.0, _HOVER])
        move = np.where(above[:, None], offset, hover)
        move = np.where(around[:, None], 0.0, move)  # wait until the fingers have closed
        move = np.where(held[:, None], goal - block, move)
        fingers = np.where(around, _CLOSED, _OPEN)
        actions = np.concatenate([_GAIN * move, fingers[:, None]], axis=1)
        return np.clip(actions, -1.0, 1.0).astype(np.float32)[:, None]

    return act
