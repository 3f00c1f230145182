"""Steps of the proofs that do not hold, each with numbers that say so."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.bellman_convergence.dynamics import Models
from benchmarks.bellman_stability import bed

SIZES = (64, 256, 1024, 4096)


def common_step() -> dict[str, Any]:
    """Lemma 2: with one step for both players the saddle repels at high discounts."""
    return {
        f"{discount:g}": {
            f"{ratio:g}": float(f"{Models.stack([bed.model(discount)]).margins(ratio)[0]:.4g}")
            for ratio in (1.0, discount**-2, 4.0)
        }
        for discount in (0.5, 0.8, 0.9, 0.95, 0.99)
    }


def lost_sign(smooth: float, scale: float, offset: float) -> dict[str, Any]:
    """Lemma 15: ``x_{t+1} = (1 + 2 L eta_t) x_t + eta_t / n`` grows like ``T^(2 L c1)``.

    Times ``n``: the recursion itself, and the sum with the sign turned round.
    """
    marks = (100, 1_000, 10_000, 100_000)
    rows, grown = {}, 0.0
    for t in range(marks[-1]):
        eta = scale / (offset + t)
        grown = (1 + 2 * smooth * eta) * grown + eta
        if t + 1 in marks:
            etas = scale / (offset + np.arange(t + 1))
            later = etas[::-1].cumsum()[::-1] - etas
            rows[str(t + 1)] = {
                "recursion": float(f"{grown:.4g}"),
                "turned": float(f"{(etas * np.exp(-2 * smooth * later)).sum():.4g}"),
            }
    logs = [np.log(rows[str(t)]["recursion"]) for t in marks[-2:]]
    exponent = (logs[1] - logs[0]) / np.log((offset + marks[-1]) / (offset + marks[-2]))
    return {"rows": rows, "exponent": float(exponent), "expected": 2 * smooth * scale}


def floor(rate: float, scale: float, offset: float) -> dict[str, Any]:
    """Lemmas 13 and 17: a term of first order in the step leaves a floor, one of second does not.

    ``x_{t+1} = (1 - c eta_t) x_t + eta_t`` goes to ``1 / c``.
    """
    first = second = 0.0
    rows = {}
    for t in range(100_000):
        eta = scale / (offset + t)
        first = (1 - rate * eta) * first + eta
        second = (1 - rate * eta) * second + eta**2
        if t + 1 in (100, 1_000, 10_000, 100_000):
            rows[str(t + 1)] = [float(f"{rate * first:.4g}"), float(f"{rate * second:.4g}")]
    return rows


def single_ascent(step: float) -> dict[str, Any]:
    """Proof (b): the contraction of a full ascent step does not carry over to a single sample.

    At the best dual a full step stays, a single sample leaves; further out its mean square still
    grows where the dual is nearer than ``radius``.
    """
    one = bed.model()
    solved = one.soft_policy_iteration(1e-12)
    law = 1.0 / one.rewards.size
    pull = 2 * one.discount**2
    noise = (step * pull) ** 2 * law * bed.variances(one).sum()
    v = one.expected(solved.v).ravel()
    away = np.abs(step * pull * (solved.v[None] - v[:, None]))[one.kernel > 0]
    # In the mean, |e'|^2 = (1 - 2 a + step a pull) |e|^2 + noise, with a = step pull law.
    shrink = 2 * step * pull * law - (step * pull) ** 2 * law
    rho = bed.strong_concavity(one.discount, np.full(6, law))
    claimed = 2 * rho * step - (rho * step) ** 2
    return {
        "leaves": float((away > 0).mean()),
        "mean_square_left": float(noise),
        "radius": float(np.sqrt(noise / shrink)),
        "shrinks": float(shrink),
        "claimed": float(claimed),
    }


def corollary(rate: float, smooth: float) -> dict[str, Any]:
    """Corollary 4: at the largest c1 it allows, ``4 / (3 c)``, the bound falls like ``T^-1/2``."""
    scale = 4.0 / (3.0 * rate)
    offset = 4.0 * smooth * scale
    n = np.array(SIZES, dtype=float)

    def kernel(t: np.ndarray) -> np.ndarray:
        return (offset / (offset + t)) ** (3 * rate * scale / 8)

    def slope(values: np.ndarray) -> float:
        return float(np.polyfit(np.log(n), np.log(values), 1)[0])

    return {
        "largest_scale": scale,
        "exponent": 3 * rate * scale / 8,
        "slope": {
            "n": slope(kernel(n)),
            "10n": slope(kernel(10 * n)),
            "n2": slope(kernel(n**2)),
        },
        "steps_for_1/n": {str(int(each)): float(offset * (each**2 - 1)) for each in n},
    }


def exponents(rate: float, scale: float, offset: float) -> dict[str, Any]:
    """The kernel as stated in Theorem 3 and as left by its proof, after ``10 n`` steps."""
    share = {n: offset / (offset + 10 * n) for n in SIZES}
    return {
        str(n): [float(f"{s ** (p * rate * scale):.4g}") for p in (0.75, 0.5)]
        for n, s in share.items()
    }


def optimum_on_data(n: int) -> dict[str, float]:
    """Theorem 7: ``n E[R_n(w*)]`` exactly. It is not 0, though ``R(w*)`` is."""
    one = bed.model()
    terms = one.discount**2 * bed.variances(one)
    seen = 1.0 - (1.0 - 1.0 / terms.size) ** n
    return {"n_times": float(seen * terms.sum())}


def unbounded_gradients() -> dict[str, float]:
    """A5: the largest per-sample gradient on spheres around the saddle grows with the radius."""
    one = bed.model()
    w = one.soft_policy_iteration(1e-12).q.ravel()
    v = Models.stack([one]).v[0]
    rng = np.random.default_rng(0)
    rows = {}
    for radius in (1.0, 10.0, 100.0, 1000.0):
        most = 0.0
        for _ in range(100):
            away = rng.standard_normal((2, w.size))
            away *= radius / np.linalg.norm(away)
            first, second = bed.per_sample(one, w + away[0], v + away[1])
            most = max(most, float(np.sqrt((first**2).sum(-1) + (second**2).sum(-1)).max()))
        rows[f"{radius:g}"] = float(f"{most:.4g}")
    return rows


def missing_pairs(draws: int = 4000) -> dict[str, Any]:
    """A8: data sets of a size in which replacing one row can leave a pair without any."""
    rng = np.random.default_rng(0)
    rows = {}
    for n in (16, 32, 64, 128):
        counts = rng.multinomial(n, np.full(6, 1 / 6), size=draws).min(1)
        rows[str(n)] = {
            "absent": float((counts == 0).mean()),
            "one_row": float((counts < 2).mean()),
        }
    return rows


def concave_along_the_constant() -> dict[str, list[float]]:
    """Curvature of F in w along the constant: second differences, and ``2 ((1 - b)^2 - b^2)``."""
    rows = {}
    for discount in (0.3, 0.5, 0.6, 0.9):
        models = Models.stack([bed.model(discount)])
        ones = np.ones_like(models.w)
        small = 1e-3
        up, _ = models.gradients(models.w + small * ones, models.v)
        down, _ = models.gradients(models.w - small * ones, models.v)
        measured = float(((up - down) * ones).sum() / (2 * small))
        rows[f"{discount:g}"] = [measured, 2 * ((1 - discount) ** 2 - discount**2)]
    return rows


def every() -> dict[str, Any]:
    """All of them on the bed; the rate c is taken as large as the PL constant allows."""
    known = bed.constants(bed.model(), points=50)
    scale = bed.SCALE
    offset = bed.offset(bed.model(), scale)
    return {
        "common step (Lemma 2)": common_step(),
        "lost sign (Lemma 15)": lost_sign(known["L"], scale, offset),
        "floor (Lemmas 13 and 17)": floor(known["mu"], scale, offset),
        "single-sample ascent (proof of Theorem 3)": single_ascent(scale / offset),
        "rate in T (Corollary 4)": corollary(known["mu"], known["L"]),
        "exponents (Theorem 3)": exponents(known["mu"], scale, offset),
        "optimum on data (Theorem 7)": {str(n): optimum_on_data(n) for n in SIZES},
        "bounded gradients (A5)": unbounded_gradients(),
        "constants of neighbours (A8)": missing_pairs(),
        "convexity (earlier bounds)": concave_along_the_constant(),
    }
