"""Combiner: how the gradients of several objectives in one step become one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from holdfast.joint.combine import METHODS, Surgery, check_scale
from holdfast.schema.base import Spec


class CombinerSpec(Spec):
    """Gradient surgery in steps that update several objectives."""

    method: Literal[METHODS] = Field("upgrad", description="how the gradients are combined")  # type: ignore[valid-type]
    scale: Literal["none", "match"] | float = Field(
        "none", description="of the first gradient; match: as long as the second"
    )
    priority: str | None = Field(None, description="the objective that pcd puts first")

    @field_validator("scale", mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        return check_scale(value)

    @model_validator(mode="after")
    def _priority(self) -> CombinerSpec:
        self.combiner()
        return self

    def combiner(self) -> Surgery:
        return Surgery(self.method, self.scale, self.priority)
