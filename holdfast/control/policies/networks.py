"""Multilayer perceptrons and the embedding of a denoising step.

Initial weights come from a generator that the caller passes, never from torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

Activation = Literal["mish", "relu", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"mish": nn.Mish, "relu": nn.ReLU, "tanh": nn.Tanh}


class MLP(nn.Sequential):
    """A multilayer perceptron with orthogonal weights and zero biases.

    Parameters
    ----------
    inputs, outputs : int
        Sizes of the ends.
    hidden : sequence of int
        Sizes between, at least one.
    activation : str
        ``mish``, ``relu`` or ``tanh``, after every layer but the last.
    last_gain : float
        Gain of the last layer's weights. 0: the network starts as the constant 0.
    generator : torch.Generator
        Draws the weights, on the CPU.

    Raises
    ------
    ValueError
        For a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int],
        *,
        activation: Activation,
        last_gain: float,
        generator: torch.Generator,
    ) -> None:
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden is {tuple(hidden)}: it must be one or more positive sizes")
        if activation not in _ACTIVATIONS:
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation is {activation!r}: it must be one of {known}")
        gain = nn.init.calculate_gain("tanh" if activation == "tanh" else "relu")
        sizes = [inputs, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [_linear(before, after, gain, generator), _ACTIVATIONS[activation]()]
        layers.append(_linear(sizes[-1], outputs, last_gain, generator))
        super().__init__(*layers)


class NoiseNetwork(nn.Module):
    """Predicts the noise in a chunk from the chunk, the denoising step and the observation.

    Parameters
    ----------
    features : int
        Size of the observation features.
    chunk : int
        Size of a flattened chunk.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        As of :class:`MLP`.
    time_size : int
        Size of the embedding of the denoising step. Even.
    generator : torch.Generator
        Draws the weights, on the CPU.
    """

    def __init__(
        self,
        features: int,
        chunk: int,
        hidden: Sequence[int],
        *,
        activation: Activation,
        time_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if time_size < 2 or time_size % 2:
            raise ValueError(f"time_size is {time_size}: it must be positive and even")
        self.time_size = time_size
        self.time = MLP(
            time_size,
            time_size,
            (2 * time_size,),
            activation=activation,
            last_gain=1.0,
            generator=generator,
        )
        # A small last layer: the first loss is that of predicting no noise.
        self.body = MLP(
            features + chunk + time_size,
            chunk,
            hidden,
            activation=activation,
            last_gain=0.01,
            generator=generator,
        )

    def forward(self, features: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise in ``noisy (rows, chunk)`` at integer ``timesteps (rows,)``, of its shape."""
        time = self.time(sinusoidal(timesteps, self.time_size).to(noisy.dtype))
        return self.body(torch.cat([noisy, time, features], dim=-1))


def sinusoidal(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines of positions at geometric frequencies from 1 down to 1/10000.

    Vaswani et al., "Attention Is All You Need", section 3.5, all sines before all cosines.

    Parameters
    ----------
    positions : Tensor
        ``(rows,)``.
    size : int
        Of the embedding. Positive and even.

    Returns
    -------
    Tensor
        ``(rows, size)``, float32.
    """
    half = size // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1)
    angles = positions[:, None].float() * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    # torch's own constructor would draw from the global generator.
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
