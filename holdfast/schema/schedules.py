"""Schedules: which objectives are updated in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from holdfast.joint.interleave import check_ratio, turns_per_unit
from holdfast.joint.mixing import Fade, NoiseAware
from holdfast.joint.schedules import (
    AdaptiveInterleave,
    Interleave,
    Stage,
    WatchedInterleave,
    check_weights,
)
from holdfast.schema.base import Spec


class ScheduleSpec(Spec):
    """What all schedules have."""

    @property
    def together(self) -> bool:
        """Whether some step updates several objectives, which a combiner is for."""
        return False


class WeightedSpec(ScheduleSpec):
    """Schedules that weigh their objectives."""

    weights: dict[str, float] = Field(description="one per objective, in [0, 1], summing to 1")

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        return check_weights(value)

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        return f"weights.{objective}"


class MixSpec(WeightedSpec):
    """Every objective in every step, as a weighted sum."""

    kind: Literal["mix"] = "mix"

    @property
    def together(self) -> bool:
        return _several(self.weights)


class AlrightSpec(WeightedSpec):
    """One objective a step, drawn with the given probabilities (ALRIGHT)."""

    kind: Literal["alright"] = "alright"
    seed: int | None = Field(None, description="of the draws; default: training.seed")


class MaxrightSpec(WeightedSpec):
    """The objective with the largest weighted optimality gap (MAXRIGHT)."""

    kind: Literal["maxright"] = "maxright"
    evaluate_every: int = Field(10, ge=1, description="steps between evaluations of all gaps")
    smoothing: float = Field(0.0, ge=0, lt=1, description="of the losses behind the gaps")


class PairSpec(ScheduleSpec):
    """What interleaves of two objectives have in common."""

    combine: bool = Field(False, description="hold second in the turn of first as well")
    every: Literal["update", "iteration"] = Field("update", description="what the ratio counts")
    updates_per_iteration: int | None = Field(
        None,
        ge=1,
        description="of second; with every iteration. null: as many as a batch of its rollouts "
        "serves, where it has such",
    )

    @model_validator(mode="after")
    def _unit(self) -> Self:
        if self.every == "update":
            turns_per_unit(self.every, self.updates_per_iteration)
        return self

    @property
    def together(self) -> bool:
        return self.combine

    def cycle(self, updates: int | None) -> dict[str, Any]:
        """Arguments of the schedule; ``updates`` of an iteration, where the recipe is silent."""
        given = self.model_dump(include={"combine", "every", "updates_per_iteration"})
        if self.every == "iteration" and self.updates_per_iteration is None:
            given["updates_per_iteration"] = updates
        return given


class InterleaveSpec(PairSpec):
    """So many steps of one objective, then so many of the next, over and over (1:m)."""

    kind: Literal["interleave"] = "interleave"
    counts: dict[str, int] | None = Field(
        None, min_length=1, description="steps of each objective in a cycle"
    )
    first: str | None = Field(None, description="in place of counts: one step of it, …")
    second: str | None = Field(None, description="… then ratio steps of this one")
    ratio: int | Literal["inf"] | None = Field(None, description="inf: second alone")
    estimates: bool | None = Field(
        None,
        description="whether cosine, norms and gain of the two are recorded, at two copies of the "
        "trained parameters each; null: for control policies",
    )

    @property
    def together(self) -> bool:
        return self.combine and self.ratio != "inf"

    @field_validator("ratio", mode="plain")
    @classmethod
    def _ratio(cls, value: Any) -> int | str | None:
        if value is None:
            return None
        number = math.inf if value == "inf" else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"ratio is {value!r}: it must be a whole number of at least 1, or inf")
        check_ratio(number)
        return "inf" if number == math.inf else int(number)

    @model_validator(mode="after")
    def _one_form(self) -> InterleaveSpec:
        pair = [value is not None for value in (self.first, self.second, self.ratio)]
        if any(pair) if self.counts is not None else not all(pair):
            raise ValueError("interleave takes either counts, or first, second and ratio")
        if self.counts is not None and self.estimates:
            raise ValueError("estimates are of first and second: counts has neither")
        self.schedule()
        return self

    def schedule(self, *, updates: int | None = 1, watched: bool = False) -> Interleave:
        """The schedule.

        Parameters
        ----------
        updates : int, optional
            Of an iteration, where the recipe does not say.
        watched : bool
            With estimates, unless the recipe says otherwise.
        """
        cycle = self.cycle(updates)
        if self.counts is not None:
            return Interleave(self.counts, **cycle)
        assert self.first is not None and self.second is not None and self.ratio is not None
        wanted = watched if self.estimates is None else self.estimates
        kind = WatchedInterleave if wanted else Interleave
        return kind(self.first, self.second, float(self.ratio), **cycle)

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.schedule().objectives

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        if self.counts is not None:
            return f"counts.{objective}"
        return "first" if objective == self.first else "second"


class AdaptiveInterleaveSpec(PairSpec):
    """One step of one objective, then m of another; m follows from the geometry of gradients."""

    kind: Literal["adaptive_interleave"] = "adaptive_interleave"
    first: str
    second: str
    form: Literal["root", "balance"] = "balance"
    maximum: float = Field(15.0, ge=1, description="largest m")
    smoothing: float = Field(0.9, ge=0, lt=1, description="of what m is computed from")
    c_il: float = Field(1.0, gt=0, description="step size of first in units of 1 / smoothness")
    c_rl: float = Field(1.0, gt=0, lt=2, description="the same of second")

    @model_validator(mode="after")
    def _two(self) -> AdaptiveInterleaveSpec:
        self.schedule()
        return self

    def schedule(self, *, updates: int | None = 1) -> AdaptiveInterleave:
        """The schedule; ``updates`` of an iteration, where the recipe does not say."""
        return AdaptiveInterleave(**self.model_dump(exclude={"kind"}) | self.cycle(updates))

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.first, self.second)

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        return "first" if objective == self.first else "second"


class FadeSpec(ScheduleSpec):
    """Two objectives in every step; the weight of the first changes (CHORD)."""

    kind: Literal["fade"] = "fade"
    first: str
    second: str
    start: float = Field(0.9, ge=0, le=1, description="weight of first; the rest is second's")
    end: float = Field(0.05, ge=0, le=1)
    steps: int = Field(ge=1, description="from start to end")
    warmup_steps: int = Field(0, ge=0, description="before them, from 0 to start")
    shape: Literal["linear", "cosine"] = "cosine"

    @model_validator(mode="after")
    def _two(self) -> Self:
        self.prior()
        return self

    @property
    def together(self) -> bool:
        return True

    def prior(self) -> Fade:
        options = set(FadeSpec.model_fields) - {"kind"}
        return Fade(**self.model_dump(include=options))

    def schedule(self) -> Fade | NoiseAware:
        return self.prior()

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.first, self.second)

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        return "first" if objective == self.first else "second"


class NoiseAwareSpec(FadeSpec):
    """As fade, and pulled to what the noise of both gradients and their distance ask for (GAC)."""

    kind: Literal["noise_aware"] = "noise_aware"  # type: ignore[assignment]
    target: float = Field(0.5, ge=0, le=1, description="weight of first, were there no noise")
    blend: float = Field(0.5, ge=0, le=1, description="share of the fading weight")
    smoothing: float = Field(0.99, ge=0, lt=1)
    cap: float = Field(0.01, gt=0, description="largest change of the weight in a step")
    lowest: float = Field(0.05, gt=0, lt=1)
    highest: float = Field(0.9, gt=0, lt=1)
    every: int = Field(10, ge=1, description="steps between updates of the average")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        self.schedule()
        return self

    def schedule(self) -> Fade | NoiseAware:
        options = set(NoiseAwareSpec.model_fields) - set(FadeSpec.model_fields)
        return NoiseAware(self.prior(), **self.model_dump(include=options))


class StageSpec(Spec):
    """One stage of a sequence: an objective, or a weighted sum of several."""

    objective: str | None = None
    weights: dict[str, float] | None = None
    steps: int | None = Field(None, ge=0)
    loss_below: float | None = Field(None, description="end once the probed loss is this low")
    check_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _stage(self) -> StageSpec:
        if (self.objective is None) == (self.weights is None):
            raise ValueError("a stage names either an objective or weights")
        self.stage()
        return self

    def stage(self) -> Stage:
        weights = {str(self.objective): 1.0} if self.weights is None else self.weights
        return Stage(weights, self.steps, self.loss_below, self.check_every)


class SequentialSpec(ScheduleSpec):
    """Stages one after another."""

    kind: Literal["sequential"] = "sequential"
    stages: tuple[StageSpec, ...]

    @property
    def together(self) -> bool:
        return any(_several(stage.stage().weights) for stage in self.stages)

    @field_validator("stages")
    @classmethod
    def _stages(cls, value: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
        if not value:
            raise ValueError("stages is empty: name at least one stage")
        return value

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for s in self.stages for n in s.stage().weights))

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        naming = (i for i, s in enumerate(self.stages) if objective in s.stage().weights)
        return f"stages.{next(naming)}"


def _several(weights: Mapping[str, float]) -> bool:
    return sum(weight > 0 for weight in weights.values()) > 1
