"""What every control policy is to those who act with it and train it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.control.policies import files
from holdfast.control.policies.normalization import Normalizer

OBSERVATION_LIMIT = 5.0
"""Networks see normalised observations clipped to this many half-ranges of the demonstrations, so
that a dimension that hardly moved in them cannot swamp the others once it does."""


@dataclass(frozen=True)
class Decision:
    """What a policy does in a batch of states.

    Attributes
    ----------
    actions : Tensor
        ``(batch, horizon, action_size)``, in the environment's units. Not clipped to its bounds.
    record : mapping of str to Tensor
        ``(batch, ...)`` each: what :meth:`Policy.log_probs` needs to score this decision again, and
        its ``log_probs`` now. Empty for a deterministic decision, which nothing learns from.
    """

    actions: Tensor
    record: Mapping[str, Tensor]


class Policy(nn.Module, ABC):
    """Chooses chunks of actions from the latest observations.

    Attributes
    ----------
    observation_size, action_size : int
        Numbers in an observation and in an action.
    horizon : int
        Actions in a chunk, which are carried out one after the other.
    history : int
        Observations that the policy sees, the newest last.
    observations, actions : Normalizer
        From the environment's units to those of the networks. Fitted on demonstrations, part of the
        state, never fitted again.
    """

    kinds: ClassVar[dict[str, type[Policy]]] = {}
    """Every kind of policy, by its name."""

    kind: ClassVar[str]
    """The name of this kind, in a saved policy's description."""

    observation_size: int
    action_size: int
    horizon: int
    history: int
    observations: Normalizer
    actions: Normalizer

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            Policy.kinds[cls.kind] = cls

    @abstractmethod
    def act(
        self, observations: Tensor, generator: torch.Generator, *, deterministic: bool = False
    ) -> Decision:
        """Choose chunks. Takes no gradient.

        Parameters
        ----------
        observations : Tensor
            ``(batch, history, observation_size)``, in the environment's units.
        generator : torch.Generator
            The only source of randomness.
        deterministic : bool
            Act as in evaluation, without the noise that is there for exploration.
        """

    @abstractmethod
    def log_probs(self, observations: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of recorded decisions under the present parameters, differentiable.

        Parameters
        ----------
        observations : Tensor
            ``(batch, history, observation_size)``: those that were acted on.
        record : mapping of str to Tensor
            The rows of :attr:`Decision.record` that belong to them.

        Returns
        -------
        Tensor
            Of the shape of ``record["log_probs"]``, in nats: **summed** over the chunk's positions
            and action dimensions. (Ren et al.'s code for DPPO takes their mean, so a log-ratio
            there is ``horizon * action_size`` times smaller.)
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Arguments of :meth:`from_config` as JSON values; weights and bounds are in the state."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Policy:
        """A policy of the structure that :meth:`config` described, to load a state into."""
        return cls(**config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy, for :func:`~holdfast.control.policies.load_policy` to read.

        Parameters
        ----------
        folder : str or Path
            Created if it is not there; a policy that lies in it is replaced.

        Raises
        ------
        ModelError
            If it cannot be written.
        """
        files.write(Path(folder), self.kind, self.config(), self.state_dict())

    @property
    def cloned(self) -> Policy:
        """The policy that imitation trains: this one, unless it stands on another."""
        return self

    def check_observations(self, observations: Tensor) -> None:
        """Raise ``ValueError`` unless ``(batch, history, observation_size)``."""
        expected = (self.history, self.observation_size)
        if observations.ndim != 3 or observations.shape[1:] != expected:
            raise ValueError(
                f"observations has shape {tuple(observations.shape)}: it must be (batch, history, "
                f"observation_size), here (batch, {self.history}, {self.observation_size})"
            )

    def check_chunks(self, name: str, chunks: Tensor) -> None:
        """Raise ``ValueError`` unless ``(batch, horizon, action_size)``."""
        expected = (self.horizon, self.action_size)
        if chunks.ndim != 3 or chunks.shape[1:] != expected:
            raise ValueError(
                f"{name} has shape {tuple(chunks.shape)}: it must be (batch, horizon, "
                f"action_size), here (batch, {self.horizon}, {self.action_size})"
            )

    def features(self, observations: Tensor) -> Tensor:
        """``(batch, history * observation_size)``: what the networks see of the observations."""
        self.check_observations(observations)
        return observation_features(self.observations, observations)


def observation_features(normalizer: Normalizer, observations: Tensor) -> Tensor:
    """Normalised, clipped to :data:`OBSERVATION_LIMIT` and flattened: ``(batch, history * size)``.

    Nothing is clipped where nothing was fitted: raw units say nothing of what is far out.

    Parameters
    ----------
    normalizer : Normalizer
        Of one observation.
    observations : Tensor
        ``(batch, history, size)``, in raw units.
    """
    if normalizer.changes_nothing:
        return observations.flatten(1)
    return (
        normalizer.normalize(observations).clamp(-OBSERVATION_LIMIT, OBSERVATION_LIMIT).flatten(1)
    )


def check_sizes(**sizes: int) -> None:
    """Raise ``ValueError``, naming the argument, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")


def normalizer_of(name: str, given: Normalizer | None, size: int) -> Normalizer:
    """A copy of the given normaliser, checked; by default one that changes nothing."""
    if given is None:
        return Normalizer.identity(size)
    if given.size != size:
        raise ValueError(f"{name} normalises {given.size} dimensions: it must have {size}")
    return copy.deepcopy(given)  # two owners must not load into one another


def draw_normal(
    shape: tuple[int, ...], generator: torch.Generator, like: Tensor, limit: float | None = None
) -> Tensor:
    """Standard normal numbers on the device and in the dtype of ``like``, clipped to ``±limit``."""
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    if limit is not None:
        noise = noise.clamp(-limit, limit)
    return noise.to(like.device)
