"""Matching a policy's distribution with a target over the whole vocabulary, tile by tile.

The target's logits are a linear combination of the logits of frozen models, of which only hidden
states are kept: ``t = sum_j c_j (W_j h_j) + offset + sparse``. Where several sources share one
vocabulary matrix, their projections collapse into one: ``sum_j c_j W h_j = W (sum_j c_j h_j)``.

The derivative is taken in the forward pass, while a tile's logits are at hand, so a training step
projects nothing twice unless a row of the vocabulary is cut into several tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.joint import LossTerms
from holdfast.language.head.divergences import (
    Divergence,
    ForwardKl,
    LogCosh,
    SquaredError,
    Watched,
    generalised_jsd,
)
from holdfast.language.head.tiles import (
    Activation,
    Head,
    add_product_,
    check_temperature,
    operand_dtypes,
    project,
    tiles,
)

Kind = Callable[[Tensor, int], Divergence]
"""Makes the divergence of rows like a given vector, over a vocabulary of a given size."""

Source = tuple[Tensor, Tensor | Head, float]
"""Hidden states ``(..., width)`` of a frozen model, its vocabulary matrix, and a coefficient."""


@dataclass(frozen=True)
class Bonus:
    """What is added to a target's logits besides the frozen models.

    Attributes
    ----------
    offset : Tensor, optional
        ``(...)``: to every id of a position. It does not change a softmax, but it does change the
        squared error and log cosh.
    token_ids, amounts : Tensor, optional
        ``(...)``: to one id of each position (the sparse advantage over ``beta``).
    """

    offset: Tensor | None = None
    token_ids: Tensor | None = None
    amounts: Tensor | None = None


@dataclass
class Watch:
    """What a chunked loss has seen of the policy at every counted position, in order.

    Attributes
    ----------
    logit_gap : Tensor
        ``(counted,)``: deviation over the vocabulary of the policy's logits from the target's.
    lse : Tensor
        ``(counted,)``: log-sum-exp of the policy's logits over the temperature.
    entropy : Tensor
        ``(counted,)``: of the policy at the temperature, in nats.
    """

    logit_gap: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    entropy: Tensor = field(init=False)


class Options(TypedDict, total=False):
    """What all chunked losses take besides their tensors: see :func:`chunked_lco_kl`."""

    bonus: Bonus | None
    temperature: float
    token_weights: Tensor | None
    watch: Watch | None
    tile_tokens: int | None
    tile_vocab: int | None


def chunked_lco_kl(
    hidden: Tensor,
    weight: Tensor | Head,
    sources: Sequence[Source],
    mask: Tensor,
    **options: Unpack[Options],
) -> LossTerms:
    """``KL(softmax(t) || softmax(z))`` at every counted position, without holding logits.

    Equals :func:`holdfast.language.losses.lco_kl` of the dense logits. Gradients flow to ``hidden``
    and to the weight and bias of the policy's head where they are asked for; never to a source.

    Parameters
    ----------
    hidden : Tensor
        ``(..., width)``: the policy's hidden states.
    weight : Tensor or Head
        The policy's vocabulary matrix ``(vocab, width)``, or its whole output layer.
    sources : sequence of (Tensor, Tensor or Head, float)
        Hidden states ``(..., width_j)``, vocabulary matrix ``(vocab, width_j)`` or output layer,
        and coefficient ``c_j`` of every frozen model. Sources that share a matrix (and have no
        soft cap) cost one projection together.
    mask : Tensor
        ``(...)``, bool: the counted positions. Only they are projected.
    bonus : Bonus, optional
        Per-position and per-token additions to the target.
    temperature : float
        All logits are divided by it, the policy's and the sources'. Positive.
    token_weights : Tensor, optional
        ``(...)``: weight of every counted position; the count is their sum. By default 1.
    watch : Watch, optional
        Filled in, at no further projection.
    tile_tokens, tile_vocab : int, optional
        Extent of a tile. They change the result by rounding only.

    Returns
    -------
    LossTerms
        In nats. Metric ``logit_gap`` with a ``watch``.

    Raises
    ------
    ValueError
        For a bad shape or number, or vocabularies of different size.
    """
    return _chunked(ForwardKl, hidden, weight, sources, mask, **options)


def chunked_lco_mse(
    hidden: Tensor,
    weight: Tensor | Head,
    sources: Sequence[Source],
    mask: Tensor,
    **options: Unpack[Options],
) -> LossTerms:
    """``(1 / vocab) sum (z - t)^2``; otherwise as :func:`chunked_lco_kl`."""
    return _chunked(SquaredError, hidden, weight, sources, mask, **options)


def chunked_lco_log_cosh(
    hidden: Tensor,
    weight: Tensor | Head,
    sources: Sequence[Source],
    mask: Tensor,
    **options: Unpack[Options],
) -> LossTerms:
    """``(1 / vocab) sum log cosh(z - t)``; otherwise as :func:`chunked_lco_kl`."""
    return _chunked(LogCosh, hidden, weight, sources, mask, **options)


def chunked_gkd(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher: tuple[Tensor, Tensor | Head],
    mask: Tensor,
    *,
    beta: float,
    **options: Unpack[Options],
) -> LossTerms:
    """Generalised Jensen-Shannon divergence to a teacher; ``beta`` as in TRL.

    Equals :func:`holdfast.language.losses.gkd` of the dense logits. ``beta`` 1 is MiniLLM's term
    over the whole vocabulary. Otherwise as :func:`chunked_lco_kl`.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}: it must lie in [0, 1]")
    kind = partial(generalised_jsd, beta)
    return _chunked(kind, hidden, weight, [(*teacher, 1.0)], mask, **options)


