"""Guards of the engine: what may scale a proposed step, and what ends a run that collapses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from holdfast.joint.guards import Guard, LogRatioBudget, Tripwires, UpdateNormCap
from holdfast.joint.guards.tripwires import METRICS
from holdfast.schema.base import Spec
from holdfast.schema.control_rl import ClippedControlSpec, ControlRlSpec
from holdfast.schema.objectives import ObjectiveSpec, TrainedSpec
from holdfast.schema.on_policy import (
    GkdSpec,
    LcoSpec,
    OnPolicySpec,
    PenalisedSpec,
    ReinforceSpec,
    RewardedSpec,
)

Objectives = Mapping[str, TrainedSpec]


class LogRatioBudgetSpec(Spec):
    """No log-probability changes by more than a limit in one step."""

    kind: Literal["log_ratio_budget"] = "log_ratio_budget"
    limit: float = Field(gt=0, description="nats; pi: the radius of convergence")
    quantile: float = Field(1.0, gt=0, le=1, description="of tokens that must keep to it")
    probability_floor: float = Field(
        0.0, ge=0, lt=1, description="less probable tokens are left out of the spread"
    )
    derivative: Literal["jvp", "finite_difference"] = Field(
        "jvp", description="finite_difference: cheaper, and needs float32"
    )

    def guard(self) -> Guard:
        return LogRatioBudget(**self.model_dump(exclude={"kind"}))

    def misfit(self, objectives: Objectives, float32: bool) -> tuple[str, str] | None:
        """The entry that does not fit the rest of a recipe, and why; ``None`` if all do."""
        if self.derivative == "finite_difference" and not float32:
            return "derivative", (
                "is finite_difference, which needs float32 throughout: use jvp, or set "
                "policy.dtype float32 and training.bf16 false"
            )
        for name, spec in objectives.items():
            if not isinstance(spec, ObjectiveSpec):
                return "kind", (
                    f"bounds log-probabilities of tokens, but objective '{name}' has none: use "
                    "update_norm_cap"
                )
        return None


class UpdateNormCapSpec(Spec):
    """The update is no longer than a limit, after the optimiser's own scaling."""

    kind: Literal["update_norm_cap"] = "update_norm_cap"
    limit: float = Field(gt=0, description="Euclidean norm, in units of the parameters")

    def guard(self) -> Guard:
        return UpdateNormCap(self.limit)

    def misfit(self, objectives: Objectives, float32: bool) -> tuple[str, str] | None:
        """As of the others: this one fits everything."""
        return None


class TripwiresSpec(Spec):
    """Detectors of a collapse, and what is done about it."""

    kind: Literal["tripwires"] = "tripwires"
    then: Literal["stop", "reduce", "roll_back"] = Field(
        "roll_back",
        description="stop the run; reduce learning rates; or that, from the last good checkpoint",
    )
    non_finite: bool = Field(True, description="steps refused, as not finite")
    ratio: float | None = Field(None, gt=0, description="largest mean likelihood ratio")
    kl: float | None = Field(None, gt=0, description="largest KL to the reference, in nats")
    approx_kl: float | None = Field(
        None, gt=0, description="largest KL to the policy that sampled, in nats"
    )
    entropy: float | None = Field(None, description="smallest, in nats")
    gradient_norm: float | None = Field(
        None, gt=0, description="largest, in multiples of its running average"
    )
    reward: float | None = Field(
        None, gt=0, description="largest fall of its running average below the best"
    )
    patience: int = Field(3, ge=1, description="turns beyond a limit before a wire trips")
    hysteresis: float = Field(
        0.2, ge=0, lt=1, description="share of a limit by which a value must be back"
    )
    smoothing: float = Field(0.9, ge=0, lt=1, description="of running averages")
    rate_factor: float = Field(0.5, gt=0, lt=1, description="of learning rates, on a trip")
    max_trips: int = Field(3, ge=0, description="one more stops the run")

    @model_validator(mode="after")
    def _some(self) -> TripwiresSpec:
        self.guard()
        return self

    def outlasts(self, max_refusals: int) -> bool:
        """Whether so many refused steps end a run before its wire on them trips."""
        return self.non_finite and self.patience > max_refusals

    def guard(self) -> Guard:
        return Tripwires(**{entry.name: getattr(self, entry.name) for entry in fields(Tripwires)})

    def misfit(self, objectives: Objectives, float32: bool) -> tuple[str, str] | None:
        """As of the others."""
        for metric in METRICS:
            if getattr(self, metric) is None:
                continue
            if not any(metric in _recorded(spec) for spec in objectives.values()):
                return metric, (
                    "is limited, but no objective of the schedule records it so that it could ever "
                    "trip" + (_SINGLE if metric in ("ratio", "approx_kl") else "")
                )
        return None


_SINGLE = " (where rollouts serve one update, the policy is the one that sampled)"


def _recorded(spec: TrainedSpec) -> set[str]:
    """The metrics that wires may be on, as far as training tells them."""
    if isinstance(spec, ClippedControlSpec):
        return {"ratio", "approx_kl", "reward"}
    if isinstance(spec, ControlRlSpec):
        return {"reward"}
    if not isinstance(spec, OnPolicySpec):
        return set()
    found = {"entropy"}
    if spec.rewards:
        found.add("reward")
    if spec.uses > 1:
        found.add("approx_kl")
        if not isinstance(spec, ReinforceSpec | LcoSpec | GkdSpec):
            found.add("ratio")
    penalised = isinstance(spec, PenalisedSpec) and spec.beta > 0
    controlled = isinstance(spec, RewardedSpec) and spec.kl_control is not None
    if spec.log_reference_kl or penalised or controlled:
        found.add("kl")
    return found


AnyGuard = Annotated[
    LogRatioBudgetSpec | UpdateNormCapSpec | TripwiresSpec, Field(discriminator="kind")
]


def check_kinds(value: Any) -> Any:
    """Refuse the clip, which has an entry of its own, before the kinds are looked at."""
    for entry in value if isinstance(value, list | tuple) else ():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        if kind == "gradient_clip":
            raise ValueError("gradient_clip has an entry of its own: training.max_grad_norm")
    return value
