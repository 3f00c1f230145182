"""Objectives on the policy's own completions: reinforcement learning and distillation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from holdfast.schema.base import Spec
from holdfast.schema.objectives import ObjectiveSpec
from holdfast.schema.on_policy_guards import (
    Covariance,
    CurvatureSpec,
    HintsSpec,
    ImitationSpec,
    KlControl,
    KlCovSpec,
    MembersSpec,
    SolveRateGateSpec,
)


class RewardSpec(Spec):
    """A reward function: one that ships with Holdfast, or a dotted path to your own."""

    name: str = Field(description="numeric_answer, regex, …, package.module.name or file.py:name")
    weight: float = 1.0
    options: dict[str, Any] = Field({}, description="of a function that ships with Holdfast")


class OnPolicySpec(ObjectiveSpec):
    """What all objectives on the policy's own completions have; names as in TRL."""

    rewards: tuple[RewardSpec, ...] = Field((), description="functions of prompts and completions")
    num_generations: int = Field(8, ge=1, description="completions of each prompt")
    max_completion_length: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    stop_strings: tuple[str, ...] = ()
    steps_per_generation: int = Field(1, ge=1, description="optimiser steps a batch is cut into")
    num_iterations: int = Field(1, ge=1, description="passes over a batch of rollouts")
    mask_truncated_completions: bool = False
    generator: Literal["transformers", "vllm"] = "transformers"
    evaluation_temperature: float = Field(0.0, ge=0, description="0: the most probable tokens")
    log_reference_kl: bool = Field(
        True,
        description="record the KL to the policy before its first update, for one forward pass "
        "more a rollout (and, without LoRA, a copy of the policy)",
    )
    truncate_vocabulary: bool = Field(
        False, description="cut padding off frozen models' vocabularies that are longer"
    )

    @model_validator(mode="after")
    def _divides(self) -> OnPolicySpec:
        drawn = self.batch_size * self.steps_per_generation
        if drawn % self.num_generations:
            raise ValueError(
                f"num_generations is {self.num_generations}, which does not divide the {drawn} "
                f"completions of a batch of rollouts (batch_size {self.batch_size} times "
                f"steps_per_generation {self.steps_per_generation})"
            )
        return self

    @property
    def uses(self) -> int:
        """Optimiser steps that a batch of rollouts serves."""
        return self.steps_per_generation * self.num_iterations


class PreferenceAdvantage(Spec):
    """Advantages from a preference-tuned model: beta_rm (log pi_rm - log pi_ref)."""

    reward_model: str = Field(description="directory or hub id of the preference-tuned model")
    reference_model: str | None = Field(
        None, description="null: the policy before its first update"
    )
    beta_rm: float = Field(1.0, gt=0)


class RewardedSpec(OnPolicySpec):
    """Objectives that learn from advantages."""

    rewards: tuple[RewardSpec, ...] = Field(description="functions of prompts and completions")
    preference: PreferenceAdvantage | None = Field(
        None, description="advantages of tokens from a preference-tuned model, not from rewards"
    )
    kl_control: KlControl | None = Field(
        None, description="coefficient of a KL penalty to the reference: fixed, adaptive, safe"
    )
    entropy_coef: float = Field(0.0, ge=0, description="of an entropy bonus; 0: none")
    use_adaptive_entropy: bool = Field(False, description="only while the entropy is low")
    entropy_target: float = Field(0.2, gt=0, description="nats a token: at or below it is low")
    entropy_coef_delta: float = Field(0.005, gt=0, description="change of entropy_coef in a step")
    entropy_coef_min: float = Field(0.0, ge=0)
    entropy_coef_max: float = Field(1.0, ge=0)
    curvature_mask: CurvatureSpec | None = Field(
        None, description="tokens that would move objective or policy too far do not learn (CAPO)"
    )
    advantage_filter: float | None = Field(
        None, gt=0, description="advantages this many deviations off are set to 0"
    )
    stop_on_rise: bool = Field(
        False, description="draw anew once a pass over the rollouts no longer lowers the loss"
    )

    added: ClassVar[frozenset[str]] = frozenset(
        {
            "kl_control",
            "entropy_coef",
            "use_adaptive_entropy",
            "entropy_target",
            "entropy_coef_delta",
            "entropy_coef_min",
            "entropy_coef_max",
            "curvature_mask",
            "advantage_filter",
            "stop_on_rise",
        }
    )

    def _refuse(self, entry: str, why: str) -> None:
        """Say that an entry does nothing here, if it is not at its default."""
        value, default = getattr(self, entry), type(self).model_fields[entry].default
        if value != default:
            raise ValueError(f"{entry} does nothing {why}: leave it out")

    @model_validator(mode="after")
    def _adaptive(self) -> RewardedSpec:
        if not self.use_adaptive_entropy:
            for name in ("target", "coef_delta", "coef_min", "coef_max"):
                self._refuse(f"entropy_{name}", "unless use_adaptive_entropy is true")
        elif not self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef is {self.entropy_coef}: it must lie in [entropy_coef_min, "
                f"entropy_coef_max], [{self.entropy_coef_min}, {self.entropy_coef_max}]"
            )
        if self.num_iterations == 1:
            self._refuse("stop_on_rise", "with num_iterations 1, a single pass over rollouts")
        return self

    @field_validator("rewards")
    @classmethod
    def _some(cls, value: tuple[RewardSpec, ...]) -> tuple[RewardSpec, ...]:
        names = [reward.name for reward in value]
        if len(set(names)) < len(names):
            raise ValueError("a reward function is named twice")
        if not value:
            raise ValueError("rewards is empty: name at least one reward function")
        return value


