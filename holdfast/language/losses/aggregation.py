"""How values per token become one sum and the count it is divided by.

Every total is a plain sum over sequences, and so is every count. A batch that is cut, padded or
sharded therefore has the same total and count as a whole, and the same gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "fixed-length"]
"""What a loss is the mean of.

- ``token-mean``: the tokens of the batch, each with the same weight.
- ``sequence-mean``: the sequences, each with the mean over its tokens.
- ``sequence-sum``: the sequences, each with the sum over its tokens.
- ``fixed-length``: the tokens of the batch, were every sequence ``length`` tokens long: the weight
  of a token depends neither on its own sequence nor on the others (Liu et al., "Understanding
  R1-Zero-Like Training", section 3.2).
"""


def aggregate(
    values: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum values per token, and count what the sum is over.

    Parameters
    ----------
    values : Tensor
        ``(..., time)``, one sequence a row. Ignored where ``mask`` is False, whatever they are.
    mask : Tensor
        ``(..., time)``, bool: the counted tokens.
    aggregation : str
        One of :data:`Aggregation`.
    length : int, optional
        Tokens that a sequence stands for. Positive; ``fixed-length`` needs it, nothing else has it.

    Returns
    -------
    total : Tensor
        Scalar, differentiable, at least float32.
    count : Tensor
        Scalar, int64. ``token-mean``: the counted tokens. ``sequence-mean`` and ``sequence-sum``:
        the sequences with at least one. ``fixed-length``: all sequences, times ``length``.

    Raises
    ------
    ValueError
        For an unknown aggregation, a bad length, or shapes that differ.
    """
    _check(values, mask, aggregation, length)
    kept = _at_least_float32(values).masked_fill(~mask, 0.0)
    tokens = mask.sum(-1)
    match aggregation:
        case "token-mean":
            return kept.sum(), tokens.sum()
        case "sequence-mean":
            return (kept.sum(-1) / tokens.clamp(min=1)).sum(), (tokens > 0).sum()
        case "sequence-sum":
            return kept.sum(), (tokens > 0).sum()
        case "fixed-length":
            return kept.sum(), tokens.new_full((), tokens.numel() * (length or 0))


def average(
    values: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> Tensor:
    """Sum a metric per token so that it stays an average over tokens.

    Divided by the count of :func:`aggregate`, a share of correct tokens must lie in [0, 1] even
    where the loss itself is summed over a sequence. With ``token-mean`` all tokens weigh the same;
    otherwise all sequences do. Parameters and errors as in :func:`aggregate`.

    Returns
    -------
    Tensor
        Scalar, detached.
    """
    _check(values, mask, aggregation, length)
    weighing: Aggregation = "token-mean" if aggregation == "token-mean" else "sequence-mean"
    total, _ = aggregate(values.detach(), mask, weighing)
    return total if length is None else total * length


def _check(values: Tensor, mask: Tensor, aggregation: str, length: int | None) -> None:
    if values.ndim == 0 or values.shape != mask.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)} and mask {tuple(mask.shape)}: both must be "
            "(..., time)"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, not bool")
    if aggregation not in get_args(Aggregation):
        known = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation is {aggregation!r}: it must be one of {known}")
    if aggregation != "fixed-length":
        if length is not None:
            raise ValueError(f"length is {length}: only the aggregation fixed-length has a length")
    elif not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length is {length!r}: fixed-length needs a positive number of tokens")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
