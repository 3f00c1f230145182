"""What the deviation divided by, and the mean over tokens, do to a policy gradient (Lite PPO).

Two toys in which the true gradient is known. *Solve rates*: prompts are answered right or wrong, a
logit each, so that the gradient of the expected reward is ``p (1 - p)``. *Lengths*: answers of
random length whose reward does not depend on it, so that lengths should stay.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch

from holdfast.language.advantages import Scale, group_normalized
from holdfast.language.losses.aggregation import Aggregation, aggregate

SOLVE_RATES = (0.02, 0.5, 0.98)
PROMPTS, GROUP = 8, 8
"""Prompts of each solve rate in a batch, and completions of each."""
DRAWS = 2000
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = 60
LONGEST = 12
ENOUGH, MOST = 0.9, 5000


def directions(scale: Scale, seed: int) -> dict[str, Any]:
    """The gradient of prompts of each solve rate in mixed batches: mean, noise, and largest."""
    draw = torch.Generator().manual_seed(seed)
    p = torch.tensor(SOLVE_RATES, dtype=torch.float64).repeat_interleave(PROMPTS)
    found = []
    for _ in range(DRAWS):
        right = torch.rand(len(p), GROUP, generator=draw, dtype=torch.float64) < p[:, None]
        advantages = group_normalized(right.double().flatten(), GROUP, scale=scale)
        # d log pi / d logit = right - p
        found.append((advantages.view(-1, GROUP) * (right.double() - p[:, None])).mean(1))
    gradients = torch.stack(found).view(DRAWS, len(SOLVE_RATES), PROMPTS)
    true = torch.tensor([x * (1 - x) for x in SOLVE_RATES], dtype=torch.float64)
    share = gradients.mean((0, 2)) / true
    return {
        f"{rate:g}": {
            "over_true": float(share[i] / share[1]),
            "noise": float(gradients[:, i].std() / gradients[:, i].mean().abs()),
            "largest": float(gradients[:, i].abs().max() / gradients[:, 1].abs().mean()),
        }
        for i, rate in enumerate(SOLVE_RATES)
    }


def trained(scale: Scale, rate: float, seed: int) -> dict[str, Any]:
    """Shared skill: a logit of each solve rate's prompts and one they all have in common.

    Ends with the mean solve rate by level of difficulty.
    """
    draw = torch.Generator().manual_seed(seed)
    own = torch.logit(torch.tensor(SOLVE_RATES, dtype=torch.float64))
    common = torch.zeros((), dtype=torch.float64)
    for _ in range(STEPS):
        p = (own + common).sigmoid().repeat_interleave(PROMPTS)
        right = torch.rand(len(p), GROUP, generator=draw, dtype=torch.float64) < p[:, None]
        advantages = group_normalized(right.double().flatten(), GROUP, scale=scale)
        each = (advantages.view(-1, GROUP) * (right.double() - p[:, None])).mean(1)
        common = common + rate * each.mean()
        own = own + rate * each.view(len(SOLVE_RATES), PROMPTS).mean(1) / len(SOLVE_RATES)
    solved = (own + common).sigmoid()
    return {"mean": float(solved.mean()), "by_rate": [float(x) for x in solved]}


def lengths(aggregation: Aggregation, seed: int, *, rate: float = 1.0) -> dict[str, Any]:
    """How far the mean length has drifted once nine answers in ten are right.

    At every position an answer stops with probability ``sigmoid(stop)``; it is right with
    probability ``sigmoid(skill)`` whatever its length, and that is decided at its last token.
    """
    draw = torch.Generator().manual_seed(seed)
    stop = torch.full((LONGEST - 1,), -1.5, dtype=torch.float64)
    skill = torch.tensor(-1.0, dtype=torch.float64)
    at = torch.arange(LONGEST)
    first, updates = _mean_length(stop), 0
    while float(skill.sigmoid()) < ENOUGH and updates < MOST:
        updates += 1
        stops = torch.rand(64, LONGEST - 1, generator=draw, dtype=torch.float64) < stop.sigmoid()
        place = torch.cat([stops, torch.ones(64, 1, dtype=torch.bool)], 1).double().argmax(1)
        right = torch.rand(64, generator=draw, dtype=torch.float64) < skill.sigmoid()
        advantages = group_normalized(right.double(), GROUP, scale="none")
        leaves = stop.clone().requires_grad_(), skill.clone().requires_grad_()
        log, sure = torch.nn.functional.logsigmoid, stop.new_zeros(1)
        ends = at == place[:, None]
        # At the last place it stops in any case.
        going, stopping = (torch.cat([log(sign * leaves[0]), sure]) for sign in (-1, 1))
        answer = torch.where(right, log(leaves[1]), log(-leaves[1]))
        logps = torch.where(ends, stopping + answer[:, None], going)
        length = LONGEST if aggregation == "fixed-length" else None
        mask = at <= place[:, None]
        total, count = aggregate(-advantages[:, None] * logps, mask, aggregation, length)
        gradients = torch.autograd.grad(total / count, leaves)
        stop, skill = stop - rate * gradients[0], skill - rate * gradients[1]
    return {"first": first, "last": _mean_length(stop), "updates": updates}


def _mean_length(stop: torch.Tensor) -> float:
    return 1.0 + float((1.0 - stop.sigmoid()).cumprod(0).sum())


def every(seeds: int) -> dict[str, Any]:
    """All scales and aggregations."""
    ends = {}
    for scale in get_args(Scale):
        by_rate = {
            rate: np.array([trained(scale, rate, seed)["mean"] for seed in range(seeds)])
            for rate in RATES
        }
        ends[scale] = {f"{rate:g}": values.tolist() for rate, values in by_rate.items()}
    return {
        "directions": {scale: directions(scale, 0) for scale in get_args(Scale)},
        "trained": ends,
        "lengths": {
            name: [lengths(name, seed) for seed in range(seeds)] for name in get_args(Aggregation)
        },
    }
