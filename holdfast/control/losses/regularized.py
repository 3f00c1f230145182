"""A cloning term beside a reinforcement loss, in every update: what interleaving is compared to."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from holdfast.control.losses.rows import check_positive
from holdfast.joint import LossTerms

Cloned = Literal["demonstrations", "teacher"]
"""What the cloning term is of.

- ``demonstrations``: observations and actions of demonstrations.
- ``teacher``: the observations of the rollouts, with actions drawn there from the frozen policy
  that training began with. This is the "BC loss" of DPPO's reference code; no demonstration is
  seen.
"""


def with_cloning(
    reinforcement: LossTerms,
    cloning: LossTerms,
    *,
    weight: float,
    of: Cloned,
    ratio: float = 1.0,
) -> LossTerms:
    """The mean of a reinforcement loss plus ``weight`` times the mean of a cloning loss.

    Both are summed, and the trainer divides by one count, that of ``reinforcement``. The cloning
    sum is therefore multiplied by ``ratio``, which must be that of the whole step so that nothing
    depends on how its batch is cut. A step whose two batches are of unrelated sizes is better had
    from two objectives in one turn, weighed by a schedule.

    Parameters
    ----------
    reinforcement : LossTerms
        Of rollouts, such as :func:`~ppo.ppo` or :func:`~dppo.dppo`.
    cloning : LossTerms
        Of actions to imitate: with ``teacher``, of the same rows.
    weight : float
        In [0, inf).
    of : str
        ``demonstrations`` or ``teacher``: what is cloned, by which the metric is named.
    ratio : float
        Counted rows of ``reinforcement`` for each of ``cloning``, over the whole step. Positive.

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
    check_positive("ratio", ratio)
    if of not in get_args(Cloned):
        raise ValueError(f"of is {of!r}: it must be one of {', '.join(get_args(Cloned))}")
    own = cloning.total.detach()
    metric: Tensor = torch.stack([own, cloning.count.to(own.dtype)])
    return LossTerms(
        reinforcement.total + weight * ratio * cloning.total,
        reinforcement.count,
        {**reinforcement.metrics, f"cloning/{of}": metric},
    )
