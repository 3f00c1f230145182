"""The cells of the study: which runs there are, and the recipe of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RATIOS = (1, 5, 15)
"""m: updates by reinforcement after one by imitation."""
MIXED = (0.1, 0.5, 0.9)
"""Weights of imitation where it regularises every update."""
SEPARATED = 1e-4
"""Learning rate of a base that imitation alone trains on, under a residual network."""
CRITIC = 2.0
"""Learning rate of the critic, in units of the policy's."""
TUNING = 100
"""Seeds from here on choose learning rates and weights, and are not reported."""


@dataclass(frozen=True)
class Task:
    """A task, and what every run on it has in common.

    Attributes
    ----------
    name, environment : str
    demonstrations, held_out : int
        Episodes to clone from, and those on which imitation is evaluated.
    count, steps, batch_size, epochs : int
        Environments, chunks in each of a batch of rollouts, rows of an update, passes.
    rounds, every : int
        Batches of rollouts of a run, and between evaluations.
    episodes : int
        Of an evaluation.
    discount : float
        Per chunk.
    hidden, diffusion_hidden, critic_hidden : tuple of int
        The Gaussian policy and a residual have ``hidden``.
    std : float
        Of the Gaussian policy, in normalised units; the least of a denoising step.
    scale : float
        Of the residual, whose own deviation makes it explore as widely as the Gaussian policy.
    cloning : dict of str to int
        Updates that a policy of each kind is cloned for.
    cloning_batch : int
    rates : tuple of float
        Learning rates to choose from, on RL alone.
    tuning_seeds, seeds : int
    time_limit : int, optional
    whole : bool
        Whether all methods run, or RL alone and interleaving at the best m of ``reference``.
    reference : str
        The task whose sweep says which m is best.
    """

    name: str
    environment: str
    demonstrations: int
    held_out: int
    count: int
    steps: int
    batch_size: int
    epochs: int
    rounds: int
    every: int
    episodes: int
    discount: float
    hidden: tuple[int, ...]
    diffusion_hidden: tuple[int, ...]
    critic_hidden: tuple[int, ...]
    std: float
    scale: float
    cloning: dict[str, int]
    cloning_batch: int
    rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    time_limit: int | None
    whole: bool
    reference: str


