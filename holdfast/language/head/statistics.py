"""Log-probabilities of labels, tile by tile.

A forward pass visits tiles of tokens x vocabulary, folds each into per-token statistics with an
online log-sum-exp, and forgets it; the backward pass projects every tile again. Dense and tiled
evaluation share the maths of a tile, so that they cannot drift apart: dense evaluation is one tile.

Source of the online log-sum-exp: Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018), algorithm 3. Entropies of tiles are merged by the chain rule of entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.language.head.tiles import (
    Activation,
    Head,
    add_product_,
    check_temperature,
    operand_dtypes,
    project,
    tile_sizes,
    tiles,
)


@dataclass(frozen=True)
class TokenStatistics:
    """What a loss needs to know about the predicted distribution at each position.

    Attributes
    ----------
    logps : Tensor
        ``(...)``, differentiable: log-probability of the label, in nats; 0 where ignored. float32,
        or float64 if an input was.
    mask : Tensor
        ``(...)``, bool: the counted positions.
    entropy : Tensor, optional
        ``(...)``, detached: entropy of the distribution over the vocabulary, in nats; 0 where
        ignored.
    correct : Tensor, optional
        ``(...)``, bool, detached: the label is more probable than every other token; False where
        ignored.
    squares, cubes : Tensor, optional
        ``(...)``, detached: sums of the squares and of the cubes of all probabilities; 0 where
        ignored.
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    squares: Tensor | None = None
    cubes: Tensor | None = None


def token_statistics(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    statistics: bool = False,
    moments: bool = False,
    tile_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> TokenStatistics:
    """Log-probabilities of the labels, without ever holding the logits.

    Gradients flow to ``hidden``, ``head.weight`` and ``head.bias`` where they are asked for: a
    frozen head costs no gradient product. Under autocast on CUDA the products take their operands
    in autocast's dtype; sums stay in float32.

    Parameters
    ----------
    hidden : Tensor
        ``(..., width)``. ``hidden[t]`` scores ``labels[t]``: the caller shifts.
    head : Head
        The output layer.
    labels : Tensor
        ``(...)``, integer: token ids, or ``ignore_index`` at positions that do not count. Only the
        counted positions are projected.
    ignore_index : int
        The label of a position that does not count.
    temperature : float
        The logits are divided by it. Positive.
    statistics : bool
        Also compute ``entropy`` and ``correct``.
    moments : bool
        Also compute ``squares`` and ``cubes``.
    tile_tokens, tile_vocab : int, optional
        Extent of a tile. By default chosen to fit the cache (CPU) or to keep the device busy
        (CUDA). They change the result by rounding only.

    Returns
    -------
    TokenStatistics
        Of the shape of ``labels``.

    Raises
    ------
    ValueError
        For a bad shape, label, temperature or tile.
    """
    vocab, width = head.weight.shape
    if hidden.shape != (*labels.shape, width):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, not {(*labels.shape, width)}: the shape of "
            "labels, then the width of the head"
        )
    check_temperature(temperature)
    counted = _Counted(labels, ignore_index, vocab)
    tokens = len(counted.targets)
    found = _TiledLogps.apply(
        counted.gather(hidden.reshape(-1, width)),
        head.weight,
        head.bias,
        counted.targets,
        Activation.of(head.scale, head.softcap, temperature),
        tile_sizes(tokens, vocab, hidden.device, tile_tokens, tile_vocab),
        statistics,
        moments,
    )
    return counted.statistics(*found)


def dense_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    statistics: bool = False,
    moments: bool = False,
) -> TokenStatistics:
    """Log-probabilities of the labels, from logits.

    Parameters
    ----------
    logits : Tensor
        ``(..., vocab)``. ``logits[t]`` scores ``labels[t]``: the caller shifts.
    labels, ignore_index, temperature, statistics, moments
        As in :func:`token_statistics`.

    Returns
    -------
    TokenStatistics
        Of the shape of ``labels``.

    Raises
    ------
    ValueError
        For a bad shape, label or temperature.
    """
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, not {(*labels.shape, 'vocab')}: the shape of "
            "labels, then the vocabulary"
        )
    check_temperature(temperature)
    vocab = logits.shape[-1]
    counted = _Counted(labels, ignore_index, vocab)
    found = _DenseLogps.apply(
        counted.gather(logits.reshape(-1, vocab)),
        counted.targets,
        Activation.of(1.0, None, temperature),
        statistics,
        moments,
    )
    return counted.statistics(*found)


