"""Losses of control policies: pure functions from tensors to loss terms."""

from holdfast.control.losses.advantages import (
    generalized_advantage,
    normalize_advantages,
)
from holdfast.control.losses.cloning import denoising, mse, nll
from holdfast.control.losses.dipo import improve_actions
from holdfast.control.losses.dppo import clip_range, dppo
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
    "clip_range",
    "denoising",
    "dppo",
    "expectile",
    "generalized_advantage",
    "idql_critic",
    "idql_value",
    "implicit_choice",
    "implicit_weights",
    "improve_actions",
    "mse",
    "nll",
    "normalize_advantages",
    "ppo",
    "soft_update",
    "value_loss",
    "weighted_regression",
    "with_cloning",
]
