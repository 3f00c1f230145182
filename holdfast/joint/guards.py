"""Guards: they look at the proposed update and may scale or refuse it, never silently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils import get_total_norm


@dataclass(frozen=True)
class Verdict:
    """What a guard found.

    Attributes
    ----------
    grad_norm : float
        Euclidean norm of the whole gradient before the guard touched it.
    clipped_norm : float
        The same after it.
    refused : str, optional
        Why the step must not be taken. ``None``: it may be.
    """

    grad_norm: float
    clipped_norm: float
    refused: str | None = None


class ClipNorm:
    """Scale the gradient to at most ``max_norm``; refuse it where it is not finite.

    Parameters
    ----------
    max_norm : float, optional
        Largest Euclidean norm of the whole gradient, above 0. ``None``: only measured.

    Raises
    ------
    ValueError
        If ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float | None = 1.0) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}: it must be positive, or None for no limit")
        self.max_norm = max_norm

    def __call__(self, gradient: Sequence[Tensor | None]) -> Verdict:
        parts = [part for part in gradient if part is not None]
        norm = float(get_total_norm(parts)) if parts else 0.0
        if not math.isfinite(norm):
            return Verdict(norm, norm, refused="the gradient is not finite")
        if self.max_norm is not None and norm > self.max_norm:
            for part in parts:
                part.mul_(self.max_norm / norm)
            return Verdict(norm, self.max_norm)
        return Verdict(norm, norm)
