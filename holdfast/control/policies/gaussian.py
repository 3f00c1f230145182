"""A policy that chooses a whole chunk of actions from one Gaussian."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.policies.interface import (
    Decision,
    Policy,
    check_sizes,
    draw_normal,
    normalizer_of,
)
from holdfast.control.policies.networks import MLP, Activation
from holdfast.control.policies.normalization import Normalizer


class GaussianHead(nn.Module):
    """A diagonal Gaussian over chunks, whose mean a network predicts.

    Parameters
    ----------
    inputs : int
        Size of what the network sees.
    horizon, action_size : int
        Shape of a chunk.
    hidden, activation :
        Of the network (see :class:`~holdfast.control.policies.networks.MLP`).
    bounded : bool
        Whether a tanh keeps the mean in (-1, 1).
    std : float
        Standard deviation of every action dimension, at first.
    learn_std : bool
        Whether it is learnt: one number per action dimension, the same in every state and at every
        position of the chunk.
    std_range : tuple of float
        Where a learnt deviation stays, ``(low, high)``. Its logarithm is a sigmoid between theirs,
        so it has a gradient everywhere; a clamp would hold on to what once left the range.
    last_gain : float
        Of the network's last layer.
    generator : torch.Generator
        Draws the weights.

    Raises
    ------
    ValueError
        For a deviation that is not positive, or, if it is learnt, not inside its range.
    """

    def __init__(
        self,
        inputs: int,
        horizon: int,
        action_size: int,
        *,
        hidden: Sequence[int],
        activation: Activation,
        bounded: bool,
        std: float,
        learn_std: bool,
        std_range: tuple[float, float],
        last_gain: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"std is {std}: it must be positive and finite")
        low, high = std_range
        if learn_std and not 0 < low < std < high < math.inf:
            raise ValueError(
                f"std is {std} and std_range {std_range}: it must be 0 < low < std < high"
            )
        self.shape = (horizon, action_size)
        self.bounded = bounded
        self.network = MLP(
            inputs,
            horizon * action_size,
            hidden,
            activation=activation,
            last_gain=last_gain,
            generator=generator,
        )
        self.log_bounds = (math.log(low), math.log(high)) if learn_std else None
        if self.log_bounds is None:
            start = math.log(std)
        else:
            share = math.log(std / low) / math.log(high / low)
            start = math.log(share / (1 - share))
        self.raw_std = nn.Parameter(torch.full((action_size,), start), requires_grad=learn_std)

    def log_std(self) -> Tensor:
        """``(action_size,)``: logarithm of the standard deviation."""
        if self.log_bounds is None:
            return self.raw_std
        low, high = self.log_bounds
        return low + (high - low) * torch.sigmoid(self.raw_std)

    def mean(self, features: Tensor) -> Tensor:
        """``(batch, horizon, action_size)``."""
        mean = self.network(features).unflatten(-1, self.shape)
        return mean.tanh() if self.bounded else mean

    def position_log_probs(self, features: Tensor, chunks: Tensor) -> Tensor:
        """``(batch, horizon)``: of the actions at each position, summed over their dimensions."""
        return normal_log_probs(chunks, self.mean(features), self.log_std()).sum(-1)

    def sample(
        self, features: Tensor, generator: torch.Generator, *, deterministic: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A chunk ``(batch, horizon, action_size)``, and its record: ``log_probs (batch,)``."""
        mean = self.mean(features)
        if deterministic:
            return mean, {}
        log_std = self.log_std()
        chunks = mean + log_std.exp() * draw_normal(tuple(mean.shape), generator, mean)
        # Summed as in `position_log_probs`, so that a ratio of the two is exactly 1.
        return chunks, {"log_probs": normal_log_probs(chunks, mean, log_std).sum(-1).sum(-1)}


