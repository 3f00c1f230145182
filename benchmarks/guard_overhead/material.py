"""What is measured on: models, rows, and the sides of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cost.worker import InOrder
from holdfast.joint import Mix
from holdfast.joint.guards import Guard, LogRatioBudget, UpdateNormCap
from holdfast.joint.objective import LossTerms, Objective, Summary
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.trainer import Trainer
from holdfast.language.data import Demonstration, Encoded
from holdfast.language.frozen import Frozen
from holdfast.language.guards import AdaptiveKl, CurvatureGuard, Penalties, RowMoments, SafeKL
from holdfast.language.guards.directional import SoftmaxRadii
from holdfast.language.losses.policy_gradient import ppo_clip
from holdfast.language.model import LanguagePolicy, load_policy
from holdfast.language.objectives import Nll
from holdfast.language.on_policy import PolicyGradient
from holdfast.language.rollouts import Rollout
from holdfast.language.signals import Signals
from holdfast.language.tokenizers import build_tokenizer

PROMPT, LENGTH, ROWS = 32, 128, 8
"""Tokens before and in a completion, and completions of a step."""

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """A model."""

    width: int
    vocab: int
    layers: int = 2


SETTINGS = {"tiny": Setting(64, 2048), "large vocabulary": Setting(128, 32768)}

COMPARISONS: dict[str, tuple[str, ...]] = {
    "imitation": ("none", "update-norm cap", "budget, difference", "budget, jvp"),
    "reinforcement": (
        "none",
        "budget, difference",
        "budget, jvp",
        "capo",
        "capo, adam",
        "kl adaptive",
        "kl safe",
    ),
}
"""By objective: its sides, the first of which is what the others are compared with."""

TARGETS = {
    "budget, difference": 1.8,
    "capo": 1.10,
    "kl adaptive": 1.02,
    "kl safe": 1.02,
    "upgrad": 1.15,
}


def build(setting: Setting, seed: int = 0) -> LanguagePolicy:
    body = {
        "hidden_size": setting.width,
        "intermediate_size": 2 * setting.width,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    policy = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=body, seed=seed)
    torch.manual_seed(seed)
    policy.base.resize_token_embeddings(setting.vocab)
    return policy


def _tokens(setting: Setting, draw: np.random.Generator) -> Encoded:
    size = PROMPT + LENGTH
    ids = draw.integers(0, setting.vocab, size).astype(np.int32)
    return Encoded(ids, np.arange(size) >= PROMPT)


def demonstrations(setting: Setting) -> list[Demonstration]:
    draw = np.random.default_rng(0)
    return [Demonstration(_tokens(setting, draw), f"row:{n}") for n in range(4 * ROWS)]


def rollouts(setting: Setting, policy: LanguagePolicy) -> list[Rollout]:
    """Completions of full length, with the reference's log-probabilities: another policy's."""
    draw = np.random.default_rng(1)
    rows = [
        Rollout(
            _tokens(setting, draw),
            f"row:{n}",
            True,
            reward=float(n % 2),
            rewards={"reward": float(n % 2)},
            group_std=0.5,
            samples=n,
            signals={"advantages": torch.full((LENGTH,), float(n % 2) - 0.5)},
        )
        for n in range(4 * ROWS)
    ]
    reference = Frozen(build(setting, seed=1).requires_grad_(False))
    scored = Signals(policy, reference=reference).score(rows)
    return [replace(row) for row in scored]


def imitation(policy: LanguagePolicy, rows: Sequence[Demonstration]) -> Objective:
    return Objective(
        "imitation",
        Nll(policy.pad_id),
        InOrder(rows, ROWS),
        radii=SoftmaxRadii(policy.pad_id),
    )


def reinforcement(policy: LanguagePolicy, rows: Sequence[Rollout], side: str = "none") -> Objective:
    """GRPO's loss on rollouts that are there already: drawing them is no part of the step."""
    penalties = Penalties(aggregation="sequence-mean")
    loss = PolicyGradient(
        policy.pad_id, partial(ppo_clip, aggregation="sequence-mean"), penalties=penalties
    )
    heard: list[Any] = []
    if side.startswith("capo"):
        # The limits of the released code.
        loss.curvature = CurvatureGuard(LEARNING_RATE, 1e-2, 1e-4)
        if side.endswith("adam"):
            loss.curvature.rows = RowMoments(*policy.head().weight.shape)
            loss.curvature.gradient = lambda: policy.head().weight.grad
        heard.append(loss.curvature)
    elif side == "kl adaptive":
        penalties.kl = AdaptiveKl(0.05, target=0.1)
    elif side == "kl safe":
        # A threshold that is exceeded from the second step on.
        penalties.kl = SafeKL(base=1e-6, lowest=1e-7, highest=1e-6)
    heard += penalties.controllers.values()

    def observed(summary: Summary) -> float:
        for controller in heard:
            controller.observe({**summary.metrics, "loss": summary.loss})
        return summary.loss

    return Objective(
        "reinforcement",
        loss,
        InOrder(rows, ROWS),
        observed=observed,
        radii=SoftmaxRadii(policy.pad_id),
    )


def guards_of(side: str) -> list[Guard]:
    """Limits that every step exceeds, so that all of them are scaled."""
    match side:
        case "update-norm cap":
            return [UpdateNormCap(1e-6)]
        case "budget, difference":
            return [LogRatioBudget(1e-6, derivative="finite_difference")]
        case "budget, jvp":
            return [LogRatioBudget(1e-6)]
        case _:
            return []


def trainers(name: str, setting: Setting) -> dict[str, Trainer]:
    """A trainer for every side of a comparison, all from the same weights on the same rows."""
    made: dict[str, Trainer] = {}
    given = demonstrations(setting)
    drawn = rollouts(setting, build(setting)) if name == "reinforcement" else []
    for side in COMPARISONS[name]:
        policy = build(setting)
        if name == "imitation":
            objective = imitation(policy, given)
        else:
            objective = reinforcement(policy, drawn, side)
        made[side] = Trainer(
            policy,
            {objective.name: objective},
            Mix({objective.name: 1.0}),
            TrainerOptions(max_steps=10**6, learning_rate=LEARNING_RATE),
            guards=guards_of(side),
        )
    return made


def pair(setting: Setting) -> tuple[LanguagePolicy, dict[str, Objective]]:
    """One policy and two objectives on it, for the combiner."""
    policy = build(setting).train()
    found = (
        imitation(policy, demonstrations(setting)),
        reinforcement(policy, rollouts(setting, policy)),
    )
    return policy, {objective.name: objective for objective in found}


def mean_loss(terms: LossTerms) -> torch.Tensor:
    return terms.total / terms.count
