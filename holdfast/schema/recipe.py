"""The whole of a recipe, and what its parts demand of one another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from holdfast.errors import nearest
from holdfast.schema.base import Spec
from holdfast.schema.bellman import AnchorSpec, BellmanSpec, ChoiceSpec, DecisionSpec, SoftQSpec
from holdfast.schema.combiner import CombinerSpec
from holdfast.schema.control import (
    CloningSpec,
    ControlSpec,
    DiffusionSpec,
    GaussianSpec,
    ResidualSpec,
    SavedSpec,
)
from holdfast.schema.control_rl import (
    AwcSpec,
    AwrSpec,
    ControlPpoSpec,
    ControlRlSpec,
    DipoSpec,
    DppoSpec,
    IdqlSpec,
)
from holdfast.schema.guards import AnyGuard, TripwiresSpec, check_kinds
from holdfast.schema.objectives import DpoSpec, NllSpec, ObjectiveSpec
from holdfast.schema.on_policy import (
    CispoSpec,
    DapoSpec,
    DrGrpoSpec,
    DroSpec,
    GkdSpec,
    GrpoSpec,
    GspoSpec,
    LcoSpec,
    MinillmSpec,
    PmdSpec,
    PpoSpec,
    ReinforceSpec,
)
from holdfast.schema.policies import LanguagePolicySpec
from holdfast.schema.schedules import (
    AdaptiveInterleaveSpec,
    AlrightSpec,
    FadeSpec,
    InterleaveSpec,
    MaxrightSpec,
    MixSpec,
    NoiseAwareSpec,
    SequentialSpec,
)


class TrainingSpec(Spec):
    """How to train; names as in ``transformers.TrainingArguments``."""

    max_steps: int = Field(ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other rates by module or parameter name; the longest that fits wins"
    )
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"
    ] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    guards: tuple[AnyGuard, ...] = Field((), description="of every step, in this order")
    bf16: bool = Field(False, description="compute in bfloat16; weights stay in policy.dtype")
    gradient_checkpointing: bool = False
    eval_steps: int = Field(100, ge=1)
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=1)
    early_stopping_patience: int | None = Field(None, ge=1)
    early_stopping_threshold: float = Field(0.0, ge=0)
    max_refusals: int = Field(3, ge=0, description="non-finite steps before training stops")
    seed: int = Field(0, ge=0)
    report_to: tuple[str, ...] = Field(
        (), description="accelerate's trackers: tensorboard, wandb, …"
    )

    @field_validator("guards", mode="before")
    @classmethod
    def _known_guards(cls, value: Any) -> Any:
        return check_kinds(value)

    @model_validator(mode="after")
    def _fitting(self) -> TrainingSpec:
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError(
                "warmup_steps does nothing with lr_scheduler_type constant: use "
                "constant_with_warmup, or set it to 0"
            )
        kinds = [guard.kind for guard in self.guards]
        if len(set(kinds)) < len(kinds):
            raise ValueError("guards: two are of one kind; one of a kind is enough")
        for guard in self.guards:
            if isinstance(guard, TripwiresSpec) and guard.outlasts(self.max_refusals):
                raise ValueError(
                    f"max_refusals is {self.max_refusals}, which ends the run before tripwires "
                    f"with patience {guard.patience} act on non-finite steps: raise it, lower "
                    "patience, or set non_finite: false"
                )
        return self


AnyObjective = Annotated[
    NllSpec
    | DpoSpec
    | ReinforceSpec
    | PpoSpec
    | GrpoSpec
    | DrGrpoSpec
    | DapoSpec
    | GspoSpec
    | CispoSpec
    | LcoSpec
    | PmdSpec
    | DroSpec
    | GkdSpec
    | MinillmSpec
    | CloningSpec
    | ControlPpoSpec
    | DppoSpec
    | IdqlSpec
    | AwrSpec
    | AwcSpec
    | DipoSpec
    | BellmanSpec
    | ChoiceSpec
    | AnchorSpec,
    Field(discriminator="kind"),
]


def _policy_kind(value: Any) -> str:
    """Recipes of language models need not say what kind of policy they have."""
    given = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return str(given or "language")


AnyPolicy = Annotated[
    Annotated[LanguagePolicySpec, Tag("language")]
    | Annotated[SoftQSpec, Tag("soft_q")]
    | Annotated[GaussianSpec, Tag("gaussian")]
    | Annotated[DiffusionSpec, Tag("diffusion")]
    | Annotated[ResidualSpec, Tag("residual")]
    | Annotated[SavedSpec, Tag("saved")],
    Discriminator(_policy_kind),
]
AnySchedule = Annotated[
    SequentialSpec
    | MixSpec
    | InterleaveSpec
    | AdaptiveInterleaveSpec
    | AlrightSpec
    | MaxrightSpec
    | FadeSpec
    | NoiseAwareSpec,
    Field(discriminator="kind"),
]


def kinds(union: Any) -> tuple[type[BaseModel], ...]:
    """The specs of a union such as :data:`AnyObjective`."""
    return get_args(get_args(union)[0])


def names_of(spec: type[BaseModel]) -> tuple[str, ...]:
    """What ``kind`` may be in a recipe for this spec."""
    return get_args(spec.model_fields["kind"].annotation)


_FITTING: dict[type[Spec], tuple[type[Spec], ...]] = {
    LanguagePolicySpec: (ObjectiveSpec,),
    SoftQSpec: (DecisionSpec,),
}
"""Which objectives train a kind of policy; those of control train all others."""


class Recipe(Spec):
    """Everything a run is made of."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    policy: AnyPolicy
    # A name is also part of file names and of dotted paths.
    objectives: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], AnyObjective
    ] = Field(min_length=1)
    schedule: AnySchedule
    combiner: CombinerSpec | None = Field(
        None, description="of steps that update several objectives; default: their weighted sum"
    )
    training: TrainingSpec
    output: str | None = Field(None, description="the run directory; default: runs/NAME")

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        for name in self.schedule.objectives:
            if name not in self.objectives:
                raise PydanticCustomError(
                    "absent_objective",
                    "names objective '{name}', which is not defined{near} Defined: {known}",
                    {
                        "where": f"schedule.{self.schedule.where(name)}",
                        "name": name,
                        "near": nearest(name, self.objectives),
                        "known": ", ".join(self.objectives),
                    },
                )
        fitting = _FITTING.get(type(self.policy), (CloningSpec, ControlRlSpec))
        for name, objective in self.objectives.items():
            if not isinstance(objective, fitting):
                raise PydanticCustomError(
                    "wrong_policy",
                    "is {kind}, which does not train a policy of kind {policy}",
                    {
                        "where": f"objectives.{name}.kind",
                        "kind": objective.kind,
                        "policy": self.policy.kind,
                    },
                )
        if self.combiner is not None and not self.schedule.together:
            raise PydanticCustomError(
                "idle_combiner",
                "does nothing: no step of schedule {kind} updates several objectives. Leave it "
                "out, or use mix, fade or an interleave with combine: true",
                {"where": "combiner", "kind": self.schedule.kind},
            )
        priority = self.combiner.priority if self.combiner else None
        if priority is not None and priority not in self.schedule.objectives:
            raise PydanticCustomError(
                "absent_priority",
                "names '{name}', which is not an objective of the schedule{near} Its: {known}",
                {
                    "where": "combiner.priority",
                    "name": priority,
                    "near": nearest(priority, self.schedule.objectives),
                    "known": ", ".join(self.schedule.objectives),
                },
            )
        for name, objective in self.objectives.items():
            needs_probe = isinstance(self.schedule, MaxrightSpec) or (
                isinstance(self.schedule, SequentialSpec)
                and any(
                    stage.loss_below is not None and name in stage.stage().weights
                    for stage in self.schedule.stages
                )
            )
            if needs_probe and name in self.schedule.objectives and not objective.has_probe:
                raise PydanticCustomError(
                    "no_probe",
                    "is 0, but schedule {kind} evaluates this objective on probe rows",
                    {
                        "where": f"objectives.{name}.{objective.probe_entry}",
                        "kind": self.schedule.kind,
                    },
                )
            needs_optimum = (
                isinstance(self.schedule, MaxrightSpec) and name in self.schedule.weights
            )
            if needs_optimum and objective.optimum is None:
                raise PydanticCustomError(
                    "no_optimum",
                    "is missing, and schedule maxright needs it: give a number, or auto",
                    {"where": f"objectives.{name}.optimum"},
                )
            if objective.optimum == "auto" and not objective.has_held_out:
                raise PydanticCustomError(
                    "no_held_out",
                    "is auto, which evaluates on held-out rows, but {entry} is 0",
                    {
                        "where": f"objectives.{name}.optimum",
                        "entry": objective.held_out_entry,
                    },
                )
        self._check_control()
        self._check_guards()
        return self

    def _check_control(self) -> None:
        """Refuse what a control policy cannot be trained with."""
        if not isinstance(self.policy, ControlSpec):
            return
        why = {
            "training.bf16": self.training.bf16
            and "is true, but a control policy acts in float32: rounded log-probabilities would "
            "not give the ratio 1 before the first update. Leave it out",
            "training.gradient_checkpointing": self.training.gradient_checkpointing
            and "is true, but a control policy has nothing to checkpoint. Leave it out",
        }
        denoising = any(isinstance(spec, DppoSpec) for spec in self.objectives.values())
        if isinstance(self.policy, DiffusionSpec) and denoising:
            sampled, tuned = self.policy.sampled, self.policy.fine_tuned_steps
            why["policy.fine_tuned_steps"] = tuned < sampled and (
                f"is {tuned}, but dppo freezes the other {sampled - tuned} of {sampled} sampling "
                "steps as they are, and this policy is new. Clone it in a run of its own and name "
                f"that run's model (kind saved), or set this to {sampled}"
            )
        for where, wrong in why.items():
            if wrong:
                raise PydanticCustomError("misfit", "{why}", {"where": where, "why": wrong})

    def _check_guards(self) -> None:
        scheduled = {name: self.objectives[name] for name in self.schedule.objectives}
        dtype = getattr(self.policy, "dtype", "float32")
        float32 = dtype == "float32" and not self.training.bf16
        for index, guard in enumerate(self.training.guards):
            misfit = guard.misfit(scheduled, float32)
            if misfit is not None:
                entry, why = misfit
                where = f"training.guards.{index}.{entry}"
                raise PydanticCustomError("misfit", "{why}", {"where": where, "why": why})

    def dump(self) -> dict[str, Any]:
        """As plain values that :func:`parse_recipe` reads back."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Digest of what decides the numbers of a run: all but names and where it is written."""
        values = self.dump()
        for entry in ("name", "description", "output"):
            values.pop(entry)
        values["training"].pop("report_to")
        values["schedule"].pop("estimates", None)
        for objective in values["objectives"].values():
            objective.pop("films", None)
        # What is not set changes no number: runs from before these entries existed go on.
        training = values["training"]
        for part, entry in (
            (values, "combiner"),
            (training, "learning_rates"),
            (training, "guards"),
        ):
            if not part[entry]:
                part.pop(entry)
        for name, spec in self.objectives.items():
            for entry in type(spec).added:
                if getattr(spec, entry) == type(spec).model_fields[entry].default:
                    values["objectives"][name].pop(entry)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
