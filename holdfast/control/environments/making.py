"""Environments by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.control.environments import furniture, metaworld, point_mass, robosuite
from holdfast.control.environments.batched import BatchedEnvironment
from holdfast.control.environments.fetch import fetch_expert
from holdfast.control.environments.interface import EnvironmentOptions, VectorEnvironment
from holdfast.control.environments.optional import SimulatorError
from holdfast.control.environments.synchronous import make_gymnasium

if TYPE_CHECKING:
    from holdfast.control.environments.interface import Act


def make_environments(
    name: str, count: int, *, seed: int = 0, options: EnvironmentOptions | None = None
) -> VectorEnvironment:
    """Make ``count`` environments of a task.

    Parameters
    ----------
    name : str
        ``holdfast/point-mass``, ``metaworld/<task>``, ``robosuite/<task>``, ``furniture/<task>``,
        or any id that Gymnasium knows, such as ``Hopper-v5`` or ``FetchPickAndPlace-v4``.
    count : int
        Environments, at least 1.
    seed : int
        Not negative. Seeds every episode, unless :meth:`VectorEnvironment.reset` is given another.
    options : EnvironmentOptions, optional
        How the task is presented.

    Raises
    ------
    SimulatorError
        If there is no such task, it does not know a keyword, or the simulator is not installed.
    ValueError
        If ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}: it must be at least 1")
    options = options or EnvironmentOptions()
    if name.startswith("holdfast/") and name != point_mass.NAME:
        raise SimulatorError(f"{name} is no environment of Holdfast; there is {point_mass.NAME}")
    if name == point_mass.NAME:
        if options.keywords:
            raise SimulatorError(f"{name} takes no keywords, but got {', '.join(options.keywords)}")
        simulator = point_mass.PointMass(count)
        return BatchedEnvironment(name, count, simulator, options=options, seed=seed)
    for prefix, make in (
        (metaworld.PREFIX, metaworld.make_metaworld),
        (robosuite.PREFIX, robosuite.make_robosuite),
        (furniture.PREFIX, furniture.make_furniture),
    ):
        if name.startswith(prefix):
            return make(name, count, options=options, seed=seed)
    return make_gymnasium(name, count, options=options, seed=seed)


def scripted_expert(name: str) -> Act:
    """The scripted expert of a task. It acts on the newest observation alone.

    Raises
    ------
    SimulatorError
        If there is none.
    """
    if name == point_mass.NAME:
        return point_mass.point_mass_expert
    if name.startswith(metaworld.PREFIX):
        return metaworld.metaworld_expert(name)
    if name.startswith("FetchPickAndPlace"):
        return fetch_expert(name)
    raise SimulatorError(
        f"there is no scripted expert for {name}; there is one for {point_mass.NAME}, every "
        "metaworld/ task and FetchPickAndPlace. Record a controller of your own instead"
    )
