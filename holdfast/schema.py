"""What a recipe may say: every entry, its type, its range and its default.

A recipe is validated whole, and without importing torch, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from holdfast.errors import nearest
from holdfast.joint.schedules import Stage, check_weights


class Spec(BaseModel):
    """A part of a recipe. Unknown entries are refused with the nearest known name."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _known_entries(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_entry",
                        "unknown entry{near} Known here: {known}",
                        {
                            "key": str(key),
                            "near": nearest(str(key), cls.model_fields),
                            "known": ", ".join(cls.model_fields),
                        },
                    )
        return data


# Policies -----------------------------------------------------------------------------------------


class TokenizerSpec(Spec):
    """``bytes``: a token a byte. ``bpe``: trained on ``files``. ``pretrained``: loaded by name."""

    kind: Literal["bytes", "bpe", "pretrained"] = "bytes"
    name_or_path: str | None = Field(None, description="pretrained: directory or hub id")
    vocab_size: int = Field(1024, ge=300, description="bpe: size of the vocabulary")
    files: tuple[str, ...] = Field((), description="bpe: data files whose text it is trained on")

    @model_validator(mode="after")
    def _complete(self) -> TokenizerSpec:
        if self.kind == "bpe" and not self.files:
            raise ValueError("kind bpe needs files to be trained on")
        if self.kind == "pretrained" and not self.name_or_path:
            raise ValueError("kind pretrained needs name_or_path")
        return self


class LoraSpec(Spec):
    """Low-rank adaptation; names as in ``peft.LoraConfig``."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class LanguagePolicySpec(Spec):
    """A causal language model."""

    kind: Literal["language"] = "language"
    model_name_or_path: str = Field(description="a preset, a model directory or a hub id")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    config: dict[str, Any] = Field({}, description="entries of a preset's configuration to replace")
    tokenizer: TokenizerSpec | None = Field(
        None, description="default: the model's own; bytes for a preset"
    )
    lora: LoraSpec | None = Field(None, description="null: all weights are trained")


# Objectives ---------------------------------------------------------------------------------------


class DataSpec(Spec):
    """Rows of one objective, and which of them are kept from training."""

    path: str = Field(description=".jsonl, .jsonl.gz, .parquet, .csv, or a hub id")
    split: str = Field("train", description="of a hub data set")
    held_out: int = Field(128, ge=0, description="rows for evaluation, never trained on")
    held_out_path: str | None = Field(None, description="a file of its own for these rows")
    probe: int = Field(32, ge=0, description="rows on which a schedule's gap is evaluated")
    held_out_split: str = Field("train", description="of a hub data set in held_out_path")
    max_rows: int | None = Field(None, ge=1, description="use only this many rows of the file")
    max_length: int = Field(1024, ge=2, description="tokens a row may have")
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="what to do with empty, identical or overlong rows"
    )


class ObjectiveSpec(Spec):
    """What every objective has."""

    data: DataSpec
    batch_size: int = Field(8, ge=1, description="rows an optimiser step takes, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="rows a forward pass takes")
    optimum: float | Literal["auto"] | None = Field(
        None, description="f*: a number, or auto to find it by training on this objective alone"
    )

    @field_validator("optimum", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"expected a finite number, or auto, but found {value!r}"
                f"{nearest(str(value), ['auto'])}"
            )
        return number


class NllSpec(ObjectiveSpec):
    """Supervised fine-tuning: negative log-likelihood of completion tokens."""

    kind: Literal["nll"] = "nll"
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = "token-mean"


class DpoSpec(ObjectiveSpec):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    reference: str | None = Field(
        None, description="a model directory or hub id; null: the policy before its first update"
    )

    @model_validator(mode="after")
    def _smoothing(self) -> DpoSpec:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning with loss_type {self.loss_type}")
        return self


# Schedules ----------------------------------------------------------------------------------------


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


# The whole ----------------------------------------------------------------------------------------


class TrainingSpec(Spec):
    """How to train; names as in ``transformers.TrainingArguments``."""

    max_steps: int = Field(ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"
    ] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
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

    @model_validator(mode="after")
    def _warmup(self) -> TrainingSpec:
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError(
                "warmup_steps does nothing with lr_scheduler_type constant: use "
                "constant_with_warmup, or set it to 0"
            )
        return self


AnyObjective = Annotated[NllSpec | DpoSpec, Field(discriminator="kind")]
AnySchedule = Annotated[
    SequentialSpec | MixSpec | AlrightSpec | MaxrightSpec, Field(discriminator="kind")
]


def kinds(union: Any) -> tuple[type[BaseModel], ...]:
    """The specs of a union such as :data:`AnyObjective`."""
    return get_args(get_args(union)[0])


class Recipe(Spec):
    """Everything a run is made of."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    policy: LanguagePolicySpec
    # A name is also part of file names and of dotted paths.
    objectives: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], AnyObjective
    ] = Field(min_length=1)
    schedule: AnySchedule
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
        for name, objective in self.objectives.items():
            needs_probe = isinstance(self.schedule, MaxrightSpec) or (
                isinstance(self.schedule, SequentialSpec)
                and any(
                    stage.loss_below is not None and name in stage.stage().weights
                    for stage in self.schedule.stages
                )
            )
            if needs_probe and name in self.schedule.objectives and objective.data.probe == 0:
                raise PydanticCustomError(
                    "no_probe",
                    "is 0, but schedule {kind} evaluates this objective on probe rows",
                    {"where": f"objectives.{name}.data.probe", "kind": self.schedule.kind},
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
            if objective.optimum == "auto" and not (
                objective.data.held_out or objective.data.held_out_path
            ):
                raise PydanticCustomError(
                    "no_held_out",
                    "is auto, which evaluates on held-out rows, but data.held_out is 0",
                    {"where": f"objectives.{name}.optimum"},
                )
        return self

    def dump(self) -> dict[str, Any]:
        """As plain values that :func:`parse_recipe` reads back."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Digest of what decides the numbers of a run: all but names and where it is written."""
        values = self.dump()
        for entry in ("name", "description", "output"):
            values.pop(entry)
        values["training"].pop("report_to")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
