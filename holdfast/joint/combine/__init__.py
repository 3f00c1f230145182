"""How the gradients of several objectives in one turn become one."""

from holdfast.joint.combine.combiners import (
    Combiner,
    Surgery,
    WeightedSum,
    check_scale,
    combine,
)
from holdfast.joint.combine.methods import METHODS
from holdfast.joint.geometry import Gradient

__all__ = [
    "METHODS",
    "Combiner",
    "Gradient",
    "Surgery",
    "WeightedSum",
    "check_scale",
    "combine",
]
