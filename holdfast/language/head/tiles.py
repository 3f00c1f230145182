"""What every evaluation of the output layer shares: the layer, its tiles, and their products.

The logits of a batch are by far its largest tensor: ``(tokens, vocab)`` against ``(tokens, width)``
for the hidden states they come from. They are visited in tiles of tokens x vocabulary. Sums run in
float32 whatever the dtype of the model, or in float64 if an input has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The output layer of a language model.

    ``logits = scale * (W h + b)``, and with a soft cap ``c``, ``c * tanh(scale * (W h + b) / c)``.

    Attributes
    ----------
    weight : Tensor
        ``(vocab, width)``.
    bias : Tensor, optional
        ``(vocab,)``.
    scale : float
        Factor on the projection, as in Cohere and Granite models.
    softcap : float, optional
        Bound on the absolute value of a logit, as in Gemma models.

    Raises
    ------
    ValueError
        For a bad shape, or a ``softcap`` that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}, not (vocab, width)")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)}, not ({self.weight.shape[0]},)"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}: it must be positive, or None")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that logits cannot be divided by."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")


@dataclass(frozen=True)
class Activation:
    """From a projection ``x`` to a logit over the temperature.

    ``inner * x``, or with a soft cap ``outer * tanh(inner * x)``.
    """

    inner: float
    outer: float | None

    @classmethod
    def of(cls, scale: float, softcap: float | None, temperature: float) -> Activation:
        if softcap is None:
            return cls(scale / temperature, None)
        return cls(scale / softcap, softcap / temperature)

    def apply_(self, tile: Tensor) -> Tensor:
        if self.inner != 1.0:
            tile.mul_(self.inner)
        if self.outer is not None:
            tile.tanh_().mul_(self.outer)
        return tile

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative at ``logits``, over ``inner``; ``None`` where it is 1 throughout."""
        if self.outer is None:
            return None
        # outer * (1 - tanh^2), with tanh = logits / outer
        return logits.square().mul_(-1.0 / self.outer).add_(self.outer)


# Products are written in place or to ``out``, and so are not autocast's to round.

# Logits that fit in the first number of elements are one tile; else tiles have the second extent,
# in tokens and vocabulary. On a CPU: 16 MiB of float32, and 4 MiB, about what a core's cache holds.
# On CUDA: 128 MiB each, enough work for a product to keep the device busy.
_CPU_TILES = 2**22, (512, 2048)
_CUDA_TILES = 2**25, (4096, 8192)


def tile_sizes(
    tokens: int, vocab: int, device: torch.device, tile_tokens: int | None, tile_vocab: int | None
) -> tuple[int, int]:
    """The extent of a tile, in tokens and in vocabulary."""
    for name, size in (("tile_tokens", tile_tokens), ("tile_vocab", tile_vocab)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    whole, default = _CUDA_TILES if device.type == "cuda" else _CPU_TILES
    if tile_tokens is None and tile_vocab is None and tokens * vocab <= whole:
        return max(tokens, 1), vocab
    return min(tile_tokens or default[0], max(tokens, 1)), min(tile_vocab or default[1], vocab)


def tiles(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def operand_dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the operands of a product and of its sums.

    Only CUDA multiplies half-precision operands into float32 sums; elsewhere they are cast up.
    """
    kind = hidden.device.type
    operands = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and operands != torch.float64:
        operands = torch.get_autocast_dtype(kind)
    sums = torch.promote_types(operands, torch.float32)
    return (operands if kind == "cuda" else sums), sums


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """``hidden @ weight.T + bias`` as a ``(tokens, tile)`` view of ``scratch``, in its dtype.

    ``hidden`` ``(tokens, width)`` and ``weight`` ``(tile, width)`` are in the operands' dtype.
    """
    shape = hidden.shape[0], weight.shape[0]
    tile = scratch[: shape[0] * shape[1]].view(shape)
    if hidden.dtype == tile.dtype:
        torch.mm(hidden, weight.T, out=tile)
    else:
        torch.mm(hidden, weight.T, out_dtype=tile.dtype, out=tile)
    return tile if bias is None else tile.add_(bias)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, summed in the dtype of ``total``."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
