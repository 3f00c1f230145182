"""What every loss asks of its tensors: equal shapes, floats, and rows that may be padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def counted(mask: Tensor | None, **given: Tensor) -> list[Tensor]:
    """Check tensors of one shape, and take out the rows that do not count.

    Parameters
    ----------
    mask : Tensor, optional
        ``(...)``, bool: the rows that count. By default all.
    **given : Tensor
        ``(...)``, floating point. Ignored where ``mask`` is False, whatever they are there.

    Returns
    -------
    list of Tensor
        At least in float32, 0 where a row does not count. All but the first are constants.

    Raises
    ------
    ValueError
        For a bad shape or dtype.
    """
    (name, first), *_ = given.items()
    for other, values in given.items():
        if values.shape != first.shape:
            raise ValueError(
                f"{other} has shape {tuple(values.shape)}: it must be that of {name} "
                f"{tuple(first.shape)}"
            )
        if not values.is_floating_point():
            raise ValueError(f"{other} has dtype {values.dtype}: it must be floating point")
    check_mask(mask, name, first.shape)
    leaf, *others = (_where(mask, wide(values)) for values in given.values())
    return [leaf, *(values.detach() for values in others)]


def check_mask(mask: Tensor | None, name: str, shape: torch.Size) -> None:
    """Raise ``ValueError`` unless the mask is bool and has the shape of what is called ``name``."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: it must be bool, of the "
            f"shape of {name} {tuple(shape)}"
        )


def count_of(rows: Tensor, mask: Tensor | None) -> Tensor:
    """How many of ``rows`` ``(...)`` count: scalar, int64."""
    if mask is None:
        return torch.full((), rows.numel(), device=rows.device)
    return mask.sum()


def total_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of ``values`` ``(...)`` over the rows that count, in their dtype."""
    return _where(mask, values).sum()


def wide(values: Tensor) -> Tensor:
    """The same values, at least in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_finite(name: str, values: Tensor) -> None:
    """Raise ``ValueError`` for a value that is not finite."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite in rows that count")


def check_positive(name: str, number: float) -> None:
    """Raise ``ValueError`` unless the number is positive and finite."""
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {number}: it must be positive and finite")


def check_share(name: str, number: float) -> None:
    """Raise ``ValueError`` unless the number lies in [0, 1]."""
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number}: it must lie in [0, 1]")


def _where(mask: Tensor | None, values: Tensor) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0.0)
