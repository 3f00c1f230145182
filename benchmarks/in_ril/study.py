"""The cells of the study: which runs there are, and the recipe of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.in_ril.tasks import TASKS, Task

RATIOS = (1, 5, 15)
"""m: updates by reinforcement after one by imitation."""
MIXED = (0.1, 0.5, 0.9)
"""Weights of imitation where it regularises every update."""
SEPARATED = 1e-4
"""Learning rate of a base that imitation alone trains on, under a residual network."""
CRITIC = 2.0
"""Learning rate of the critic on rollouts, in units of the policy's."""
FINE_TUNED = 4
"""Denoising steps that DPPO trains, of eight."""
TUNING = 100
"""Seeds from here on choose learning rates and weights, and are not reported."""
POLICIES = ("gaussian", "residual", "diffusion", "implicit")
"""PPO of the cloned policy; of a residual on top of it; DPPO; IDQL."""

Method = tuple[str, float | None]
"""And its option."""


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
        reinforcement; ``iteration``: then m iterations of it. ``surgery``: as ``alternate``, but
        the first update holds both, by UPGrad of gradients of equal norm; ``sum``: by their sum.
        ``root`` and ``balance``: surgery with m(t). ``mix``: a weighted sum in every update.
        ``random``: surgery, with the actions of the demonstrations shuffled. ``noise``: surgery,
        with a random direction for the gradient of imitation. ``buffer``: no imitation, but
        demonstrations are half of every batch of an off-policy method.
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
        if self.policy == "implicit":
            rates = dict.fromkeys(("critic", "q"), task.replay.critic * self.learning_rate)
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
        schedule, combiner = self._schedule(task)
        imitated = imitation(task, demonstrations)
        reinforcement = self._off_policy(task) if self.policy == "implicit" else self._on(task)
        if self.method == "buffer":
            reinforcement["data"] = imitated["data"]
        return {
            "name": "cell",
            "policy": policy | critic,
            "objectives": {"il": imitated, "rl": reinforcement},
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

    def _on(self, task: Task) -> dict[str, Any]:
        """Reinforcement on rollouts."""
        values: dict[str, Any] = {
            "kind": "control_ppo",
            "environment": task.environments,
            "steps": task.steps,
            "batch_size": task.batch_size,
            "epochs": task.epochs,
            "discount": task.discount,
            "episodes": task.episodes,
            "scale_rewards": not task.sparse,
        }
        if self.policy == "diffusion":
            values |= {"kind": "dppo", "epsilon": 0.05, "epsilon_base": 0.01}
            values["batch_size"] = task.batch_size * FINE_TUNED
        return values

    def _off_policy(self, task: Task) -> dict[str, Any]:
        """Reinforcement on a replay buffer."""
        return {
            "kind": "idql",
            "environment": task.environments,
            "steps": task.replay.steps,
            "updates": task.replay.updates,
            "batch_size": 256,
            "capacity": task.count * task.steps * task.rounds,
            "critic_warmup": 4,
            "discount": task.discount,
            "episodes": task.episodes,
            "reward_scale": 1.0 if task.sparse else 0.01,
        }

    def _schedule(self, task: Task) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of turns, and of gradients in a turn that holds both."""
        pair = {"first": "il", "second": "rl"}
        surgery = {"method": "sum" if self.method == "sum" else "upgrad", "scale": "match"}
        match self.method:
            case "rl" | "buffer":
                return {"kind": "mix", "weights": {"rl": 1.0}}, None
            case "mix":
                assert self.option is not None
                weights = {"il": self.option, "rl": 1.0 - self.option}
                return {"kind": "mix", "weights": weights}, None
            case "root" | "balance":
                adaptive = {"kind": "adaptive_interleave", "form": self.method, "combine": True}
                return adaptive | pair, surgery
        fixed = {"kind": "interleave", **pair, "ratio": self.option}
        match self.method:
            case "alternate":
                return fixed, None
            case "iteration":
                per = {"every": "iteration", "updates_per_iteration": task.updates}
                return fixed | per, None
        return fixed | {"combine": True}, surgery


def cloned(task: Task, policy: str) -> dict[str, Any]:
    """What one of ``POLICIES`` starts from, before it is cloned."""
    values = {"horizon": 4, "activation": "relu"}
    if policy in ("gaussian", "residual"):
        return values | {"kind": "gaussian", "hidden": list(task.hidden), "std": task.std}
    return values | {
        "kind": "diffusion",
        "hidden": list(task.diffusion_hidden),
        "steps": 2 * FINE_TUNED,
        "fine_tuned_steps": FINE_TUNED,
        "min_sampling_std": task.replay.std if policy == "implicit" else task.std,
        "min_log_prob_std": task.std,
    }


def imitation(task: Task, demonstrations: Path) -> dict[str, Any]:
    data = {"path": str(demonstrations), "held_out": task.held_out}
    return {"kind": "cloning", "data": data, "batch_size": task.cloning_batch}


# What runs, in the order in which it is needed ----------------------------------------------------


def policies(task: Task) -> tuple[str, ...]:
    """The Gaussian policy is for the sweep and the controls."""
    return POLICIES if task.whole else POLICIES[1:]


def rates(task: Task, policy: str) -> Iterator[Cell]:
    """RL alone at every learning rate, on seeds of their own."""
    for seed in range(TUNING, TUNING + task.tuning_seeds):
        for rate in task.rates[policy]:
            yield Cell(task.name, policy, "rl", rate, seed)


def weights(task: Task, rate: float) -> Iterator[Cell]:
    """What the weight of a regulariser is chosen from."""
    for seed in range(TUNING, TUNING + task.tuning_seeds):
        for weight in MIXED:
            yield Cell(task.name, "gaussian", "mix", rate, seed, weight)


def sweep() -> tuple[Method, ...]:
    """RL alone, and m, fixed and adaptive."""
    fixed: list[Method] = [("surgery", m) for m in RATIOS]
    return (("rl", None), *fixed, ("root", None), ("balance", None))


def controls(ratio: float, weight: float | None) -> tuple[Method, ...]:
    """What else could have helped, at the chosen m."""
    found: list[Method] = [(name, ratio) for name in ("alternate", "random", "noise", "sum")]
    mixed: list[Method] = [] if weight is None else [("mix", weight)]
    return (*found, ("iteration", 1), *mixed)


def rescues(ratio: float, weight: float | None) -> tuple[Method, ...]:
    """What could save a run at the highest rate, which may be too high for RL alone."""
    mixed: list[Method] = [] if weight is None else [("mix", weight)]
    return (("rl", None), ("surgery", ratio), *mixed)


def pair(task: Task, policy: str, ratio: float) -> tuple[Method, ...]:
    """RL alone against the chosen m.

    A residual network is separate and needs no surgery; IDQL's own loss of the actor is a cloning
    loss as well. The off-policy method also gets the demonstrations in its batches.
    """
    together = "alternate" if policy in ("residual", "implicit") else "surgery"
    found: tuple[Method, ...] = (("rl", None), (together, ratio))
    return (*found, ("buffer", None)) if policy == "implicit" and task.whole else found


def compared(task: Task, policy: str, methods: tuple[Method, ...], rate: float) -> Iterator[Cell]:
    """All seeds, all methods of a seed together."""
    for seed in range(task.seeds):
        for method, option in methods:
            yield Cell(task.name, policy, method, rate, seed, option)
