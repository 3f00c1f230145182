"""Proposition 4.7 in our reading: gradients in the logits shrink with the distance to the target.

The bounds, and why each holds, are in README.md. Gradients are those of the library's losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lco_theory.losses import LCO, library

VOCABS = (2, 10, 100, 1000)
DISTANCES = (0.01, 0.1, 1.0, 3.0, 10.0)
PPO = ("ppo_sample", "ppo_mean", "ppo_sample_kl", "ppo_mean_kl")
SLACK = 1e-9
"""Relative; the bounds on the squared error are equalities and meet rounding."""


def bounds(name: str, loss: Tensor, z: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Upper bounds of the gradient's norm, ``(rows,)``: from the distance, and from the loss."""
    vocab = z.shape[-1]
    distance = z - target
    if name == "mse":
        return {
            "distance": 2 / vocab * distance.norm(dim=-1),
            "loss": 2 * (loss / vocab).sqrt(),
        }
    if name == "log_cosh":
        return {
            "distance": distance.norm(dim=-1).clamp(max=vocab**0.5) / vocab,
            "loss": (2 * loss / vocab).sqrt().clamp(max=vocab**-0.5),
        }
    # A constant shift moves no probability: the distance that counts is that of centred logits.
    centred = distance - distance.mean(-1, keepdim=True)
    return {
        "distance": (centred.norm(dim=-1) / 2).clamp(max=2**0.5),
        "loss": loss.sqrt().clamp(max=2**0.5),
    }


def draw(
    generator: torch.Generator, rows: int, vocab: int, distance: float, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Logits and targets: apart by ``distance`` in one token (equation 11), or in all of them."""
    sharpness = 3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    z = sharpness * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    gap = distance * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    if sparse:
        token = torch.multinomial(z.softmax(-1), 1, generator=generator)
        gap = torch.zeros_like(gap).scatter(-1, token, gap.gather(-1, token))
    return z, z + gap


def check(rows: int, seed: int) -> dict[str, Any]:
    """For every loss and bound: violations, and how much of the bound gradients use.

    ``rows`` cases for each vocabulary, distance, and dense or sparse gap.
    """
    generator = torch.Generator().manual_seed(seed)
    ratios: dict[str, list[Tensor]] = {}
    for vocab in VOCABS:
        for distance in DISTANCES:
            for sparse in (False, True):
                z, target = draw(generator, rows, vocab, distance, sparse)
                for name, loss in LCO.items():
                    norm = library(name, z, target)[1].norm(dim=-1)
                    for of, bound in bounds(name, loss(z, target), z, target).items():
                        ratios.setdefault(f"{name} | {of}", []).append(norm / bound)
    return {key: summarise(torch.cat(parts)) for key, parts in ratios.items()}


def summarise(ratio: Tensor) -> dict[str, Any]:
    quantiles = torch.quantile(ratio, torch.tensor([0.05, 0.5, 0.95], dtype=ratio.dtype))
    return {
        "cases": len(ratio),
        "violations": int((ratio > 1 + SLACK).sum()),
        "quantiles": [float(f"{x:.4g}") for x in quantiles],
        "largest": round(float(ratio.max()), 6),
    }


def near_the_target(rows: int, vocab: int, shrinkage: Sequence[float]) -> dict[str, list[float]]:
    """Median gradient norms at ``z* + s d``: LCO's, and PPO's at the same policies.

    PPO's advantages are those that the target comes from (β = 1, behaviour policy z* - A), centred
    under the policy. ``ppo_sample`` is the gradient of one token drawn from the policy (ratio 1),
    ``ppo_mean`` its mean over tokens. Without a KL term the target is not PPO's optimum. With one
    it is: ``ppo_mean_kl``, ``ppo_sample_kl``, where the advantage of token a is reduced by
    ``log π(a) / π_old(a)``.
    """
    generator = torch.Generator().manual_seed(0)
    target, advantages, d = (
        torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    norms: dict[str, list[float]] = {name: [] for name in (*LCO, *PPO)}
    for s in shrinkage:
        z = target + s * d
        for name in LCO:
            norms[name].append(median(library(name, z, target)[1].norm(dim=-1)))
        token = torch.multinomial(z.softmax(-1), 1, generator=generator)
        for suffix, values in (("", advantages), ("_kl", target - z)):
            sampled, mean = policy_gradients(z, values)
            norms[f"ppo_sample{suffix}"].append(median(sampled.gather(-1, token)))
            norms[f"ppo_mean{suffix}"].append(median(mean))
    return norms


def near_its_own_optimum(
    rows: int, vocab: int, sharpness: Sequence[float]
) -> dict[str, list[float]]:
    """PPO's gradients as the policy goes to the best token, where PPO's optimum lies (at infinity).

    ``z = κ A``. Medians over problems: of a sample of the best token, of a sample of the worst one,
    of the mean gradient; and the probability that a sample has a negative advantage.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    found: dict[str, list[float]] = {
        name: [] for name in ("best", "worst", "mean", "negative_share")
    }
    for kappa in sharpness:
        z = kappa * values
        sampled, mean = policy_gradients(z, values)
        p = z.softmax(-1)
        negative = values < (p * values).sum(-1, keepdim=True)
        found["best"].append(median(sampled.gather(-1, values.argmax(-1, keepdim=True))))
        found["worst"].append(median(sampled.gather(-1, values.argmin(-1, keepdim=True))))
        found["mean"].append(median(mean))
        found["negative_share"].append(median((p * negative).sum(-1)))
    return found


def policy_gradients(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of ``A (e_a - p)`` for every token a, ``(rows, vocab)``, and of its mean, ``(rows,)``.

    ``A`` is ``values`` less its mean under the policy.
    """
    p = z.softmax(-1)
    advantage = values - (p * values).sum(-1, keepdim=True)
    # |e_a - p|² = 1 - 2 p_a + |p|²
    sampled = advantage.abs() * (1 - 2 * p + p.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    return sampled, (p * advantage).norm(dim=-1)


def median(values: Tensor) -> float:
    return float(f"{float(values.median()):.4g}")