def dense_match(
    kind: Kind,
    logits: Tensor,
    target_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
) -> LossTerms:
    """A divergence from logits ``(..., vocab)``; what the pure losses are made of.

    Raises
    ------
    ValueError
        For a bad shape, or logits that are not finite at a counted position.
    """
    _check_mask(mask)
    check_temperature(temperature)
    for name, value in (("logits", logits), ("target_logits", target_logits)):
        if value.ndim == 0 or value.shape[:-1] != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, not {(*mask.shape, 'vocab')}: the shape "
                "of mask, then the vocabulary"
            )
    if target_logits.shape != logits.shape:
        raise ValueError(
            f"target_logits has a vocabulary of {target_logits.shape[-1]}, logits one of "
            f"{logits.shape[-1]}: they must be the same"
        )
    rows = _Rows(mask, token_weights)
    z, t = (rows.gather(x.reshape(-1, x.shape[-1])) for x in (logits, target_logits.detach()))
    for name, value in (("logits", z), ("target_logits", t)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite at counted positions")
    total = _DenseMatch.apply(z, t, rows.weights, kind, temperature)
    return LossTerms(total, rows.count, {})


def mean_logits(hidden: Tensor, weight: Tensor | Head) -> Tensor:
    """Mean over the vocabulary of the logits at every position, without computing any.

    Parameters
    ----------
    hidden : Tensor
        ``(..., width)``.
    weight : Tensor or Head
        Without a soft cap: the mean of capped logits is not a projection.

    Returns
    -------
    Tensor
        ``(...)``.
    """
    head = _head(weight)
    if head.softcap is not None:
        raise ValueError("the head has a softcap: the mean of its logits needs all of them")
    sums = operand_dtypes(hidden, head.weight)[1]
    # No matrix product: autocast would round it.
    mean = (hidden.to(sums) * head.weight.mean(0, dtype=sums)).sum(-1)
    return (mean if head.bias is None else mean + head.bias.mean(dtype=sums)) * head.scale


# The path from arguments to tiles -----------------------------------------------------------------


def _chunked(
    kind: Kind,
    hidden: Tensor,
    weight: Tensor | Head,
    sources: Sequence[Source],
    mask: Tensor,
    *,
    bonus: Bonus | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    watch: Watch | None = None,
    tile_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> LossTerms:
    _check_mask(mask)
    check_temperature(temperature)
    head = _head(weight)
    vocab, width = head.weight.shape
    if hidden.shape != (*mask.shape, width):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, not {(*mask.shape, width)}: the shape of "
            "mask, then the width of the head"
        )
    rows = _Rows(mask, token_weights)
    target = _Target(sources, bonus or Bonus(), rows, vocab, temperature)
    extent = _extent(len(rows.weights), vocab, hidden.device, tile_tokens, tile_vocab)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(like: Tensor, vocab: int) -> Divergence:
        divergence = _begin(kind, like, vocab)
        return divergence if watch is None else Watched(divergence, like, vocab, found)

    total = _TiledMatch.apply(
        rows.gather(hidden.reshape(-1, width)),
        head.weight,
        head.bias,
        rows.weights,
        target,
        watched,
        Activation.of(head.scale, head.softcap, temperature),
        extent,
        torch.is_grad_enabled(),
    )
    metrics = {}
    if watch is not None:
        nothing = (total.new_zeros(0),) * 3
        seen = (torch.cat(parts) for parts in zip(nothing, *found, strict=True))
        watch.logit_gap, watch.lse, watch.entropy = (part.detach() for part in seen)
        metrics["logit_gap"] = (watch.logit_gap * rows.weights).sum()
    return LossTerms(total, rows.count, metrics)


def _head(weight: Tensor | Head) -> Head:
    return weight if isinstance(weight, Head) else Head(weight)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, not bool")


class _Rows:
    """The counted positions as rows, and their weights."""

    def __init__(self, mask: Tensor, token_weights: Tensor | None) -> None:
        self.shape = mask.shape
        self.positions = mask.flatten().nonzero().squeeze(-1)
        self.all = self.positions.numel() == mask.numel()
        if token_weights is None:
            self.weights = torch.ones(len(self.positions), device=mask.device)
            self.count = mask.sum()
            return
        if token_weights.shape != mask.shape:
            raise ValueError(
                f"token_weights has shape {tuple(token_weights.shape)}, not that of mask "
                f"{tuple(mask.shape)}"
            )
        self.weights = self.gather(token_weights.flatten()).detach()
        self.count = self.weights.sum()

    def gather(self, rows: Tensor) -> Tensor:
        return rows if self.all else rows.index_select(0, self.positions)

    def gather_positions(self, name: str, values: Tensor) -> Tensor:
        if values.shape != self.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, not that of mask {tuple(self.shape)}"
            )
        return self.gather(values.flatten())


