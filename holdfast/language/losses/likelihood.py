"""Negative log-likelihood: the loss of pre-training and of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.language.head import TokenStatistics, dense_statistics
from holdfast.language.losses.aggregation import Aggregation, aggregate, average

Weighting = Literal["nll", "dft", "chord"]
"""What the negative log-likelihood of a token is multiplied by, with ``p`` its probability.

- ``nll``: 1.
- ``dft``: ``p``. Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective
  with Reward Rectification". Its authors report that it fails outside of mathematics and code.
- ``chord``: ``p (1 - p)``: a token teaches most where the policy is undecided. Zhang et al.,
  "On-Policy RL Meets Off-Policy Experts" (CHORD), token weight phi.

The weight is a constant: no gradient flows through it.
"""


def nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
    weighting: Weighting = "nll",
) -> LossTerms:
    """Negative log-likelihood of the labels, from logits.

    Parameters
    ----------
    logits : Tensor
        ``(..., time, vocab)``. ``logits[t]`` scores ``labels[t]``: the caller shifts.
    labels : Tensor
        ``(..., time)``, integer: token ids, or ``ignore_index`` at positions that do not count.
    ignore_index : int
        The label of a position that does not count.
    aggregation : str
        What the loss is the mean of: see :data:`~holdfast.language.losses.Aggregation`.
    length : int, optional
        Tokens that a sequence stands for; for ``fixed-length`` only.
    weighting : str
        One of :data:`Weighting`. The count does not depend on it.

    Returns
    -------
    LossTerms
        In nats. Metrics ``mean_token_accuracy`` (a share) and ``entropy`` (nats), as averages over
        tokens.

    Raises
    ------
    ValueError
        For a bad shape, label, aggregation or length.
    """
    statistics = dense_statistics(logits, labels, ignore_index=ignore_index, statistics=True)
    return nll_from_statistics(
        statistics, aggregation=aggregation, length=length, weighting=weighting
    )


def nll_from_statistics(
    statistics: TokenStatistics,
    *,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
    weighting: Weighting = "nll",
) -> LossTerms:
    """Negative log-likelihood of the labels, from statistics ``(..., time)`` of their positions.

    Otherwise as :func:`nll`. The metrics are there if the statistics behind them are.
    """
    if weighting not in get_args(Weighting):
        known = ", ".join(get_args(Weighting))
        raise ValueError(f"weighting is {weighting!r}: it must be one of {known}")
    mask = statistics.mask
    losses = -statistics.logps
    if weighting != "nll":
        probability = losses.detach().neg().exp()
        rest = 1.0 if weighting == "dft" else 1.0 - probability
        losses = losses * probability * rest
    total, count = aggregate(losses, mask, aggregation, length)
    observed = {"mean_token_accuracy": statistics.correct, "entropy": statistics.entropy}
    metrics = {
        name: average(values, mask, aggregation, length)
        for name, values in observed.items()
        if values is not None
    }
    return LossTerms(total, count, metrics)


def sequence_logps(statistics: TokenStatistics, *, mean: bool = False) -> Tensor:
    """Log-probability of every sequence.

    Parameters
    ----------
    statistics : TokenStatistics
        ``(..., time)``.
    mean : bool
        Divide by the number of counted tokens. A sequence without any has 0 either way.

    Returns
    -------
    Tensor
        ``(...)``, in nats, differentiable.
    """
    total = statistics.logps.sum(-1)
    return total / statistics.mask.sum(-1).clamp(min=1) if mean else total
