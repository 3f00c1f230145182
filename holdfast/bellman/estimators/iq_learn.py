"""Inverse soft Q-learning on logged choices: a baseline."""

from __future__ import annotations

import math

from torch import Tensor, nn

from holdfast.bellman.estimators.fitting import Columns, Fit, FitOptions, columns_of, fit_network
from holdfast.bellman.mdp import check_discount
from holdfast.bellman.saddle import choice_likelihood, soft_value
from holdfast.bellman.transitions import Transitions
from holdfast.joint import LossTerms


def inverse_soft_q(
    q_row: Tensor,
    action: Tensor,
    next_value: Tensor,
    *,
    discount: float,
    scale: float = 0.5,
) -> LossTerms:
    """The offline objective of inverse soft Q-learning with chi-squared regularisation.

    With the implied reward ``r = Q(s, a) - discount * V(s')``, the objective is to maximise the
    mean of ``r - r² / (4 scale) - (V(s) - discount * V(s'))`` (Garg et al., "IQ-Learn", 2021,
    equation 10 with the initial states' value written along the data, and section 5.2). Its sum of
    first and last term is ``log pi(a | s)``: behavioural cloning that prefers small rewards, which
    is computed here. Nothing ties the rewards to those of an anchor, and ``r²`` of one sampled
    next state holds its variance.

    Parameters
    ----------
    q_row : Tensor
        ``(..., actions)``: ``Q(s, .)``.
    action : Tensor
        ``(...)``, integers.
    next_value : Tensor
        ``(...)``: ``V(s')``, 0 where the episode ended.
    discount : float
        In [0, 1).
    scale : float
        Of rewards that cost little; positive.

    Returns
    -------
    LossTerms
        To be descended, summed over rows. Metrics ``nll``, ``accuracy`` and ``reward_squared``, as
        sums.

    Raises
    ------
    ValueError
        For shapes that do not fit or a number out of range.
    """
    check_discount(discount)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}: it must be positive and finite")
    choices = choice_likelihood(q_row, action)
    if next_value.shape != action.shape:
        raise ValueError(
            f"next_value has shape {tuple(next_value.shape)}: it must be {tuple(action.shape)}"
        )
    chosen = q_row.gather(-1, action[..., None])[..., 0]
    squared = (chosen - discount * next_value).square().sum()
    return LossTerms(
        choices.total + squared / (4 * scale),
        choices.count,
        {**choices.metrics, "reward_squared": squared.detach()},
    )


def iq_learn(
    network: nn.Module,
    transitions: Transitions,
    *,
    discount: float,
    scale: float = 0.5,
    options: FitOptions | None = None,
    held_out: Transitions | None = None,
) -> Fit:
    """Fit a network's Q to choices by :func:`inverse_soft_q`, in place.

    The reward is read off as ``Q(s, a) - discount * V(s')``. Parameters are those of
    :func:`inverse_soft_q` and :func:`~holdfast.bellman.estimators.cloning.clone`.
    """

    def loss(network: nn.Module, columns: Columns) -> LossTerms:
        ahead = soft_value(network(columns["next_state"]), columns["terminal"])
        return inverse_soft_q(
            network(columns["state"]), columns["action"], ahead, discount=discount, scale=scale
        )

    return fit_network(
        network,
        loss,
        columns_of(transitions, network),
        options or FitOptions(),
        held_out=None if held_out is None else columns_of(held_out, network),
    )
