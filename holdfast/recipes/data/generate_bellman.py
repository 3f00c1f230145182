"""Write the logged decisions of the recipes ``bellman-*``. Each has a known answer.

``bellman_offline.csv``: moves on a slippery 4 x 4 grid, states and moves drawn alike, rewards seen.
``bellman_bus.csv``: months of buses whose engine is kept or replaced by an agent who is
soft-optimal; a new engine's first month is random, as is every other's.
``bellman_cartpole.npz``: Gymnasium's CartPole, balanced by an agent who is nearly soft-optimal for
its reward of 1 a step: soft value iteration on a grid over the four observations, whose
interpolation weights are the chances of a sparse model.

Run ``python generate_bellman.py`` to write the files beside this script. It needs the extra
``bellman`` and, for the cart, ``gymnasium``.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from holdfast.bellman import TabularMDP
from holdfast.bellman.solve import soft_policy

Array = NDArray[np.float64]

GRID_DISCOUNT = 0.9
BUS_DISCOUNT = 0.9
CART_DISCOUNT = 0.95
LIMITS = np.array([2.4, 3.0, 12 * np.pi / 180, 3.5])
"""Of position, velocity, angle and its velocity; beyond the first and third, episodes end."""
POINTS = (7, 9, 9, 11)
"""Of the grid over them."""
START = np.array([1.0, 1.0, 0.15, 1.5])
"""Episodes begin anywhere within these, so that some are lost: falls say what balance is worth."""


def grid() -> TabularMDP:
    return TabularMDP.gridworld(4, 4, GRID_DISCOUNT, slip=0.2, goal=20.0)


def buses() -> TabularMDP:
    return TabularMDP.bus(
        6, BUS_DISCOUNT, cost=0.4, replacement=2.0, increments=(0.3, 0.5, 0.2), drives_on=True
    )


def offline_rows() -> Iterable[Sequence[Any]]:
    yield "state", "action", "reward", "next_state", "terminal"
    found = grid().sample(3000, seed=0)
    for row in zip(
        found.state, found.action, found.reward, found.next_state, found.terminal, strict=True
    ):
        yield row[0], row[1], f"{row[2]:.4g}", row[3], int(row[4])


def bus_rows(count: int = 100, months: int = 50) -> Iterable[Sequence[Any]]:
    yield "bus", "month", "mileage", "replace"
    found = buses().sample_trajectories(count, months, seed=0)
    assert found.trajectory is not None
    month = np.arange(len(found)) % months
    yield from zip(found.trajectory, month, found.state, found.action, strict=True)


def corners(observation: Array) -> tuple[NDArray[np.int64], Array]:
    """The ``(n, 16)`` grid points around observations ``(n, 4)``, and their weights."""
    place = (observation / LIMITS).clip(-1, 1) * 0.5 + 0.5
    place = place * (np.array(POINTS) - 1)
    low = np.minimum(place.astype(int), np.array(POINTS) - 2)
    share = place - low
    index, weight = [], []
    for corner in itertools.product((0, 1), repeat=4):
        index.append(np.ravel_multi_index(tuple((low + corner).T), POINTS))
        weight.append(np.where(corner, share, 1 - share).prod(-1))
    return np.stack(index, 1), np.stack(weight, 1)


def cart_agent(environment: Any) -> Callable[[Array], Array]:
    """From an observation ``(4,)`` to the probabilities of both pushes."""
    axes = [np.linspace(-limit, limit, n) for limit, n in zip(LIMITS, POINTS, strict=True)]
    points = np.stack([each.ravel() for each in np.meshgrid(*axes, indexing="ij")], 1)
    end = len(points)
    environment.reset(seed=0)
    pairs = []
    for point, action in itertools.product(points, (0, 1)):
        environment.reset()
        environment.state = tuple(point)
        observation, _, terminated, _, _ = environment.step(action)
        pairs.append((observation.astype(np.float64), terminated))
    index, weight = corners(np.array([observation for observation, _ in pairs]))
    ended = np.array([terminated for _, terminated in pairs])
    index[ended] = end
    rows = np.repeat(np.arange(2 * end), 16)
    kernel = sparse.coo_array((weight.ravel(), (rows, index.ravel())), (2 * end, end + 1)).tocsr()
    last = sparse.csr_array(([1.0, 1.0], ([0, 1], [end, end])), (2, end + 1))
    model = TabularMDP(
        sparse.vstack([kernel, last]).tocsr(),
        np.ones((end + 1, 2)),
        CART_DISCOUNT,
        terminal=np.arange(end + 1) == end,
    )
    q = model.soft_value_iteration(1e-8).q

    def act(observation: Array) -> Array:
        near, share = corners(observation[None])
        return soft_policy(share[0] @ q[near[0]])

    return act


def cart_arrays(rows: int = 4000, limit: int = 100) -> dict[str, NDArray[Any]]:
    """Episodes until there are ``rows``; a longer one than ``limit`` is cut there."""
    import gymnasium

    environment = gymnasium.make("CartPole-v1").unwrapped
    act = cart_agent(environment)
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("state", "action", "terminal", "trajectory", "time")
    }
    for number in itertools.count():
        if len(columns["action"]) >= rows:
            break
        environment.reset(seed=number)
        environment.state = tuple(rng.uniform(-START, START))
        observation = np.array(environment.state, np.float32)
        for time in range(limit):
            action = int(rng.random() < act(observation.astype(np.float64))[1])
            following, _, terminated, _, _ = environment.step(action)
            values = (observation.round(4), action, terminated, number, time)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            if terminated:
                break
            observation = following
    kinds = (np.float32, np.int8, np.bool_, np.int16, np.int16)
    return {
        name: np.array(values, kind)
        for (name, values), kind in zip(columns.items(), kinds, strict=True)
    }


def main(folder: Path) -> None:
    for name, rows in (("bellman_offline.csv", offline_rows()), ("bellman_bus.csv", bus_rows())):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    np.savez_compressed(folder / "bellman_cartpole.npz", **cart_arrays())  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(__file__).parent)
