"""Scaling of observations and actions, fitted once on demonstrations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

RANGE_FLOOR = 1e-2
"""Default of the smallest range, in raw units, that is stretched to [-1, 1]."""


class _Units(NamedTuple):
    """What follows from the bounds, and the bounds it follows from."""

    low: Tensor
    high: Tensor
    versions: tuple[int, int]
    middle: Tensor
    half: Tensor
    identity: bool


class Normalizer(nn.Module):
    """Min-max scaling to [-1, 1], dimension by dimension.

    The bounds are buffers: they travel with the policy's checkpoint, and loading one restores them.
    They are never fitted again, since every weight of the policy was learnt in their units.

    Parameters
    ----------
    low, high : Tensor
        ``(size,)``: the raw values that become -1 and 1. ``low`` is below ``high``.

    Raises
    ------
    ValueError
        For bounds that are not finite, or not in this order.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        if low.ndim != 1 or low.shape != high.shape:
            raise ValueError(
                f"low has shape {tuple(low.shape)} and high {tuple(high.shape)}: both must be "
                "(size,)"
            )
        if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
            raise ValueError("low and high must be finite, and low below high in every dimension")
        self.register_buffer("low", low.detach().clone().float())
        self.register_buffer("high", high.detach().clone().float())
        self._known: _Units | None = None

    @classmethod
    def identity(cls, size: int) -> Normalizer:
        """A normaliser that leaves values of ``size`` dimensions as they are."""
        return cls(-torch.ones(size), torch.ones(size))

    @classmethod
    def fit(cls, values: Tensor, *, floor: float = RANGE_FLOOR) -> Normalizer:
        """Bounds from data.

        Parameters
        ----------
        values : Tensor
            ``(rows, size)``, at least one row.
        floor : float
            Smallest range, in raw units. A dimension that moves less (a constant one, say) gets a
            range of ``floor`` around its middle, so that it becomes about 0, and a small later
            deviation stays small.

        Raises
        ------
        ValueError
            For a bad shape, a floor that is not positive, or a value that is not finite.
        """
        if values.ndim != 2 or not len(values):
            raise ValueError(
                f"values has shape {tuple(values.shape)}: it must be (rows, size), with a row"
            )
        if not (math.isfinite(floor) and floor > 0):
            raise ValueError(f"floor is {floor}: it must be positive and finite")
        broken = (~values.isfinite()).sum(0)
        if bool(broken.any()):
            dimension = int(broken.argmax())
            raise ValueError(
                f"values has {int(broken[dimension])} entries that are not finite in dimension "
                f"{dimension}, of {len(values)} rows"
            )
        low, high = values.double().aminmax(dim=0)
        middle, half = (low + high) / 2, ((high - low) / 2).clamp(min=floor / 2)
        # Where the range is narrow beside the values themselves, float32 cannot tell the bounds
        # apart: as many of its steps as keep one per cent of precision.
        half = half.maximum(100.0 * torch.finfo(torch.float32).eps * middle.abs())
        return cls(middle - half, middle + half)

    @property
    def size(self) -> int:
        """Dimensions of a value."""
        return len(self.low)

    def _units(self) -> _Units:
        """Computed once: a policy acts every few hundred microseconds."""
        low, high, known = self.low, self.high, self._known
        versions = (low._version, high._version)
        if (
            known is None
            or known.low is not low
            or known.high is not high
            or known.versions != versions
        ):
            identity = bool(((low == -1) & (high == 1)).all())
            known = _Units(low, high, versions, (low + high) / 2, (high - low) / 2, identity)
            self._known = known
        return known

    @property
    def changes_nothing(self) -> bool:
        """Whether this is :meth:`identity`."""
        return self._units().identity

    @property
    def scale(self) -> Tensor:
        """``(size,)``: raw units in one normalised unit."""
        return self._units().half

    def normalize(self, values: Tensor) -> Tensor:
        """From raw units, ``(..., size)``. Values beyond the bounds leave [-1, 1]."""
        units = self._units()
        return values if units.identity else (values - units.middle) / units.half

    def denormalize(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        units = self._units()
        # A copy: who is given actions may write into them.
        return values.clone() if units.identity else values * units.half + units.middle
