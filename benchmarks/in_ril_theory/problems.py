"""Pairs of losses whose smoothness, noise and gradients are known in closed form.

All are batches of ``problems`` that are descended side by side; rows never mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Pair(Protocol):
    """A loss of reinforcement and one of imitation, for each of several problems.

    Attributes
    ----------
    start : array, (problems, parameters)
    smoothness_rl, smoothness_il : array, (problems,)
        Upper bounds of the largest curvature, tight for quadratics.
    optimum : array, (problems,)
        The lowest RL loss.
    """

    start: Array
    smoothness_rl: Array
    smoothness_il: Array
    optimum: Array

    def rl_loss(self, theta: Array) -> Array: ...

    def rl_gradient(self, theta: Array) -> Array: ...

    def il_gradient(self, theta: Array) -> Array: ...

    def variance(self, theta: Array) -> Array:
        """``σ²``: expected squared norm of the noise of the imitation gradient of one sample."""
        ...

    def noise(self, theta: Array, batch: int, draw: np.random.Generator) -> Array:
        """That noise, of a mean over ``batch`` samples."""
        ...


@dataclass
class Quadratics:
    """``½ (θ - a)ᵀ A (θ - a)`` and ``½ (θ - b)ᵀ B (θ - b)`` with Gaussian noise in imitation.

    ``a`` is 0, the start has length 1, and ``b``, what is demonstrated, lies ``distance`` from
    ``a`` in a random direction. Spectra are log-uniform in [``1 / condition``, 1] with both ends
    taken, in random bases.
    """

    start: Array
    rl_curvature: Array
    il_curvature: Array
    il_optimum: Array
    deviation: float
    smoothness_rl: Array
    smoothness_il: Array
    optimum: Array

    @classmethod
    def drawn(
        cls,
        problems: int,
        distance: float,
        draw: np.random.Generator,
        *,
        size: int = 10,
        condition: float = 30.0,
        deviation: float = 0.3,
    ) -> Quadratics:
        start, away = (_directions(problems, size, draw) for _ in range(2))
        curvatures = [_curvature(problems, size, condition, draw) for _ in range(2)]
        ones = np.ones(problems)
        return cls(start, *curvatures, distance * away, deviation, ones, ones, np.zeros(problems))

    def rl_loss(self, theta: Array) -> Array:
        return np.einsum("pi,pij,pj->p", theta, self.rl_curvature, theta) / 2

    def rl_gradient(self, theta: Array) -> Array:
        return np.einsum("pij,pj->pi", self.rl_curvature, theta)

    def il_gradient(self, theta: Array) -> Array:
        return np.einsum("pij,pj->pi", self.il_curvature, theta - self.il_optimum)

    def variance(self, theta: Array) -> Array:
        return np.full(len(theta), self.deviation**2)

    def noise(self, theta: Array, batch: int, draw: np.random.Generator) -> Array:
        each = self.deviation / np.sqrt(theta.shape[1] * batch)
        return each * draw.standard_normal(theta.shape)


@dataclass
class Bandits:
    """Softmax policies over ``arms`` with known rewards, and demonstrations of another policy.

    RL: ``-Σ π_a r_a``, exact, with rewards in [0, 1]; it is 5/2-smooth in the logits (Mei et al.,
    "On the Global Convergence Rates of Softmax Policy Gradient Methods", lemma 2). Imitation: the
    cross-entropy to the demonstrator ``q``, 1/2-smooth, of sampled actions. ``q`` gives the best
    arm the share ``skill`` and the rest a random policy.
    """

    start: Array
    rewards: Array
    demonstrator: Array
    smoothness_rl: Array
    smoothness_il: Array
    optimum: Array

    @classmethod
    def drawn(
        cls, problems: int, skill: float, draw: np.random.Generator, *, arms: int = 10
    ) -> Bandits:
        rewards = draw.random((problems, arms))
        best = rewards.argmax(axis=1)
        demonstrator = (1 - skill) * draw.dirichlet(np.ones(arms), problems)
        demonstrator[np.arange(problems), best] += skill
        # A cloned start: what was demonstrated, blurred.
        start = np.log(demonstrator + 0.05) + 0.5 * draw.standard_normal((problems, arms))
        ones = np.ones(problems)
        return cls(start, rewards, demonstrator, 2.5 * ones, 0.5 * ones, -rewards.max(axis=1))

    def rl_loss(self, theta: Array) -> Array:
        return -(_softmax(theta) * self.rewards).sum(axis=1)

    def rl_gradient(self, theta: Array) -> Array:
        policy = _softmax(theta)
        value = (policy * self.rewards).sum(axis=1, keepdims=True)
        return -policy * (self.rewards - value)

    def il_gradient(self, theta: Array) -> Array:
        return _softmax(theta) - self.demonstrator

    def variance(self, theta: Array) -> Array:
        return 1.0 - (self.demonstrator**2).sum(axis=1)

    def noise(self, theta: Array, batch: int, draw: np.random.Generator) -> Array:
        return self.demonstrator - draw.multinomial(batch, self.demonstrator) / batch


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _directions(problems: int, size: int, draw: np.random.Generator) -> Array:
    found = draw.standard_normal((problems, size))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _curvature(problems: int, size: int, condition: float, draw: np.random.Generator) -> Array:
    spectrum = condition ** -draw.random((problems, size))
    spectrum[:, 0], spectrum[:, 1] = 1.0, 1.0 / condition
    bases = np.linalg.qr(draw.standard_normal((problems, size, size)))[0]
    return np.einsum("pik,pk,pjk->pij", bases, spectrum, bases)
