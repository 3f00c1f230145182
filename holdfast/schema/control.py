"""Control: policies, environments, demonstrations and their imitation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from holdfast.schema.base import Spec
from holdfast.schema.objectives import TrainedSpec

Hidden = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Activation = Literal["mish", "relu", "tanh"]


class CriticSpec(Spec):
    """The value function that reinforcement learning trains beside the policy."""

    hidden: Hidden = (256, 256, 256)
    activation: Activation = "mish"


class ControlSpec(Spec):
    """What every control policy has."""

    critic: CriticSpec = CriticSpec()


class ChunkSpec(ControlSpec):
    """A policy that is made anew; its normalisation is fitted on the demonstrations."""

    horizon: int = Field(1, ge=1, description="actions in a chunk")
    history: int = Field(1, ge=1, description="observations that the policy sees")
    hidden: Hidden = (256, 256, 256)
    activation: Activation = "mish"


class GaussianSpec(ChunkSpec):
    """A Gaussian over chunks of actions."""

    kind: Literal["gaussian"] = "gaussian"
    std: float = Field(0.1, gt=0, description="standard deviation, in normalised units")
    learn_std: bool = False
    std_range: tuple[float, float] = (0.01, 0.2)
    bounded: bool = Field(True, description="a tanh keeps the mean in the demonstrations' range")


class DiffusionSpec(ChunkSpec):
    """A diffusion policy over chunks of actions."""

    kind: Literal["diffusion"] = "diffusion"
    steps: int = Field(20, ge=1, description="denoising steps")
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    sampling_steps: int | None = Field(None, ge=1, description="null: all")
    fine_tuned_steps: int = Field(10, ge=1, description="the last ones, which dppo trains")
    min_sampling_std: float = Field(0.1, ge=0)
    min_log_prob_std: float = Field(0.1, gt=0)
    average_decay: float | None = Field(0.995, gt=0, lt=1)

    @property
    def sampled(self) -> int:
        """Denoising steps in sampling."""
        return self.steps if self.sampling_steps is None else self.sampling_steps


class SavedSpec(ControlSpec):
    """A policy that an earlier run wrote, with its normalisation."""

    kind: Literal["saved"] = "saved"
    model_name_or_path: str = Field(description="a run's model folder")


class ResidualSpec(ControlSpec):
    """A Gaussian correction on top of another policy: a network of its own for each gradient."""

    kind: Literal["residual"] = "residual"
    base: Annotated[GaussianSpec | DiffusionSpec | SavedSpec, Field(discriminator="kind")]
    hidden: Hidden = (256, 256)
    activation: Activation = "relu"
    scale: float = Field(0.1, gt=0)
    std: float = Field(0.37, gt=0)
    learn_std: bool = False
    std_range: tuple[float, float] = (0.05, 1.0)


class EnvironmentSpec(Spec):
    """Where a policy acts."""

    name: str = Field(
        description="holdfast/point-mass, metaworld/<task>, robosuite/<task>, furniture/<task>, or "
        "a Gymnasium id"
    )
    count: int = Field(16, ge=1, description="environments stepped together")
    time_limit: int | None = Field(None, ge=1, description="null: the task's own")
    sparse: bool = Field(False, description="reward 1 at success, where the episode ends; else 0")
    keywords: dict[str, Any] = {}


class DemonstrationSpec(Spec):
    """Demonstrations, and which episodes are kept from training."""

    path: str = Field(description=".npz, .hdf5, or a Minari or LeRobot folder")
    held_out: int = Field(0, ge=0, description="episodes for evaluation, never trained on")
    probe: int = Field(0, ge=0, description="episodes on which a schedule's gap is evaluated")
    max_episodes: int | None = Field(None, ge=1, description="use only the first of the file")
    observation_keys: tuple[str, ...] | None = Field(
        None, description="parts of observations, where the file names parts"
    )
    allow_cut: bool = Field(False, description="accept episodes that were cut short")


class CloningSpec(TrainedSpec):
    """Imitation of demonstrations."""

    kind: Literal["cloning"] = "cloning"
    data: DemonstrationSpec
    batch_size: int = Field(256, ge=1, description="chunks an optimiser step takes")
    loss: Literal["nll", "mse", "denoising"] | None = Field(
        None, description="null: denoising for a diffusion policy, mse for a Gaussian one"
    )

    @property
    def has_held_out(self) -> bool:
        return self.data.held_out > 0

    @property
    def has_probe(self) -> bool:
        return self.data.probe > 0