class PenalisedSpec(RewardedSpec):
    """Policy gradients, with a KL penalty."""

    beta: float = Field(0.0, ge=0, description="of the KL penalty to the reference; 0: none")
    covariance: Covariance | None = Field(
        None, description="Clip-Cov or KL-Cov: tokens that lower the entropy most"
    )

    added: ClassVar[frozenset[str]] = RewardedSpec.added | {"covariance"}

    @model_validator(mode="after")
    def _one_penalty(self) -> PenalisedSpec:
        if self.kl_control is not None and self.beta:
            raise ValueError("beta is a fixed coefficient, and kl_control sets one: name only one")
        if isinstance(self.covariance, KlCovSpec) and self.uses == 1:
            raise ValueError(
                "covariance kl does nothing where rollouts serve one update, in which no policy "
                "has moved: raise num_iterations or steps_per_generation, or use clip"
            )
        return self


class ComparedSpec(RewardedSpec):
    """Rewards are compared within the group of a prompt."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    scale_floor: float = Field(0.0, ge=0, description="smallest deviation of a group divided by")
    smooth_advantages: bool = Field(False, description="against a prompt's past as well (DCPO)")
    imitation: ImitationSpec | None = Field(
        None, description="the data's own completions: members, hints, or solve_rate_gate"
    )

    added: ClassVar[frozenset[str]] = RewardedSpec.added | {
        "scale_floor",
        "smooth_advantages",
        "imitation",
    }

    @property
    def compares(self) -> bool:
        """Whether advantages come from rewards."""
        return self.preference is None

    @model_validator(mode="after")
    def _comparing(self) -> ComparedSpec:
        if not self.compares:
            for entry in ("scale_rewards", "scale_floor", "smooth_advantages", "imitation"):
                self._refuse(entry, "where advantages come from a model, not from rewards")
            return self
        if self.scale_rewards != "group":
            for entry in ("scale_floor", "smooth_advantages"):
                self._refuse(entry, f"with scale_rewards {self.scale_rewards}, only with group")
        if isinstance(self.imitation, MembersSpec) and (
            self.num_generations - self.imitation.count < 1
        ):
            raise ValueError(
                f"imitation.count is {self.imitation.count} of {self.num_generations} "
                "num_generations: at least one completion must be the policy's own"
            )
        if isinstance(self.imitation, SolveRateGateSpec):
            if getattr(self, "dynamic_sampling", False):
                raise ValueError(
                    "dynamic_sampling replaces the groups that imitation solve_rate_gate is for: "
                    "set one of them only"
                )
            if self.imitation.threshold >= self.num_generations:
                raise ValueError(
                    f"imitation.threshold is {self.imitation.threshold} of {self.num_generations} "
                    "num_generations: no prompt would ever be learnt from its own completions"
                )
        return self


class RatioSpec(PenalisedSpec):
    """Ratios of tokens are clipped."""

    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0, description="null: epsilon")
    delta: float | None = Field(None, gt=1, description="upper bound on the ratio (dual clip)")
    dynamic_clip: bool = Field(False, description="bounds by the token's probability (DCPO)")
    log_ratio_limit: float | None = Field(
        None, gt=0, description="log-ratios are clipped before they become ratios"
    )
    off_policy_mask_threshold: float | None = Field(
        None, gt=0, description="nats a token that a sequence of negative advantage may be behind"
    )

    added: ClassVar[frozenset[str]] = PenalisedSpec.added | {
        "dynamic_clip",
        "log_ratio_limit",
        "off_policy_mask_threshold",
    }

    @model_validator(mode="after")
    def _above(self) -> RatioSpec:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"delta is {self.delta}: it must be above 1 + epsilon_high, {1 + high}"
            )
        if self.uses == 1:
            for entry in ("dynamic_clip", "log_ratio_limit", "off_policy_mask_threshold"):
                self._refuse(entry, "where rollouts serve one update, with ratios of 1")
        return self


class ReinforceSpec(PenalisedSpec):
    """REINFORCE, with a baseline."""

    kind: Literal["reinforce"] = "reinforce"
    baseline: Literal["none", "batch", "leave_one_out"] = "leave_one_out"
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = "token-mean"

    @model_validator(mode="after")
    def _compared(self) -> ReinforceSpec:
        if self.preference is not None:
            self._refuse("baseline", "where advantages come from preference")
            return self
        if self.baseline == "leave_one_out" and self.num_generations < 2:
            raise ValueError(
                "num_generations is 1, but baseline leave_one_out compares the completions of a "
                "prompt: ask for 2 or more, or use baseline batch or none"
            )
        if self.baseline == "batch" and self.batch_size * self.steps_per_generation < 2:
            raise ValueError("batch_size is 1, but baseline batch compares completions of a batch")
        return self


class PpoSpec(RatioSpec):
    """PPO: clipped ratios, a value head, generalised advantage estimation."""

    kind: Literal["ppo"] = "ppo"
    num_generations: int = Field(1, ge=1, description="completions of each prompt")
    vf_coef: float = Field(0.1, gt=0)
    cliprange_value: float = Field(0.2, gt=0)
    discount: float = Field(1.0, gt=0, le=1)
    trace: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    soft_minimum: float | None = Field(
        None, gt=0, description="alpha: the value is the soft minimum of two heads (SAFE)"
    )

    added: ClassVar[frozenset[str]] = RatioSpec.added | {"soft_minimum", "delta", "epsilon_high"}


class GroupedSpec(PenalisedSpec, ComparedSpec):
    """Advantages relative to the other completions of the same prompt."""

    num_generations: int = Field(8, ge=2, description="completions of each prompt")
    dynamic_sampling: bool = Field(False, description="replace groups of equal rewards (DAPO)")

    added: ClassVar[frozenset[str]] = PenalisedSpec.added | ComparedSpec.added


class ClippedSpec(GroupedSpec, RatioSpec):
    """Ratios are clipped, and advantages relative."""

    added: ClassVar[frozenset[str]] = GroupedSpec.added | RatioSpec.added


class GrpoSpec(ClippedSpec):
    """GRPO: every sequence weighs the same."""

    kind: Literal["grpo"] = "grpo"


class DrGrpoSpec(ClippedSpec):
    """Dr. GRPO: no division by the group's deviation, nor by a sequence's own length."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    added: ClassVar[frozenset[str]] = ClippedSpec.added | {"delta"}
    scale_rewards: Literal["group", "batch", "none"] = "none"


