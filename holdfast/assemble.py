"""From a validated recipe to the objects that train: policy, objectives, schedule, trainer."""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from holdfast.assemble_on_policy import Models, check, on_policy_objective
from holdfast.errors import DataError, RecipeError
from holdfast.joint import Alright, Maxright, Mix, Objective, Schedule, Sequential
from holdfast.joint.batches import Batches
from holdfast.joint.checkpoint import Checkpoints
from holdfast.joint.optimizer import TrainerOptions, check_learning_rates
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer
from holdfast.language.data import (
    Demonstration,
    Prompt,
    fingerprint,
    load_demonstrations,
    load_preferences,
    load_prompts,
    read_rows,
    split_rows,
)
from holdfast.language.data import texts as texts_of
from holdfast.language.guards.directional import SoftmaxRadii
from holdfast.language.model import PRESETS, LanguagePolicy, load_policy, load_tokenizer
from holdfast.language.objectives import Dpo, Nll
from holdfast.language.reference import with_reference
from holdfast.language.tokenizers import build_tokenizer, train_bpe
from holdfast.schema import (
    AdaptiveInterleaveSpec,
    AlrightSpec,
    ComparedSpec,
    ControlSpec,
    DpoSpec,
    FadeSpec,
    GkdSpec,
    InterleaveSpec,
    LanguagePolicySpec,
    MaxrightSpec,
    MixSpec,
    NllSpec,
    ObjectiveSpec,
    OnPolicySpec,
    PpoSpec,
    Recipe,
    SoftQSpec,
)

if TYPE_CHECKING:
    from holdfast.bellman.soft_q import SoftQ
    from holdfast.control.actor_critic import ActorCritic

TrainedPolicy: TypeAlias = "LanguagePolicy | ActorCritic | SoftQ"
SPLIT_SEED = 0
"""Which rows are held out never depends on a run's seed: a row held out once is held out always."""


