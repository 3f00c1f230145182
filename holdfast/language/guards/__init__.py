"""Guards of language policies: what may be masked, bounded or penalised before a step is taken."""

from holdfast.language.guards.controllers import (
    AdaptiveEntropy,
    AdaptiveKl,
    Controller,
    Surrogate,
)
from holdfast.language.guards.curvature import CurvatureGuard, RowMoments, curvature_mask
from holdfast.language.guards.filters import ClipCov, KlCov, OutlierFilter, SmoothedAdvantages
from holdfast.language.guards.inner import InnerSteps, inner_loop, target_surrogate
from holdfast.language.guards.penalties import Penalties
from holdfast.language.guards.radius import softmax_radius
from holdfast.language.guards.safe import SafeKL, soft_minimum

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveKl",
    "ClipCov",
    "Controller",
    "CurvatureGuard",
    "InnerSteps",
    "KlCov",
    "OutlierFilter",
    "Penalties",
    "RowMoments",
    "SafeKL",
    "SmoothedAdvantages",
    "Surrogate",
    "curvature_mask",
    "inner_loop",
    "soft_minimum",
    "softmax_radius",
    "target_surrogate",
]
