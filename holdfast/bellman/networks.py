"""Functions Q and zeta for many replicas at once, from flat vectors of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from holdfast.bellman.aligned import AlignedLinear


class Approximator(Protocol):
    """Q and zeta on separate parameters, for replicas that never mix."""

    def initial(self) -> tuple[Tensor, Tensor]:
        """Start of the parameters of Q and of zeta, ``(primal,)`` and ``(dual,)``, float64."""
        ...

    def q(self, primal: Tensor, state: Tensor) -> Tensor:
        """``Q(s, .)``, ``(replicas, rows, actions)``.

        ``primal`` is ``(replicas, primal)``, ``state`` ``(replicas, rows)``, or ``(replicas, rows,
        features)`` for observations.
        """
        ...

    def zeta(self, dual: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """``zeta(s, a)``, ``(replicas, rows)``, for actions ``(replicas, rows)``."""
        ...


@dataclass(frozen=True)
class Tables:
    """One parameter a pair, for Q and for zeta; both start at 0."""

    states: int
    actions: int

    def initial(self) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self.states * self.actions, dtype=torch.float64)
        return zeros, zeros.clone()

    def q(self, primal: Tensor, state: Tensor) -> Tensor:
        table = primal.view(-1, self.states, self.actions)
        return table.gather(1, state[..., None].expand(*state.shape, self.actions))

    def zeta(self, dual: Tensor, state: Tensor, action: Tensor) -> Tensor:
        return dual.gather(1, state * self.actions + action)


class Linear:
    """Q and zeta linear in the same features of pairs, ``(states, actions, features)``."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = torch.as_tensor(features, dtype=torch.float64)
        if self.features.ndim != 3 or not torch.isfinite(self.features).all():
            raise ValueError(
                f"features has shape {tuple(self.features.shape)}: it must be finite (states, "
                "actions, features)"
            )
        self.states, self.actions, self.size = self.features.shape

    def initial(self) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self.size, dtype=torch.float64)
        return zeros, zeros.clone()

    def q(self, primal: Tensor, state: Tensor) -> Tensor:
        # A product and a sum, not a matrix product: the same rounding in every replica.
        return (self.features[state] * primal[:, None, None, :]).sum(-1)

    def zeta(self, dual: Tensor, state: Tensor, action: Tensor) -> Tensor:
        return (self.features[state, action] * dual[:, None, :]).sum(-1)


class Networks:
    """Two separate networks from observations to a number per action.

    Parameters
    ----------
    q, zeta : nn.Module
        From ``(rows, features)`` to ``(rows, actions)``. Without buffers or dropout: whatever rows
        or replicas share would break the coupling of runs. Their parameters are the start. All is
        computed in float64, whatever the precision of parameters and observations.
    """

    def __init__(self, q: nn.Module, zeta: nn.Module) -> None:
        for name, module in (("q", q), ("zeta", zeta)):
            if any(True for _ in module.buffers()):
                raise ValueError(f"{name} has buffers, such as those of batch normalisation")
        self._q, self._zeta = q, zeta

    def initial(self) -> tuple[Tensor, Tensor]:
        return _flat(self._q), _flat(self._zeta)

    def q(self, primal: Tensor, state: Tensor) -> Tensor:
        return _apply(self._q, primal, state)

    def zeta(self, dual: Tensor, state: Tensor, action: Tensor) -> Tensor:
        return _apply(self._zeta, dual, state).gather(-1, action[..., None])[..., 0]


def mlp(features: int, hidden: Sequence[int], outputs: int, *, seed: int) -> nn.Sequential:
    """A float64 network with tanh between layers, which is smooth, as the theory asks.

    Weights and biases are uniform within the inverse root of the layer's inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [features, *hidden, outputs]
    layers: list[nn.Module] = []
    for inputs, width in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.utils.skip_init(nn.Linear, inputs, width, dtype=torch.float64)
        for parameter in layer.parameters():
            bound = 1.0 / math.sqrt(inputs)
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten().double() for each in module.parameters()])


def _apply(module: nn.Module, flat: Tensor, state: Tensor) -> Tensor:
    parameters, start = {}, 0
    for name, each in module.named_parameters():
        parameters[name] = flat[:, start : start + each.numel()].view(-1, *each.shape)
        start += each.numel()
    if state.is_floating_point():
        state = state.to(flat.dtype)
    # One replica has none to be equal to.
    with AlignedLinear() if len(flat) > 1 else nullcontext():
        return vmap(lambda own, rows: functional_call(module, own, (rows,)))(parameters, state)
