"""SAFE: a KL penalty behind an entropy gate and a moving threshold, and a critic of several heads.

Source: Maity, "SAFE" (arXiv 2602.04651): equations of the controller and of the soft minimum. Its
released code adds the penalty as a number, which has no gradient, and steps the controller once
for every pass over a batch. Here the penalty has one, and the controller moves once a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.language.guards.controllers import check_positive


class SafeKL:
    """No penalty below a threshold of the smoothed KL; above, one that grows with the excess.

    The penalty is ``strength (kl - threshold)^2 gate`` for ``kl > threshold``. Its derivative at
    the smoothed KL, ``2 strength (kl - threshold) gate``, is the coefficient of the KL estimate in
    the loss: the estimate has the gradient, the controller only says how much of it.

    - ``gate = max(0.5, 2 / (entropy + 0.1))``: a policy that is almost deterministic is held back
      more.
    - ``threshold = clip((base + pid) phase, lowest, highest)``.
    - ``pid = 0.3 e + 0.01 clip(sum e, -1, 1) + 0.05 (e - e')`` with ``e`` the velocity of the
      smoothed reward less 0.001. With rewards in [0, 1] it stays below 0.03: the phase decides.
    - ``phase``: 1.5 in the first steps, 1.2 while rewards climb, 1.0 once they have converged, 0.8
      where they stand still before.

    Parameters
    ----------
    base, lowest, highest : float
        Threshold and its bounds, in nats a token.
    strength : float
        Of the penalty. Positive.
    smoothing : float
        Share of the smoothed KL that is kept each step, in [0, 1).
    reward_smoothing : float
        The same of the reward.
    warmup, window : int
        Steps of the first phase, and steps whose rewards are compared. At least 0; at least 2.
    converged_reward, converged_deviation : float
        Rewards of a window above the one, with a deviation below the other, have converged.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    def __init__(
        self,
        *,
        base: float = 0.3,
        lowest: float = 0.1,
        highest: float = 0.6,
        strength: float = 0.1,
        smoothing: float = 0.9,
        reward_smoothing: float = 0.95,
        warmup: int = 50,
        window: int = 50,
        converged_reward: float = 0.7,
        converged_deviation: float = 0.02,
    ) -> None:
        check_positive(base=base, lowest=lowest, highest=highest, strength=strength)
        if not lowest <= base <= highest:
            raise ValueError(f"base is {base}: it must lie in [lowest, highest], {lowest, highest}")
        for name, share in (("smoothing", smoothing), ("reward_smoothing", reward_smoothing)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"{name} is {share}: it must lie in [0, 1)")
        if warmup < 0 or window < 2:
            raise ValueError(
                f"warmup is {warmup} and window {window}: there must be at least 0 and 2 steps"
            )
        self.base, self.lowest, self.highest, self.strength = base, lowest, highest, strength
        self.smoothing, self.reward_smoothing = smoothing, reward_smoothing
        self.warmup, self.window = warmup, window
        self.converged_reward = converged_reward
        self.converged_deviation = converged_deviation
        self.steps = 0
        self.kl: float | None = None
        """Smoothed; ``None`` before the first step."""
        self.entropy: float | None = None
        self.reward: float | None = None
        """Smoothed."""
        self.rewards: list[float] = []
        """Of the latest two windows of steps."""
        self.error = self.errors = self.change = 0.0
        """Of the reward's velocity: the latest, their clipped sum, and how the latest changed."""

    # What it says ---------------------------------------------------------------------------------

    @property
    def pid(self) -> float:
        return 0.3 * self.error + 0.01 * self.errors + 0.05 * self.change

    @property
    def phase(self) -> float:
        if self.steps < self.warmup:
            return 1.5
        late = self.rewards[-self.window :]
        early = self.rewards[: -self.window]
        if len(early) < self.window:
            return 0.8
        mean = math.fsum(late) / len(late)
        if mean > math.fsum(early) / len(early) + 0.01:
            return 1.2
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in late) / len(late))
        still = deviation < self.converged_deviation and mean > self.converged_reward
        return 1.0 if still else 0.8

    @property
    def threshold(self) -> float:
        """In nats a token."""
        return min(max((self.base + self.pid) * self.phase, self.lowest), self.highest)

    @property
    def gate(self) -> float:
        return 0.5 if self.entropy is None else max(0.5, 2.0 / (self.entropy + 0.1))

    @property
    def coefficient(self) -> float:
        """What the KL estimate of the coming step is to be multiplied by; 0 below the threshold."""
        excess = 0.0 if self.kl is None else max(self.kl - self.threshold, 0.0)
        return 2.0 * self.strength * excess * self.gate

    def penalty(self, kl: Tensor) -> Tensor:
        """``coefficient * kl``, with the gradient of ``kl``."""
        return self.coefficient * kl

    @property
    def record(self) -> dict[str, float]:
        return {"kl_coef": self.coefficient, "kl_threshold": self.threshold, "kl_gate": self.gate}

    # What it hears --------------------------------------------------------------------------------

    def update(self, kl: float, entropy: float, reward: float | None = None) -> None:
        """Once an optimiser step: its mean KL and entropy, in nats a token, and mean reward."""
        if not (math.isfinite(kl) and math.isfinite(entropy)):
            return
        self.steps += 1
        keep = self.smoothing
        self.kl = kl if self.kl is None else keep * self.kl + (1.0 - keep) * kl
        self.entropy = max(entropy, 0.0)
        if reward is None or not math.isfinite(reward):
            return
        before = reward if self.reward is None else self.reward
        self.reward = self.reward_smoothing * before + (1.0 - self.reward_smoothing) * reward
        error = self.reward - before - 0.001
        self.change = error - self.error if self.rewards else 0.0
        self.errors = min(max(self.errors + error, -1.0), 1.0)
        self.error = error
        self.rewards = [*self.rewards, reward][-2 * self.window :]

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.update(
            metrics.get("kl", math.nan), metrics.get("entropy", math.nan), metrics.get("reward")
        )

    _STATE = ("steps", "kl", "entropy", "reward", "rewards", "error", "errors", "change")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])
        self.rewards = list(self.rewards)


def soft_minimum(values: Tensor, alpha: float = 0.3) -> Tensor:
    """``-alpha (logsumexp(-V / alpha) - log n)`` of the ``n`` values in the last dimension.

    Between their minimum and their mean: the one for a small ``alpha``, the other for a large one.
    A critic of several heads that is read so does not overrate what its heads disagree on.

    Parameters
    ----------
    values : Tensor
        ``(..., heads)``.
    alpha : float
        In the units of the values. Positive.

    Returns
    -------
    Tensor
        ``(...)``, differentiable.
    """
    check_positive(alpha=alpha)
    heads = values.shape[-1]
    if heads == 1:
        return values.squeeze(-1)
    return -alpha * (torch.logsumexp(-values / alpha, -1) - math.log(heads))
