"""A cloning term beside a reinforcement loss, in every update: what interleaving is compared to."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from holdfast.joint import LossTerms

Cloned = Literal["demonstrations", "teacher"]
"""What the cloning term is of.

- ``demonstrations``: observations and actions of demonstrations.
- ``teacher``: the observations of the rollouts, with actions drawn there from the frozen policy
  that training began with, as in the "BC loss" of DPPO's reference code; no demonstration is seen.
  (That code maximises the log-probability of the teacher's denoising steps; here its actions are
  cloned as demonstrated ones are.)
"""


def with_cloning(
    reinforcement: LossTerms,
    cloning: LossTerms,
    *,
    weight: float,
    of: Cloned,
) -> LossTerms:
    """The mean of a reinforcement loss plus ``weight`` times the mean of a cloning loss.

    Both are summed, and the trainer divides by one count, that of ``reinforcement``: cloning has a
    row for every row of it. A step whose two batches are of other sizes is had from two objectives
    in one turn, weighed by a schedule.

    Parameters
    ----------
    reinforcement : LossTerms
        Of rollouts, such as :func:`~ppo.ppo` or :func:`~dppo.dppo`.
    cloning : LossTerms
        Of actions to imitate, counted alike: with ``teacher``, of the same rows.
    weight : float
        In [0, inf).
    of : str
        ``demonstrations`` or ``teacher``: what is cloned, by which the metric is named.

    Returns
    -------
    LossTerms
        Counted as ``reinforcement``, with its metrics, and ``cloning/demonstrations`` or
        ``cloning/teacher``: the cloning loss, as its own sum and count.

    Raises
    ------
    ValueError
        For a number out of range or another name.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight is {weight}: it must be at least 0 and finite")
    if of not in get_args(Cloned):
        raise ValueError(f"of is {of!r}: it must be one of {', '.join(get_args(Cloned))}")
    own = cloning.total.detach()
    metric: Tensor = torch.stack([own, cloning.count.to(own.dtype)])
    return LossTerms(
        reinforcement.total + weight * cloning.total,
        reinforcement.count,
        {**reinforcement.metrics, f"cloning/{of}": metric},
    )
