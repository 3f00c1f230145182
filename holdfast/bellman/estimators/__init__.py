"""Estimators of values and rewards that the saddle problem is compared with."""

from holdfast.bellman.estimators.ccp import choice_shares, conditional_choice_probabilities
from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.cloning import clone
from holdfast.bellman.estimators.fitting import Fit, FitOptions
from holdfast.bellman.estimators.iq_learn import inverse_soft_q, iq_learn
from holdfast.bellman.estimators.maxent import (
    Flow,
    MatchedReward,
    demonstrated_flow,
    maximum_entropy_irl,
)
from holdfast.bellman.estimators.nfxp import Estimate, nested_fixed_point
from holdfast.bellman.estimators.replaced import ParameterShift, parameter_shift
from holdfast.bellman.estimators.soft_q import LinearQ, fit_soft_q_network, fitted_soft_q, one_hot

__all__ = [
    "ChoiceModel",
    "Estimate",
    "Fit",
    "FitOptions",
    "Flow",
    "LinearQ",
    "MatchedReward",
    "ParameterShift",
    "choice_shares",
    "clone",
    "conditional_choice_probabilities",
    "demonstrated_flow",
    "fit_soft_q_network",
    "fitted_soft_q",
    "inverse_soft_q",
    "iq_learn",
    "maximum_entropy_irl",
    "nested_fixed_point",
    "one_hot",
    "parameter_shift",
]
