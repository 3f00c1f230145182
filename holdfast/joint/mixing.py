"""Schedules of two objectives in one sum, whose weights change as training goes.

``first`` is imitation and ``second`` reinforcement, but nothing here knows. Every step updates both
with the weights ``mu`` and ``1 - mu``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from holdfast.joint.geometry import Gradient, inner_products, restricted, shared, smoothed
from holdfast.joint.turn import Probe, Turn

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

Shape = Literal["linear", "cosine"]


class Fade:
    """``mu`` rises to ``start`` in ``warmup_steps`` and goes over to ``end`` in ``steps``.

    Zhang et al., "On-Policy RL Meets Off-Policy Experts" (CHORD), whose ``mu`` has a warm-up and a
    cosine. Where a weight is 0 its objective is left out of the turn.

    Parameters
    ----------
    first, second : str
        Objectives: of the weight ``mu`` and of the rest.
    start, end : float
        In [0, 1].
    steps : int
        At least 1, after the warm-up.
    warmup_steps : int
        In which ``mu`` rises from 0 along a line.
    shape : str
        ``linear`` or ``cosine``.

    Raises
    ------
    ValueError
        For names that are the same, or a number out of range.
    """

    gaps: dict[str, float] = {}

    def __init__(
        self,
        first: str,
        second: str,
        *,
        start: float = 0.9,
        end: float = 0.05,
        steps: int,
        warmup_steps: int = 0,
        shape: Shape = "cosine",
    ) -> None:
        check_pair(first, second)
        for name, value in (("start", start), ("end", end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}: it must lie in [0, 1]")
        if steps < 1 or warmup_steps < 0:
            raise ValueError(
                f"steps is {steps} and warmup_steps {warmup_steps}: they must be at least 1 and 0"
            )
        if shape not in ("linear", "cosine"):
            raise ValueError(f"shape is {shape!r}: it must be linear or cosine")
        self.first, self.second = first, second
        self.start, self.end = start, end
        self.steps, self.warmup_steps, self.shape = steps, warmup_steps, shape
        self.step = 0

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.first, self.second)

    def weight(self, step: int) -> float:
        """``mu`` of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.start * (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / self.steps, 1.0)
        share = 1.0 - done if self.shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        return self.end + share * (self.start - self.end)

    def next(self, probe: Probe) -> Turn:
        weight = self.weight(self.step)
        self.step += 1
        return pair_turn(self.first, self.second, weight)

    def observe(self, name: str, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


def noise_aware_weight(
    disagreement: float, first_noise: float, second_noise: float, *, target: float = 0.5
) -> float:
    """The weight with the smallest expected squared error of the mixed gradient.

    The minimum over ``mu`` of ``(mu - target)^2 d + mu^2 s + (1 - mu)^2 r``, with ``d`` the squared
    distance of the two mean gradients and ``s``, ``r`` the variances of their estimates:
    ``(target d + r) / (d + s + r)``. Without a disagreement it weighs by inverse variance; without
    noise it is the target; it always lies between the two.

    Parameters
    ----------
    disagreement, first_noise, second_noise : float
        ``d``, ``s`` and ``r``, 0 or more. All 0: the target.
    target : float
        Weight of the first that is wanted, were there no noise, in [0, 1].
    """
    total = disagreement + first_noise + second_noise
    return (target * disagreement + second_noise) / total if total > 0 else target


class NoiseAware:
    """``mu`` from how noisy the two gradients are, and how far apart.

    GAC (arXiv 2605.26184) with the gradients themselves in the place of its proxies. What enters
    :func:`noise_aware_weight` are running averages: the variance of an objective's gradient is half
    the squared distance of two in a row, and the disagreement is the squared distance of the two
    objectives' gradients less both variances. ``mu`` is a blend of a cosine prior and of the slow
    average of what they say, and moves by at most ``cap`` a step. All is measured on the parameters
    that both objectives are of: a critic that reinforcement alone trains says nothing of how the
    policy is to be mixed.

    It costs one copy of the trainable parameters for each of the two objectives.

    Parameters
    ----------
    prior : Fade
        The two objectives, where ``mu`` starts, and what it is blended with.
    target : float
        As in :func:`noise_aware_weight`.
    blend : float
        Share of the prior, in [0, 1].
    smoothing : float
        Share of the old average that is kept at an update, in [0, 1).
    cap : float
        Positive.
    lowest, highest : float
        Of ``mu``, in (0, 1).
    every : int
        Steps between updates of the average, at least 1.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    gaps: dict[str, float] = {}

    def __init__(
        self,
        prior: Fade,
        *,
        target: float = 0.5,
        blend: float = 0.5,
        smoothing: float = 0.99,
        cap: float = 0.01,
        lowest: float = 0.05,
        highest: float = 0.9,
        every: int = 10,
    ) -> None:
        for name, value in (("target", target), ("blend", blend)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}: it must lie in [0, 1]")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}: it must lie in [0, 1)")
        if not 0.0 < lowest < highest < 1.0:
            raise ValueError(
                f"lowest is {lowest} and highest {highest}: they must lie in (0, 1), in this order"
            )
        if not cap > 0 or every < 1:
            raise ValueError(f"cap is {cap} and every {every}: they must be positive")
        self.prior, self.target, self.blend = prior, target, blend
        self.smoothing, self.cap, self.every = smoothing, cap, every
        self.lowest, self.highest = lowest, highest
        self.weight = min(max(prior.weight(0), lowest), highest)
        self.average = self.weight
        """Slow average of what the gradients say."""
        self.step = 0
        self.measured: dict[str, float] = {}
        """Running averages: ``distance``, and ``variance/NAME`` of each objective."""
        self._before: dict[str, list[Tensor | None]] = {}

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.prior.objectives

    @property
    def estimates(self) -> dict[str, float]:
        """``mu``, and the running averages as they stand."""
        return {"weight": self.weight, "average": self.average, **self.measured}

    def next(self, probe: Probe) -> Turn:
        if self.step > 0:
            if self.step % self.every == 0:
                self._learn()
            wanted = self.blend * self.prior.weight(self.step) + (1.0 - self.blend) * self.average
            change = min(max(wanted - self.weight, -self.cap), self.cap)
            self.weight = min(max(self.weight + change, self.lowest), self.highest)
        self.step += 1
        return pair_turn(self.prior.first, self.prior.second, self.weight)

    def _learn(self) -> None:
        first, second = (self.measured.get(f"variance/{name}") for name in self.objectives)
        if first is None or second is None:
            return
        apart = max(self.measured["distance"] - first - second, 0.0)
        said = noise_aware_weight(apart, first, second, target=self.target)
        self.average = smoothed(self.average, said, self.smoothing)

    def observe(self, name: str, loss: float) -> None:
        pass

    def watch(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> None:
        mask = shared([gradients[name] for name in self.objectives])
        parts = {name: restricted(gradients[name], mask) for name in self.objectives}
        one, other = parts.values()
        pairs = [(one, one), (other, other), (one, other)]
        seen = [name for name in self.objectives if name in self._before]
        for name in seen:
            before = _beside(self._before[name], parts[name])
            pairs += [(parts[name], before), (before, before)]
        products = inner_products(pairs)
        if not all(map(math.isfinite, products)):
            return  # A refused step must not decide every step that follows.
        squares = dict(zip(self.objectives, products[:2], strict=True))
        self._average("distance", products[0] + products[1] - 2.0 * products[2])
        for index, name in enumerate(seen):
            across, earlier = products[3 + 2 * index : 5 + 2 * index]
            self._average(f"variance/{name}", 0.5 * (squares[name] + earlier) - across)
        self._before = {
            name: [None if part is None else part.detach().clone() for part in gradient]
            for name, gradient in parts.items()
        }

    def _average(self, name: str, value: float) -> None:
        # As slow as the slow average is in steps, but from the first measurement on.
        keep = self.smoothing ** (1.0 / self.every)
        self.measured[name] = smoothed(self.measured.get(name), max(value, 0.0), keep)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "average": self.average,
            "step": self.step,
            "measured": dict(self.measured),
            "before": dict(self._before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.average = float(state["weight"]), float(state["average"])
        self.step = int(state["step"])
        self.measured = {name: float(value) for name, value in state["measured"].items()}
        self._before = {name: list(parts) for name, parts in state["before"].items()}


def _beside(kept: Sequence[Tensor | None], like: Gradient) -> list[Tensor | None]:
    """On the device of ``like``: a checkpoint is read on the CPU."""
    device = next((part.device for part in like if part is not None), None)
    return [None if part is None else part.to(device) for part in kept]


def check_pair(first: str, second: str) -> None:
    """Refuse an objective that would be mixed with itself.

    Raises
    ------
    ValueError
    """
    if first == second:
        raise ValueError(f"first and second are both {first!r}: two objectives are needed")


def pair_turn(first: str, second: str, weight: float) -> Turn:
    """Both objectives with the weights ``weight`` and ``1 - weight``, less those that are 0."""
    weights = {first: weight, second: 1.0 - weight}
    return Turn({name: share for name, share in weights.items() if share > 0})
