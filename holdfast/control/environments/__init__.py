"""Environments: one interface over Gymnasium, Meta-World, robosuite, FurnitureBench and a toy.

What resuming restores: the point mass exactly, from its saved state. Gymnasium's MuJoCo tasks,
Meta-World, Fetch and robosuite's Lift and Can exactly as well, by running the unfinished episodes
again from their seeds and actions, on the same machine and versions; of any other task this is
tried, and checked by the last observations. Where it fails, loading warns: the episode goes on from
where the same actions led or, if they ended it early, begins again. FurnitureBench has no state to
save, and its running episodes always begin again from their seeds, with a warning.
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