POINT_MASS = Task(
    name="point-mass",
    environment="holdfast/point-mass",
    demonstrations=10,
    held_out=10,
    count=64,
    steps=24,
    batch_size=512,
    epochs=6,
    rounds=50,
    every=5,
    episodes=192,
    discount=0.97,
    hidden=(64, 64),
    diffusion_hidden=(128, 128),
    critic_hidden=(128, 128),
    std=0.25,
    scale=0.5,
    cloning={"gaussian": 600, "diffusion": 6000},
    cloning_batch=128,
    rates=(1e-3, 3e-3, 1e-2),
    tuning_seeds=3,
    seeds=10,
    time_limit=None,
    whole=True,
    reference="point-mass",
)
PEG = Task(
    name="peg-insert-side",
    environment="metaworld/peg-insert-side",
    demonstrations=10,
    held_out=5,
    count=16,
    steps=50,
    batch_size=200,
    epochs=8,
    rounds=100,
    every=10,
    episodes=50,
    discount=0.99,
    hidden=(256, 256, 256),
    diffusion_hidden=(256, 256, 256),
    critic_hidden=(256, 256, 256),
    std=0.1,
    scale=0.2,
    cloning={"gaussian": 2500, "diffusion": 4000},
    cloning_batch=256,
    rates=(1e-4, 3e-4, 1e-3),
    tuning_seeds=2,
    seeds=4,
    time_limit=200,
    whole=True,
    reference="peg-insert-side",
)
TASKS = {
    task.name: task
    for task in (
        POINT_MASS,
        PEG,
        *(
            replace(PEG, name=name, environment=f"metaworld/{name}", whole=False)
            for name in ("box-close", "stick-pull", "shelf-place")
        ),
    )
}
POLICIES = ("gaussian", "residual", "diffusion")
"""PPO of the cloned policy; of a residual on top of it; DPPO."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    task : str
    policy : str
        One of ``POLICIES``.
    method : str
        ``rl``: reinforcement alone. ``alternate``: one update by imitation, then m by
        reinforcement. ``surgery``: the same, but the first holds both, by UPGrad of gradients of
        equal norm; ``sum``: by their sum. ``root`` and ``balance``: surgery with m(t). ``mix``: a
        weighted sum in every update. ``random``: surgery, with the actions of the demonstrations
        shuffled. ``noise``: surgery, with a random direction for the gradient of imitation.
    learning_rate : float
        Of the policy.
    seed : int
        Of the cloned policy, too.
    option : float, optional
        m, or the weight of imitation.
    """

    task: str
    policy: str
    method: str
    learning_rate: float
    seed: int
    option: float | None = None

    @property
    def label(self) -> str:
        return self.method if self.option is None else f"{self.method}-{self.option:g}"

    @property
    def group(self) -> str:
        """What is compared: all but learning rate and seed."""
        return f"{self.policy}/{self.label}"

    @property
    def key(self) -> str:
        return f"{self.group}/lr{self.learning_rate:g}/seed{self.seed}"

    def recipe(self, base: Path, demonstrations: Path) -> dict[str, Any]:
        """The recipe's values.

        Imitation is part of every recipe: where no turn trains on it, it is evaluated.
        """
        task = TASKS[self.task]
        critic = {"critic": {"hidden": list(task.critic_hidden), "activation": "relu"}}
        policy: dict[str, Any] = {"kind": "saved", "model_name_or_path": str(base)}
        rates = {"critic": CRITIC * self.learning_rate}
        if self.policy == "residual":
            std = task.std / task.scale
            policy = {
                "kind": "residual",
                "base": policy,
                "hidden": list(task.hidden),
                "scale": task.scale,
                "std": std,
            }
            rates["actor.base"] = SEPARATED
        schedule, combiner = self._schedule()
        return {
            "name": "cell",
            "policy": policy | critic,
            "objectives": {"il": imitation(task, demonstrations), "rl": self._reinforcement(task)},
            "schedule": schedule,
            "combiner": combiner,
            "training": {
                "max_steps": 10**6,  # What ends a run is the number of rollouts.
                "max_refusals": 10**6,
                "learning_rate": self.learning_rate,
                "learning_rates": rates,
                "seed": self.seed,
            },
        }

    def _reinforcement(self, task: Task) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": "control_ppo",
            "environment": {
                "name": task.environment,
                "count": task.count,
                "sparse": True,
                "time_limit": task.time_limit,
            },
            "steps": task.steps,
            "batch_size": task.batch_size,
            "epochs": task.epochs,
            "discount": task.discount,
            "episodes": task.episodes,
        }
        if self.policy == "diffusion":
            values |= {"kind": "dppo", "epsilon": 0.05, "epsilon_base": 0.01}
            values["batch_size"] = task.batch_size * FINE_TUNED
        return values

    def _schedule(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of turns, and of gradients in a turn that holds both."""
        pair = {"first": "il", "second": "rl"}
        surgery = {"method": "sum" if self.method == "sum" else "upgrad", "scale": "match"}
        match self.method:
            case "rl":
                return {"kind": "mix", "weights": {"rl": 1.0}}, None
            case "mix":
                assert self.option is not None
                weights = {"il": self.option, "rl": 1.0 - self.option}
                return {"kind": "mix", "weights": weights}, None
            case "root" | "balance":
                adaptive = {"kind": "adaptive_interleave", "form": self.method, "combine": True}
                return adaptive | pair, surgery
        fixed = {"kind": "interleave", **pair, "ratio": self.option}
        if self.method == "alternate":
            return fixed, None
        return fixed | {"combine": True}, surgery


FINE_TUNED = 4
"""Denoising steps that DPPO trains, of eight."""


def cloned(task: Task, kind: str) -> dict[str, Any]:
    """A policy before it is cloned."""
    values = {"kind": kind, "horizon": 4, "activation": "relu"}
    if kind == "gaussian":
        return values | {"hidden": list(task.hidden), "std": task.std}
    return values | {
        "hidden": list(task.diffusion_hidden),
        "steps": 2 * FINE_TUNED,
        "fine_tuned_steps": FINE_TUNED,
        "min_sampling_std": task.std,
        "min_log_prob_std": task.std,
    }


def imitation(task: Task, demonstrations: Path) -> dict[str, Any]:
    data = {"path": str(demonstrations), "held_out": task.held_out}
    return {"kind": "cloning", "data": data, "batch_size": task.cloning_batch}


# What runs, in the order in which it is needed ----------------------------------------------------


def rates(task: Task, policy: str) -> Iterator[Cell]:
    """RL alone at every learning rate, on seeds of their own."""
    for seed in range(TUNING, TUNING + task.tuning_seeds):
        for rate in task.rates:
            yield Cell(task.name, policy, "rl", rate, seed)


def weights(task: Task, rate: float) -> Iterator[Cell]:
    """What the weight of a regulariser is chosen from."""
    for seed in range(TUNING, TUNING + task.tuning_seeds):
        for weight in MIXED:
            yield Cell(task.name, "gaussian", "mix", rate, seed, weight)


def sweep() -> tuple[tuple[str, float | None], ...]:
    """Method and option: RL alone, and m, fixed and adaptive."""
    fixed = tuple((method, m) for method in ("alternate", "surgery") for m in RATIOS)
    return (("rl", None), *fixed, ("root", None), ("balance", None))


def controls(ratio: float, weight: float | None) -> tuple[tuple[str, float | None], ...]:
    """What else could have helped, at the chosen m."""
    found: tuple[tuple[str, float | None], ...] = (
        ("random", ratio),
        ("noise", ratio),
        ("sum", ratio),
    )
    return found if weight is None else (*found, ("mix", weight))


def pair(policy: str, ratio: float) -> tuple[tuple[str, float | None], ...]:
    """RL alone against the chosen m; the residual network is separate and needs no surgery."""
    return (("rl", None), ("alternate" if policy == "residual" else "surgery", ratio))


def compared(
    task: Task, policy: str, methods: tuple[tuple[str, float | None], ...], rate: float
) -> Iterator[Cell]:
    """All seeds, all methods of a seed together."""
    for seed in range(task.seeds):
        for method, option in methods:
            yield Cell(task.name, policy, method, rate, seed, option)
