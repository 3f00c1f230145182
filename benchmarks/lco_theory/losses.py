"""The losses as formulas over the last axis, in float64: autograd can differentiate them twice.

The library's own losses carry their derivative and no second one. Here the same formulas are
written out, and :func:`library` gives the library's value and gradient to compare them with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import hessian, vmap

from holdfast.joint import LossTerms
from holdfast.language.losses import nll as library_nll
from holdfast.language.losses.logits_convex import lco_kl, lco_log_cosh, lco_mse


def mse(z: Tensor, target: Tensor) -> Tensor:
    return (z - target).square().mean(-1)


def log_cosh(z: Tensor, target: Tensor) -> Tensor:
    """Through ``cosh d = 1 + 2 sinh²(d / 2)``, exact also where it is tiny; ``|d|`` below 700."""
    return torch.log1p(2.0 * ((z - target) / 2).sinh().square()).mean(-1)


def kl(z: Tensor, target: Tensor) -> Tensor:
    """``KL(softmax(target) || softmax(z))``, exact also where it is tiny.

    ``w`` is log π - log π*, whose ``exp`` has mean 1 under π*: the mean of ``exp(w) - 1 - w`` has
    no large terms that cancel.
    """
    goal = target.log_softmax(-1)
    w = z.log_softmax(-1) - goal
    return (goal.exp() * (torch.expm1(w) - w)).sum(-1)


def nll(z: Tensor, label: Tensor) -> Tensor:
    """``label`` is one-hot."""
    return -(label * z.log_softmax(-1)).sum(-1)


def surrogate(
    z: Tensor, label: Tensor, old_logp: Tensor, advantage: Tensor, epsilon: float = math.inf
) -> Tensor:
    """PPO's loss of one sampled token, ``-min(r A, clip(r, 1 - ε, 1 + ε) A)``; unclipped as is.

    ``label`` is one-hot, the other rows of numbers have one entry a sample.
    """
    ratio = (-nll(z, label) - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def reverse_kl(z: Tensor, target: Tensor) -> Tensor:
    """``KL(softmax(z) || softmax(target))``: PPO's mean surrogate with a KL term.

    Up to a factor and a constant: ``E[A] - β KL(π || π_old) = β log Z - β KL(π || π*)``.
    """
    w = target.log_softmax(-1) - z.log_softmax(-1)
    return (z.softmax(-1) * (torch.expm1(w) - w)).sum(-1)


def expected_surrogate(z: Tensor, advantages: Tensor) -> Tensor:
    """The mean of the unclipped surrogate over the behaviour policy: ``-sum_a π_a A_a``."""
    return -(z.softmax(-1) * advantages).sum(-1)


LCO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "log_cosh": log_cosh, "kl": kl}
LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor], LossTerms]] = {
    "mse": lco_mse,
    "log_cosh": lco_log_cosh,
    "kl": lco_kl,
}
SMOOTHNESS: dict[str, Callable[[int], float]] = {
    "mse": lambda vocab: 2.0 / vocab,
    "log_cosh": lambda vocab: 1.0 / vocab,
    "kl": lambda vocab: 0.5,
}
"""The largest eigenvalue that the Hessian in the logits can have."""


def library(name: str, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Total and gradient, ``(rows, vocab)``, of the library's loss; for SFT ``target`` is labels.

    Rows do not share a gradient, since the loss is a sum.
    """
    leaf = z.detach().clone().requires_grad_()
    if name == "sft":
        terms = library_nll(leaf, target)
    else:
        terms = LIBRARY[name](leaf, target, torch.ones(len(z), dtype=torch.bool))
    (gradient,) = torch.autograd.grad(terms.total, leaf)
    return terms.total.detach(), gradient


def hessians(loss: Callable[..., Tensor], z: Tensor, *rest: Tensor) -> Tensor:
    """Hessians in the logits, ``(rows, vocab, vocab)``, by autograd."""
    return vmap(hessian(loss))(z, *rest)


def fisher(p: Tensor) -> Tensor:
    """``diag(p) - p pᵀ``."""
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
