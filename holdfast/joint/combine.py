"""How the gradients of several objectives in one turn become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

Gradient: TypeAlias = "Sequence[Tensor | None]"
"""One tensor per trainable parameter, in the optimiser's order; ``None`` where there is none."""


class Combiner(Protocol):
    """Combines one *mean* gradient per objective into the gradient of the step."""

    def __call__(
        self, gradients: Mapping[str, Gradient], weights: Mapping[str, float]
    ) -> list[Tensor | None]: ...


class WeightedSum:
    """``sum_i w_i g_i``: the gradient of the weighted sum of the losses."""

    def __call__(
        self, gradients: Mapping[str, Gradient], weights: Mapping[str, float]
    ) -> list[Tensor | None]:
        names = list(gradients)
        combined: list[Tensor | None] = []
        for parts in zip(*(gradients[name] for name in names), strict=True):
            total: Tensor | None = None
            for name, part in zip(names, parts, strict=True):
                if part is None:
                    continue
                # The buffers belong to this step alone, so they can be reused in place.
                total = (
                    part.mul_(weights[name])
                    if total is None
                    else total.add_(part, alpha=weights[name])
                )
            combined.append(total)
        return combined
