"""The joint-training engine: one policy, several objectives. Free of any domain."""

from holdfast.joint.combine import Combiner, Surgery, WeightedSum
from holdfast.joint.objective import LossTerms, Objective, Source
from holdfast.joint.schedules import (
    AdaptiveInterleave,
    Alright,
    Interleave,
    Maxright,
    Mix,
    Schedule,
    Sequential,
    Stage,
    Turn,
)

__all__ = [
    "AdaptiveInterleave",
    "Alright",
    "Combiner",
    "Interleave",
    "LossTerms",
    "Maxright",
    "Mix",
    "Objective",
    "Schedule",
    "Sequential",
    "Source",
    "Stage",
    "Surgery",
    "Turn",
    "WeightedSum",
]
