"""The joint-training engine: one policy, several objectives. Free of any domain."""

from holdfast.joint.combine import Combiner, WeightedSum
from holdfast.joint.objective import LossTerms, Objective, Source
from holdfast.joint.schedules import (
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
    "Turn",
    "WeightedSum",
]
