"""The cells of the study: which runs there are, and the recipe of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.arithmetic.prepare import BASE, HELD_OUT, PROMPTS, RUNS, TEACHER, VALIDATION

SAMPLES = 12_800
"""Completions that every run may draw; a batch drawn in vain counts."""
ROLLOUTS = 128
"""Completions in a batch of rollouts: 16 prompts, 8 of each."""
GROUP = 8
EVERY = 1_280
"""Completions between evaluations."""
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
INNER = (1, 4)
"""Passes over a batch of rollouts, each of one update."""
SCREENED, ALL = tuple(range(3)), tuple(range(10))
TUNED_AT = 3e-4
"""Learning rate at which a method's own strength is chosen, on validation rows."""

LCO = ("lco_kl", "lco_mse", "lco_log_cosh")
SPARSE = (
    "reinforce", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "pmd", "dro", *LCO,
)  # fmt: skip
"""Methods that learn from the reward of a whole completion."""
DENSE = ("reinforce", "ppo", "grpo", *LCO, "gkd", "minillm")
"""Methods that learn from a preference-tuned model: as reward of every token, or as teacher."""
UNCLIPPED = ("ppo", "grpo")
"""Run without gradient clipping as well: whether the clipping of gradients would do the same."""
STRENGTHS = {
    "sparse/pmd": (0.1, 0.3, 1.0, 3.0),
    "sparse/dro": (0.03, 0.1, 0.3, 1.0),
    "sparse/lco_kl": (0.3, 1.0, 3.0, 10.0, 30.0),
    "sparse/lco_mse": (0.01, 0.03, 0.1, 0.3, 1.0),
    "sparse/lco_log_cosh": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    # The target moves on with the policy from one batch to the next, so that a small beta follows
    # the preference-tuned model far beyond where it is right.
    "dense/lco_kl": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "dense/lco_mse": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "dense/lco_log_cosh": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "dense/gkd": (0.0, 0.5, 1.0),
}
"""What is tried for a method's own option: the KL strength, or the divergence of GKD."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    method : str
        A kind of objective.
    advantage : str
        ``sparse`` or ``dense``.
    inner : int
        Passes over a batch of rollouts.
    learning_rate : float
    seed : int
    strength : float, optional
        The method's own option (``beta``, ``tau``, ``kl_coef``).
    clip : bool
        Whether gradients are clipped to norm 1.
    current : bool
        LCO only: the target follows the policy from one inner update to the next (as in the
        authors' code) where it should be fixed at the policy that sampled.
    """

    method: str
    advantage: str
    inner: int
    learning_rate: float
    seed: int
    strength: float | None = None
    clip: bool = True
    current: bool = False

    @property
    def group(self) -> str:
        """What is tuned as one: all but learning rate and seed."""
        strength = "" if self.strength is None else f"-{self.strength:g}"
        clip = "" if self.clip else "-unclipped"
        current = "-current" if self.current else ""
        return f"{self.advantage}/{self.method}{strength}{clip}{current}/inner{self.inner}"

    @property
    def key(self) -> str:
        return f"{self.group}/lr{self.learning_rate:g}/seed{self.seed}"

    def recipe(self) -> dict[str, Any]:
        """The recipe's values. The objective that is never trained on is there to be evaluated."""
        objective: dict[str, Any] = {
            "kind": self.method,
            "data": {
                "path": str(PROMPTS),
                "held_out_path": str(VALIDATION),
                "held_out": 0,
                "probe": 0,
            },
            "rewards": [{"name": "exact_match"}],
            "batch_size": ROLLOUTS,
            "num_generations": GROUP,
            "num_iterations": self.inner,
            "max_completion_length": 5,
            "temperature": 1.0,
            "evaluation_temperature": 1.0,
            "log_reference_kl": False,
        }
        reported = objective | {
            "kind": "reinforce",
            "data": objective["data"] | {"held_out_path": str(HELD_OUT)},
        }
        match self.method:
            case "gkd":
                objective |= {"lmbda": 1.0, "temperature": 1.0, "beta": self.strength}
            case "lco_kl" | "lco_mse" | "lco_log_cosh":
                objective |= {"beta": self.strength, "centre": "mean"}
            case "pmd":
                objective["tau"] = self.strength
            case "dro":
                objective["kl_coef"] = self.strength
            case "dapo":
                objective |= {"mask_truncated_completions": True}
        if self.method in ("gkd", "minillm"):
            objective["teacher_model_name_or_path"] = str(TEACHER / "model")
        elif self.advantage == "dense":
            objective["preference"] = {"reward_model": str(TEACHER / "model"), "beta_rm": 1.0}
        steps = SAMPLES // ROLLOUTS * self.inner
        return {
            "name": "cell",
            "policy": {"model_name_or_path": str(BASE / "model")},
            "objectives": {"rl": objective, "reported": reported},
            "schedule": {"kind": "mix", "weights": {"rl": 1.0}},
            "training": {
                "max_steps": steps,
                "learning_rate": self.learning_rate,
                "max_grad_norm": 1.0 if self.clip else None,
                "eval_steps": EVERY // ROLLOUTS * self.inner,
                "save_steps": steps,
                "max_refusals": steps,
                "seed": self.seed,
            },
            "output": str(RUNS / "cell" / self.key),
        }


def tuning(inner: int) -> Iterator[Cell]:
    """What the methods' own options are chosen from."""
    for name, strengths in STRENGTHS.items():
        advantage, method = name.split("/")
        for strength in strengths:
            for seed in SCREENED:
                yield Cell(method, advantage, inner, TUNED_AT, seed, strength)


def groups(inner: int, strengths: Mapping[str, float]) -> Iterator[Cell]:
    """One cell of each group that is compared; learning rate and seed are to be replaced."""
    for advantage, methods in (("sparse", SPARSE), ("dense", DENSE)):
        for method in methods:
            strength = strengths.get(f"{advantage}/{method}")
            yield Cell(method, advantage, inner, TUNED_AT, 0, strength)
    for method in UNCLIPPED:
        yield Cell(method, "sparse", inner, TUNED_AT, 0, clip=False)
    if inner > 1:  # With one update both targets are the same.
        for method in LCO:
            strength = strengths.get(f"sparse/{method}")
            yield Cell(method, "sparse", inner, TUNED_AT, 0, strength, current=True)


def screening(inner: int, strengths: Mapping[str, float]) -> Iterator[Cell]:
    """Every group at every learning rate, on a few seeds; all groups advance together."""
    for seed in SCREENED:
        for rate in LEARNING_RATES:
            for cell in groups(inner, strengths):
                yield replace(cell, learning_rate=rate, seed=seed)
