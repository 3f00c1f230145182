"""Values and rewards from logged decisions."""

from holdfast.bellman.bus import nfxp
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
    "GeneralizationResult",
    "Harmonic",
    "Influence",
    "Linear",
    "Margin",
    "Networks",
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
    "rank_influence",
    "recovered_reward",
    "saddle_of_values",
    "saddle_point",
    "soft_value",
    "solve_saddle",
    "stability_margin",
    "td_error",
    "td_error_of_values",
]
