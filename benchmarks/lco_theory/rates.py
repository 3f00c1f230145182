"""Propositions 4.8 and 4.9: how fast gradient descent in the logits closes the gap to the target.

With a loss that is L-smooth, and μ-strongly convex on the way from the iterate to the target, a
step η ≤ 1/L multiplies the gap by at most ``1 - ημ``. README.md says where the moduli come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.lco_theory.losses import LCO, SMOOTHNESS, fisher, library, reverse_kl

Array = NDArray[np.float64]

SMALL = 1e-12
"""A run ends at this share of its first loss; below it, losses are rounding."""
SETTLED = 1e-6
"""From this share on the rate counts as the asymptotic one."""
SLACK = 1e-8
"""Relative rounding of a factor, at the smallest losses that count."""
POINTS = 60
"""Points of a curve that are kept, about evenly over the logarithm of the steps."""


def draw_problems(runs: int, vocab: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Behaviour logits and targets ``z_old + A / β``; A / β has standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(runs, vocab, generator=generator, dtype=torch.float64)
    return z, z + spread * torch.randn(runs, vocab, generator=generator, dtype=torch.float64)


def modulus_ahead(name: str, z: Tensor, target: Tensor) -> Tensor:
    """Strong convexity on the segment from ``z`` to the target, ``(runs,)``.

    Squared error: 2 / V. log cosh: sech²(max |d|) / V. KL: the smallest probability at either end,
    since every log π_a is concave along a segment.
    """
    vocab = z.shape[-1]
    if name == "mse":
        return torch.full_like(z[:, 0], 2 / vocab)
    if name == "log_cosh":
        return (z - target).abs().amax(-1).cosh() ** -2 / vocab
    return torch.minimum(z.softmax(-1), target.softmax(-1)).amin(-1)


def modulus_at_start(name: str, z: Tensor, target: Tensor) -> Tensor:
    """Strong convexity that is known before the first step, ``(runs,)``.

    For log cosh no ``|d_a|`` ever grows. For the KL it is the least probability that a policy no
    farther from the target than the first one can give to any token.
    """
    if name != "kl":
        return modulus_ahead(name, z, target)
    return least_probability(target.softmax(-1), LCO["kl"](z, target))


def least_probability(goal: Tensor, level: Tensor) -> Tensor:
    """Smallest probability of any token at any π with ``KL(goal || π) <= level``, ``(runs,)``.

    Merging the other tokens cannot increase the divergence, and a π that scales them alike attains
    it: the smallest q with ``p log(p / q) + (1 - p) log((1 - p) / (1 - q)) = level``, by bisection.
    """
    low, high = torch.full_like(goal, -700.0), goal.log()
    for _ in range(200):
        middle = (low + high) / 2
        rest = torch.log1p(-middle.exp())
        far = goal * (goal.log() - middle) + (1 - goal) * (torch.log1p(-goal) - rest)
        beyond = far > level.unsqueeze(-1)
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return low.exp().amin(-1)


def curvature_at_target(name: str, target: Tensor) -> Tensor:
    """Least eigenvalue of the Hessian at the target, ``(runs,)``; the KL's 0 for shifts apart."""
    vocab = target.shape[-1]
    if name == "kl":
        return torch.linalg.eigvalsh(fisher(target.softmax(-1)))[:, 1]
    return torch.full_like(target[:, 0], (2 if name == "mse" else 1) / vocab)


def descend(name: str, z: Tensor, target: Tensor, step: float, steps: int) -> tuple[Array, Array]:
    """Losses ``(steps + 1, runs)`` and moduli ahead ``(steps, runs)``; the library's gradient."""
    losses, moduli = [LCO[name](z, target)], []
    for _ in range(steps):
        moduli.append(modulus_ahead(name, z, target))
        z = z - step * library(name, z, target)[1]
        losses.append(LCO[name](z, target))
        if bool((losses[-1] <= SMALL * losses[0]).all()):
            break
    return torch.stack(losses).numpy(), torch.stack(moduli).numpy()


