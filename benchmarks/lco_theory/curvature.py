"""Equations 4 and 5, Proposition 4.1, Lemmas 4.5 and 4.6: derivatives in the logits.

Every function draws random rows of logits and returns what it found, as JSON values.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from benchmarks.lco_theory.losses import (
    LCO,
    expected_surrogate,
    fisher,
    hessians,
    library,
    nll,
    surrogate,
)

SCALES = (0.1, 1.0, 3.0)
"""Standard deviations of the logits: from nearly uniform policies to nearly certain ones."""
CLIP = 0.2
ROUNDING = 1e-10
"""Eigenvalues below this share of the largest one count as zero."""


def draw_logits(generator: torch.Generator, rows: int, vocab: int) -> Tensor:
    """``(rows, vocab)``, each row at one of the scales."""
    z = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return z * torch.tensor(SCALES, dtype=torch.float64)[torch.arange(rows) % len(SCALES), None]


def draw_tokens(generator: torch.Generator, z: Tensor) -> Tensor:
    """One token a row, from its policy."""
    return torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)


def shape_of(eigenvalues: Tensor) -> dict[str, float]:
    """Shares of Hessians that are indefinite, positive and negative semi-definite, or zero.

    ``eigenvalues`` is ``(rows, vocab)``, ascending.
    """
    size = eigenvalues.abs().amax(-1)
    up = eigenvalues[:, -1] > ROUNDING * size
    down = eigenvalues[:, 0] < -ROUNDING * size
    return {
        "indefinite": share(up & down),
        "convex": share(up & ~down),
        "concave": share(down & ~up),
        "zero": share(~up & ~down),
    }


def share(held: Tensor) -> float:
    return round(float(held.double().mean()), 5) if len(held) else math.nan


def largest(error: Tensor) -> float:
    return float(f"{float(error.abs().max()):.2e}")


def supervised(rows: int, vocab: int, seed: int) -> dict[str, Any]:
    """Equation 4: gradient ``p - e_y`` and Hessian ``diag(p) - p pᵀ`` of the log-likelihood."""
    generator = torch.Generator().manual_seed(seed)
    z = draw_logits(generator, rows, vocab)
    token = draw_tokens(generator, z)
    label = F.one_hot(token, vocab).double()
    p = z.softmax(-1)
    curvature = hessians(nll, z, label)
    return {
        "gradient_error": largest(vmap(grad(nll))(z, label) - (p - label)),
        "library_error": largest(library("sft", z, token)[1] - (p - label)),
        "hessian_error": largest(curvature - fisher(p)),
        **shape_of(torch.linalg.eigvalsh(curvature)),
    }


def policy_gradient(rows: int, vocab: int, seed: int) -> dict[str, Any]:
    """Equation 5 and Proposition 4.1: derivatives of PPO's surrogate of one sampled token.

    Gradient ``-A r (e_a - p)``, Hessian ``-A r ((e_a - p)(e_a - p)ᵀ - diag(p) + p pᵀ)``. The
    behaviour policy lies near the policy, and the token is drawn from it.
    """
    generator = torch.Generator().manual_seed(seed)
    z = draw_logits(generator, rows, vocab)
    old = z + 0.2 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    label = F.one_hot(draw_tokens(generator, old), vocab).double()
    old_logp = -nll(old, label)
    advantage = torch.randn(rows, generator=generator, dtype=torch.float64)

    p = z.softmax(-1)
    probability = (p * label).sum(-1)
    pull = -advantage * probability / old_logp.exp()
    u = label - p
    gradient = vmap(grad(surrogate))(z, label, old_logp, advantage)
    curvature = hessians(surrogate, z, label, old_logp, advantage)
    closed = pull[:, None, None] * (u[:, :, None] * u[:, None, :] - fisher(p))
    eigenvalues = torch.linalg.eigvalsh(curvature)

    ratio = probability / old_logp.exp()
    clipped = torch.where(advantage > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    with_clip = hessians(partial(surrogate, epsilon=CLIP), z, label, old_logp, advantage)
    signs = {"A>0": advantage > 0, "A<0": advantage < 0}
    groups = {
        f"{sign}, {side}": shape_of(eigenvalues[chosen])
        for sign, signed in signs.items()
        for side, half in (("p<1/2", probability < 0.5), ("p>1/2", probability > 0.5))
        if bool((chosen := signed & half).any())
    }
    every = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(hessians(expected_surrogate, z, every))
    spread = eigenvalues.abs().amax(-1)
    points = torch.stack(
        [probability, advantage.sign(), eigenvalues[:, 0] / spread, eigenvalues[:, -1] / spread], -1
    )
    return {
        "gradient_error": largest(gradient - pull[:, None] * u),
        "hessian_error": largest(curvature - closed),
        "convex": {sign: shape_of(eigenvalues[chosen])["convex"] for sign, chosen in signs.items()},
        "groups": groups,
        "expected": shape_of(expected),
        "clipped": {
            "share": share(clipped),
            "hessian": largest(with_clip[clipped]) if bool(clipped.any()) else 0.0,
            "error_elsewhere": largest((with_clip - curvature)[~clipped]),
        },
        "points": [[round(float(x), 4) for x in row] for row in points[:300]],
    }


def moduli(rows: int, vocab: int, seed: int) -> dict[str, Any]:
    """Lemmas 4.5 and 4.6: smallest eigenvalues of LCO's Hessians against closed forms.

    - Squared error: ``2 / V`` everywhere.
    - log cosh: ``sech²(max |d|) / V``, above 0 and without a lower bound.
    - KL: 0 for a constant shift; the next one, λ₂, lies between the smallest and the second
      smallest probability (a rank-one change interlaces), so it has no lower bound either.
    """
    generator = torch.Generator().manual_seed(seed)
    z, target = draw_logits(generator, rows, vocab), draw_logits(generator, rows, vocab)
    found: dict[str, Any] = {}
    for name, loss in LCO.items():
        total, gradient = library(name, z, target)
        curvature = hessians(loss, z, target)
        eigenvalues = torch.linalg.eigvalsh(curvature)
        found[name] = {
            "value_error": largest(total / loss(z, target).sum() - 1),
            "gradient_error": largest(vmap(grad(loss))(z, target) - gradient),
            "indefinite": shape_of(eigenvalues)["indefinite"],
            "concave": shape_of(eigenvalues)["concave"],
        }
        if name == "mse":
            found[name]["modulus_error"] = largest(eigenvalues * vocab / 2 - 1)
        elif name == "log_cosh":
            modulus = (z - target).abs().amax(-1).cosh() ** -2
            found[name]["modulus_error"] = largest(eigenvalues[:, 0] * vocab - modulus)
            found[name]["least"] = float(f"{eigenvalues[:, 0].min():.3g}")
        else:
            least = z.softmax(-1).sort(-1).values
            gap = eigenvalues[:, 1]
            found[name]["shift_error"] = largest(curvature.sum(-1))
            found[name]["below_least_p"] = int((gap < least[:, 0] * (1 - 1e-6)).sum())
            found[name]["above_second_p"] = int((gap > least[:, 1] * (1 + 1e-6)).sum())
            over = gap / least[:, 0]
            found[name]["over_least_p"] = [
                round(float(x), 4) for x in (over.min(), over.median(), over.max())
            ]
            found[name]["least"] = float(f"{gap.min():.3g}")
    return found