@dataclass
class _Group:
    """Sources whose projections are one product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: Activation | None
    """``None`` without a soft cap: then the logits are linear in the hidden states."""
    factor: float
    """Of the projection, or of the activated logits."""
    bias_factor: float

    def merge(self, hidden: Tensor, factor: float) -> None:
        # A lone source keeps its hidden states as they are: what is multiplied here, operands of
        # half precision round.
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        if self.factor != 1.0:
            self.hidden = self.hidden.to(wide) * self.factor
        self.hidden = self.hidden + hidden.to(wide) * factor
        self.bias_factor += factor
        self.factor = 1.0


class _Target:
    """The target's logits, by tile."""

    def __init__(
        self,
        sources: Sequence[Source],
        bonus: Bonus,
        rows: _Rows,
        vocab: int,
        temperature: float,
    ) -> None:
        if not sources:
            raise ValueError("sources is empty: a target needs at least one frozen model")
        self.groups: list[_Group] = []
        for index, (hidden, weight, coefficient) in enumerate(sources):
            head = _head(weight)
            if len(head.weight) != vocab:
                raise ValueError(
                    f"source {index} has a vocabulary of {len(head.weight)}, the policy one of "
                    f"{vocab}: they must be the same"
                )
            if hidden.shape != (*rows.shape, head.weight.shape[1]):
                raise ValueError(
                    f"source {index} has hidden states of shape {tuple(hidden.shape)}, not "
                    f"{(*rows.shape, head.weight.shape[1])}"
                )
            if not math.isfinite(coefficient):
                raise ValueError(f"source {index} has coefficient {coefficient}: it must be finite")
            flat = rows.gather(hidden.detach().reshape(-1, hidden.shape[-1]))
            self._add(flat, head, float(coefficient), temperature)
        self.offset = bonus.offset
        if self.offset is not None:
            self.offset = rows.gather_positions("offset", self.offset)
        if (bonus.token_ids is None) != (bonus.amounts is None):
            raise ValueError("token_ids and amounts belong together: one of them is missing")
        self.token_ids = self.amounts = None
        if bonus.token_ids is not None and bonus.amounts is not None:
            self.token_ids = rows.gather_positions("token_ids", bonus.token_ids)
            self.amounts = rows.gather_positions("amounts", bonus.amounts)
            _check_ids(self.token_ids, vocab)

    def _add(self, hidden: Tensor, head: Head, coefficient: float, temperature: float) -> None:
        activation = Activation.of(head.scale, head.softcap, temperature)
        weight = head.weight.detach()
        bias = None if head.bias is None else head.bias.detach()
        if head.softcap is not None:
            self.groups.append(_Group(hidden, weight, bias, activation, coefficient, 1.0))
            return
        factor = coefficient * activation.inner
        for group in self.groups:
            if group.activation is None and _same(group.weight, weight) and _same(group.bias, bias):
                group.merge(hidden, factor)
                return
        self.groups.append(_Group(hidden, weight, bias, None, factor, factor))

    @property
    def needs_scratch(self) -> bool:
        return any(group.activation is not None for group in self.groups[1:])

    def project(
        self, tokens: slice, vocab: slice, operands: torch.dtype, tile: Tensor, scratch: Tensor
    ) -> Tensor:
        """The target's logits in a tile, in ``tile``; ``scratch`` is overwritten if needed."""
        shape = tokens.stop - tokens.start, vocab.stop - vocab.start
        total = tile[: shape[0] * shape[1]].view(shape)
        for index, group in enumerate(self.groups):
            hidden = group.hidden[tokens].to(operands)
            columns = group.weight[vocab].to(operands)
            bias = None if group.bias is None else group.bias[vocab].to(total.dtype)
            if group.activation is None:
                _accumulate_(total, hidden, columns, group.factor, anew=index == 0)
                if bias is not None:
                    total.add_(bias, alpha=group.bias_factor)
            elif index == 0:
                group.activation.apply_(project(hidden, columns, bias, tile)).mul_(group.factor)
            else:
                logits = group.activation.apply_(project(hidden, columns, bias, scratch))
                total.add_(logits, alpha=group.factor)
        if self.offset is not None:
            total.add_(self.offset[tokens].unsqueeze(1))
        if self.token_ids is not None and self.amounts is not None:
            local = self.token_ids[tokens] - vocab.start
            size = total.shape[1]
            inside = (local >= 0) & (local < size)
            amounts = torch.where(inside, self.amounts[tokens], 0.0).to(total.dtype)
            total.scatter_add_(1, local.clamp(0, size - 1).unsqueeze(1), amounts.unsqueeze(1))
        return total


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token_ids has dtype {ids.dtype}: token ids are integers")
    if bool(((ids < 0) | (ids >= vocab)).any()):
        raise ValueError(
            f"token_ids has ids from {int(ids.min())} to {int(ids.max())}: a counted id must lie "
            f"in [0, {vocab})"
        )


