"""How far a step may go before the softmax of a token leaves its radius of convergence.

Logits are visited in tiles of tokens x vocabulary, as everywhere else: what is carried along a step
are hidden states and the output layer, and of each token's rates only their extremes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.joint.guards import binary_radius
from holdfast.joint.objective import Along, Spread
from holdfast.language.data import Encoded, Preference, collate
from holdfast.language.head.tiles import Activation, Head, tile_sizes, tiles


@dataclass(frozen=True)
class SoftmaxRadii:
    """The radii of the counted tokens of rows along a step, for a guard of the engine.

    Attributes
    ----------
    pad_id : int
        Token that fills short rows.
    temperature : float
        The logits are divided by it, as where the completions were sampled. Positive.
    """

    pad_id: int
    temperature: float = 1.0

    def __call__(self, along: Along, rows: Sequence[Any], spread: Spread) -> Tensor:
        """``(counted,)``, in lengths of the step; see :class:`~holdfast.joint.objective.Objective`.

        Parameters
        ----------
        along : Along
            A :class:`~holdfast.language.model.LanguagePolicy` along the step.
        rows : sequence
            Demonstrations, pairs of completions (both of which count), or rollouts.
        spread : Spread
        """
        device = next(along.policy.parameters()).device
        input_ids, labels = collate(_encoded(rows), self.pad_id)
        heads: list[Head] = []

        def read(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, ...]:
            heads.append(head)
            kept = hidden[labels >= 0], head.weight
            return kept if head.bias is None else (*kept, head.bias)

        outputs = along(input_ids.to(device), labels.to(device), read=read)
        (hidden, d_hidden), (weight, d_weight) = outputs[:2]
        bias, d_bias = outputs[2] if len(outputs) > 2 else (None, None)
        states = hidden, torch.zeros_like(hidden) if d_hidden is None else d_hidden
        head = replace(heads[0], weight=weight, bias=bias)
        return directional_radii(*states, head, d_weight, d_bias, spread, self.temperature)


def directional_radii(
    hidden: Tensor,
    d_hidden: Tensor,
    head: Head,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    spread: Spread,
    temperature: float = 1.0,
    *,
    tile_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> Tensor:
    """:func:`~holdfast.language.guards.softmax_radius` of logits that are never held whole.

    Parameters
    ----------
    hidden, d_hidden : Tensor
        ``(tokens, width)``: hidden states, and their derivative along the step.
    head : Head
        The output layer where the step begins.
    d_weight, d_bias : Tensor, optional
        What the step adds to it, ``(vocab, width)`` and ``(vocab,)``; ``None``: nothing.
    spread : Spread
    temperature : float
        The logits are divided by it. Positive.
    tile_tokens, tile_vocab : int, optional
        Extent of a tile.

    Returns
    -------
    Tensor
        ``(tokens,)``, at least float32, in lengths of the step; NaN where rates are not finite.
    """
    layer = _Rates(hidden, d_hidden, head, d_weight, d_bias, temperature)
    vocab = len(head.weight)
    extent = tile_sizes(len(hidden), vocab, hidden.device, tile_tokens, tile_vocab)
    if spread.binary and vocab == 2:
        everything = slice(None)
        logits, rates = layer.logits(everything, everything), layer(everything, everything)
        return binary_radius(logits[:, 0] - logits[:, 1], (rates[:, 0] - rates[:, 1]).abs())
    found = [
        layer.radii(tokens, extent[1], spread.floor) for tokens in tiles(len(hidden), extent[0])
    ]
    return torch.cat(found) if found else hidden.new_zeros(0)


class _Rates:
    """Rates of change of logits along a step, by tile."""

    def __init__(
        self,
        hidden: Tensor,
        d_hidden: Tensor,
        head: Head,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        temperature: float,
    ) -> None:
        self.kind = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden, self.d_hidden = hidden.to(self.kind), d_hidden.to(self.kind)
        self.head, self.d_weight, self.d_bias = head, d_weight, d_bias
        self.activation = Activation.of(head.scale, head.softcap, temperature)

    def _project(self, states: Tensor, weight: Tensor, bias: Tensor | None, ids: slice) -> Tensor:
        product = states @ weight[ids].to(self.kind).T
        return product if bias is None else product + bias[ids].to(self.kind)

    def logits(self, tokens: slice, ids: slice) -> Tensor:
        """``(tokens, ids)``, over the temperature."""
        product = self._project(self.hidden[tokens], self.head.weight, self.head.bias, ids)
        return self.activation.apply_(product)

    def __call__(self, tokens: slice, ids: slice, logits: Tensor | None = None) -> Tensor:
        """``(tokens, ids)``."""
        rates = self._project(self.d_hidden[tokens], self.head.weight, self.d_bias, ids)
        if self.d_weight is not None:
            rates.addmm_(self.hidden[tokens], self.d_weight[ids].to(self.kind).T)
        if self.activation.inner != 1.0:
            rates *= self.activation.inner
        if self.activation.outer is not None:
            slope = self.activation.slope(self.logits(tokens, ids) if logits is None else logits)
            assert slope is not None
            rates *= slope
        return rates

    def radii(self, tokens: slice, tile_vocab: int, floor: float) -> Tensor:
        """``(tokens,)``."""
        columns = list(tiles(len(self.head.weight), tile_vocab))
        lowest = torch.full_like(self.hidden[tokens, 0], math.inf)
        highest = -lowest
        threshold = None
        if floor:
            sums = [self.logits(tokens, ids).logsumexp(-1) for ids in columns]
            threshold = (torch.stack(sums).logsumexp(0) + math.log(floor)).unsqueeze(-1)
        for ids in columns:
            logits = None if threshold is None else self.logits(tokens, ids)
            rates = self(tokens, ids, logits)
            # NaN is carried on, where leaving it out would leave the token without a bound.
            if threshold is None or logits is None:
                low, high = rates.amin(-1), rates.amax(-1)
            else:
                left_out = logits < threshold
                low = rates.masked_fill(left_out, math.inf).amin(-1)
                high = rates.masked_fill_(left_out, -math.inf).amax(-1)
            lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
        # Where everything was left out the spread is below 0, and nothing is bounded.
        found = math.pi / (highest - lowest).clamp(min=0.0)
        broken = lowest.isnan() | highest.isnan() | lowest.isneginf() | highest.isposinf()
        return found.masked_fill(broken, math.nan)


def _encoded(rows: Sequence[Any]) -> list[Encoded]:
    """The tokens of rows: of a pair, those of both completions."""
    found: list[Encoded] = []
    for row in rows:
        found += [row.chosen, row.rejected] if isinstance(row, Preference) else [row.tokens]
    return found