class _Counted:
    """The positions that count, and the way from all positions to them and back."""

    def __init__(self, labels: Tensor, ignore_index: int, vocab: int) -> None:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels has dtype {labels.dtype}: token ids are integers")
        self.mask = labels != ignore_index
        self.positions = self.mask.flatten().nonzero().squeeze(-1)
        self.targets = labels.flatten().index_select(0, self.positions).long()
        if bool(((self.targets < 0) | (self.targets >= vocab)).any()):
            raise ValueError(
                f"labels has ids from {int(self.targets.min())} to {int(self.targets.max())}: a "
                f"counted id must lie in [0, {vocab})"
            )

    @property
    def all(self) -> bool:
        return self.positions.numel() == self.mask.numel()

    def gather(self, rows: Tensor) -> Tensor:
        return rows if self.all else rows.index_select(0, self.positions)

    def scatter(self, values: Tensor) -> Tensor:
        if not self.all:
            values = values.new_zeros(self.mask.numel()).index_copy(0, self.positions, values)
        return values.view(self.mask.shape)

    def statistics(self, logps: Tensor, *observed: Tensor | None) -> TokenStatistics:
        placed = (None if values is None else self.scatter(values) for values in observed)
        return TokenStatistics(self.scatter(logps), self.mask, *placed)


# The maths of a tile ------------------------------------------------------------------------------


