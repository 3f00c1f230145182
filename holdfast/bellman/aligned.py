"""Matrix products that round alike in every replica of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_WIDTH = 8
"""Entries of a row that fill 64 bytes in float64, the widest alignment that kernels look at."""


class AlignedLinear(TorchFunctionMode):
    """``linear`` on operands whose rows fill whole multiples of 64 bytes.

    Libraries choose a kernel by the alignment of its operands, and so may round the same numbers
    differently in two replicas of one batch. With every row padded by zeros all replicas are
    aligned alike, forward and backward, and equal replicas stay equal bit for bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def padded(matrices: Tensor, *, both: bool = False) -> Tensor:
    """A copy whose rows, with ``both`` columns too, are filled with zeros to the width."""
    rows = -matrices.shape[-2] % _WIDTH if both else 0
    # A copy even where nothing is missing: a view would begin anywhere.
    return F.pad(matrices, (0, -matrices.shape[-1] % _WIDTH, 0, rows))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(..., inputs)`` and ``(outputs, inputs)`` to ``(..., outputs)``."""
    product = torch.matmul(padded(input), padded(weight, both=True).mT)[..., : len(weight)]
    return product if bias is None else product + bias
