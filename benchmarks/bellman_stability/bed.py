"""The bed on which every constant is known: a small table, and what the theorems say of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.bellman_convergence.dynamics import Models
from holdfast.bellman import TabularMDP
from holdfast.bellman.solve import soft_policy, soft_value

Array = NDArray[np.float64]
STATES, ACTIONS, DISCOUNT = 3, 2, 0.5
SCALE = 40.0
"""c1 of the steps c1 / (c2 + t)."""


def model(discount: float = DISCOUNT, seed: int = 0) -> TabularMDP:
    return TabularMDP.random(STATES, ACTIONS, discount, seed=seed)


def smoothness(one: TabularMDP) -> float:
    """Largest singular value of the Hessian of the population objective at its saddle."""
    return float(np.linalg.norm(Models.stack([one]).jacobian(-1.0)[0], 2))


def offset(one: TabularMDP, scale: float, ratio: float = 1.0) -> float:
    """c2, such that the first step is ``1 / (4 L)``.

    Or, if that is less, such that a single sample takes the dual half of the way to what it says.
    """
    return scale * max(4.0 * smoothness(one), 4.0 * ratio * one.discount**2)


def strong_concavity(discount: float, law: Array) -> float:
    """``2 discount^2 min law``, of the objective in the dual."""
    return float(2.0 * discount**2 * law.min())


def pl_constant(one: TabularMDP, law: Array, grid: int = 21) -> float:
    """``2 inf sigma_min(D^1/2 (I - discount G))^2`` over a grid of all policies of two actions.

    The gradient of ``Phi(w) = |T w - w|^2_D`` is ``-2 (I - discount G)' D (T w - w)``, hence
    ``|grad Phi|^2 / 2 >= mu Phi``.
    """
    shares = np.linspace(0.0, 1.0, grid)
    axes = np.meshgrid(*[shares] * one.states, indexing="ij")
    first = np.stack([axis.ravel() for axis in axes], 1)
    policies = np.stack([first, 1.0 - first], 2)
    moves = np.einsum("ks,psa->pksa", one.kernel, policies).reshape(len(policies), law.size, -1)
    system = np.eye(law.size) - one.discount * moves
    singular = np.linalg.svd(np.sqrt(law.ravel())[:, None] * system, compute_uv=False)
    return float(2.0 * singular[:, -1].min() ** 2)


def constants(one: TabularMDP, points: int = 400, seed: int = 0) -> dict[str, float]:
    """All that the theorems are made of, for equally frequent pairs.

    ``G`` and the per-sample ``L_z`` are the largest found over random points of the box in which
    rewards in [0, 1] keep Q, and V for the dual, and over all transitions.
    """
    law = np.full(one.rewards.shape, 1.0 / one.rewards.size)
    top = (1.0 + one.discount * np.log(one.actions)) / (1.0 - one.discount)
    rng = np.random.default_rng(seed)
    steepest = bent = 0.0
    for _ in range(points):
        # Extremes lie at corners; half of the points are some.
        w, v = rng.random((2, law.size))
        if rng.random() < 0.5:
            w, v = np.round(w), np.round(v)
        w, v = top * w, (top + np.log(one.actions)) * v
        first, second = per_sample(one, w, v)
        steepest = max(steepest, float(np.sqrt((first**2).sum(-1) + (second**2).sum(-1)).max()))
        bent = max(bent, largest_curvature(one, w, v))
    rho, mu = strong_concavity(one.discount, law), pl_constant(one, law)
    local = smoothness(one)
    return {
        "rho": rho,
        "mu": mu,
        "mu_floor": float(2.0 * law.min() * (1 - one.discount) ** 2 / law.size),
        "L": local,
        "L_z": bent,
        "G": steepest,
        "sensitivity": sensitivity(local, rho, mu, steepest),
        "sensitivity_per_sample": sensitivity(bent, rho, mu, steepest),
        "theory_optimum_gap": float((law.size * law * variances(one)).sum() * one.discount**2),
    }


def sensitivity(smooth: float, rho: float, mu: float, steepest: float) -> float:
    """Lemma 12: ``n`` times the shift of the saddle is at most ``2 (1 + L / rho)^2 G / mu``."""
    return 2.0 * (1.0 + smooth / rho) ** 2 * steepest / mu


def variances(one: TabularMDP) -> Array:
    """``Var(V*(s') | s, a)`` at the solution, ``(states, actions)``."""
    v = one.soft_policy_iteration(1e-12).v
    return one.expected(v**2) - one.expected(v) ** 2


def per_sample(one: TabularMDP, w: Array, v: Array) -> tuple[Array, Array]:
    """Gradients of ``f(w, v; s, a, s')`` for all transitions.

    As the squares of ``V(s')`` cancel, ``f = (r - w)^2 + 2 b V(s') h - b^2 v^2`` with ``h = r - w +
    b v``.

    Returns
    -------
    array, array
        ``(k, states, k)`` each: in ``w`` and in ``v``.
    """
    k, b = w.size, one.discount
    table = w.reshape(one.states, one.actions)
    ahead, policy = soft_value(table), soft_policy(table)
    h = one.rewards.ravel() - w + b * v
    delta = one.rewards.ravel()[:, None] + b * ahead - w[:, None]
    places = np.zeros((one.states, k))
    for s in range(one.states):
        places[s, s * one.actions : (s + 1) * one.actions] = policy[s]
    own = np.eye(k)[:, None, :]
    first = -2 * delta[..., None] * own + 2 * b * h[:, None, None] * places[None]
    second = 2 * b**2 * (ahead[None] - v[:, None])[..., None] * own
    return first, second


def largest_curvature(one: TabularMDP, w: Array, v: Array) -> float:
    """Largest singular value of the Hessian of ``f`` over all transitions, at one point."""
    k, b, most = w.size, one.discount, 0.0
    policy = soft_policy(w.reshape(one.states, one.actions))
    h = one.rewards.ravel() - w + b * v
    for pair in range(k):
        for s in range(one.states):
            hessian = np.zeros((2 * k, 2 * k))
            at = slice(s * one.actions, (s + 1) * one.actions)
            curve = np.diag(policy[s]) - np.outer(policy[s], policy[s])
            hessian[at, at] += 2 * b * h[pair] * curve
            hessian[pair, pair] += 2.0
            hessian[pair, at] -= 2 * b * policy[s]
            hessian[at, pair] -= 2 * b * policy[s]
            hessian[at, k + pair] += 2 * b**2 * policy[s]
            hessian[k + pair, at] += 2 * b**2 * policy[s]
            hessian[k + pair, k + pair] -= 2 * b**2
            most = max(most, float(np.linalg.norm(hessian, 2)))
    return most


def pl_check(one: TabularMDP, points: int, seed: int = 0) -> dict[str, float]:
    """The PL inequality and quadratic growth at random points, with the constants above.

    Returns
    -------
    dict
        Least ``|grad Phi|^2 / (2 mu Phi)`` and ``2 Phi / (mu |w - w*|^2)``: at least 1 each.
    """
    law = np.full((1, one.rewards.size), 1.0 / one.rewards.size)
    models = Models.stack([one], law)
    mu = pl_constant(one, law)
    rng = np.random.default_rng(seed)
    least = [np.inf, np.inf]
    for _ in range(points):
        w = models.w + rng.standard_normal(models.w.shape) * 10 ** rng.uniform(-2, 1)
        # At the best dual the objective is Phi, and so are its derivatives in w.
        ahead = models.ahead(w)
        slope = models.gradients(w, ahead)[0]
        residual = one.rewards.ravel() + one.discount * ahead - w
        phi = float((law * residual**2).sum())
        away = float(((w - models.w) ** 2).sum())
        least[0] = min(least[0], float((slope**2).sum()) / (2 * mu * phi))
        least[1] = min(least[1], 2 * phi / (mu * away))
    return {"pl": least[0], "growth": least[1]}
