"""Control: reinforcement learning in an environment."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from holdfast.schema.base import Spec
from holdfast.schema.control import DemonstrationSpec, EnvironmentSpec
from holdfast.schema.objectives import TrainedSpec

CloneLoss = Literal["nll", "mse", "denoising"]


class ControlRlSpec(TrainedSpec):
    """What all reinforcement learning has."""

    held_out_entry: ClassVar[str] = "episodes"
    probe_entry: ClassVar[str] = "probe_episodes"

    kind: str
    environment: EnvironmentSpec
    steps: int = Field(128, ge=1, description="chunks collected at a time in each environment")
    batch_size: int = Field(1024, ge=1, description="rows an optimiser step takes")
    discount: float = Field(0.99, ge=0, le=1, description="per chunk")
    critic_warmup: int = Field(2, ge=0, description="times of collecting for the critics alone")
    episodes: int = Field(50, ge=0, description="of an evaluation, on fixed seeds")
    probe_episodes: int = Field(0, ge=0, description="of a schedule's gap")
    films: int = Field(
        3, ge=0, description="episodes of the evaluation that the report shows in pictures"
    )
    score: Literal["success", "return"] | None = Field(
        None, description="what is evaluated; null: success where rewards are sparse"
    )

    @property
    def has_held_out(self) -> bool:
        return self.episodes > 0

    @property
    def has_probe(self) -> bool:
        return self.probe_episodes > 0


# On rollouts --------------------------------------------------------------------------------------


class RolloutSpec(ControlRlSpec):
    """Objectives on what the policy of now did."""

    epochs: int = Field(8, ge=1, description="passes over a batch of rollouts")
    trace: float = Field(0.95, ge=0, le=1)
    vf_coef: float = Field(0.5, gt=0)
    normalize_advantages: bool = True
    normalize_values: bool = True
    scale_rewards: bool = False


class RegularisationSpec(Spec):
    """A cloning term in every update, beside the reinforcement loss."""

    weight: float = Field(gt=0)
    of: Literal["demonstrations", "teacher"] = Field(
        "demonstrations",
        description="of the objective's data, or what the policy would have done at first where "
        "it is now",
    )
    loss: CloneLoss | None = Field(
        None, description="null: denoising for a diffusion policy, mse for a Gaussian one"
    )


class ClippedControlSpec(RolloutSpec):
    """PPO and what follows from it."""

    epsilon: float = Field(0.2, gt=0, description="how far the ratio may leave 1")
    value_clip: float | None = Field(None, gt=0)
    target_kl: float | None = Field(None, gt=0)
    cloning: RegularisationSpec | None = None
    data: DemonstrationSpec | None = Field(None, description="what cloning is of")

    @model_validator(mode="after")
    def _cloned(self) -> ClippedControlSpec:
        wanted = self.cloning is not None and self.cloning.of == "demonstrations"
        if wanted != (self.data is not None):
            raise ValueError(
                "data is missing, and cloning.of demonstrations needs it"
                if wanted
                else "data is only used with cloning.of demonstrations: leave it out, or ask for it"
            )
        return self


class ControlPpoSpec(ClippedControlSpec):
    """PPO on chunks of actions of a Gaussian policy, or of the residual of a residual one."""

    kind: Literal["control_ppo"] = "control_ppo"


class DppoSpec(ClippedControlSpec):
    """DPPO: PPO on the last denoising steps of a diffusion policy."""

    kind: Literal["dppo"] = "dppo"
    epsilon: float = Field(0.01, gt=0, description="at the last denoising step")
    epsilon_base: float = Field(0.001, gt=0, description="at the noisiest")
    rate: float = Field(3.0, gt=0, description="how steeply the one becomes the other")
    denoising_discount: float = Field(0.99, ge=0, le=1)
    log_ratio: Literal["mean", "sum"] = Field(
        "mean", description="over the numbers of a chunk; the default epsilons are for the mean"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DppoSpec:
        if self.epsilon_base > self.epsilon:
            raise ValueError(
                f"epsilon_base is {self.epsilon_base}: it must not be above epsilon, {self.epsilon}"
            )
        return self


class AwrSpec(RolloutSpec):
    """Advantage-weighted regression: cloning of what went better than expected."""

    kind: Literal["awr"] = "awr"
    temperature: float = Field(0.1, gt=0, description="small: only the best is cloned")
    cap: float = Field(100.0, gt=0, description="the largest weight")
    loss: CloneLoss | None = Field(
        None, description="null: denoising for a diffusion policy, mse for a Gaussian one"
    )


# On a replay buffer -------------------------------------------------------------------------------


class ReplaySpec(ControlRlSpec):
    """Objectives on all that was done, and on demonstrations."""

    steps: int = Field(16, ge=1, description="chunks collected at a time in each environment")
    batch_size: int = Field(256, ge=1, description="rows an optimiser step takes")
    updates: int = Field(64, ge=1, description="optimiser steps before more is collected")
    capacity: int = Field(1_000_000, ge=1, description="chunks that are remembered")
    folder: str | None = Field(None, description="for the buffer's temporary files; null: system's")
    data: DemonstrationSpec | None = Field(None, description="of which batches have a share")
    demonstration_share: float = Field(0.5, gt=0, lt=1, description="of a batch, with data")
    reward_scale: float = Field(1.0, gt=0)
    target_rate: float = Field(0.005, gt=0, le=1, description="at which target critics follow")
    loss: CloneLoss | None = Field(
        None, description="null: denoising for a diffusion policy, mse for a Gaussian one"
    )

    @model_validator(mode="after")
    def _room(self) -> ReplaySpec:
        collected = self.steps * self.environment.count
        if self.capacity < collected:
            raise ValueError(
                f"capacity is {self.capacity}, less than the {collected} chunks that are collected "
                f"at a time (steps {self.steps} times environment.count {self.environment.count})"
            )
        return self


class IdqlSpec(ReplaySpec):
    """IDQL: critics of what was done, a clone of all of it, and a choice when it acts."""

    kind: Literal["idql"] = "idql"
    tau: float = Field(0.8, gt=0, lt=1, description="which expectile of Q the value is")
    candidates: int = Field(16, ge=1, description="chunks that are chosen among")
    choice_tau: float = Field(
        0.7, gt=0, lt=1, description="weight of candidates above the value, while training"
    )


class AwcSpec(ReplaySpec):
    """Advantage-weighted cloning: of all that was done, the more the critics make of it."""

    kind: Literal["awc"] = "awc"
    tau: float = Field(0.7, gt=0, lt=1, description="which expectile of Q the value is")
    temperature: float = Field(0.1, gt=0, description="of Q less the value; small: only the best")
    cap: float = Field(100.0, gt=0, description="the largest weight")


class DipoSpec(ReplaySpec):
    """DIPO: actions in the buffer are moved up the critic, and cloned."""

    kind: Literal["dipo"] = "dipo"
    action_steps: int = Field(10, ge=1, description="steps of Adam on the actions of a batch")
    action_rate: float = Field(1e-4, gt=0, description="their learning rate, normalised units")
