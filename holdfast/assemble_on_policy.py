"""From the recipe of an on-policy objective to its source, loss and evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from holdfast import schema
from holdfast.assemble_on_policy_guards import Guards, guarded, guards_of
from holdfast.errors import ModelError, RecipeError
from holdfast.joint import LossTerms, Objective
from holdfast.joint.objective import Source, Summary
from holdfast.language.advantages import batch_baseline, group_normalized, leave_one_out
from holdfast.language.data import Demonstration, Prompt
from holdfast.language.frozen import Frozen
from holdfast.language.generate import (
    Generator,
    Sampling,
    TransformersGenerator,
    VllmGenerator,
)
from holdfast.language.guards import Penalties, soft_minimum
from holdfast.language.losses.policy_gradient import cispo, dro, gspo, pmd, ppo_clip, reinforce
from holdfast.language.model import PRESETS, LanguagePolicy, load_policy
from holdfast.language.on_policy import (
    Distillation,
    DivergenceEvaluation,
    Lco,
    PolicyGradient,
    PolicyLoss,
    RewardEvaluation,
)
from holdfast.language.rewards import Rewards, load_reward
from holdfast.language.rollouts import (
    PartlyOnPolicy,
    RolloutOptions,
    Rollouts,
)
from holdfast.language.signals import Signals


@dataclass
class Models:
    """Loads the frozen models of a run, each once."""

    policy: LanguagePolicy
    dtype: str
    device: torch.device

    def __post_init__(self) -> None:
        self._loaded: dict[str | None, Frozen] = {}
        self.asked: set[str] = set()
        """Names that were asked for; to be emptied by whoever wants to know them."""

    def get(self, name: str | None, where: str, *, truncate: bool = False) -> Frozen:
        """A model by name; ``None``: the policy as it stands now.

        ``truncate`` is that of :meth:`Frozen.check_vocabulary`.
        """
        if name is not None:
            self.asked.add(name)
        if name not in self._loaded:
            if name is None:
                self._loaded[name] = Frozen.start_of(self.policy)
            else:
                model = Frozen(load_policy(name, dtype=self.dtype).requires_grad_(False))
                model.check_vocabulary(self.policy, f"{where} {name}", truncate=truncate)
                model.policy.to(self.device)
                model.share_head(self.policy)
                self._loaded[name] = model
        return self._loaded[name]

    def fingerprints(self) -> list[str]:
        """Digests of those that were asked for by name since the last time."""
        found = [f"{name} {self._loaded[name].policy.fingerprint()}" for name in sorted(self.asked)]
        self.asked.clear()
        return found


def check(name: str, spec: schema.OnPolicySpec, policy: schema.LanguagePolicySpec) -> None:
    """Find out what cannot work before any model is loaded.

    Raises
    ------
    RecipeError
        For a reward function or a generator that cannot be used.
    """
    _rewards(name, spec)
    if spec.generator != "vllm":
        return
    if isinstance(spec, schema.MinillmSpec) and spec.teacher_mixed_alpha:
        raise RecipeError(
            f"objectives.{name}: vLLM cannot sample from a mixture with the teacher. Set "
            "teacher_mixed_alpha: 0, or generator: transformers."
        )
    if policy.model_name_or_path in PRESETS:
        raise RecipeError(
            f"objectives.{name}.generator: vLLM reads a model from a directory or hub, and "
            f"{policy.model_name_or_path} is built in memory. Use generator: transformers."
        )
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            f"objectives.{name}.generator: vLLM is not installed: pip install holdfast[vllm], or "
            "use generator: transformers"
        )


def on_policy_objective(
    name: str,
    spec: schema.OnPolicySpec,
    policy: LanguagePolicy,
    rows: tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]],
    demonstrations: Sequence[Demonstration],
    models: Models,
    accelerator: Accelerator,
    training: schema.TrainingSpec,
) -> Objective:
    """An objective on the policy's own completions.

    Parameters
    ----------
    name : str
    spec : OnPolicySpec
    policy : LanguagePolicy
        On its device, before any update.
    rows : tuple of three sequences of Prompt
        For training, for gaps, and for evaluation.
    demonstrations : sequence of Demonstration
        Of the training prompts; for ``imitation``, and for ``gkd`` with batches that the policy
        does not write.
    models : Models
    accelerator : Accelerator
    training : TrainingSpec
        Its seed, and the steps that a curvature mask models.

    Raises
    ------
    HoldfastError
        For a reward or a model that cannot be used.
    """
    train, probe, held_out = rows
    sampling = _sampling(spec, spec.temperature)
    rewards = _rewards(name, spec)
    tokenizer = policy.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    generator = _generator(spec, policy, models)
    signals, loss = _signals_and_loss(spec, policy, models)
    signals.autocast = accelerator.autocast
    guards = Guards()
    if isinstance(spec, schema.RewardedSpec):
        guards = guards_of(spec, demonstrations, training.seed)
        loss = guarded(spec, policy, signals, loss, guards, training)
    source: Source = Rollouts(
        train,
        generator,
        sampling,
        rewards,
        signals,
        RolloutOptions(
            batch_size=spec.batch_size,
            num_generations=spec.num_generations,
            steps_per_generation=spec.steps_per_generation,
            num_iterations=spec.num_iterations,
            dynamic_sampling=getattr(spec, "dynamic_sampling", False),
            mask_truncated_completions=spec.mask_truncated_completions,
        ),
        decode=decode,
        seed=training.seed,
        share=_shared_by(accelerator),
        group=guards.imitation,
        inner=guards.surrogate,
        memory=guards.memory,
    )
    if isinstance(spec, schema.GkdSpec) and spec.lmbda < 1:
        source = PartlyOnPolicy(
            source, demonstrations, signals, spec.batch_size, share=spec.lmbda, seed=training.seed
        )

    def heard(summary: Summary) -> float | None:
        guards.observe(summary)
        return _cost_of(summary)

    evaluated = _sampling(spec, spec.evaluation_temperature)
    # Students are never asked together with their teacher when they are evaluated.
    alone = generator if isinstance(generator, VllmGenerator) else TransformersGenerator(policy)
    evaluate: Callable[[Any, Any], LossTerms]
    if rewards is None:
        # MiniLLM's reward of later tokens is a surrogate of the divergence, and no part of it.
        divergence = replace(loss, later=None)
        evaluate = DivergenceEvaluation(alone, evaluated, signals, divergence, decode)
        observed: Callable[[Summary], float | None] = _loss_of
    else:
        evaluate, observed = RewardEvaluation(alone, evaluated, rewards, decode), heard
    return Objective(
        name=name,
        loss=loss,
        source=source,
        evaluate=evaluate,
        observed=observed,
        held_out=held_out,
        probe=probe,
        optimum=spec.optimum if isinstance(spec.optimum, float) else None,
        micro_batch_size=spec.micro_batch_size or spec.batch_size,
    )


def _loss_of(summary: Summary) -> float | None:
    return summary.loss


def _cost_of(summary: Summary) -> float | None:
    """A reward stands in gaps with its sign turned, as in evaluation."""
    reward = summary.metrics.get("reward")  # absent: nobody rewarded this batch
    return None if reward is None else -reward


def _sampling(spec: schema.OnPolicySpec, temperature: float) -> Sampling:
    return Sampling(
        max_completion_length=spec.max_completion_length,
        temperature=temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        stop_strings=spec.stop_strings,
    )


def _rewards(name: str, spec: schema.OnPolicySpec) -> Rewards | None:
    if not spec.rewards:
        return None

    def shown(name: str) -> str:
        """Without the folders of a file, which are no part of what a metric is called."""
        return name.rpartition("/")[2]

    try:
        functions = {shown(one.name): load_reward(one.name, one.options) for one in spec.rewards}
    except RecipeError as error:
        raise RecipeError(f"objectives.{name}.rewards: {error}") from error
    if len(functions) < len(spec.rewards):
        raise RecipeError(f"objectives.{name}.rewards: two have one name: {', '.join(functions)}")
    return Rewards(functions, {shown(reward.name): reward.weight for reward in spec.rewards})


def _generator(spec: schema.OnPolicySpec, policy: LanguagePolicy, models: Models) -> Generator:
    if spec.generator == "vllm":
        return VllmGenerator(policy, str(policy.base.config._name_or_path))
    if isinstance(spec, schema.MinillmSpec) and spec.teacher_mixed_alpha:
        teacher = _model(spec, models, spec.teacher_model_name_or_path, "teacher")
        return TransformersGenerator(policy, teacher=teacher.policy, alpha=spec.teacher_mixed_alpha)
    return TransformersGenerator(policy)


def _signals_and_loss(
    spec: schema.OnPolicySpec, policy: LanguagePolicy, models: Models
) -> tuple[Signals, Any]:
    signals = Signals(policy, temperature=spec.temperature)
    if spec.log_reference_kl or _holds_on(spec):
        signals.reference = models.get(None, "reference")
    reused = spec.uses > 1
    if isinstance(spec, schema.GkdSpec):
        teacher = _model(spec, models, spec.teacher_model_name_or_path, "teacher")
        signals.temperature = 1.0
        signals.frozen = {"teacher": teacher}
        return signals, Distillation(policy.pad_id, teacher, spec.beta, spec.temperature)
    if isinstance(spec, schema.MinillmSpec):
        teacher = _model(spec, models, spec.teacher_model_name_or_path, "teacher")
        signals.behaviour = "logps"
        signals.frozen = {"teacher": teacher}
        signals.minillm = (teacher, spec.teacher_mixed_alpha, spec.length_normalization)
        signals.whiten = True
        later: PolicyLoss = partial(ppo_clip, epsilon=spec.epsilon)
        return signals, Distillation(
            policy.pad_id, teacher, 1.0, spec.temperature, later, sampling=spec.temperature
        )
    assert isinstance(spec, schema.RewardedSpec)
    if spec.preference is not None:
        tuned = _model(spec, models, spec.preference.reward_model, "reward_model")
        reference = _model(spec, models, spec.preference.reference_model, "reference_model")
    if isinstance(spec, schema.LcoSpec):
        signals.behaviour = "hidden" if reused else "none"
        kept = signals.kept_head
        sources: dict[str, tuple[Frozen, float]] = {}
        if spec.preference is not None:
            strength = spec.preference.beta_rm
            sources = {"reward": (tuned, strength), "reference": (reference, -strength)}
        elif spec.log_probability_model is not None:
            model = _model(spec, models, spec.log_probability_model, "log_probability_model")
            sources = {"q": (model, 1.0)}
        if spec.sparse:
            signals.advantages = partial(
                group_normalized, scale=spec.scale_rewards, floor=spec.scale_floor
            )
        signals.frozen = {key: model for key, (model, _) in sources.items()}
        loss = Lco(
            policy.pad_id,
            spec.kind,
            spec.beta,
            sparse=spec.sparse,
            sources=sources,
            centre=spec.centre,
            temperature=spec.temperature,
            behaviour_head=kept,
        )
        if spec.centre == "mean" and any(m.head().softcap for m, _ in sources.values()):
            raise ModelError(
                "centre: mean needs the mean of all logits, which is not known in advance where a "
                "model caps them (soft cap). Use centre: none or logprob."
            )
        return signals, loss

    assert isinstance(spec, schema.PenalisedSpec)
    if spec.preference is not None:
        signals.preference = (tuned, reference, spec.preference.beta_rm)
    else:
        signals.advantages = _advantages(spec)
    signals.behaviour = "logps" if reused else "none"
    policy_loss, shape = _policy_loss(spec)
    gradient = PolicyGradient(
        policy.pad_id,
        policy_loss,
        temperature=spec.temperature,
        penalties=Penalties(beta=spec.beta, **shape),
    )
    if isinstance(spec, schema.PpoSpec):
        signals.critic = (spec.discount, spec.trace)
        signals.whiten = spec.whiten_advantages
        gradient.vf_coef, gradient.cliprange_value = spec.vf_coef, spec.cliprange_value
        if spec.soft_minimum is not None:
            signals.value = gradient.value = partial(soft_minimum, alpha=spec.soft_minimum)
    return signals, gradient


def _holds_on(spec: schema.OnPolicySpec) -> bool:
    """Whether a penalty keeps the policy near the reference."""
    if isinstance(spec, schema.PenalisedSpec) and spec.beta:
        return True
    return isinstance(spec, schema.RewardedSpec) and spec.kl_control is not None


def _model(spec: schema.OnPolicySpec, models: Models, name: str | None, where: str) -> Frozen:
    return models.get(name, where, truncate=spec.truncate_vocabulary)


def _advantages(spec: schema.PenalisedSpec) -> Callable[[Tensor, int], Tensor] | None:
    if isinstance(spec, schema.GroupedSpec):
        return partial(group_normalized, scale=spec.scale_rewards, floor=spec.scale_floor)
    if isinstance(spec, schema.ReinforceSpec):
        match spec.baseline:
            case "leave_one_out":
                return leave_one_out
            case "batch":
                return lambda rewards, _: batch_baseline(rewards)
            case "none":
                return lambda rewards, _: rewards.nan_to_num(0.0)
    return None


def _policy_loss(spec: schema.PenalisedSpec) -> tuple[PolicyLoss, Mapping[str, Any]]:
    """The loss, and the aggregation that a penalty beside it takes."""
    match spec:
        case schema.ReinforceSpec():
            shape: dict[str, Any] = {"aggregation": spec.aggregation}
            return lambda logps, old, a, mask: reinforce(logps, a, mask, **shape), shape
        case schema.PpoSpec():
            shape = {}
        case schema.GspoSpec():
            high = spec.epsilon if spec.epsilon_high is None else spec.epsilon_high
            shape = {"aggregation": "sequence-mean"}
            return partial(gspo, epsilon=spec.epsilon, epsilon_high=high, **shape), shape
        case schema.CispoSpec():
            return partial(cispo, epsilon_low=spec.epsilon_low, epsilon_high=spec.epsilon_high), {}
        case schema.PmdSpec():
            loss = partial(pmd, tau=spec.tau)
            if spec.preference is None:
                # The advantage is the sequence's, once: on every token it would count every time.
                return lambda a, b, amounts, mask: loss(a, b, _of_sequence(amounts, mask), mask), {
                    "aggregation": "sequence-mean"
                }
            return loss, {"aggregation": "sequence-mean"}
        case schema.DroSpec():
            return partial(dro, beta=spec.kl_coef), {}
        case schema.GrpoSpec():
            shape = {"aggregation": "sequence-mean"}
        case schema.DrGrpoSpec():
            shape = {"aggregation": "fixed-length", "length": spec.max_completion_length}
        case _:
            shape = {"aggregation": "token-mean"}
    assert isinstance(spec, schema.RatioSpec)
    clipped = partial(
        ppo_clip,
        epsilon=spec.epsilon,
        epsilon_high=spec.epsilon_high,
        delta=spec.delta,
        dynamic=spec.dynamic_clip,
        log_ratio_limit=spec.log_ratio_limit,
        **shape,
    )
    return clipped, shape


def _of_sequence(amounts: Tensor, mask: Tensor) -> Tensor:
    """What all tokens of a sequence have in common, ``(batch,)``."""
    return (amounts * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _shared_by(accelerator: Accelerator) -> Callable[[Any, Sequence[Any]], list[Any]]:
    """Work divided among processes, and its results put together again, in order."""

    def share(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
        world, rank = accelerator.num_processes, accelerator.process_index
        if world == 1:
            return work(items)
        parts: list[list[Any]] = gather_object([work(items[rank::world])])
        return [parts[index % world][index // world] for index in range(len(items))]

    return share