def linear(
    name: str, runs: int, vocab: int, spread: float, seed: int, relative_step: float, steps: int
) -> dict[str, Any]:
    """Rates of one loss against the bounds and against the curvature at the target.

    ``relative_step`` is η L, in (0, 1]. Rates are exponents: minus the log of the factor a step.
    """
    z, target = draw_problems(runs, vocab, spread, seed)
    step = relative_step / SMOOTHNESS[name](vocab)
    losses, moduli = descend(name, z, target, step, steps)
    live = losses[:-1] > SMALL * losses[0]
    factor = np.where(live, losses[1:] / np.maximum(losses[:-1], 1e-300), 0.0)
    ahead = -np.log1p(-step * moduli)
    start = -np.log1p(-step * modulus_at_start(name, z, target).numpy())
    final = -2 * np.log1p(-step * curvature_at_target(name, target).numpy())
    held = (factor <= np.exp(-np.maximum(ahead, start)) * (1 + SLACK)).all(axis=0)
    over_ahead, over_start, over_final = [], [], []
    for run in range(runs):
        count = int(live[:, run].sum())
        fallen = -np.log(losses[count, run] / losses[0, run])
        over_ahead.append(fallen / ahead[:count, run].sum())
        over_start.append(np.log10(fallen / count) - np.log10(start[run]))
        settled = int((losses[: count + 1, run] > SETTLED * losses[0, run]).sum())
        if count - settled > 2 and losses[count, run] <= SMALL * losses[0, run]:
            late = -np.log(losses[count, run] / losses[settled, run]) / (count - settled)
            over_final.append(late / final[run])
    kept = np.unique(np.geomspace(1, len(losses), POINTS).astype(int)) - 1
    bound = np.exp(-np.vstack([np.zeros(runs), np.cumsum(ahead, axis=0)]))
    return {
        "held": int(held.sum()),
        "runs": runs,
        "converged": int((losses.min(axis=0) <= SMALL * losses[0]).sum()),
        "last_share": float(f"{np.median(losses[-1] / losses[0]):.3g}"),
        "over_ahead": digits(over_ahead),
        "log10_over_start": digits(over_start),
        "over_final": digits(over_final),
        "steps": kept.tolist(),
        "curve": digits(np.median(losses / losses[0], axis=1)[kept]),
        "bound": digits(np.median(bound, axis=1)[kept]),
    }


def digits(values: Sequence[float] | Array) -> list[float]:
    return [float(f"{x:.5g}") for x in values]


def squared_error_contraction(runs: int, vocab: int, seed: int, relative_step: float) -> float:
    """Largest deviation of ``|z_t - z*|`` from ``(1 - 2η/V)^t |z_0 - z*|``, relative, 20 steps."""
    z, target = draw_problems(runs, vocab, 1.0, seed)
    step = relative_step / SMOOTHNESS["mse"](vocab)
    first = (z - target).norm(dim=-1)
    worst = 0.0
    for t in range(1, 21):
        z = z - step * library("mse", z, target)[1]
        predicted = (1 - 2 * step / vocab) ** t * first
        worst = max(worst, float(((z - target).norm(dim=-1) / predicted - 1).abs().max()))
    return float(f"{worst:.2e}")


def mean_policy_gradient(
    runs: int, vocab: int, seed: int, step: float, kept: Sequence[int], regularised: bool
) -> dict[str, list[float]]:
    """Exact policy gradient in the logits: PPO's mean surrogate, a fresh batch a step (ratio 1).

    Plain, the gap is that of ``sum_a π_a A_a`` to its supremum. ``regularised`` subtracts
    KL(π || π_old), β = 1, and the gap is KL(π || π*).

    Returns
    -------
    dict
        Medians over runs. ``gap``: at the ``kept`` numbers of steps; ``factor``: of the gap in the
        last of these steps, which stays below 1 at a linear rate; ``start``: the gap before any.
    """
    z, target = draw_problems(runs, vocab, 1.0, seed)
    advantages = target - z
    best = advantages.amax(-1, keepdim=True)

    def plain(z: Tensor) -> Tensor:
        return (z.softmax(-1) * (best - advantages)).sum(-1)

    def with_kl(z: Tensor) -> Tensor:
        return reverse_kl(z, target)

    gap_of: Callable[[Tensor], Tensor] = with_kl if regularised else plain
    gap = gap_of(z)
    found: dict[str, list[float]] = {
        "start": digits([float(gap.median())]),
        "gap": [],
        "factor": [],
    }
    for t in range(1, kept[-1] + 1):
        p = z.softmax(-1)
        values = target - z if regularised else advantages
        z = z + step * p * (values - (p * values).sum(-1, keepdim=True))
        before, gap = gap, gap_of(z)
        if t in kept:
            found["gap"].append(float(f"{gap.median():.4g}"))
            found["factor"].append(float(f"{(gap / before).median():.6g}"))
    return found
