"""Losses of language models bound to rows: what a recipe's ``nll`` and ``dpo`` mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from holdfast.joint.objective import LossTerms
from holdfast.language.data import Demonstration, Encoded, Preference, collate
from holdfast.language.head import TokenStatistics
from holdfast.language.losses import (
    Aggregation,
    Variant,
    dpo,
    nll_from_statistics,
    sequence_logps,
)
from holdfast.language.losses.likelihood import Weighting


class Nll:
    """Negative log-likelihood of the counted tokens of demonstrations.

    Parameters
    ----------
    pad_id : int
        Token that fills short rows.
    aggregation : str
        As in :func:`holdfast.language.losses.nll`.
    weighting : str
        The same, in training. Evaluation is of the plain likelihood, whatever is trained on.
    """

    def __init__(
        self,
        pad_id: int,
        aggregation: Aggregation = "token-mean",
        weighting: Weighting = "nll",
    ) -> None:
        self.pad_id = pad_id
        self.aggregation = aggregation
        self.weighting = weighting

    def __call__(self, policy: nn.Module, rows: Sequence[Demonstration]) -> LossTerms:
        # Entropy and accuracy cost another pass over the tiles: only evaluation pays for it.
        scored = score(policy, [row.tokens for row in rows], self.pad_id, not policy.training)
        weighting = self.weighting if policy.training else "nll"
        return nll_from_statistics(scored, aggregation=self.aggregation, weighting=weighting)


class Dpo:
    """Preference loss of pairs whose reference log-probabilities are known.

    Parameters
    ----------
    pad_id : int
        Token that fills short rows.
    beta : float
        Strength of the implied KL penalty, above 0.
    variant : str
        ``"sigmoid"``, ``"ipo"`` (on log-probabilities averaged over the completion, as TRL does) or
        ``"hinge"``.
    label_smoothing : float
        In [0, 0.5), with ``"sigmoid"`` only.
    """

    def __init__(
        self,
        pad_id: int,
        *,
        beta: float = 0.1,
        variant: Variant = "sigmoid",
        label_smoothing: float = 0.0,
    ) -> None:
        self.pad_id = pad_id
        self.beta = beta
        self.variant = variant
        self.label_smoothing = label_smoothing

    def __call__(self, policy: nn.Module, rows: Sequence[Preference]) -> LossTerms:
        missing = [row.origin for row in rows if row.reference_chosen_logps is None]
        if missing:
            raise ValueError(f"rows without reference log-probabilities: {', '.join(missing)}")
        # One forward pass for both halves of every pair.
        sides = [row.chosen for row in rows] + [row.rejected for row in rows]
        scored = score(policy, sides, self.pad_id, False)
        device = scored.logps.device
        reference = torch.tensor(
            [row.reference_chosen_logps for row in rows]
            + [row.reference_rejected_logps for row in rows],
            dtype=torch.float32,
            device=device,
        )
        logps = sequence_logps(scored)
        if self.variant != "ipo":
            return self._loss(logps, reference)
        lengths = scored.mask.sum(-1).clamp(min=1)
        terms = self._loss(logps / lengths, reference / lengths)
        # Rewards and log-probabilities are told of whole completions, whatever the loss.
        return replace(terms, metrics=self._loss(logps.detach(), reference).metrics)

    def _loss(self, logps: Tensor, reference: Tensor) -> LossTerms:
        """Of the chosen sides, (pairs,), followed by the rejected ones, (pairs,)."""
        return dpo(
            *logps.chunk(2),
            *reference.chunk(2),
            beta=self.beta,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
        )


def score(
    policy: nn.Module, rows: Sequence[Encoded], pad_id: int, statistics: bool
) -> TokenStatistics:
    """Log-probabilities of the counted tokens of ``rows``, (batch, time - 1).

    On a CPU padding costs as much as tokens do: there, rows of unlike length are evaluated apart.
    In training they stay together, since a data-parallel wrapper expects one forward pass a loss.
    """
    device = next(policy.parameters()).device
    together = torch.is_grad_enabled() or device.type != "cpu"
    groups = [range(len(rows))] if together else _alike([row.length for row in rows])
    parts: list[TokenStatistics] = []
    for group in groups:
        input_ids, labels = collate([rows[index] for index in group], pad_id)
        parts.append(
            policy(
                input_ids.to(device, non_blocking=True),
                labels.to(device, non_blocking=True),
                statistics=statistics,
            )
        )
    return parts[0] if together else _joined(parts, groups)


_PADDING_WORTH_A_PASS = 512
"""Padded tokens that take a tiny model on a CPU about as long as starting one more pass."""


def _alike(lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """Indices from short to long, in groups that waste little on padding. At least one group."""
    groups: list[list[int]] = [[]]
    padding = longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # All that are in the group already would be padded up to this one.
        padding += (lengths[index] - longest) * len(groups[-1])
        if padding > _PADDING_WORTH_A_PASS:
            groups.append([])
            padding = 0
        groups[-1].append(index)
        longest = lengths[index]
    return groups


def _joined(parts: Sequence[TokenStatistics], groups: Sequence[Sequence[int]]) -> TokenStatistics:
    """The parts as one batch, its rows back in their places."""
    width = max(part.mask.shape[1] for part in parts)
    places = torch.tensor([index for group in groups for index in group]).argsort()

    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(value, (0, width - value.shape[1])) for value in values])[places]

    def join_if_there(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return join(present) if present else None

    return TokenStatistics(
        logps=join([part.logps for part in parts]),
        mask=join([part.mask for part in parts]),
        entropy=join_if_there([part.entropy for part in parts]),
        correct=join_if_there([part.correct for part in parts]),
    )
