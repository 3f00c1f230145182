"""A reward that can be hacked, and penalties that keep near a reference (SAFE).

One choice among ``ARMS``, each with a quality and a trick, both normal. The policy is a softmax of
a linear function of the two; the reference is uniform. Rewarded are quality and trick alike. The
true reward is the quality less what tricks cost, which grows with their square: near the reference
more of the one is more of the other, far from it less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.language.guards import SafeKL
from holdfast.language.guards.controllers import AdaptiveKl

ARMS, COST = 512, 1.0
BATCH, UPDATES = 64, 800
RATE = 0.02
EVERY = 10
LATE = 20
"""Looks over which an end is the mean."""
TARGETS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
COEFFICIENTS = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)
STRENGTHS = (0.1, 1.0, 10.0)
KLS = (0.1, 0.2, 0.3, 0.5)
"""At which true rewards are compared, in nats."""


@dataclass
class Task:
    """Features ``(arms, 2)``, true reward and what is rewarded, ``(arms,)``."""

    features: Tensor
    true: Tensor
    proxy: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Task:
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(ARMS, 2, generator=draw, dtype=torch.float64)
        quality, trick = features.T
        return cls(features, quality - COST / 2 * trick.clamp(min=0.0).square(), quality + trick)


def run(
    task: Task,
    seed: int,
    penalty: Callable[[Tensor], Tensor],
    hear: Callable[[float, float, float], None],
) -> dict[str, Any]:
    """REINFORCE with the batch's mean as its baseline; the KL and the true reward on the way."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    weights = torch.zeros(2, dtype=torch.float64)
    kls, true, proxy = [], [], []
    for update in range(UPDATES + 1):
        leaf = weights.clone().requires_grad_()
        log = (task.features @ leaf).log_softmax(-1)
        policy = log.detach().exp()
        kl = (log.exp() * (log + math.log(ARMS))).sum()
        if update % EVERY == 0:
            kls.append(kl.item())
            true.append(float(policy @ task.true))
            proxy.append(float(policy @ task.proxy))
        arms = torch.multinomial(policy, BATCH, replacement=True, generator=draw)
        rewards = task.proxy[arms]
        loss = -((rewards - rewards.mean()) * log[arms]).mean() + penalty(kl)
        weights = weights - RATE * torch.autograd.grad(loss, leaf)[0]
        hear(kl.item(), float(-(policy * log.detach()).sum()), float(rewards.mean()))
    return {"kl": kls, "true": true, "proxy": proxy}


def arms() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """By name: makes the penalty and what hears of a step."""
    found: dict[str, Callable[[], tuple[Any, Any]]] = {"none": lambda: (_nothing, _deaf)}
    for beta in COEFFICIENTS:
        found[f"fixed {beta:g}"] = lambda beta=beta: ((lambda kl: beta * kl), _deaf)
    for target in TARGETS:
        found[f"adaptive {target:g}"] = lambda target=target: _adaptive(target)
    for strength in STRENGTHS:
        found[f"safe {strength:g}"] = lambda strength=strength: _safe(strength, True)
        found[f"safe {strength:g}, no gradient"] = lambda strength=strength: _safe(strength, False)
    return found


def _nothing(kl: Tensor) -> Tensor:
    return 0.0 * kl.detach()


def _deaf(*seen: float) -> None:
    pass


def _adaptive(target: float) -> tuple[Any, Any]:
    controller = AdaptiveKl(0.3, target=target)
    return (
        lambda kl: controller.coefficient * kl,
        lambda kl, entropy, reward: controller.observe({"kl": kl}),
    )


def _safe(strength: float, gradient: bool) -> tuple[Any, Any]:
    controller = SafeKL(strength=strength)
    return (
        lambda kl: controller.penalty(kl if gradient else kl.detach()),
        controller.update,
    )


def every(seeds: int) -> dict[str, Any]:
    """By arm and seed: where it ends, the best on the way, and the true reward at equal KL."""
    found: dict[str, Any] = {}
    for name, make in arms().items():
        rows = []
        for seed in range(seeds):
            path = run(Task.drawn(seed), seed, *make())
            mean = {key: sum(values[-LATE:]) / LATE for key, values in path.items()}
            rows.append(
                {
                    **{key: round(value, 4) for key, value in mean.items()},
                    "best": round(max(path["true"]), 4),
                    "at_kl": {f"{kl:g}": _first(path, kl) for kl in KLS},
                }
            )
        found[name] = rows
    return found


def _first(path: dict[str, list[float]], kl: float) -> float | None:
    """The true reward when the KL first gets there."""
    for reached, reward in zip(path["kl"], path["true"], strict=True):
        if reached >= kl:
            return round(reward, 4)
    return None