def cache_folder() -> Path:
    """Where values that are dear to compute are kept: ``HOLDFAST_CACHE``, or a user's cache."""
    named = os.environ.get("HOLDFAST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "holdfast"


@dataclass
class Assembly:
    """What a recipe was built into.

    Attributes
    ----------
    policy : LanguagePolicy, ActorCritic or SoftQ
        On its device, before any update.
    objectives : dict of str to Objective
        With their rows; optima only where the recipe gives numbers.
    fingerprint : str
        Digest of recipe, data and initial policy: equal only if the runs are the same run.
    keys : dict of str to str
        Per objective, digest of the policy, the rows and all else that its optimum depends on.
    """

    policy: TrainedPolicy
    objectives: dict[str, Objective]
    fingerprint: str
    keys: dict[str, str]


def assemble(
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    tokenizer_folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Assembly:
    """Load policy and data.

    Parameters
    ----------
    recipe : Recipe
        Validated.
    accelerator : Accelerator
        Says which device is used; the main process fills caches while the others wait.
    tokenizer_folder : Path, optional
        A tokenizer saved by the run itself, which then wins over building it again.
    say : callable
        Told what happens, for a person to read.

    Raises
    ------
    HoldfastError
        For a model or data that cannot be used.
    """
    if isinstance(recipe.policy, ControlSpec):
        # Imported where they are needed: what they stand on is in extras.
        from holdfast.assemble_control import assemble_control

        return _assembled(recipe, *assemble_control(recipe, accelerator, say))
    if isinstance(recipe.policy, SoftQSpec):
        try:
            from holdfast.assemble_bellman import assemble_bellman
        except ImportError as error:
            raise RecipeError(
                f"policy.kind soft_q needs a package that is not installed ({error}): pip install "
                "holdfast[bellman]"
            ) from error
        return _assembled(recipe, *assemble_bellman(recipe, accelerator, say))
    for name, spec in recipe.objectives.items():
        if isinstance(spec, OnPolicySpec):
            check(name, spec, recipe.policy)
    policy = _policy(recipe.policy, recipe.training.seed, tokenizer_folder)
    if recipe.training.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    policy.to(accelerator.device)
    if _has_critic(recipe):
        policy.add_value_head(_value_heads(recipe))
    weights = policy.fingerprint()
    models = Models(policy, recipe.policy.dtype, accelerator.device)
    objectives: dict[str, Objective] = {}
    digests: dict[str, str] = {}
    for name, spec in recipe.objectives.items():
        assert isinstance(spec, ObjectiveSpec)
        if spec.batch_size < accelerator.num_processes:
            raise RecipeError(
                f"objectives.{name}.batch_size is {spec.batch_size}, but there are "
                f"{accelerator.num_processes} processes: each needs at least one row of a batch"
            )
        train, probe, held_out = _rows(name, spec, policy, say)
        digests[name] = _digest(weights, *(fingerprint(part) for part in (train, probe, held_out)))
        if isinstance(spec, OnPolicySpec):
            objectives[name] = on_policy_objective(
                name,
                spec,
                policy,
                (train, probe, held_out),
                _demonstrations_of(name, spec, train, policy),
                models,
                accelerator,
                recipe.training,
            )
            digests[name] = _digest(digests[name], *models.fingerprints(), *_code_of(spec))
            continue
        assert isinstance(spec, NllSpec | DpoSpec)
        if isinstance(spec, DpoSpec):
            reference = policy
            if spec.reference is not None:
                reference = load_policy(spec.reference, tokenizer=policy.tokenizer)
                reference.to(accelerator.device)
                digests[name] = _digest(digests[name], reference.fingerprint(adapter=False))
            with accelerator.main_process_first(), accelerator.autocast():
                train, probe, held_out = _scored(reference, (train, probe, held_out), say)
        objectives[name] = Objective(
            name=name,
            loss=_loss(spec, policy),
            source=Batches(
                train,
                spec.batch_size,
                seed=recipe.training.seed,
                length=lambda row: row.length,
            ),
            # Rows of like length together: less padding, same means.
            held_out=sorted(held_out, key=lambda row: row.length),
            probe=sorted(probe, key=lambda row: row.length),
            optimum=spec.optimum if isinstance(spec.optimum, float) else None,
            micro_batch_size=spec.micro_batch_size or spec.batch_size,
        )
    for name, spec in recipe.objectives.items():
        temperature = spec.temperature if isinstance(spec, OnPolicySpec) else 1.0
        objectives[name].radii = SoftmaxRadii(policy.pad_id, temperature)
    return _assembled(recipe, policy, objectives, digests)


def _assembled(
    recipe: Recipe,
    policy: TrainedPolicy,
    objectives: dict[str, Objective],
    digests: dict[str, str],
) -> Assembly:
    everything = _digest(recipe.fingerprint(), *digests.values())
    keys = {name: _digest(alone(recipe, name).fingerprint(), digests[name]) for name in objectives}
    return Assembly(policy, objectives, everything, keys)


def alone(recipe: Recipe, name: str) -> Recipe:
    """The recipe that trains one objective alone, from the same start, for the same budget."""
    values = recipe.dump()
    values["objectives"] = {name: {**values["objectives"][name], "optimum": None}}
    steps = recipe.training.max_steps
    values["schedule"] = {"kind": "sequential", "stages": [{"objective": name, "steps": steps}]}
    values["training"]["report_to"] = []
    # What tripwires are on may be another objective's; a run that goes well never feels them.
    guards = [entry for entry in values["training"]["guards"] if entry["kind"] != "tripwires"]
    values["training"]["guards"] = guards
    values["combiner"] = None
    values.update(name=f"{recipe.name}-{name}-alone", output=None)
    return Recipe.model_validate(values)


def build_schedule(
    recipe: Recipe, optima: Mapping[str, float], objectives: Mapping[str, Objective]
) -> Schedule:
    """The schedule of a recipe; ``optima`` for those that use gaps.

    Raises
    ------
    RecipeError
        If an iteration is said to have other updates than its objective makes, or nothing says
        how many.
    """
    spec = recipe.schedule
    if isinstance(spec, MixSpec):
        return Mix(spec.weights)
    if isinstance(spec, InterleaveSpec):
        watched = isinstance(recipe.policy, ControlSpec)
        return spec.schedule(updates=_updates(spec, objectives), watched=watched)
    if isinstance(spec, AdaptiveInterleaveSpec):
        return spec.schedule(updates=_updates(spec, objectives))
    if isinstance(spec, FadeSpec):
        return spec.schedule()
    if isinstance(spec, AlrightSpec):
        return Alright(spec.weights, recipe.training.seed if spec.seed is None else spec.seed)
    if isinstance(spec, MaxrightSpec):
        return Maxright(spec.weights, optima, spec.evaluate_every, smoothing=spec.smoothing)
    return Sequential([stage.stage() for stage in spec.stages])


def _updates(
    spec: InterleaveSpec | AdaptiveInterleaveSpec, objectives: Mapping[str, Objective]
) -> int | None:
    """Of an iteration of the second objective; ``None`` where none are counted."""
    if spec.every == "update":
        return None
    name, given = spec.objectives[-1], spec.updates_per_iteration
    own: int | None = getattr(objectives[name].source, "updates", None)
    if own is None and given is None:
        raise RecipeError(
            f"schedule.updates_per_iteration is missing, and {name} has no iterations of its own "
            "to count: give a number, or count updates (every: update)"
        )
    if own is not None and given not in (None, own):
        raise RecipeError(
            f"schedule.updates_per_iteration is {given}, but {name} makes {own} updates before it "
            f"collects again. Leave it out, or make it {own}."
        )
    return own or given


def build_trainer(
    recipe: Recipe,
    assembly: Assembly,
    optima: Mapping[str, float],
    accelerator: Accelerator,
    *,
    folder: Path,
    recorder: Recorder | None,
) -> Trainer:
    """The trainer of a run that lives in ``folder``.

    Raises
    ------
    RecipeError
        If an entry of ``training.learning_rates`` fits no trainable parameter, or the schedule
        does not fit the objectives.
    """
    training = recipe.training.model_dump()
    own = ("bf16", "gradient_checkpointing", "save_total_limit", "report_to", "guards")
    keep = training["save_total_limit"]
    for entry in own:
        training.pop(entry)
    for name, optimum in optima.items():
        assembly.objectives[name].optimum = optimum
    if isinstance(recipe.policy, SoftQSpec):
        rate, given = training["learning_rate"], training["learning_rates"]
        training["learning_rates"] = recipe.policy.learning_rates(rate, given)
    options = TrainerOptions(**training)
    try:
        check_learning_rates(assembly.policy, options)
    except ValueError as error:
        raise RecipeError(f"training.{error}") from error
    return Trainer(
        assembly.policy,
        assembly.objectives,
        build_schedule(recipe, optima, assembly.objectives),
        options,
        accelerator=accelerator,
        combiner=recipe.combiner.combiner() if recipe.combiner else None,
        recorder=recorder,
        checkpoints=Checkpoints(folder / "checkpoints", keep),
        guards=[spec.guard() for spec in recipe.training.guards],
        fingerprint=assembly.fingerprint,
    )


def _policy(spec: LanguagePolicySpec, seed: int, tokenizer_folder: Path | None) -> LanguagePolicy:
    return load_policy(
        spec.model_name_or_path,
        tokenizer=_tokenizer(spec, tokenizer_folder),
        revision=spec.revision,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        config=spec.config,
        lora=spec.lora.model_dump() if spec.lora else None,
        seed=seed,
    )


def _tokenizer(spec: LanguagePolicySpec, saved: Path | None) -> Any:
    if saved is not None and saved.is_dir():
        return load_tokenizer(str(saved))
    chosen = spec.tokenizer
    if chosen is None:
        return build_tokenizer() if spec.model_name_or_path in PRESETS else None
    if chosen.kind == "pretrained":
        return load_tokenizer(str(chosen.name_or_path))
    if chosen.kind == "bpe":
        corpus = [
            text
            for file in chosen.files
            for row in read_rows(file, base=Path())
            for text in texts_of(row)
        ]
        return train_bpe(corpus, chosen.vocab_size)
    return build_tokenizer()


def _code_of(spec: OnPolicySpec) -> list[str]:
    """Digests of the files that reward functions come from."""
    files = [Path(reward.name.rpartition(":")[0]) for reward in spec.rewards if ":" in reward.name]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _has_critic(recipe: Recipe) -> bool:
    return any(isinstance(spec, PpoSpec) for spec in recipe.objectives.values())


def _value_heads(recipe: Recipe) -> int:
    """How many the critics of a recipe share."""
    heads = {
        name: 1 if spec.soft_minimum is None else 2
        for name, spec in recipe.objectives.items()
        if isinstance(spec, PpoSpec)
    }
    if len(set(heads.values())) > 1:
        raise RecipeError(
            f"objectives {', '.join(heads)} share one critic, but soft_minimum is set for some of "
            "them only: set it for all, or for none"
        )
    return max(heads.values())


def _demonstrations_of(
    name: str, spec: OnPolicySpec, prompts: Sequence[Prompt], policy: LanguagePolicy
) -> list[Demonstration]:
    """The data's own completions of training prompts, where an objective takes some of them."""
    imitated = isinstance(spec, ComparedSpec) and spec.imitation is not None
    if not imitated and (not isinstance(spec, GkdSpec) or spec.lmbda == 1):
        return []
    wanted = {prompt.origin for prompt in prompts}
    raw = read_rows(spec.data.path, base=Path(), split=spec.data.split)
    limit = spec.data.max_length + spec.max_completion_length
    rows = [row for row in raw if row.origin in wanted]
    try:
        found, _ = load_demonstrations(
            rows, policy.tokenizer, max_length=limit, bad_rows=spec.data.bad_rows
        )
    except DataError as error:
        wanting = (
            "imitation needs the data's own completions"
            if not isinstance(spec, GkdSpec)
            else f"lmbda is {spec.lmbda}, so completions of the data are needed as well (lmbda: 1 "
            "takes only the policy's own)"
        )
        raise DataError(f"objectives.{name}: {wanting}. {error}") from error
    absent = wanted - {row.origin for row in found}
    if imitated and absent:
        raise DataError(
            f"objectives.{name}: imitation needs a completion of every prompt, and {len(absent)} "
            f"of {len(wanted)} have none, among them {min(absent)}. Leave these rows out."
        )
    return list(found)


def _rows(
    name: str, spec: ObjectiveSpec, policy: LanguagePolicy, say: Callable[[str], None]
) -> tuple[list[Any], list[Any], list[Any]]:
    data = spec.data
    load: Callable[..., tuple[list[Any], dict[str, int]]] = load_demonstrations
    if isinstance(spec, DpoSpec):
        load = load_preferences
    elif isinstance(spec, OnPolicySpec):
        load = load_prompts

    def encoded(path: str, split: str) -> list[Any]:
        raw = read_rows(path, base=Path(), split=split)
        rows, dropped = load(
            raw, policy.tokenizer, max_length=data.max_length, bad_rows=data.bad_rows
        )
        for reason, count in dropped.items():
            say(f"{name}: dropped {count} of {len(raw)} rows of {path} ({reason})")
        return list(rows)

    rows = encoded(data.path, data.split)
    if data.max_rows is not None and len(rows) > data.max_rows:
        # A random part: files are often sorted.
        rows = random.Random(SPLIT_SEED).sample(rows, data.max_rows)
    try:
        if data.held_out_path is None:
            return split_rows(rows, held_out=data.held_out, probe=data.probe, seed=SPLIT_SEED)
        held_out = encoded(data.held_out_path, data.held_out_split)
        if 0 < data.held_out < len(held_out):
            held_out = random.Random(SPLIT_SEED).sample(held_out, data.held_out)
        prompts = {row.group for row in held_out if row.group}
        unseen = [row for row in rows if row.group not in prompts]
        if len(unseen) < len(rows):
            say(f"{name}: left out {len(rows) - len(unseen)} training rows with held-out prompts")
        train, probe, _ = split_rows(unseen, held_out=0, probe=data.probe, seed=SPLIT_SEED)
        return train, probe, held_out
    except DataError as error:
        raise DataError(f"objectives.{name}.data: {error}") from error


def _loss(spec: NllSpec | DpoSpec, policy: LanguagePolicy) -> Any:
    if isinstance(spec, DpoSpec):
        return Dpo(
            policy.pad_id,
            beta=spec.beta,
            variant=spec.loss_type,
            label_smoothing=spec.label_smoothing,
        )
    return Nll(policy.pad_id, spec.aggregation, spec.loss_type)


def _scored(
    reference: LanguagePolicy,
    parts: tuple[list[Any], list[Any], list[Any]],
    say: Callable[[str], None],
) -> tuple[list[Any], list[Any], list[Any]]:
    say(f"reference log-probabilities of {sum(map(len, parts))} pairs")
    rows = [row for part in parts for row in part]
    scored = with_reference(rows, reference, cache_folder())
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
    return scored[:first], scored[first:second], scored[second:]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def accelerator_for(recipe: Recipe, folder: Path) -> Accelerator:
    """An accelerator with the recipe's precision and trackers.

    Raises
    ------
    RecipeError
        If a tracker is not installed.
    """
    wanted = list(recipe.training.report_to)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=")  # said better below
            accelerator = Accelerator(
                # Otherwise several processes on a machine without accelerator each train alone.
                cpu=not torch.accelerator.is_available(),
                mixed_precision="bf16" if recipe.training.bf16 else "no",
                log_with=wanted or None,
                project_dir=str(folder),
                # A critic takes part in its own objective's steps alone.
                kwargs_handlers=[
                    DistributedDataParallelKwargs(
                        find_unused_parameters=_has_critic(recipe)
                        or isinstance(recipe.policy, ControlSpec)
                    )
                ],
            )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training.report_to or training.bf16: {error}") from error
    # accelerate leaves out a tracker whose package is not installed, and trains without it.
    found = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    absent = [name for name in wanted if name != "all" and name not in found]
    if absent:
        raise RecipeError(
            f"training.report_to: {', '.join(absent)} is not installed. Install its package, or "
            "leave it out."
        )
    return accelerator
