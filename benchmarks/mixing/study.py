"""What is compared: ways of joining imitation and reinforcement, under one budget of gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.forgetting_rl import run as forgetting

GRADIENTS = 200
"""Of one objective on 64 completions or demonstrations: so samples are equal as well."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SCREENED, ALL = forgetting.SCREENED, forgetting.ALL
BOTH = forgetting.RUNS / "both.jsonl"
"""Prompts of both tasks: what the gate learns from."""
PAIR = {"first": "sft", "second": "rl"}
HALF = {"sft": 0.5, "rl": 0.5}
FADING = {"start": 0.9, "end": 0.05}

Schedule = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way of joining the two.

    Attributes
    ----------
    schedule : dict
        A recipe's entry.
    steps : int
        As many as ``GRADIENTS`` gradients take.
    combiner : dict, optional
    token_weight : str
        ``loss_type`` of the imitation.
    gate : bool
        Reinforcement on both tasks' prompts; unsolved ones are imitated.
    """

    schedule: Schedule
    steps: int = GRADIENTS
    combiner: dict[str, Any] | None = None
    token_weight: str = "nll"
    gate: bool = False


def sequence(first: int) -> Method:
    """SFT, then reinforcement."""
    stages = [
        {"objective": "sft", "steps": first},
        {"objective": "rl", "steps": GRADIENTS - first},
    ]
    return Method({"kind": "sequential", "stages": stages})


def surgery(method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"method": method, "scale": "match"}
    return found | ({"priority": "rl"} if method == "pcd" else {})


EVERY_STEP: Schedule = {"kind": "mix", "weights": HALF}
ALONE: Schedule = {"kind": "mix", "weights": {"rl": 1.0}}
CYCLE: Schedule = {"kind": "interleave", **PAIR, "ratio": 3}
METHODS = {
    "rl": Method(ALONE),
    "sft-rl 50": sequence(50),
    "sft-rl 100": sequence(100),
    "sft-rl 150": sequence(150),
    "gate": Method(ALONE, gate=True),
    "chord": Method(
        {"kind": "fade", **PAIR, **FADING, "steps": GRADIENTS // 2},
        GRADIENTS // 2,
        token_weight="chord",
    ),
    "gac": Method(
        {"kind": "noise_aware", **PAIR, **FADING, "steps": GRADIENTS // 2}, GRADIENTS // 2
    ),
    "alright": Method({"kind": "alright", "weights": HALF}),
    "maxright": Method({"kind": "maxright", "weights": HALF, "evaluate_every": 10}),
    "interleave": Method(CYCLE),
    "interleave, upgrad": Method(CYCLE | {"combine": True}, GRADIENTS * 4 // 5, surgery("upgrad")),
    "mix": Method(EVERY_STEP, GRADIENTS // 2),
    "upgrad": Method(EVERY_STEP, GRADIENTS // 2, surgery("upgrad")),
    "pcd": Method(EVERY_STEP, GRADIENTS // 2, surgery("pcd")),
}
SINGLE = ("sft", "rl")
"""Runs on one objective, from whose best rates MAXRIGHT's optima are taken."""
SINGLE_RATES = RATES[:3]


class Cell(forgetting.Cell):
    """One run; ``method`` is one of ``METHODS``, or ``sft``."""

    def recipe(self, optima: dict[str, float]) -> dict[str, Any]:
        """The recipe of the study of forgetting, with GRPO and this method."""
        values = forgetting.Cell("grpo", self.learning_rate, self.seed).recipe(optima)
        alone = Method({"kind": "mix", "weights": {"sft": 1.0}})
        method = alone if self.method == "sft" else METHODS[self.method]
        objectives, training = values["objectives"], values["training"]
        values["schedule"], values["combiner"] = method.schedule, method.combiner
        objectives["sft"]["loss_type"] = method.token_weight
        if method.gate:
            objectives["rl"]["data"] = objectives["rl"]["data"] | {"path": str(BOTH)}
            objectives["rl"]["imitation"] = {"kind": "solve_rate_gate"}
        training["max_steps"] = method.steps
        training["eval_steps"] = method.steps // 10
        training["save_steps"] = method.steps
        values["output"] = str(forgetting.RUNS / "mixing" / self.key)
        return values


def prepare() -> None:
    """The study of forgetting's files and model, and prompts of both tasks."""
    forgetting.start()
    if not BOTH.exists():
        parts = [(forgetting.RUNS / f"{task}.jsonl").read_text() for task in ("first", "second")]
        BOTH.write_text("".join(parts), encoding="utf-8")
        assert all("completion" in json.loads(line) for line in BOTH.read_text().splitlines())


def single() -> Iterator[Cell]:
    for seed in SCREENED:
        for rate in SINGLE_RATES:
            for method in SINGLE:
                yield Cell(method, rate, seed)


def screened() -> Iterator[Cell]:
    for seed in SCREENED:
        for rate in RATES:
            for method in METHODS:
                yield Cell(method, rate, seed)


def finalists(rates: dict[str, float]) -> Iterator[Cell]:
    """Ten seeds of every method at its best rate."""
    for seed in ALL:
        for method, rate in rates.items():
            yield replace(Cell(method, rate, 0), seed=seed)
