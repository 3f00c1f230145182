"""Guards of language policies: what may be masked, bounded or penalised before a step is taken."""

from holdfast.language.guards.curvature import RowMoments, curvature_mask
from holdfast.language.guards.radius import softmax_radius

__all__ = ["RowMoments", "curvature_mask", "softmax_radius"]
