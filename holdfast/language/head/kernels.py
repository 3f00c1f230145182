"""The work of the divergences on a tile as single kernels, for CUDA tensors.

:mod:`holdfast.language.head.divergences` says what a loss is; its classes keep the sums over the
parts of the vocabulary and turn them into losses here too. Only what visits every element of a tile
is replaced: PyTorch would read and write the tile once an operation.

A tile is float32 and contiguous. Needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.language.head.divergences import (
    Divergence,
    ForwardKl,
    LogCosh,
    ReverseKl,
    SquaredError,
)

_BLOCK = 4096
"""Elements of a row that a program holds at a time."""


def fused(divergence: Divergence) -> Divergence:
    """The same divergence, through kernels if there are any for it. Jensen-Shannon has none."""
    if isinstance(divergence, ForwardKl | ReverseKl):
        return _Kl(divergence)
    if isinstance(divergence, SquaredError | LogCosh):
        return _Error(divergence)
    return divergence


class _Kl:
    def __init__(self, plain: ForwardKl | ReverseKl) -> None:
        self.plain = plain
        self.stages = plain.stages
        self.losses = plain.losses
        self.forward = isinstance(plain, ForwardKl)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        a, b, of_a, of_b = z, t, self.plain.policy, self.plain.target
        if self.forward:
            a, b, of_a, of_b = b, a, of_b, of_a
        with torch.cuda.device_of(z):
            _fold_kl[(len(z),)](
                a.view(-1), b.view(-1), of_a.lse[rows], of_a.mean[rows], of_b.lse[rows],
                z.shape[1], BLOCK=_block(z),
            )  # fmt: skip

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        policy, target = self.plain.policy, self.plain.target
        with torch.cuda.device_of(z):
            _residual_kl[_elements(z)](
                z.view(-1), t.view(-1), policy.lse[rows], policy.mean[rows], target.lse[rows],
                factors, z.shape[1], FORWARD=self.forward, BLOCK=_block(z),
            )  # fmt: skip


class _Error:
    def __init__(self, plain: SquaredError | LogCosh) -> None:
        self.plain = plain
        self.stages = plain.stages
        self.losses = plain.losses
        self.squared = isinstance(plain, SquaredError)

    def fold(self, stage: int, rows: slice, z: Tensor, t: Tensor) -> None:
        with torch.cuda.device_of(z):
            _fold_error[(len(z),)](
                z.view(-1), t.view(-1), self.plain.sums[rows],
                z.shape[1], SQUARED=self.squared, BLOCK=_block(z),
            )  # fmt: skip

    def residual_(self, rows: slice, z: Tensor, t: Tensor, factors: Tensor) -> None:
        with torch.cuda.device_of(z):
            _residual_error[_elements(z)](
                z.view(-1), t.view(-1), factors, 1.0 / self.plain.vocab,
                z.shape[1], SQUARED=self.squared, BLOCK=_block(z),
            )  # fmt: skip


def _block(tile: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(tile.shape[1]))


def _elements(tile: Tensor) -> tuple[int, int]:
    return len(tile), triton.cdiv(tile.shape[1], _block(tile))


# A row of a tile is one program where it is summed, and one for each block where it is overwritten.
# Offsets are 64 bits wide: a tile may have more than 2^31 elements.


@triton.jit
def _fold_kl(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_lse_ptr: tl.tensor,
    a_mean_ptr: tl.tensor,
    b_lse_ptr: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Log-sum-exp of ``a`` and ``b``, and the mean of ``a - b`` under ``softmax(a)``."""
    row = tl.program_id(0).to(tl.int64)
    # What was folded in before is one more logit, as large as its log-sum-exp: mass 1 below it.
    # Before anything was, that logit is -inf, and the first block wipes its mass out.
    a_top = tl.load(a_lse_ptr + row)
    b_top = tl.load(b_lse_ptr + row)
    moment = tl.load(a_mean_ptr + row)
    a_mass = 1.0
    b_mass = 1.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        a = tl.load(a_ptr + row * columns + at, mask=inside, other=float("-inf"))
        b = tl.load(b_ptr + row * columns + at, mask=inside, other=float("-inf"))
        top = tl.maximum(a_top, tl.max(a, 0))
        shrink = tl.exp(a_top - top)
        exponentials = tl.exp(a - top)
        a_mass = a_mass * shrink + tl.sum(exponentials, 0)
        moment = moment * shrink + tl.sum(tl.where(inside, exponentials * (a - b), 0.0), 0)
        a_top = top
        top = tl.maximum(b_top, tl.max(b, 0))
        b_mass = b_mass * tl.exp(b_top - top) + tl.sum(tl.exp(b - top), 0)
        b_top = top
    tl.store(a_lse_ptr + row, a_top + tl.log(a_mass))
    tl.store(b_lse_ptr + row, b_top + tl.log(b_mass))
    tl.store(a_mean_ptr + row, moment / a_mass)


@triton.jit
def _residual_kl(
    z_ptr: tl.tensor,
    t_ptr: tl.tensor,
    z_lse_ptr: tl.tensor,
    z_mean_ptr: tl.tensor,
    t_lse_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    columns: tl.tensor,
    FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    z = tl.load(z_ptr + row * columns + at, mask=inside)
    t = tl.load(t_ptr + row * columns + at, mask=inside)
    residual = tl.exp(z - tl.load(z_lse_ptr + row))
    if FORWARD:
        residual -= tl.exp(t - tl.load(t_lse_ptr + row))
    else:
        residual *= z - t - tl.load(z_mean_ptr + row)
    tl.store(z_ptr + row * columns + at, residual * tl.load(factors_ptr + row), mask=inside)


@triton.jit
def _fold_error(
    z_ptr: tl.tensor,
    t_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    columns: tl.tensor,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the sum of ``(z - t)^2``, or else of ``log cosh(z - t)``."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.load(sums_ptr + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        z = tl.load(z_ptr + row * columns + at, mask=inside)
        t = tl.load(t_ptr + row * columns + at, mask=inside)
        if SQUARED:
            errors = (z - t) * (z - t)
        else:
            far = tl.abs(z - t)
            errors = tl.log(1.0 + tl.exp(-2.0 * far)) + far - 0.6931471805599453  # log 2
        total += tl.sum(tl.where(inside, errors, 0.0), 0)
    tl.store(sums_ptr + row, total)


@triton.jit
def _residual_error(
    z_ptr: tl.tensor,
    t_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    per_id: tl.tensor,
    columns: tl.tensor,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    far = tl.load(z_ptr + row * columns + at, mask=inside)
    far -= tl.load(t_ptr + row * columns + at, mask=inside)
    # tanh by way of the sigmoid is off by a unit in the last place of 1, not of itself. That is
    # less than what the difference of two logits of order 1 was rounded by.
    residual = 2.0 * far if SQUARED else 2.0 * tl.sigmoid(2.0 * far) - 1.0
    scale = per_id * tl.load(factors_ptr + row)
    tl.store(z_ptr + row * columns + at, residual * scale, mask=inside)
