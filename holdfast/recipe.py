"""Recipes: one YAML file that names everything a run is made of.

A recipe is validated whole, and without importing torch, before anything is loaded. Messages name
the file, the line, the path of the entry and the nearest valid name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from holdfast.errors import RecipeError
from holdfast.joint.schedules import Stage, check_weights

SHIPPED = Path(__file__).parent / "recipes"


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
                            "near": _nearest(str(key), cls.model_fields),
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
                f"{_nearest(str(value), ['auto'])}"
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
                        "near": _nearest(name, self.objectives),
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


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Parameters
    ----------
    name_or_path : str
        A YAML file, or the name of a recipe that ships with Holdfast.
    overrides : sequence of str
        ``"a.b=value"``; the value is read as YAML.

    Returns
    -------
    Recipe
        With relative data and model paths made absolute.

    Raises
    ------
    RecipeError
        If it is missing, not YAML, or not valid.
    """
    path = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise RecipeError(f"{path} {found}; a recipe is a mapping of entries")
    lines = {where: line for where, line in _lines(node)} if node else {}
    for override in overrides:
        lines[_override(values, override)] = 0
    return parse_recipe(values, file=path, lines=lines)


def parse_recipe(
    values: Mapping[str, Any], *, file: Path, lines: Mapping[str, int] | None = None
) -> Recipe:
    """Validate a recipe given as plain values.

    Parameters
    ----------
    values : mapping
        As read from YAML.
    file : Path
        Named in messages; relative paths in the recipe start from its folder.
    lines : mapping of str to int, optional
        Line of each entry by its dotted path, 0 for one that came from ``--set``.

    Raises
    ------
    RecipeError
        Naming every entry that is wrong.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        messages = [_message(entry, file, lines or {}) for entry in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(messages))) from None
    return _resolve(recipe, file.resolve().parent)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with Holdfast, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise RecipeError(
        f"there is no recipe {name_or_path!r}: neither a file nor a recipe that ships with "
        f"Holdfast{_nearest(name_or_path, shipped)} Shipped: {', '.join(shipped)}"
    )


def _override(values: dict[str, Any], override: str) -> str:
    where, equals, text = override.partition("=")
    if not equals or not where.strip():
        raise RecipeError(f"--set {override!r}: expected PATH=VALUE, such as training.seed=1")
    *parents, last = where.strip().split(".")
    target: Any = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is not a mapping of entries")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {problem}") from error
    return where.strip()


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Local paths made absolute, so that a run can be resumed from anywhere."""

    def local(name: str | None) -> str | None:
        if name is None or not name:
            return name
        beside = folder / Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or Path(name).suffix in _DATA_SUFFIXES
        return str(beside.resolve()) if beside.exists() or looks_local else name

    policy = recipe.policy
    tokenizer = policy.tokenizer and policy.tokenizer.model_copy(
        update={
            "files": tuple(local(file) for file in policy.tokenizer.files),
            "name_or_path": local(policy.tokenizer.name_or_path),
        }
    )
    objectives = {}
    for name, objective in recipe.objectives.items():
        data = objective.data.model_copy(
            update={
                "path": local(objective.data.path),
                "held_out_path": local(objective.data.held_out_path),
            }
        )
        update: dict[str, Any] = {"data": data}
        if isinstance(objective, DpoSpec):
            update["reference"] = local(objective.reference)
        objectives[name] = objective.model_copy(update=update)
    return recipe.model_copy(
        update={
            "policy": policy.model_copy(
                update={
                    "model_name_or_path": local(policy.model_name_or_path),
                    "tokenizer": tokenizer,
                }
            ),
            "objectives": objectives,
        }
    )


_DATA_SUFFIXES = (".jsonl", ".gz", ".parquet", ".csv", ".json", ".txt")


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted path and line of every entry of a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        items = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, at, value in items:
        where = f"{prefix}.{name}" if prefix else name
        yield where, at.start_mark.line + 1
        yield from _lines(value, where)


def _message(entry: Any, file: Path, lines: Mapping[str, int]) -> str:
    """One line for one validation error."""
    context = entry.get("ctx", {})
    # Pydantic puts the tag of a union into the location; a recipe's reader never wrote it there.
    parts = [str(part) for part in entry["loc"]]
    where = ""
    for index, part in enumerate(parts):
        longer = f"{where}.{part}" if where else part
        is_tag = part in _TAGS and longer not in lines and index > 0 or part == "[key]"
        where = where if is_tag else longer
    text = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "unknown_entry":
        where = f"{where}.{context['key']}" if where else context["key"]
    elif "where" in context:
        where = context["where"]
    elif entry["type"] == "missing":
        text = "is required, but missing"
    elif entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",")]
        found = context.get("tag")
        where = f"{where}.kind"
        if found is None:
            text = "is required, but missing"
        else:
            text = f"{found!r} is not known{_nearest(str(found), known)} Known: {', '.join(known)}"
    elif entry["type"] == "literal_error":
        known = [
            option.strip(" '") for option in context["expected"].replace(" or ", ",").split(",")
        ]
        found = entry["input"]
        text = f"{found!r} is not known{_nearest(str(found), known)} Known: {', '.join(known)}"
    elif entry["type"] in _SHAPES:
        text = f"expected {_SHAPES[entry['type']]}, but found {entry['input']!r}"
    elif not isinstance(entry["input"], Mapping) and entry["type"] != "value_error":
        text = f"{text[0].lower()}{text[1:]}, but found {entry['input']!r}"
    line = lines.get(where, lines.get(where.rpartition(".")[0]))
    place = f"{file}" if line is None else f"{file}:{line}" if line else "--set"
    return f"{place}: {where}: {text}" if where else f"{place}: {text}"


_TAGS = {"nll", "dpo", "sequential", "mix", "alright", "maxright", "str", "tuple[str, ...]"}

_SHAPES = {
    "model_type": "a mapping of entries",
    "model_attributes_type": "a mapping of entries",
    "dict_type": "a mapping of entries",
    "tuple_type": "a list",
}
"""What the shapes of a recipe are called where it is written."""


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f"; did you mean '{near[0]}'?" if near else "."
