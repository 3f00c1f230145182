"""Environments: one interface over Gymnasium, Meta-World, robosuite, FurnitureBench and a toy.

What resuming restores: the point mass exactly, from its saved state. Gymnasium's MuJoCo tasks,
Meta-World, Fetch and robosuite exactly as well, by running the unfinished episodes again from their
seeds and actions, on the same machine and versions. A simulator that does not repeat itself goes on
from where the same actions led, with a warning. FurnitureBench cannot be resumed within an episode.
"""

from holdfast.control.environments.evaluation import (
    Evaluation,
    bootstrap_interval,
    evaluate,
)
from holdfast.control.environments.interface import (
    Act,
    EnvironmentOptions,
    Step,
    VectorEnvironment,
)
from holdfast.control.environments.keyed import episode_seeds, keyed_normal, keyed_uniform
from holdfast.control.environments.making import make_environments, scripted_expert
from holdfast.control.environments.optional import SimulatorError, require

__all__ = [
    "Act",
    "EnvironmentOptions",
    "Evaluation",
    "SimulatorError",
    "Step",
    "VectorEnvironment",
    "bootstrap_interval",
    "episode_seeds",
    "evaluate",
    "keyed_normal",
    "keyed_uniform",
    "make_environments",
    "require",
    "scripted_expert",
]
