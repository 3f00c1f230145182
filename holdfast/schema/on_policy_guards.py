"""Guards of objectives on the policy's own completions, and the data's completions among them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from holdfast.schema.base import Spec


class FixedKlSpec(Spec):
    """A coefficient that stays as it is."""

    kind: Literal["fixed"] = "fixed"
    coefficient: float = Field(gt=0)


class AdaptiveKlSpec(Spec):
    """A coefficient that rises above a target and falls below it."""

    kind: Literal["adaptive"] = "adaptive"
    coefficient: float = Field(0.05, gt=0, description="where it starts")
    target: float = Field(gt=0, description="nats a token")
    gain: float = Field(0.1, gt=0)


class SafeKlSpec(Spec):
    """No penalty below a threshold that follows entropy and reward (SAFE)."""

    kind: Literal["safe"] = "safe"
    base: float = Field(0.3, gt=0, description="threshold in nats a token")
    lowest: float = Field(0.1, gt=0)
    highest: float = Field(0.6, gt=0)
    strength: float = Field(0.1, gt=0, description="of the squared excess")
    smoothing: float = Field(0.9, ge=0, lt=1, description="of the KL")
    reward_smoothing: float = Field(0.95, ge=0, lt=1)
    warmup: int = Field(50, ge=0, description="steps of the first phase")
    window: int = Field(50, ge=2, description="steps whose rewards are compared")
    converged_reward: float = 0.7
    converged_deviation: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> SafeKlSpec:
        if not self.lowest <= self.base <= self.highest:
            raise ValueError(
                f"base is {self.base}: it must lie between lowest {self.lowest} and highest "
                f"{self.highest}"
            )
        return self


KlControl = Annotated[FixedKlSpec | AdaptiveKlSpec | SafeKlSpec, Field(discriminator="kind")]


class CurvatureSpec(Spec):
    """Tokens that would move objective or policy too far do not learn (CAPO)."""

    objective_limit: float = Field(1e-2, gt=0, description="of the predicted change of A r")
    policy_limit: float = Field(1e-4, gt=0, description="of the predicted KL, in nats")
    objective_floor: float | None = Field(None, description="smallest predicted improvement")
    learning_rate: float | None = Field(None, gt=0, description="null: training.learning_rate")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="whose step is modelled")
    random: bool = Field(False, description="mask as many tokens, but others: a study's control")

    @model_validator(mode="after")
    def _below(self) -> CurvatureSpec:
        if self.objective_floor is not None and self.objective_floor >= self.objective_limit:
            raise ValueError(
                f"objective_floor is {self.objective_floor}: it must be below objective_limit "
                f"{self.objective_limit}"
            )
        return self


class ClipCovSpec(Spec):
    """Some tokens of high covariance of advantage and log-probability do not learn."""

    kind: Literal["clip"] = "clip"
    share: float = Field(2e-4, gt=0, le=1, description="of all tokens")
    lowest: float = 1.0
    highest: float = 5.0

    @model_validator(mode="after")
    def _ordered(self) -> ClipCovSpec:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest is {self.lowest}: it must be below highest {self.highest}")
        return self


class KlCovSpec(Spec):
    """The tokens of highest covariance are held near the policy that sampled."""

    kind: Literal["kl"] = "kl"
    share: float = Field(2e-4, gt=0, le=1, description="of all tokens")
    coefficient: float = Field(1.0, gt=0, description="of |log r|")


Covariance = Annotated[ClipCovSpec | KlCovSpec, Field(discriminator="kind")]


class MembersSpec(Spec):
    """Demonstrations are members of their prompts' groups (LUFFY, SRFT)."""

    kind: Literal["members"] = "members"
    count: int = Field(1, ge=1, description="of num_generations")
    shaping: float | None = Field(0.1, gt=0, description="gamma of pi / (pi + gamma); null: log pi")
    entropy_weights: bool = Field(False, description="weigh by entropy, and imitate too (SRFT)")


class HintsSpec(Spec):
    """Completions go on from beginnings of demonstrations, ever shorter ones (UFT)."""

    kind: Literal["hints"] = "hints"
    segments: int = Field(5, ge=1, description="that a demonstration is cut into")
    start: float = Field(0.95, ge=0, le=1, description="probability of a segment at first")
    end: float = Field(0.05, ge=0, le=1, description="and in the end, along a cosine")
    steps: int = Field(300, ge=1, description="after them there are no hints")
    coefficient: float = Field(0.001, ge=0, description="of the likelihood of hints")


class SolveRateGateSpec(Spec):
    """Prompts that are solved too rarely are learnt from demonstrations (HPT, DyME, ReLIFT)."""

    kind: Literal["solve_rate_gate"] = "solve_rate_gate"
    action: Literal["imitate", "replace", "buffer"] = "imitate"
    threshold: int = Field(
        0, ge=0, description="the most completions that solve an unsolved prompt"
    )
    coefficient: float = Field(1.0, gt=0, description="of a demonstration's log-likelihood")
    solved_above: float = Field(0.0, description="reward of a completion that solves its prompt")


ImitationSpec = Annotated[MembersSpec | HintsSpec | SolveRateGateSpec, Field(discriminator="kind")]