class _Running:
    """Statistics over the part of the vocabulary seen so far, each ``(tokens,)``.

    ``lse`` is the log-sum-exp of the logits and ``target`` the logit of the label. Only if asked
    for: ``entropy``, and ``rival``, the largest logit of any other token than the label; and
    ``squares`` and ``cubes``, moments of the softmax.
    """

    def __init__(
        self, targets: Tensor, dtype: torch.dtype, statistics: bool, moments: bool
    ) -> None:
        self.targets = targets
        self.lse = torch.full(targets.shape, -math.inf, dtype=dtype, device=targets.device)
        self.target = torch.zeros_like(self.lse)
        self.entropy = torch.zeros_like(self.lse) if statistics else None
        self.rival = self.lse.clone() if statistics else None
        self.squares = torch.zeros_like(self.lse) if moments else None
        self.cubes = torch.zeros_like(self.lse) if moments else None

    def fold(self, logits: Tensor, tokens: slice, start: int) -> tuple[Tensor, Tensor]:
        """Take in the logits ``(tokens, tile)`` of the ids from ``start`` on, overwriting them.

        Returns the tile's softmax as ``(tokens, tile)`` numerators and ``(tokens,)`` denominators.
        """
        local, inside = _local(self.targets[tokens], start, logits.shape[1])
        at_target = logits.gather(1, local)
        target, lse = self.target[tokens], self.lse[tokens]
        torch.where(inside, at_target.squeeze(1), target, out=target)

        # A largest logit of -inf (every id of the tile is banned) must not become inf - inf.
        lowest = torch.finfo(logits.dtype).min
        if self.entropy is None or self.rival is None:
            largest = logits.amax(1).clamp_(min=lowest)
            exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
            mass = exponentials.sum(1)
            tile_lse = mass.log() + largest
            merged = torch.logaddexp(lse, tile_lse)
            self._fold_moments(exponentials, largest, tokens, merged)
            lse.copy_(merged)
            return exponentials, mass

        logits.scatter_(1, local, at_target.masked_fill(inside.unsqueeze(1), -math.inf))
        others = logits.amax(1)
        logits.scatter_(1, local, at_target)
        rival, entropy = self.rival[tokens], self.entropy[tokens]
        torch.maximum(rival, others, out=rival)

        largest = torch.maximum(others, at_target.squeeze(1)).clamp_(min=lowest)
        shifted = logits.sub_(largest.unsqueeze(1))
        exponentials = shifted.exp()
        mass = exponentials.sum(1)
        # -inf * 0 is nan, but a banned id adds nothing to an entropy.
        moment = shifted.clamp_(min=lowest).mul_(exponentials).sum(1)
        tile_entropy = mass.log() - moment / mass

        tile_lse = mass.log() + largest
        merged = torch.logaddexp(lse, tile_lse)
        before, here = (lse - merged).exp_(), (tile_lse - merged).exp_()
        chosen = torch.special.entr(before) + torch.special.entr(here)
        both = before * entropy + here * tile_entropy + chosen
        torch.where(here > 0, both, entropy, out=entropy)
        self._fold_moments(exponentials, largest, tokens, merged)
        lse.copy_(merged)
        return exponentials, mass

    def _fold_moments(
        self, exponentials: Tensor, largest: Tensor, tokens: slice, merged: Tensor
    ) -> None:
        """Moments of a tile whose exponentials are of logits less their ``largest``."""
        if self.squares is None or self.cubes is None:
            return
        # Where all ids so far are banned there is nothing, and -inf - -inf must not become NaN.
        nothing = merged.isneginf()
        before, here = (
            (x - merged).masked_fill_(nothing, -math.inf) for x in (self.lse[tokens], largest)
        )
        squared, cubed = _power_sums(exponentials)
        squares, cubes = self.squares[tokens], self.cubes[tokens]
        squares.mul_((2 * before).exp_()).add_((2 * here).exp_() * squared)
        cubes.mul_((3 * before).exp_()).add_((3 * here).exp_() * cubed)

    def fold_all(
        self, logits: Tensor, activation: Activation, *, keep: bool
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Take in a tile that holds everything; if kept, its residual takes the logits' place.

        Returns the residual times the softmax's denominators, and these, ``(tokens, 1)``.
        """
        slope = activation.slope(logits) if keep else None
        numerators, mass = self.fold(logits, slice(None), 0)
        if not keep:
            return None, None
        denominators = mass.unsqueeze(1)
        return _residual_(numerators, denominators, slope, self.targets, 0), denominators

    def results(self) -> tuple[Tensor | None, ...]:
        """As :class:`TokenStatistics` has them, but for its mask."""
        correct = None if self.rival is None else self.target > self.rival
        return self.target - self.lse, self.entropy, correct, self.squares, self.cubes


_CACHED = 2**18
"""Elements whose powers stay in a core's cache until they are summed."""


def _power_sums(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares and of cubes along the rows of a tile, ``(tokens,)`` each."""
    size = len(tile) if tile.is_cuda else max(_CACHED // tile.shape[1], 1)
    squares, cubes = tile.new_empty(len(tile)), tile.new_empty(len(tile))
    scratch = torch.empty_like(tile[:size])
    for rows in tiles(len(tile), size):
        block = tile[rows]
        powers = torch.mul(block, block, out=scratch[: len(block)])
        torch.sum(powers, 1, out=squares[rows])
        torch.sum(powers.mul_(block), 1, out=cubes[rows])
    return squares, cubes


def _residual_(
    numerators: Tensor,
    denominators: Tensor | float,
    slope: Tensor | None,
    targets: Tensor,
    start: int,
) -> Tensor:
    """``(softmax - one_hot(targets)) * slope * denominators`` on a tile, in place.

    Up to sign and factors along a row, how the log-probabilities change with the projection.
    """
    local, inside = _local(targets, start, numerators.shape[1])
    at_target = numerators.gather(1, local) - inside.unsqueeze(1) * denominators
    residual = numerators.scatter_(1, local, at_target)
    return residual if slope is None else residual.mul_(slope)


def _local(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Where the targets lie in a vocabulary tile ``(tokens, 1)``, and whether they do."""
    local = targets - start
    inside = (local >= 0) & (local < size)
    return local.clamp_(0, size - 1).unsqueeze(1), inside


class _TiledLogps(torch.autograd.Function):
    """Vocabulary tiles outside, token tiles inside: a tile of the weight is cast up only once, and
    its gradient is summed in float32 without a float32 gradient of the whole weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        activation: Activation,
        extent: tuple[int, int],
        statistics: bool,
        moments: bool,
    ) -> tuple[Tensor | None, ...]:
        operands, sums = operand_dtypes(hidden, weight)
        tile_tokens, tile_vocab = extent
        # What fits in one tile is kept: projecting it again would save no memory. It is kept before
        # it is divided by its sums, which half-precision operands might not hold.
        whole = len(targets) <= tile_tokens and len(weight) <= tile_vocab and operands == sums
        running = _Running(targets, sums, statistics, moments)
        residual = denominators = None
        rows = hidden.to(operands)
        scratch = rows.new_empty(tile_tokens * tile_vocab, dtype=sums)
        for vocab in tiles(len(weight), tile_vocab):
            columns = weight[vocab].to(operands)
            offset = None if bias is None else bias[vocab].to(sums)
            for tokens in tiles(len(rows), tile_tokens):
                tile = project(rows[tokens], columns, offset, scratch)
                logits = activation.apply_(tile)
                if whole:
                    keep = any(ctx.needs_input_grad)
                    residual, denominators = running.fold_all(logits, activation, keep=keep)
                else:
                    running.fold(logits, tokens, vocab.start)
        found = running.results()
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, running.lse, residual, denominators)
        ctx.activation, ctx.extent, ctx.dtypes = activation, extent, (operands, sums)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_logps is None:
            return (None,) * 8
        hidden, weight, bias, targets, lse, kept, denominators = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        activation, (tile_tokens, tile_vocab) = ctx.activation, ctx.extent
        operands, sums = ctx.dtypes
        # What is constant along a row goes on the short side of the products.
        factor = grad_logps.unsqueeze(1) * -activation.inner
        if kept is not None:
            factor /= denominators
        rows = hidden.to(operands)
        if needs_hidden:
            grad_hidden = torch.zeros_like(hidden, dtype=sums)
        if needs_weight:
            grad_weight = torch.empty_like(weight)
            weighted = (hidden * factor).to(operands)
        if needs_bias:
            grad_bias = torch.empty_like(bias)
        scratch = rows.new_empty(tile_tokens * tile_vocab if kept is None else 0, dtype=sums)
        for vocab in tiles(len(weight), tile_vocab):
            columns = weight[vocab].to(operands)
            offset = None if bias is None else bias[vocab].to(sums)
            weight_sum = torch.zeros_like(columns, dtype=sums) if needs_weight else None
            bias_sum = columns.new_zeros(len(columns), dtype=sums) if needs_bias else None
            for tokens in tiles(len(rows), tile_tokens):
                if kept is None:
                    tile = project(rows[tokens], columns, offset, scratch)
                    logits = activation.apply_(tile)
                    slope = activation.slope(logits)
                    softmax = logits.sub_(lse[tokens].unsqueeze(1)).exp_()
                    residual = _residual_(softmax, 1.0, slope, targets[tokens], vocab.start)
                else:
                    residual = kept
                if bias_sum is not None:
                    bias_sum.addmv_(residual.T, factor[tokens, 0])
                residual = residual.to(operands)
                if needs_hidden:
                    add_product_(grad_hidden[tokens], residual, columns)
                if weight_sum is not None:
                    add_product_(weight_sum, residual.T, weighted[tokens])
            if weight_sum is not None:
                grad_weight[vocab] = weight_sum
            if bias_sum is not None:
                grad_bias[vocab] = bias_sum
        if needs_hidden:
            grad_hidden = grad_hidden.mul_(factor).to(hidden.dtype)
        return (
            grad_hidden if needs_hidden else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *(None,) * 5,
        )


class _DenseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        activation: Activation,
        statistics: bool,
        moments: bool,
    ) -> tuple[Tensor | None, ...]:
        sums = torch.promote_types(logits.dtype, torch.float32)
        running = _Running(targets, sums, statistics, moments)
        tile = activation.apply_(logits.to(sums, copy=True))
        residual, denominators = running.fold_all(tile, activation, keep=ctx.needs_input_grad[0])
        found = running.results()
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual, denominators)
        ctx.inner, ctx.dtype = activation.inner, logits.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_logps is None:
            return (None,) * 5
        residual, denominators = ctx.saved_tensors
        factor = grad_logps.unsqueeze(1) * -ctx.inner / denominators
        return (residual * factor).to(ctx.dtype), None, None, None, None
