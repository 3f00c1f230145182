"""Functions Q and zeta for many replicas at once, from flat vectors of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from holdfast.bellman.aligned import AlignedLinear, padded


class Approximator(Protocol):
    """Q and zeta on separate parameters, for replicas that never mix."""

    def initial(self) -> tuple[Tensor, Tensor]:
        """Start of the parameters of Q and of zeta, ``(primal,)`` and ``(dual,)``."""
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
        or replicas share would break the coupling of runs. Their parameters are the start.
    dtype : torch.dtype
        In which all is computed, whatever that of parameters and observations. ``float32`` is the
        faster; what is measured of stability calls for ``float64``.
    """

    def __init__(
        self, q: nn.Module, zeta: nn.Module, *, dtype: torch.dtype = torch.float64
    ) -> None:
        for name, module in (("q", q), ("zeta", zeta)):
            if any(True for _ in module.buffers()):
                raise ValueError(f"{name} has buffers, such as those of batch normalisation")
        self._q, self._zeta, self._dtype = q, zeta, dtype

    def initial(self) -> tuple[Tensor, Tensor]:
        return _flat(self._q).to(self._dtype), _flat(self._zeta).to(self._dtype)

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


_ELEMENTWISE = (
    nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
)  # fmt: skip


def _is_plain(chain: nn.Sequential) -> bool:
    """Whether it consists of linear layers and functions of single numbers."""
    return all(type(each) is nn.Linear or type(each) in _ELEMENTWISE for each in chain)


def _apply(module: nn.Module, flat: Tensor, state: Tensor) -> Tensor:
    if state.is_floating_point():
        state = state.to(flat.dtype)
    if isinstance(module, nn.Sequential) and _is_plain(module):
        return _chain(module, flat, state)
    parameters, start = {}, 0
    for name, each in module.named_parameters():
        parameters[name] = flat[:, start : start + each.numel()].view(-1, *each.shape)
        start += each.numel()
    # One replica has none to be equal to.
    with AlignedLinear() if len(flat) > 1 else nullcontext():
        return vmap(lambda own, rows: functional_call(module, own, (rows,)))(parameters, state)


def _chain(layers: Iterable[nn.Module], flat: Tensor, rows: Tensor) -> Tensor:
    """A plain module without the machinery that maps any: several times as fast."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    sizes = [
        each.numel() for layer in linear for each in (layer.weight, layer.bias) if each is not None
    ]
    alone, width = len(flat) == 1, rows.shape[-1]
    parts = iter((flat[0] if alone else flat).split(sizes, -1))
    rows = rows[0] if alone else padded(rows)
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            rows = layer(rows)
            continue
        width = layer.out_features
        weight = next(parts).unflatten(-1, layer.weight.shape)
        bias = None if layer.bias is None else next(parts)
        if alone:
            rows = F.linear(rows, weight, bias)
            continue
        # Replicas must be aligned alike, so that equal ones round alike.
        factor = padded(weight, both=True).mT
        added = None if bias is None else padded(bias)[:, None]
        rows = torch.bmm(rows, factor) if added is None else torch.baddbmm(added, rows, factor)
    return rows[None] if alone else rows[..., :width]