class GaussianPolicy(Policy):
    """A Gaussian over chunks of normalised actions, with a mean that depends on the observation.

    :attr:`Decision.record` holds ``chunk (batch, horizon, action_size)``, the normalised actions,
    and ``log_probs (batch,)``.

    Parameters
    ----------
    observation_size, action_size : int
        Numbers in an observation and in an action.
    horizon : int
        Actions in a chunk, at least 1.
    history : int
        Observations that the policy sees, at least 1.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        ``mish``, ``relu`` or ``tanh``.
    bounded : bool
        Whether a tanh keeps the mean within the range of the demonstrations.
    std : float
        Standard deviation, in normalised units.
    learn_std : bool
        Whether it is learnt, one number per action dimension.
    std_range : tuple of float
        The range of a learnt deviation, around ``std``.
    observations, actions : Normalizer, optional
        Fitted on demonstrations; by default they change nothing.
    seed : int
        Of the initial weights.

    Raises
    ------
    ValueError
        For a size or deviation out of range.
    """

    kind = "gaussian"

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        horizon: int = 1,
        history: int = 1,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "mish",
        bounded: bool = True,
        std: float = 0.1,
        learn_std: bool = False,
        std_range: tuple[float, float] = (0.01, 0.2),
        observations: Normalizer | None = None,
        actions: Normalizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(
            observation_size=observation_size,
            action_size=action_size,
            horizon=horizon,
            history=history,
        )
        self.observation_size, self.action_size = observation_size, action_size
        self.horizon, self.history = horizon, history
        self._options = {
            "hidden": list(hidden),
            "activation": activation,
            "bounded": bounded,
            "std": std,
            "learn_std": learn_std,
            "std_range": list(std_range),
        }
        self.observations = normalizer_of("observations", observations, observation_size)
        self.actions = normalizer_of("actions", actions, action_size)
        self.head = GaussianHead(
            history * observation_size,
            horizon,
            action_size,
            hidden=hidden,
            activation=activation,
            bounded=bounded,
            std=std,
            learn_std=learn_std,
            std_range=std_range,
            # Small, so that the first chunks are near the middle of the range in every state.
            last_gain=0.01,
            generator=torch.Generator().manual_seed(seed),
        )

    @torch.no_grad()
    def act(
        self, observations: Tensor, generator: torch.Generator, *, deterministic: bool = False
    ) -> Decision:
        """Sample a chunk, or take the mean where ``deterministic``."""
        chunk, record = self.head.sample(
            self.features(observations), generator, deterministic=deterministic
        )
        return Decision(
            self.actions.denormalize(chunk), {"chunk": chunk, **record} if record else {}
        )

    def log_probs(self, observations: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """``(batch,)``: see :meth:`Policy.log_probs`."""
        self.check_chunks("record['chunk']", record["chunk"])
        return self.head.position_log_probs(self.features(observations), record["chunk"]).sum(-1)

    def mean(self, observations: Tensor) -> Tensor:
        """``(batch, horizon, action_size)``: the mean chunk, in normalised units."""
        return self.head.mean(self.features(observations))

    def position_log_probs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-probability density of given actions, position by position, for cloning.

        Parameters
        ----------
        observations : Tensor
            ``(batch, history, observation_size)``, in the environment's units.
        actions : Tensor
            ``(batch, horizon, action_size)``, in the environment's units.

        Returns
        -------
        Tensor
            ``(batch, horizon)``, in nats, of the normalised actions. Differentiable.
        """
        self.check_chunks("actions", actions)
        return self.head.position_log_probs(
            self.features(observations), self.actions.normalize(actions)
        )

    def config(self) -> dict[str, Any]:
        """See :meth:`Policy.config`."""
        return {
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "horizon": self.horizon,
            "history": self.history,
            **self._options,
        }


def normal_log_probs(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, number by number, in nats. Shapes broadcast."""
    deviation = (values - mean) * torch.exp(-log_std)
    return -0.5 * (deviation.square() + math.log(2.0 * math.pi)) - log_std
