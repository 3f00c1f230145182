"""Values and rewards from logged decisions."""

from holdfast.bellman.bus import nfxp, nfxp_shift
from holdfast.bellman.draws import CoverageError
from holdfast.bellman.estimators.replaced import ParameterShift, parameter_shift
from holdfast.bellman.files import read_transitions
from holdfast.bellman.generalization import GeneralizationResult, measure_generalization
from holdfast.bellman.influence import Influence, measure_influence, rank_influence
from holdfast.bellman.inverse import inverse_reward, inverse_values
from holdfast.bellman.margin import Margin, saddle_point, stability_margin
from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.networks import Linear, Networks, Tables, mlp
from holdfast.bellman.problem import SaddleProblem
from holdfast.bellman.saddle import (
    anchor_bellman,
    ascend,
    bellman_saddle,
    choice_likelihood,
    dual_fit,
    gladius,
    gladius_of_values,
    recovered_reward,
    saddle_of_values,
    soft_value,
    td_error,
    td_error_of_values,
)
from holdfast.bellman.sgda import Constant, Harmonic, SaddleSolution, Sgda, solve_saddle
from holdfast.bellman.solve import Solution
from holdfast.bellman.stability import StabilityResult, measure_controls, measure_stability
from holdfast.bellman.transitions import Transitions

__all__ = [
    "Constant",
    "CoverageError",
    "GeneralizationResult",
    "Harmonic",
    "Influence",
    "Linear",
    "Margin",
    "Networks",
    "ParameterShift",
    "SaddleProblem",
    "SaddleSolution",
    "Sgda",
    "Solution",
    "StabilityResult",
    "TabularMDP",
    "Tables",
    "Transitions",
    "anchor_bellman",
    "ascend",
    "bellman_saddle",
    "choice_likelihood",
    "dual_fit",
    "gladius",
    "gladius_of_values",
    "inverse_reward",
    "inverse_values",
    "measure_controls",
    "measure_generalization",
    "measure_influence",
    "measure_stability",
    "mlp",
    "nfxp",
    "nfxp_shift",
    "parameter_shift",
    "rank_influence",
    "read_transitions",
    "recovered_reward",
    "saddle_of_values",
    "saddle_point",
    "soft_value",
    "solve_saddle",
    "stability_margin",
    "td_error",
    "td_error_of_values",
]
