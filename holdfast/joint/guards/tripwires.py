"""Tripwires: detectors of a run that is collapsing, and what is done about it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from holdfast.joint.geometry import smoothed
from holdfast.joint.guards.base import Seen, Stage, State, Trip, check_positive
from holdfast.joint.objective import Summary

Then = Literal["stop", "reduce", "roll_back"]

METRICS = ("ratio", "kl", "approx_kl", "entropy", "reward")
"""Metrics of objectives that wires are on, under the names in the record."""


@dataclass(frozen=True)
class _Reading:
    """What one wire shows of one turn.

    ``sign``: 1 where the value must not rise above the limit, -1 where it must not fall below.
    ``said``: what to say of it once it has tripped, where that is not the value.
    """

    what: str
    value: float
    limit: float
    sign: float = 1.0
    said: str | None = None

    @property
    def beyond(self) -> bool:
        return not self.sign * self.value <= self.sign * self.limit  # NaN is beyond everything

    def within(self, margin: float) -> bool:
        """Whether it is back, by a share ``margin`` of the limit."""
        return self.sign * self.value <= self.sign * self.limit - margin * abs(self.limit)

    def __str__(self) -> str:
        if self.said is not None:
            return self.said
        side = "above" if self.sign > 0 else "below"
        return f"{self.what} is {self.value:.4g}, {side} {self.limit:.4g}"


@dataclass(frozen=True)
class Tripwires:
    """Detect a collapse by limits on what a run records, and act.

    A wire that is beyond its limit counts turns. It trips at ``patience`` of them; the count starts
    anew once the value is back by a share ``hysteresis`` of the limit, and in between it stands
    still, so that a value that trembles about its limit neither trips at once nor never. A wire
    that has tripped sleeps until the value is back as far. Each objective has wires of its own.

    On a trip the batches of the turn are saved and an event is recorded. Then the run stops with an
    error; or learning rates are multiplied by ``rate_factor``; or that, and everything but the
    count of steps goes back to the last good checkpoint: the same batches come again, at lower
    rates. Good is the checkpoint of the start, and any after which ``patience`` turns passed with
    no wire beyond its limit, for what an update did shows only in the turns that follow. Steps that
    were undone count towards ``max_steps``.

    Parameters
    ----------
    then : {"stop", "reduce", "roll_back"}
        What is done on a trip.
    non_finite : bool
        A wire on steps that were refused because loss, gradient or update were not finite.
    ratio : float, optional
        Largest mean likelihood ratio to the policy that sampled. ``None``, here and below: no wire.
    kl : float, optional
        Largest KL divergence to the reference, in nats, as the objective records it.
    approx_kl : float, optional
        Largest KL divergence to the policy that sampled, in nats.
    entropy : float, optional
        Smallest entropy, in nats.
    gradient_norm : float, optional
        Largest norm of the gradient before guards, in multiples of its running average over turns
        of the same objectives that were within the limit.
    reward : float, optional
        How far the running average of the reward may fall below the best that it has been.
    patience : int
        At least 1.
    hysteresis : float
        In [0, 1).
    smoothing : float
        Share that the old value keeps in running averages, in [0, 1).
    rate_factor : float
        In (0, 1).
    max_trips : int
        A run that trips once more than this stops, whatever ``then`` says. At least 0.

    Raises
    ------
    ValueError
        For a number out of its range, or if no wire is on anything.
    """

    then: Then = "roll_back"
    non_finite: bool = True
    ratio: float | None = None
    kl: float | None = None
    approx_kl: float | None = None
    entropy: float | None = None
    gradient_norm: float | None = None
    reward: float | None = None
    patience: int = 3
    hysteresis: float = 0.2
    smoothing: float = 0.9
    rate_factor: float = 0.5
    max_trips: int = 3

    name: ClassVar[str] = "tripwires"
    stage: ClassVar[Stage] = "turn"

    def __post_init__(self) -> None:
        if self.then not in get_args(Then):
            raise ValueError(
                f"then is {self.then!r}: it must be one of {', '.join(get_args(Then))}"
            )
        check_positive(
            ratio=self.ratio,
            kl=self.kl,
            approx_kl=self.approx_kl,
            gradient_norm=self.gradient_norm,
            reward=self.reward,
            patience=self.patience,
        )
        if self.entropy is not None and not math.isfinite(self.entropy):
            raise ValueError(f"entropy is {self.entropy}: it must be finite")
        for name in ("hysteresis", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if not 0 < self.rate_factor < 1:
            raise ValueError(f"rate_factor is {self.rate_factor}: it must lie in (0, 1)")
        if self.max_trips < 0:
            raise ValueError(f"max_trips is {self.max_trips}: it must not be negative")
        limits = [getattr(self, metric) for metric in METRICS] + [self.gradient_norm]
        if not self.non_finite and all(limit is None for limit in limits):
            raise ValueError("no wire is on anything: give at least one limit")

    def init(self) -> State:
        return {"trips": 0, "counts": {}, "asleep": [], "averages": {}, "best": {}}

    def quiet(self, state: State) -> bool:
        """Whether no wire has anything against the present state."""
        return not state["counts"] and not state["asleep"]

    def rolled_back(self, restored: State, now: State) -> State:
        """The state after a rollback: as in the checkpoint, but trips are remembered."""
        return {**restored, "trips": now["trips"]}

    def update(self, seen: Seen, state: State) -> tuple[Trip | None, State]:
        state = copy.deepcopy(state)
        counts, asleep = state["counts"], state["asleep"]
        tripped: list[str] = []
        for reading in self._readings(seen, state):
            if reading.beyond:
                if reading.what in asleep:
                    continue
                counts[reading.what] = counts.get(reading.what, 0) + 1
                if counts[reading.what] >= self.patience:
                    counts.pop(reading.what)
                    asleep.append(reading.what)
                    tripped.append(str(reading))
            elif reading.within(self.hysteresis):
                counts.pop(reading.what, None)
                if reading.what in asleep:
                    asleep.remove(reading.what)
        if not tripped:
            return None, state
        state["trips"] += 1
        reason = "; ".join(tripped)
        if state["trips"] > self.max_trips and self.then != "stop":
            reason += f" (more than max_trips={self.max_trips} trips)"
            return Trip(reason, "stop", self.rate_factor), state
        return Trip(reason, self.then, self.rate_factor), state

    def _readings(self, seen: Seen, state: State) -> Iterator[_Reading]:
        if self.non_finite:
            said = f"{self.patience} steps were refused, the last since {seen.refused}"
            yield _Reading("refused steps", float(seen.refused is not None), 0.0, said=said)
        if seen.refused is not None:
            return  # nothing else can be said of the turn
        if self.gradient_norm is not None:
            yield self._gradient(seen, state)
        for objective, summary in seen.summaries.items():
            yield from self._of(objective, summary, state)

    def _gradient(self, seen: Seen, state: State) -> _Reading:
        assert self.gradient_norm is not None
        turn = "+".join(seen.summaries)
        average = state["averages"].get(f"gradient/{turn}", seen.grad_norm)
        times = seen.grad_norm / average if average > 0 else float(seen.grad_norm > 0)
        reading = _Reading(f"gradient norm of {turn} over its average", times, self.gradient_norm)
        if not reading.beyond:
            now = smoothed(average, seen.grad_norm, self.smoothing)
            state["averages"][f"gradient/{turn}"] = now
        return reading

    def _of(self, objective: str, summary: Summary, state: State) -> Iterator[_Reading]:
        known: dict[str, Any] = summary.metrics
        for metric in ("ratio", "kl", "approx_kl"):
            limit = getattr(self, metric)
            if limit is not None and metric in known:
                yield _Reading(f"{metric} of {objective}", known[metric], limit)
        if self.entropy is not None and "entropy" in known:
            yield _Reading(f"entropy of {objective}", known["entropy"], self.entropy, -1.0)
        if self.reward is not None and "reward" in known:
            averages, best = state["averages"], state["best"]
            key = f"reward/{objective}"
            reward = known["reward"]
            if math.isfinite(reward):
                averages[key] = smoothed(averages.get(key), reward, self.smoothing)
                best[key] = max(best.get(key, averages[key]), averages[key])
            fall = best[key] - averages[key] if math.isfinite(reward) else math.nan
            yield _Reading(f"fall of the reward of {objective}", fall, self.reward)
