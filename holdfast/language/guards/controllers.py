"""Coefficients that follow what training shows, one change an optimiser step.

A controller hears the means of a step (:meth:`Controller.observe`) and sets the coefficient of the
next one. A refused step is not heard. What it remembers is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol


class Controller(Protocol):
    """What an objective adjusts between its optimiser steps."""

    @property
    def record(self) -> dict[str, float]:
        """What it is at, for the metrics of a step."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hear the means of an accepted step of this objective, and its mean ``loss``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class AdaptiveKl:
    """Raises the coefficient of a KL penalty above a target, and lowers it below.

    ``beta <- beta (1 + gain clip((kl - target) / target, -0.2, 0.2))``. Ziegler et al.,
    "Fine-Tuning Language Models from Human Preferences", section 2.2.

    Parameters
    ----------
    coefficient : float
        Where it starts. Positive.
    target : float
        KL divergence from the reference that is aimed at, in nats a token. Positive.
    gain : float
        Positive.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    def __init__(self, coefficient: float, *, target: float, gain: float = 0.1) -> None:
        check_positive(coefficient=coefficient, target=target, gain=gain)
        self.coefficient, self.target, self.gain = coefficient, target, gain

    @property
    def record(self) -> dict[str, float]:
        return {"kl_coef": self.coefficient}

    def observe(self, metrics: Mapping[str, float]) -> None:
        kl = metrics.get("kl", math.nan)
        if math.isfinite(kl):
            error = min(max((kl - self.target) / self.target, -0.2), 0.2)
            self.coefficient *= 1.0 + self.gain * error

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])


class AdaptiveEntropy:
    """Raises the coefficient of an entropy bonus while the entropy is low, and lowers it after.

    At or below ``target`` the coefficient grows by ``step`` and is applied; above, it shrinks by as
    much and is not. He et al., "Skywork Open Reasoner 1", on adaptive entropy control; what is done
    when is as in TRL.

    Parameters
    ----------
    coefficient : float
        Where it starts, in [lowest, highest].
    target : float
        In nats a token.
    step, lowest, highest : float
        Change in an optimiser step, and bounds. Positive; 0 or more; finite.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    def __init__(
        self,
        coefficient: float,
        *,
        target: float = 0.2,
        step: float = 0.005,
        lowest: float = 0.0,
        highest: float = 1.0,
    ) -> None:
        check_positive(target=target, step=step)
        if not 0.0 <= lowest <= coefficient <= highest < math.inf:
            raise ValueError(
                f"coefficient is {coefficient}: it must lie in [{lowest}, {highest}], which must "
                "be finite and not negative"
            )
        self.setting = coefficient
        """The coefficient that is applied while the entropy is low."""
        self.target, self.step, self.lowest, self.highest = target, step, lowest, highest
        self.entropy = math.inf
        """That of the latest step; before any, nothing is low."""

    @property
    def coefficient(self) -> float:
        """What the entropy of the coming step is to be multiplied by."""
        return self.setting if self.entropy <= self.target else 0.0

    @property
    def record(self) -> dict[str, float]:
        return {"entropy_coef": self.coefficient}

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = metrics.get("entropy", math.nan)
        if not math.isfinite(entropy):
            return
        self.entropy = entropy
        change = self.step if entropy <= self.target else -self.step
        self.setting = min(max(self.setting + change, self.lowest), self.highest)

    def state_dict(self) -> dict[str, Any]:
        known = None if math.isinf(self.entropy) else self.entropy
        return {"setting": self.setting, "entropy": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.setting = float(state["setting"])
        self.entropy = math.inf if state["entropy"] is None else float(state["entropy"])


class Surrogate:
    """Whether passes over one batch of rollouts still lower its loss; else it has served enough.

    Several passes over one batch are an inner loop on a surrogate of the true objective
    (Lavington et al., "Target-based Surrogates for Stochastic Optimization"). Once the surrogate
    rises, its steps no longer decrease what it majorises, and new rollouts are due. The rise shows
    in the pass after the step that made it, which is still taken: the check costs nothing.

    Parameters
    ----------
    passes : int
        The most passes over a batch, at least 2.
    steps : int
        Optimiser steps of a pass: losses are compared pass by pass. At least 1.
    """

    def __init__(self, passes: int, steps: int = 1) -> None:
        if passes < 2 or steps < 1:
            raise ValueError(
                f"passes is {passes} and steps {steps}: there must be at least 2 passes, of at "
                "least 1 step"
            )
        self.passes, self.steps = passes, steps
        self.seen = 0
        """Steps heard since the rollouts are new."""
        self.sums = [0.0, 0.0]
        """Losses of the pass before, and of the one that is under way."""
        self.exhausted = False
        """The surrogate rose: new rollouts are due."""
        self.increase = 0.0
        """By how much, in the mean loss of a step."""

    @property
    def record(self) -> dict[str, float]:
        return {"surrogate_increase": self.increase}

    def renew(self) -> None:
        """There are new rollouts."""
        self.seen, self.sums, self.exhausted = 0, [0.0, 0.0], False

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.seen += 1
        self.sums[1] += metrics["loss"]
        if self.seen % self.steps:
            return
        before, now = self.sums
        if self.seen > self.steps:
            self.increase = max(now - before, 0.0) / self.steps
            self.exhausted = now > before or not math.isfinite(now)
        self.sums = [now, 0.0]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.sums = int(state["seen"]), [float(x) for x in state["sums"]]
        self.exhausted, self.increase = bool(state["exhausted"]), float(state["increase"])


def check_positive(**numbers: float) -> None:
    """Refuse numbers that are not positive and finite, by name.

    Raises
    ------
    ValueError
    """
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} is {number}: it must be positive and finite")
