"""The cells of the study: which runs there are, and the recipe of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.joint_sft_dpo.prepare import DATA, PRETRAINED, RUNS

STEPS = 200
MODES = ("full", "lora")
PROBE, VALIDATION, HELD_OUT = 32, 64, 96
"""Rows on which MAXRIGHT sees its gaps, and rows on which options are tuned: apart from each other,
from the training rows, and from the held-out rows that results are taken from."""
LAMBDAS = (0.01, 0.25, 0.5, 0.75, 0.99)
"""λ is the weight of DPO, as in the paper; SFT has 1 - λ."""
FRACTIONS = (0.25, 0.5, 0.75)
"""Share of the steps that the first stage of a sequence takes."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
SEQUENCES = ("sft-dpo", "dpo-sft")
JOINT = ("mix", "alright", "maxright")
EVALUATE_EVERY = (1, 10, 100, 1000)
TUNING_SEED = 1000
SEEDS = tuple(range(5))
MORE_SEEDS = tuple(range(5, 10))
"""Seeds beyond the grid's, for the cells that claims compare."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes
    ----------
    mode : str
        ``full`` or ``lora``.
    method : str
        ``sft``, ``dpo`` (alone), ``sft-dpo``, ``dpo-sft`` (sequences), ``mix``, ``alright`` or
        ``maxright``.
    setting : float
        λ, the share of the first stage, or 0 where a method has neither.
    learning_rate : float
    seed : int
    evaluate_every : int
        Of MAXRIGHT.
    """

    mode: str
    method: str
    setting: float
    learning_rate: float
    seed: int
    evaluate_every: int = 10

    @property
    def key(self) -> str:
        every = f"-k{self.evaluate_every}" if self.method == "maxright" else ""
        return (
            f"{self.mode}/{self.method}-{self.setting:g}{every}/lr{self.learning_rate:g}"
            f"/seed{self.seed}"
        )

    def recipe(self, optima: dict[str, float]) -> dict[str, Any]:
        """The recipe's values; ``optima`` for MAXRIGHT."""
        data = {
            "probe": PROBE + VALIDATION,
            "held_out": HELD_OUT,
            "max_length": 128,
            "bad_rows": "drop",
        }
        objectives = {
            "sft": {
                "kind": "nll",
                "data": {"path": str(DATA / "dolly_train.jsonl.gz"), **data},
                "batch_size": 16,
                "optimum": optima.get("sft"),
            },
            "dpo": {
                "kind": "dpo",
                "beta": 0.1,
                "data": {"path": str(DATA / "hh_helpful_train.jsonl.gz"), **data},
                "batch_size": 8,
                "optimum": optima.get("dpo"),
            },
        }
        lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        return {
            "name": "cell",
            "policy": {
                "model_name_or_path": str(PRETRAINED),
                "lora": lora if self.mode == "lora" else None,
            },
            "objectives": objectives,
            "schedule": self._schedule(),
            "training": {
                "max_steps": STEPS,
                "learning_rate": self.learning_rate,
                "warmup_steps": 10,
                "lr_scheduler_type": "linear",
                "eval_steps": 40,
                "save_steps": STEPS,
                "save_total_limit": 1,
                "seed": self.seed,
            },
            "output": str(RUNS / self.key),
        }

    def _schedule(self) -> dict[str, Any]:
        weights = {"sft": 1.0 - self.setting, "dpo": self.setting}
        if self.method in ("mix", "alright"):
            return {"kind": self.method, "weights": weights}
        if self.method == "maxright":
            return {"kind": "maxright", "weights": weights, "evaluate_every": self.evaluate_every}
        first, _, second = self.method.partition("-")
        steps = round(self.setting * STEPS) if second else STEPS
        stages = [{"objective": first, "steps": steps}]
        if second:
            stages.append({"objective": second, "steps": STEPS - steps})
        return {"kind": "sequential", "stages": stages}


def tuning(mode: str) -> tuple[list[Cell], list[Cell]]:
    """Learning rate of every method, and stage lengths of the sequences, on a seed of its own.

    First each objective alone, whose optima MAXRIGHT needs, then the others.
    """
    first, others = [], []
    for rate in LEARNING_RATES:
        for method in ("sft", "dpo"):
            first.append(Cell(mode, method, 0, rate, TUNING_SEED))
        for method in SEQUENCES:
            others += [Cell(mode, method, share, rate, TUNING_SEED) for share in FRACTIONS]
        for method in JOINT:
            others.append(Cell(mode, method, 0.5, rate, TUNING_SEED))
    return first, others


def alone(mode: str, rates: dict[str, float], seeds: tuple[int, ...]) -> list[Cell]:
    """Each objective alone, for the optima."""
    return [Cell(mode, m, 0, rates[m], seed) for seed in seeds for m in ("sft", "dpo")]


def grid(mode: str, rates: dict[str, float], best: dict[str, float]) -> Iterator[Cell]:
    """The comparison: first the cells that claims need, with more seeds, then the whole grid."""
    for seed in SEEDS + MORE_SEEDS:
        for method in SEQUENCES:
            yield Cell(mode, method, best[method], rates[method], seed)
        for method in JOINT:
            yield Cell(mode, method, 0.5, rates[method], seed)
    for seed in SEEDS:
        for method in SEQUENCES:
            for share in FRACTIONS:
                yield Cell(mode, method, share, rates[method], seed)
        for method in JOINT:
            for weight in LAMBDAS:
                yield Cell(mode, method, weight, rates[method], seed)
    if mode == "full":
        for seed in SEEDS:
            for every in EVALUATE_EVERY:
                yield Cell(mode, "maxright", 0.5, rates["maxright"], seed, every)
