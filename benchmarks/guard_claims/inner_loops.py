"""Several steps on one target: does the objective fall, as the weight promises (SSO)?

Cross-entropy of a linear softmax and of a small network, full batch, float64. The objective is
1/2-smooth in the logits, so a weight of 1/4 or more makes the surrogate a majorant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holdfast.language.guards.inner import inner_loop, target_surrogate

WEIGHTS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
STEPS = (1, 10)
ROUNDS = 20
"""Looks at the objective's gradient, the expensive call."""
ROWS, FEATURES, CLASSES, WIDTH = 64, 8, 5, 16


def run(kind: str, weight: float, steps: int, seed: int, *, checked: bool) -> dict[str, Any]:
    """Objectives after each round, and how many rounds raised it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = normal(ROWS, FEATURES)
    labels = (inputs @ normal(FEATURES, CLASSES) + normal(ROWS, CLASSES)).argmax(-1)
    if kind == "linear":
        parameters = [0.1 * normal(FEATURES, CLASSES)]
    else:
        parameters = [normal(FEATURES, WIDTH) / FEATURES**0.5, normal(WIDTH, CLASSES) / WIDTH**0.5]
    parameters = [part.requires_grad_() for part in parameters]

    def outputs() -> Tensor:
        hidden = inputs @ parameters[0]
        return hidden if kind == "linear" else hidden.tanh() @ parameters[1]

    def objective() -> Tensor:
        return torch.nn.functional.cross_entropy(outputs(), labels)

    mask = torch.ones(ROWS, dtype=torch.bool)
    values, taken, rejected = [objective().item()], 0, 0
    for _ in range(ROUNDS):
        anchor = outputs().detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(anchor, labels, reduction="sum"), anchor
        )

        def surrogate(anchor: Tensor = anchor, gradient: Tensor = gradient) -> Tensor:
            terms = target_surrogate(outputs(), anchor, gradient, mask, weight=weight)
            return terms.total / terms.count

        done = inner_loop(
            surrogate, parameters, steps=steps, objective=objective if checked else None
        )
        taken += len(done.surrogates) - 1
        rejected += done.stopped == "not majorised"
        values.append(objective().item())
    rises = sum(later > before + 1e-12 for before, later in zip(values, values[1:], strict=False))
    return {
        "rises": rises,
        "rejected": rejected,
        "steps": taken,
        "last": values[-1],
        "lowest": min(values),
    }


def every(seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("linear", "network"):
        for weight in WEIGHTS:
            for steps in STEPS:
                for checked in (False, True):
                    name = f"{kind}, w = {weight:g}, m = {steps}" + (", checked" if checked else "")
                    found[name] = [
                        run(kind, weight, steps, seed, checked=checked) for seed in range(seeds)
                    ]
    return found