def _accumulate_(
    total: Tensor, hidden: Tensor, weight: Tensor, factor: float, *, anew: bool
) -> None:
    """``total += factor * hidden @ weight.T``, or ``total =``, summed in the dtype of ``total``."""
    options: dict[str, Any] = {"beta": 0.0 if anew else 1.0, "alpha": factor, "out": total}
    if hidden.dtype != total.dtype:
        options["out_dtype"] = total.dtype
    torch.addmm(total, hidden, weight.T, **options)


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are one and the same memory."""
    if left is None or right is None:
        return left is right
    return (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left.device == right.device
    )


# A tile of the policy's logits, one of the target's and a scratch are alive at a time. A whole row
# of the vocabulary in a tile saves projecting it twice. On a CPU 64 MiB of float32 each, on CUDA
# 256 MiB; a row is cut only where a single one would not fit.
_CPU_ELEMENTS, _CUDA_ELEMENTS = 2**24, 2**26


def _extent(
    tokens: int, vocab: int, device: torch.device, tile_tokens: int | None, tile_vocab: int | None
) -> tuple[int, int]:
    for name, size in (("tile_tokens", tile_tokens), ("tile_vocab", tile_vocab)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    elements = _CUDA_ELEMENTS if device.type == "cuda" else _CPU_ELEMENTS
    width = min(tile_vocab or vocab, vocab, elements)
    height = tile_tokens or max(elements // width, 1)
    return max(min(height, tokens), 1), width


# Row by row a tile of the policy, one of the target and what is computed from them stay in a core's
# cache. On CUDA a tile is taken as it is.
_CACHED_ELEMENTS = 2**16


def _strips(tile: Tensor) -> Iterator[slice]:
    rows, columns = tile.shape
    size = rows if tile.is_cuda else max(_CACHED_ELEMENTS // columns, 1)
    return tiles(rows, max(size, 1))


def _begin(kind: Kind, like: Tensor, vocab: int) -> Divergence:
    """The divergence of rows like a vector, over a vocabulary."""
    divergence = kind(like, vocab)
    if not _kernels_serve(like):
        return divergence
    from holdfast.language.head.kernels import fused

    return fused(divergence)


def _kernels_serve(like: Tensor) -> bool:
    return like.is_cuda and like.dtype == torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class _TiledMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weights: Tensor,
        target: _Target,
        kind: Kind,
        activation: Activation,
        extent: tuple[int, int],
        differentiate: bool,
    ) -> Tensor:
        operands, sums = operand_dtypes(hidden, weight)
        needs = [differentiate and need for need in ctx.needs_input_grad[:3]]
        tile_tokens, tile_vocab = extent
        vocab = len(weight)
        losses = torch.zeros(len(hidden), dtype=sums, device=hidden.device)
        grads = [
            torch.zeros(x.shape, dtype=sums, device=x.device) if need and x is not None else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        size = tile_tokens * tile_vocab
        space = [losses.new_empty(size) for _ in range(2 + target.needs_scratch)]
        whole = vocab <= tile_vocab
        row_weights = row_weights.to(sums)
        factors = (row_weights * activation.inner).unsqueeze(1)

        def visit(tokens: slice, ids: slice) -> tuple[Tensor, Tensor]:
            offset = None if bias is None else bias[ids].to(sums)
            columns = weight[ids].to(operands)
            z = activation.apply_(project(hidden[tokens].to(operands), columns, offset, space[0]))
            return z, target.project(tokens, ids, operands, space[1], space[-1])

        for tokens in tiles(len(hidden), tile_tokens):
            divergence = kind(losses[tokens], vocab)
            kept = visit(tokens, slice(0, vocab)) if whole else None
            for stage in range(divergence.stages):
                for ids in tiles(vocab, tile_vocab):
                    z, t = kept or visit(tokens, ids)
                    for rows in _strips(z):
                        divergence.fold(stage, rows, z[rows], t[rows])
            if any(needs) or divergence.stages == 0:
                for ids in tiles(vocab, tile_vocab):
                    z, t = kept or visit(tokens, ids)
                    slope = activation.slope(z) if any(needs) else None
                    for rows in _strips(z):
                        if divergence.stages == 0:
                            divergence.fold(0, rows, z[rows], t[rows])
                        if any(needs):
                            divergence.residual_(rows, z[rows], t[rows], factors[tokens][rows])
                            if slope is not None:
                                z[rows].mul_(slope[rows])
                    if not any(needs):
                        continue
                    products = z.to(operands)
                    if grad_hidden is not None:
                        add_product_(grad_hidden[tokens], products, weight[ids].to(operands))
                    if grad_weight is not None:
                        add_product_(grad_weight[ids], products.T, hidden[tokens].to(operands))
                    if grad_bias is not None:
                        grad_bias[ids] += z.sum(0)
            losses[tokens] = divergence.losses()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return (losses * row_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a vocabulary matrix is large. It is scaled where it lies, unless the graph
        # may be walked again.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [
            None
            if grad is None
            else (grad * grad_total if kept else grad.mul_(grad_total)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *(None,) * 6)


class _DenseMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, t: Tensor, row_weights: Tensor, kind: Kind, temperature: float
    ) -> Tensor:
        sums = torch.promote_types(torch.promote_types(z.dtype, t.dtype), torch.float32)
        row_weights = row_weights.to(sums)
        scaled, target = ((x.to(sums) / temperature).contiguous() for x in (z, t))
        divergence = _begin(kind, row_weights, z.shape[1])
        everything = slice(None)
        for stage in range(max(divergence.stages, 1)):
            divergence.fold(stage, everything, scaled, target)
        total = (divergence.losses() * row_weights).sum()
        ctx.dtype = z.dtype
        if ctx.needs_input_grad[0]:
            factors = row_weights.unsqueeze(1) / temperature
            divergence.residual_(everything, scaled, target, factors)
            ctx.save_for_backward(scaled)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        return (residual * grad_total).to(ctx.dtype), None, None, None, None
