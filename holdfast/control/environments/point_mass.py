"""A point that has to reach a goal between obstacles: a sparse task that runs in no time.

The point starts at the lower edge of the square [-1, 1]² and has to reach a goal at the upper edge.
Its velocity follows the commanded one with a lag. Touching an obstacle ends the episode without
success. There are ways on both sides of every obstacle, so demonstrations have several modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.control.environments.batched import Outcome
from holdfast.control.environments.interface import Bools, Floats, Integers
from holdfast.control.environments.keyed import keyed_uniform

NAME = "holdfast/point-mass"
OBSTACLES = ((0.0, -0.4), (-0.45, 0.05), (0.45, 0.05), (0.0, 0.45))
RADIUS = 0.16
GOAL_RADIUS = 0.1
_SECONDS = 0.05  # of a step
_LAG = 0.4  # share of the way to the commanded velocity that a step goes
_MARGIN = 0.08  # that the expert keeps from an obstacle
_PIXELS = 128


class PointMass:
    """The simulator: ``count`` points as one batch, on tensors.

    Observations are position, velocity and goal, two entries each; actions are the commanded
    velocity, each entry in [-1, 1]. The reward is 1 at the goal, where the episode terminates, and
    0 everywhere else.

    Only additions, products, comparisons and square roots: the same numbers whatever the count.
    """

    observation_size = 6
    action_low: Floats = np.full(2, -1.0, dtype=np.float32)
    action_high: Floats = np.full(2, 1.0, dtype=np.float32)
    time_limit = 100

    def __init__(self, count: int) -> None:
        self._state = torch.zeros(count, 6)
        self._obstacles = torch.tensor(OBSTACLES)

    def reset(self, slots: Integers, seeds: Integers) -> None:
        start, goal = 2.0 * keyed_uniform(seeds[:, None], 2).T - 1.0
        begun = np.zeros((len(slots), 6), dtype=np.float32)
        begun[:, 0], begun[:, 1] = 0.5 * start, -0.9
        begun[:, 4], begun[:, 5] = 0.7 * goal, 0.9
        self._state[torch.from_numpy(slots)] = torch.from_numpy(begun)

    def step(self, moving: Bools, actions: Floats) -> Outcome:
        position, velocity, goal = self._state.split(2, dim=1)
        velocity = velocity + _LAG * (torch.from_numpy(actions) - velocity)
        moved = position + _SECONDS * velocity
        position = moved.clamp(-1.0, 1.0)
        velocity = torch.where(moved == position, velocity, torch.zeros(()))
        state = torch.cat([position, velocity, goal], dim=1)
        self._state = torch.where(torch.from_numpy(moving)[:, None], state, self._state)
        hit = (_distance(position[:, None], self._obstacles) < RADIUS).any(dim=1)
        reached = (_distance(position, goal) < GOAL_RADIUS) & ~hit
        return Outcome(reached.numpy().astype(np.float32), (reached | hit).numpy(), reached.numpy())

    def observe(self) -> Floats:
        return self._state.numpy().copy()

    def draw(self) -> list[NDArray[np.uint8]]:
        return [draw_point_mass(row) for row in self.observe()]

    def state_dict(self) -> dict[str, Any]:
        return {"points": self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = state["points"].clone()


def point_mass_expert(observations: Floats) -> Floats:
    """Heads for the goal, and for a tangent of the nearest obstacle in the way.

    Parameters
    ----------
    observations : ndarray
        ``(count, history, 6)``; only the newest is looked at.

    Returns
    -------
    ndarray
        ``(count, 1, 2)``.
    """
    newest = torch.from_numpy(np.ascontiguousarray(observations[:, -1]))
    position, _, goal = newest.split(2, dim=1)
    obstacles = torch.tensor(OBSTACLES)
    distance = _distance(goal, position)[:, None].clamp_min(1e-6)
    heading = (goal - position) / distance
    # Of every obstacle: how far ahead it is, and how far left of the straight way to the goal.
    offset = obstacles - position[:, None]
    ahead = (offset * heading[:, None]).sum(dim=2)
    left = heading[:, :1] * offset[..., 1] - heading[:, 1:] * offset[..., 0]
    blocks = (ahead > 0) & (ahead < distance) & (left.abs() < RADIUS + _MARGIN)
    order = torch.where(blocks, ahead, torch.inf)
    nearest = order.argmin(dim=1, keepdim=True)
    side = torch.where(left.gather(1, nearest) > 0, -1.0, 1.0)
    perpendicular = torch.cat([-heading[:, 1:], heading[:, :1]], dim=1)
    around = obstacles[nearest[:, 0]] + side * (RADIUS + _MARGIN) * perpendicular
    target = torch.where(blocks.any(dim=1, keepdim=True), around, goal)
    way = target - position
    return (way / _distance(target, position)[:, None].clamp_min(1e-6)).numpy()[:, None]


def draw_point_mass(observation: Floats) -> NDArray[np.uint8]:
    """A picture of an environment at ``observation`` ``(6,)``."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_PIXELS, _PIXELS), "white")
    pen = ImageDraw.Draw(image)

    def disc(centre: Any, radius: float, colour: str) -> None:
        x, y = (float(centre[0]) + 1) * _PIXELS / 2, (1 - float(centre[1])) * _PIXELS / 2
        r = radius * _PIXELS / 2
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    for obstacle in OBSTACLES:
        disc(obstacle, RADIUS, "#b0b0b0")
    disc(observation[4:6], GOAL_RADIUS, "#59a14f")
    disc(observation[:2], 0.05, "#e15759")
    pen.rectangle((0, 0, _PIXELS - 1, _PIXELS - 1), outline="#d0d0d0")
    return np.asarray(image)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Between points ``(..., 2)``."""
    offset = a - b
    return (offset[..., 0] ** 2 + offset[..., 1] ** 2).sqrt()
