"""The cells of the study: which runs there are, and the recipe of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arithmetic import study as arithmetic
from benchmarks.arithmetic.prepare import RUNS

METHODS = {
    "reinforce": None,
    "ppo": None,
    "grpo": None,
    "dapo": None,
    "gspo": None,
    "lco_kl": 10.0,
    "lco_log_cosh": 10.0,
}
"""And ``beta`` of LCO, as the study of arithmetic chose it."""
CROSSED = ("ppo", "grpo", "lco_kl")
"""Methods that run under every guard."""
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SAMPLES = 6_400
"""Completions that every run may draw, evaluated five times: half of what arithmetic draws."""
EVERY = 1_280
GUARDED_RATES = LEARNING_RATES[2:]
"""Under guards: what is slower learns too little in this budget for any guard to matter."""
INNER = 4
"""Passes over a batch of rollouts, each of one update."""
ALL, SOME = tuple(range(10)), tuple(range(5))
"""Seeds of methods alone and at the edges; of guards elsewhere."""
TUNING = (100, 101)
TUNED_AT = {"ppo": (3e-4, 3e-3), "grpo": (3e-4, 3e-3), "lco_kl": (1e-4, 1e-3)}
"""Where a guard's own option is chosen: near the method's best rate, and where it collapses."""
NONE = "none"
OPTIONS: dict[str, tuple[float, ...]] = {
    "clip": (0.01, 0.1, 1.0),
    "cap": (0.01, 0.03, 0.1, 0.3),
    "budget": (0.1, 0.3, 1.0, 3.0),
    "capo": (1e-4, 1e-3, 1e-2, 1e-1),
    "safe": (0.1, 1.0, 10.0),
    "lite": (),
}
"""Guards, and what is tried for the option of each.

``clip``: the gradient's norm. ``cap``: that of the update. ``budget``: the largest change of a
log-probability in an update, in nats. ``capo``: the largest predicted KL of a token; a hundred
times that for the objective. ``safe``: the strength of the penalty. ``lite``: Lite PPO, advantages
over the batch's deviation and a mean over tokens.
"""
RANDOM = "random"
"""As many tokens masked as by ``capo``, but others; its option is that of ``capo``."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    method, guard : str
    learning_rate : float
    seed : int
    option : float, optional
        Of the guard.
    """

    method: str
    guard: str
    learning_rate: float
    seed: int
    option: float | None = None
    current: bool = False
    """As of the cells of arithmetic, whose runner this one shares: the target stays fixed."""

    @property
    def group(self) -> str:
        option = "" if self.option is None else f"-{self.option:g}"
        return f"{self.method}/{self.guard}{option}"

    @property
    def key(self) -> str:
        return f"{self.group}/lr{self.learning_rate:g}/seed{self.seed}"

    def recipe(self) -> dict[str, Any]:
        """The recipe's values: that of the study of arithmetic, and the guard."""
        values = arithmetic.Cell(
            self.method,
            "sparse",
            INNER,
            self.learning_rate,
            self.seed,
            METHODS[self.method],
            clip=False,
        ).recipe()
        training, objective = values["training"], values["objectives"]["rl"]
        match self.guard:
            case "clip":
                training["max_grad_norm"] = self.option
            case "cap":
                training["guards"] = [{"kind": "update_norm_cap", "limit": self.option}]
            case "budget":
                training["guards"] = [{"kind": "log_ratio_budget", "limit": self.option}]
            case "capo" | "random":
                assert self.option is not None
                objective["curvature_mask"] = {
                    "policy_limit": self.option,
                    "objective_limit": 100 * self.option,
                    "optimizer": "adam",
                    "random": self.guard == "random",
                }
            case "safe":
                objective["kl_control"] = {"kind": "safe", "strength": self.option}
                if self.method == "ppo":
                    objective["soft_minimum"] = 1.0
            case "lite":
                objective["scale_rewards"] = "batch"
                if self.method == "grpo":
                    objective |= {
                        "kind": "dapo",
                        "dynamic_sampling": False,
                        "epsilon_high": None,
                        "mask_truncated_completions": False,
                    }
        steps = SAMPLES // arithmetic.ROLLOUTS * INNER
        training |= {
            "max_steps": steps,
            "eval_steps": EVERY // arithmetic.ROLLOUTS * INNER,
            "save_steps": steps,
            "max_refusals": steps,
        }
        values["output"] = str(RUNS / "envelope" / self.key)
        return values


def fits(method: str, guard: str) -> bool:
    """Lite PPO has no critic: on PPO it would be Lite PPO on GRPO."""
    return not (method == "ppo" and guard == "lite")


def alone() -> Iterator[Cell]:
    """Methods without a guard, all rates and seeds."""
    for seed in ALL:
        for rate in LEARNING_RATES:
            for method in METHODS:
                yield Cell(method, NONE, rate, seed)


def tuning() -> Iterator[Cell]:
    """What the guards' options are chosen from."""
    for seed in TUNING:
        for method in CROSSED:
            for guard, options in OPTIONS.items():
                if fits(method, guard):
                    for option in options:
                        for rate in TUNED_AT[method]:
                            yield Cell(method, guard, rate, seed, option)


def groups(options: Mapping[str, float | None]) -> Iterator[Cell]:
    """A cell of every method under every guard, with the chosen option."""
    for method in CROSSED:
        for guard in (*OPTIONS, RANDOM):
            if fits(method, guard):
                source = "capo" if guard == RANDOM else guard
                yield Cell(method, guard, 0.0, 0, options.get(f"{method}/{source}"))


def crossed(options: Mapping[str, float | None]) -> Iterator[Cell]:
    """Guards on some seeds."""
    for seed in SOME:
        for rate in GUARDED_RATES:
            for cell in groups(options):
                yield replace(cell, learning_rate=rate, seed=seed)
