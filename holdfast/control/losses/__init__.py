"""Losses of control policies: pure functions from tensors to loss terms."""

from holdfast.control.losses.advantages import (
    clip_quantiles,
    generalized_advantage,
    normalize_advantages,
    td_lambda_returns,
)
from holdfast.control.losses.dipo import improve_actions
from holdfast.control.losses.dppo import clip_range, dppo, sum_log_probs
from holdfast.control.losses.idql import (
    expectile,
    idql_critic,
    idql_value,
    implicit_choice,
    implicit_weights,
    soft_update,
)
from holdfast.control.losses.ppo import ppo, value_loss
from holdfast.control.losses.regression import advantage_weights, weighted_regression
from holdfast.control.losses.regularized import Cloned, with_cloning

__all__ = [
    "Cloned",
    "advantage_weights",
    "clip_quantiles",
    "clip_range",
    "dppo",
    "expectile",
    "generalized_advantage",
    "idql_critic",
    "idql_value",
    "implicit_choice",
    "implicit_weights",
    "improve_actions",
    "normalize_advantages",
    "ppo",
    "soft_update",
    "sum_log_probs",
    "td_lambda_returns",
    "value_loss",
    "weighted_regression",
    "with_cloning",
]
