"""What may still be scaled before it counts: a combined gradient, and an optimiser's update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from holdfast.joint.guards.base import Derivative
from holdfast.joint.objective import Along, Spread


class ProposedGradient:
    """The combined gradient of a turn, scaled in place.

    Parameters
    ----------
    parts : sequence of Tensor or None
        One for each trainable parameter.
    """

    def __init__(self, parts: Sequence[Tensor | None]) -> None:
        self._parts = [part for part in parts if part is not None]
        self.norm = _norm(self._parts)

    def scale(self, factor: float) -> None:
        """Multiply by ``factor``; nothing is touched where it is 1."""
        if factor != 1.0:
            torch._foreach_mul_(self._parts, factor)
            self.norm *= factor


class ProposedUpdate:
    """What an optimiser is about to add to the parameters.

    Made before the optimiser's step, completed by :meth:`take` after it. Until :meth:`apply` it can
    be scaled. Holds two copies of the parameters that have a gradient, and no others.

    Parameters
    ----------
    policy : nn.Module
    named : sequence of (str, Parameter)
        The trainable parameters.
    radii : callable
        From the policy along a step to the radii of softmaxes, by objective.
    """

    def __init__(
        self,
        policy: nn.Module,
        named: Sequence[tuple[str, nn.Parameter]],
        radii: Callable[[Along, Spread], Mapping[str, Tensor]],
    ) -> None:
        self._policy = policy
        self._radii = radii
        self._moving = {name: part for name, part in named if part.grad is not None}
        self._before = {name: part.detach().clone() for name, part in self._moving.items()}
        self._step: dict[str, Tensor] = {}
        self._factor = 1.0

    def take(self) -> None:
        """Look at what the optimiser did."""
        self._step = {n: p.detach() - self._before[n] for n, p in self._moving.items()}
        self._norm = _norm(list(self._step.values()))

    @property
    def norm(self) -> float:
        return self._norm * self._factor

    def scale(self, factor: float) -> None:
        """Multiply by ``factor``; it counts from :meth:`apply` on."""
        self._factor *= factor

    def radii(self, derivative: Derivative, spread: Spread) -> Mapping[str, Tensor]:
        along = AlongStep(self._policy, self._before, self._step, derivative)
        found = self._radii(along, spread)
        return {name: radii / self._factor for name, radii in found.items()}

    def apply(self) -> None:
        """Put the parameters where the scaled update leads; where nothing was scaled they stay."""
        if self._factor != 1.0:
            self._move_to(self._factor)

    def undo(self) -> None:
        """Put the parameters back to where they were before."""
        self._move_to(None)

    def _move_to(self, factor: float | None) -> None:
        with torch.no_grad():
            for name, parameter in self._moving.items():
                parameter.copy_(self._before[name])
                if factor is not None:
                    parameter.add_(self._step[name], alpha=factor)


class AlongStep:
    """The policy before a step, and how its outputs change along it.

    Parameters
    ----------
    policy : nn.Module
    before, step : mapping of str to Tensor
        By parameter: the value before the step, and what the step adds.
    derivative : {"jvp", "finite_difference"}
        The quotient's two points lie ``sqrt(eps)`` of the parameters' norm apart, where truncation
        and rounding are about as large.
    """

    def __init__(
        self,
        policy: nn.Module,
        before: Mapping[str, Tensor],
        step: Mapping[str, Tensor],
        derivative: Derivative,
    ) -> None:
        self.policy = policy
        self._before, self._step = before, step
        self._derivative = derivative

    def __call__(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor | None]]:
        with torch.no_grad():
            if self._derivative == "jvp":
                return self._jvp(args, kwargs)
            return self._difference(args, kwargs)

    def _jvp(self, args: Any, kwargs: Any) -> list[tuple[Tensor, Tensor | None]]:
        # Fused attention has no forward-mode derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = {
                name: forward_ad.make_dual(value, self._step[name])
                for name, value in self._before.items()
            }
            outputs = functional_call(self.policy, dual, args, kwargs)
            return [tuple(forward_ad.unpack_dual(output)) for output in outputs]

    def _difference(self, args: Any, kwargs: Any) -> list[tuple[Tensor, Tensor | None]]:
        start, step = list(self._before.values()), list(self._step.values())
        eps = max(torch.finfo(part.dtype).eps for part in start)
        share = math.sqrt(eps) * (_norm(start) or 1.0) / _norm(step)
        there = dict(zip(self._before, torch._foreach_add(start, step, alpha=share), strict=True))
        at = functional_call(self.policy, dict(self._before), args, kwargs)
        moved = functional_call(self.policy, there, args, kwargs)
        return [
            (one, None if one is other else (other - one) / share)
            for one, other in zip(at, moved, strict=True)
        ]


def _norm(parts: list[Tensor]) -> float:
    return float(get_total_norm(parts)) if parts else 0.0