class DapoSpec(ClippedSpec):
    """DAPO: every token weighs the same, clip-higher, dynamic sampling."""

    kind: Literal["dapo"] = "dapo"
    added: ClassVar[frozenset[str]] = ClippedSpec.added | {"delta"}
    epsilon_high: float | None = Field(0.28, gt=0)
    dynamic_sampling: bool = True
    mask_truncated_completions: bool = True


class GspoSpec(GroupedSpec):
    """GSPO: one ratio a sequence."""

    kind: Literal["gspo"] = "gspo"
    epsilon: float = Field(3e-4, gt=0)
    epsilon_high: float | None = Field(4e-4, gt=0, description="null: epsilon")


class CispoSpec(GroupedSpec):
    """CISPO: ratios capped from above as weights of the log-probability."""

    kind: Literal["cispo"] = "cispo"
    epsilon_low: float | None = Field(None, gt=0, description="absolute lower bound; null: none")
    epsilon_high: float = Field(5.0, gt=0, description="absolute upper bound on the ratio")


class PmdSpec(GroupedSpec):
    """Policy mirror descent: squared distance of log-ratio and advantage (Kimi's form)."""

    kind: Literal["pmd"] = "pmd"
    scale_rewards: Literal["group", "batch", "none"] = "none"
    tau: float = Field(0.1, gt=0, description="KL strength")


