"""Behavioural cloning: imitating choices, with no thought of what they lead to.

On a table the clone is :func:`~holdfast.bellman.estimators.ccp.choice_shares`.
"""

from __future__ import annotations

from torch import nn

from holdfast.bellman.estimators.fitting import Columns, Fit, FitOptions, columns_of, fit_network
from holdfast.bellman.saddle import choice_likelihood
from holdfast.bellman.transitions import Transitions
from holdfast.joint import LossTerms


def clone(
    network: nn.Module,
    transitions: Transitions,
    *,
    options: FitOptions | None = None,
    held_out: Transitions | None = None,
) -> Fit:
    """Fit ``softmax`` of a network to the choices, in place, by maximum likelihood.

    Parameters
    ----------
    network : nn.Module
        From states ``(n,)`` or observations ``(n, features)`` to ``(n, actions)``.
    transitions : Transitions
        Of which states and actions are read.
    options : FitOptions, optional
    held_out : Transitions, optional
        To choose the step on; see :func:`~holdfast.bellman.estimators.fitting.fit_network`.

    Returns
    -------
    Fit
        Losses are in nats a choice.
    """
    return fit_network(
        network,
        _loss,
        columns_of(transitions, network),
        options or FitOptions(),
        held_out=None if held_out is None else columns_of(held_out, network),
    )


def _loss(network: nn.Module, columns: Columns) -> LossTerms:
    return choice_likelihood(network(columns["state"]), columns["action"])
