"""Descent-ascent on the Bellman saddle of a known model, in closed form, for many models at once.

With ``D`` the law of pairs and ``P V_w`` the expected soft value, the population objective is

    F(w, v) = |T w - w|^2_D - discount^2 |P V_w - v|^2_D

since the variances of both squares cancel. Tables are flat vectors over the ``k`` pairs. The other
form of the same problem, with ``h = r - Q + discount * zeta`` as the dual variable, is

    F(w, h) = 2 h' D (T w - w) - |h|^2_D
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman import TabularMDP
from holdfast.bellman.solve import soft_policy, soft_value

Array = NDArray[np.float64]
NOISE = 1e-12
"""Real parts below this share of the largest eigenvalue are rounding."""


@dataclass(frozen=True)
class Models:
    """Models of one size with their saddles.

    Attributes
    ----------
    kernel : Array
        ``(models, k, states)``.
    rewards, law, w : Array
        ``(models, k)``: rewards, probabilities of pairs, and Q at the saddle.
    discount : float
    """

    kernel: Array
    rewards: Array
    law: Array
    w: Array
    discount: float

    @classmethod
    def stack(cls, models: Sequence[TabularMDP], laws: Array | None = None) -> Models:
        """Models of one size and discount; by default all pairs are equally frequent."""
        kernel = np.stack([model.kernel for model in models])
        rewards = np.stack([model.rewards.ravel() for model in models])
        law = np.full(rewards.shape, 1.0 / rewards.shape[1]) if laws is None else laws
        w = np.stack([model.soft_policy_iteration(1e-12).q.ravel() for model in models])
        return cls(kernel, rewards, law, w, models[0].discount)

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        return self.kernel, self.rewards, self.law, self.w

    @property
    def v(self) -> Array:
        """The dual at the saddle, ``(models, k)``."""
        return self.ahead(self.w)

    def table(self, w: Array) -> Array:
        """``(models, states, actions)`` of ``(models, k)``."""
        return w.reshape(len(w), self.kernel.shape[2], -1)

    def ahead(self, w: Array) -> Array:
        """``E[V_w(s') | s, a]``, ``(models, k)``."""
        return np.einsum("mks,ms->mk", self.kernel, soft_value(self.table(w)))

    def moves(self, w: Array) -> Array:
        """Pair-to-pair probabilities under the policy of ``w``, ``(models, k, k)``."""
        policy = soft_policy(self.table(w))
        return np.einsum("mks,msa->mksa", self.kernel, policy).reshape(*w.shape, -1)

    def gradients(self, w: Array, v: Array) -> tuple[Array, Array]:
        """Of ``F`` in ``w`` and in ``v``, ``(models, k)`` each."""
        ahead = self.ahead(w)
        residual = self.law * (self.rewards + self.discount * ahead - w)
        lag = self.law * (ahead - v)
        # Both squares pull at V(s'), which the policy hands on to the actions there.
        pull = 2 * self.discount * residual - 2 * self.discount**2 * lag
        handed = np.einsum("mk,mks->ms", pull, self.kernel)[..., None] * soft_policy(self.table(w))
        return handed.reshape(w.shape) - 2 * residual, 2 * self.discount**2 * lag

    def hessian(self) -> tuple[Array, Array, Array]:
        """``F_ww``, ``F_wv`` and ``F_vv`` at the saddle, where the residual vanishes."""
        d = np.einsum("mk,kl->mkl", self.law, np.eye(self.law.shape[1]))
        back = self.moves(self.w).transpose(0, 2, 1) @ d
        b = self.discount
        return 2 * (d - b * (back + back.transpose(0, 2, 1))), 2 * b**2 * back, -2 * b**2 * d

    def jacobian(self, ratio: float) -> Array:
        """Of the update, ``(models, 2k, 2k)``: ``z' = -J (z - z*)`` for steps of size one."""
        ww, wv, vv = self.hessian()
        first = np.concatenate([ww, wv], 2)
        second = np.concatenate([wv.transpose(0, 2, 1), vv], 2)
        return np.concatenate([first, -ratio * second], 1)

    def jacobian_of_h(self, ratio: float) -> Array:
        """The same of the form with the dual variable ``h``."""
        k = self.law.shape[1]
        d = np.einsum("mk,kl->mkl", self.law, np.eye(k))
        wh = 2 * (self.discount * self.moves(self.w) - np.eye(k)).transpose(0, 2, 1) @ d
        first = np.concatenate([np.zeros_like(wh), wh], 2)
        return np.concatenate(
            [first, ratio * np.concatenate([-wh.transpose(0, 2, 1), 2 * d], 2)], 1
        )

    def margins(self, ratio: float) -> Array:
        """Least real part of an eigenvalue, ``(models,)``: the saddle repels if negative."""
        return least_real_part(self.jacobian(ratio))

    def distance(self, w: Array, v: Array) -> Array:
        """``|w - w*| + |v - v*|``, ``(models,)``, infinite where it is no number."""
        apart = np.linalg.norm(w - self.w, axis=1) + np.linalg.norm(v - self.v, axis=1)
        return np.where(np.isfinite(apart), apart, np.inf)

    def descend(
        self,
        start: tuple[Array, Array],
        ratio: float,
        step: float,
        keep: Sequence[int],
        *,
        ball: float | None = None,
    ) -> Array:
        """Full-gradient descent-ascent; distances to the saddle after ``keep`` steps.

        With ``ball``, both tables are projected onto the ball around 0 whose radius is that many
        times the norm of the saddle's.

        Returns
        -------
        Array
            ``(keep, models)``.
        """
        w, v = start
        radii = [ball and ball * np.linalg.norm(x, axis=1, keepdims=True) for x in (self.w, self.v)]
        distances = []
        with np.errstate(all="ignore"):
            for t in range(1, max(keep) + 1):
                down, up = self.gradients(w, v)
                w, v = w - step * down, v + step * ratio * up
                if ball is not None:
                    w, v = (_projected(x, r) for x, r in zip((w, v), radii, strict=True))
                if t in keep:
                    distances.append(self.distance(w, v))
        return np.array(distances)


def _projected(table: Array, radius: Array) -> Array:
    return table * np.minimum(1.0, radius / np.linalg.norm(table, axis=1, keepdims=True))


def least_real_part(matrices: Array) -> Array:
    """Of the eigenvalues of ``(models, n, n)``, and 0 where it is rounding."""
    values = np.linalg.eigvals(matrices)
    least = values.real.min(-1)
    return np.where(np.abs(least) < NOISE * np.abs(values).max(-1), 0.0, least)


def critical_ratio(models: Models, low: float = 0.01, high: float = 1e4) -> Array:
    """The ratio from which on the saddle attracts, ``(models,)``, by bisection in the logarithm.

    ``low`` where it attracts at that already.
    """
    critical = []
    for i in range(len(models.law)):
        one = Models(*(each[i : i + 1] for each in models.arrays), models.discount)
        below, above = np.log(low), np.log(high)
        while above - below > 1e-4:
            middle = 0.5 * (below + above)
            attracts = one.margins(float(np.exp(middle)))[0] > 0
            below, above = (below, middle) if attracts else (middle, above)
        critical.append(float(np.exp(above)))
    return np.array(critical)


def funnel(pairs: int, discount: float) -> Models:
    """All pairs lead to one state, in which one of two actions is all but certain."""
    states = pairs // 2
    kernel = np.zeros((states, 2, states))
    kernel[..., 0] = 1.0
    rewards = np.zeros((states, 2))
    rewards[0, 0] = 30.0
    return Models.stack([TabularMDP(kernel, rewards, discount)])


def draw(
    count: int, states: int, actions: int, discount: float, *, family: str = "plain"
) -> Models:
    """Random models, the same for every discount.

    ``plain``: Dirichlet(1) next states, rewards uniform in [0, 1), all pairs equally frequent.
    ``sharp``: rewards twenty times as large, so that policies are all but greedy. ``sparse``:
    Dirichlet(0.1) next states. ``skewed``: frequencies of pairs from Dirichlet(0.3). ``all``: the
    last three at once.
    """
    models, laws = [], []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        alpha = 0.1 if family in ("sparse", "all") else 1.0
        kernel = rng.dirichlet(np.full(states, alpha), size=(states, actions))
        kernel /= kernel.sum(-1, keepdims=True)
        rewards = rng.random((states, actions)) * (20.0 if family in ("sharp", "all") else 1.0)
        models.append(TabularMDP(kernel, rewards, discount))
        skewed = family in ("skewed", "all")
        pairs = states * actions
        # A floor, so that no pair is without data.
        law = 0.9 * rng.dirichlet(np.full(pairs, 0.3)) + 0.1 / pairs if skewed else None
        laws.append(np.full(pairs, 1.0 / pairs) if law is None else law)
    return Models.stack(models, np.stack(laws))