class DroSpec(GroupedSpec):
    """DRO: REINFORCE with a squared penalty on the log-ratio of every token."""

    kind: Literal["dro"] = "dro"
    kl_coef: float = Field(0.1, gt=0, description="of the squared log-ratio")


class LcoSpec(ComparedSpec):
    """LCO: match the optimal logits over the whole vocabulary."""

    kind: Literal["lco_kl", "lco_mse", "lco_log_cosh"] = "lco_kl"
    beta: float = Field(1.0, gt=0, description="KL strength of the optimal policy")
    log_probability_model: str | None = Field(
        None, description="advantages from the log-probabilities of this model"
    )
    sparse_advantages: bool | None = Field(
        None,
        description="advantages of sampled tokens from rewards; null: unless there are dense ones",
    )
    centre: Literal["none", "mean", "logprob"] = Field(
        "none", description="constant of the advantages; lco_kl does not depend on it"
    )

    @model_validator(mode="after")
    def _centred(self) -> LcoSpec:
        if self.centre == "logprob" and not self.dense:
            raise ValueError("centre logprob is for dense advantages: none or mean")
        return self

    @property
    def dense(self) -> bool:
        """Whether every token of the vocabulary has an advantage."""
        return self.preference is not None or self.log_probability_model is not None

    @property
    def sparse(self) -> bool:
        """Whether the sampled token has an advantage of its own."""
        return not self.dense if self.sparse_advantages is None else self.sparse_advantages

    @property
    def compares(self) -> bool:
        return self.sparse

    @model_validator(mode="after")
    def _fitting(self) -> LcoSpec:
        if not self.sparse:
            for entry in ("advantage_filter", "curvature_mask"):
                self._refuse(entry, "where every token of the vocabulary has an advantage")
        if self.kind != "lco_kl" or self.dense:
            self._refuse("curvature_mask", "but for lco_kl with advantages of sampled tokens alone")
        if isinstance(self.imitation, HintsSpec) and self.imitation.coefficient:
            raise ValueError(
                "imitation.coefficient is of a likelihood that LCO has not: set it to 0"
            )
        if isinstance(self.imitation, MembersSpec) and (
            self.imitation.shaping is not None or self.imitation.entropy_weights
        ):
            raise ValueError(
                "imitation.shaping and entropy_weights are of policy gradients. LCO moves the "
                "logits of a demonstration by its advantage: set shaping: null"
            )
        return self

    @model_validator(mode="after")
    def _one_advantage(self) -> LcoSpec:
        if self.preference is not None and self.log_probability_model is not None:
            raise ValueError("name either preference or log_probability_model, not both")
        if not (self.sparse or self.dense):
            raise ValueError(
                "sparse_advantages is false, and there are no others: name preference or "
                "log_probability_model"
            )
        if self.sparse and self.num_generations < 2:
            raise ValueError("num_generations is 1: advantages need a group of 2 or more")
        return self


class GkdSpec(OnPolicySpec):
    """GKD: a divergence to a teacher at every token."""

    kind: Literal["gkd"] = "gkd"
    teacher_model_name_or_path: str
    num_generations: int = Field(1, ge=1)
    beta: float = Field(0.5, ge=0, le=1, description="0: forward KL, 1: reverse KL")
    lmbda: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of batches that the policy writes itself",
    )
    temperature: float = Field(0.9, gt=0)


class MinillmSpec(OnPolicySpec):
    """MiniLLM: reverse KL by policy gradient, its single step over the whole vocabulary."""

    kind: Literal["minillm"] = "minillm"
    teacher_model_name_or_path: str
    num_generations: int = Field(1, ge=1)
    teacher_mixed_alpha: float = Field(0.2, ge=0, lt=1, description="teacher's share in sampling")
    length_normalization: bool = True
    epsilon: float = Field(0.2, gt=0)
