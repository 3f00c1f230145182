"""Values of states, and of chunks of actions in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.control.policies.interface import (
    check_sizes,
    normalizer_of,
    observation_features,
)
from holdfast.control.policies.networks import MLP, Activation
from holdfast.control.policies.normalization import Normalizer


class Critic(nn.Module):
    """The value of a state.

    Parameters
    ----------
    observation_size : int
        Numbers in an observation.
    history : int
        Observations it sees.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        ``mish``, ``relu`` or ``tanh``.
    observations : Normalizer, optional
        As of the policy; a copy is kept. By default it changes nothing.
    seed : int
        Of the initial weights.

    Raises
    ------
    ValueError
        For a size out of range.
    """

    def __init__(
        self,
        observation_size: int,
        history: int = 1,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        activation: Activation = "mish",
        observations: Normalizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(observation_size=observation_size, history=history)
        self.shape = (history, observation_size)
        self.structure = {"hidden": list(hidden), "activation": activation}
        self.observations = normalizer_of("observations", observations, observation_size)
        self.network = MLP(
            history * observation_size,
            1,
            hidden,
            activation=activation,
            last_gain=1.0,
            generator=torch.Generator().manual_seed(seed),
        )

    def forward(self, observations: Tensor) -> Tensor:
        """Values ``(batch,)`` of observations ``(batch, history, observation_size)``, raw units."""
        _check("observations", observations, self.shape)
        return self.network(observation_features(self.observations, observations)).squeeze(-1)


class TwinQ(nn.Module):
    """Two independent values of a chunk of actions, of which the smaller is the safer estimate.

    Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods", section 4.2.

    Parameters
    ----------
    observation_size, action_size : int
        Numbers in an observation and in an action.
    horizon, history : int
        Actions in a chunk, and observations it sees.
    hidden : sequence of int
        Sizes of the hidden layers of each.
    activation : str
        ``mish``, ``relu`` or ``tanh``.
    observations, actions : Normalizer, optional
        As of the policy; copies are kept. By default they change nothing.
    seed : int
        Of the initial weights, which differ between the two.

    Raises
    ------
    ValueError
        For a size out of range.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        horizon: int = 1,
        history: int = 1,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "mish",
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
        self.observation_shape = (history, observation_size)
        self.chunk_shape = (horizon, action_size)
        self.observations = normalizer_of("observations", observations, observation_size)
        self.actions = normalizer_of("actions", actions, action_size)
        self.structure = {"hidden": list(hidden), "activation": activation}
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleList(
            MLP(
                history * observation_size + horizon * action_size,
                1,
                hidden,
                activation=activation,
                last_gain=1.0,
                generator=generator,
            )
            for _ in range(2)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Both values.

        Parameters
        ----------
        observations : Tensor
            ``(batch, history, observation_size)``, in the environment's units.
        actions : Tensor
            ``(batch, horizon, action_size)``, in the environment's units. Differentiable.

        Returns
        -------
        Tensor
            ``(2, batch)``.
        """
        _check("observations", observations, self.observation_shape)
        _check("actions", actions, self.chunk_shape)
        features = observation_features(self.observations, observations)
        inputs = torch.cat([features, self.actions.normalize(actions).flatten(1)], dim=-1)
        return torch.stack([network(inputs).squeeze(-1) for network in self.networks])


def _check(name: str, values: Tensor, shape: tuple[int, int]) -> None:
    if values.ndim != 3 or values.shape[1:] != shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: it must be (batch, {shape[0]}, {shape[1]})"
        )
