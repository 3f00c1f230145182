"""Schedules: which objectives are updated in a step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from holdfast.joint.schedules import Stage, check_weights
from holdfast.schema.base import Spec


class WeightedSpec(Spec):
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


class AlrightSpec(WeightedSpec):
    """One objective a step, drawn with the given probabilities (ALRIGHT)."""

    kind: Literal["alright"] = "alright"
    seed: int | None = Field(None, description="of the draws; default: training.seed")


class MaxrightSpec(WeightedSpec):
    """The objective with the largest weighted optimality gap (MAXRIGHT)."""

    kind: Literal["maxright"] = "maxright"
    evaluate_every: int = Field(10, ge=1, description="steps between evaluations of all gaps")
    smoothing: float = Field(0.0, ge=0, lt=1, description="of the losses behind the gaps")


class InterleaveSpec(Spec):
    """So many steps of one objective, then so many of the next, over and over (1:m)."""

    kind: Literal["interleave"] = "interleave"
    counts: dict[str, int] = Field(min_length=1, description="steps of each objective in a cycle")

    @field_validator("counts")
    @classmethod
    def _counts(cls, value: dict[str, int]) -> dict[str, int]:
        for name, count in value.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: it must be at least 1")
        return value

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.counts)

    def where(self, objective: str) -> str:
        """The entry that names an objective."""
        return f"counts.{objective}"


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


class SequentialSpec(Spec):
    """Stages one after another."""

    kind: Literal["sequential"] = "sequential"
    stages: tuple[StageSpec, ...]

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
