"""What a recipe may say: every entry, its type, its range and its default.

A recipe is validated whole, and without importing torch, before anything is loaded.
"""

from holdfast.schema.combiner import CombinerSpec
from holdfast.schema.objectives import DataSpec, DpoSpec, NllSpec, ObjectiveSpec
from holdfast.schema.on_policy import (
    CispoSpec,
    ClippedSpec,
    DapoSpec,
    DrGrpoSpec,
    DroSpec,
    GkdSpec,
    GroupedSpec,
    GrpoSpec,
    GspoSpec,
    LcoSpec,
    MinillmSpec,
    OnPolicySpec,
    PenalisedSpec,
    PmdSpec,
    PpoSpec,
    PreferenceAdvantage,
    ReinforceSpec,
    RewardedSpec,
    RewardSpec,
)
from holdfast.schema.policies import LanguagePolicySpec, LoraSpec, TokenizerSpec
from holdfast.schema.recipe import AnyObjective, AnySchedule, Recipe, TrainingSpec, kinds, names_of
from holdfast.schema.schedules import (
    AdaptiveInterleaveSpec,
    AlrightSpec,
    InterleaveSpec,
    MaxrightSpec,
    MixSpec,
    SequentialSpec,
    StageSpec,
    WeightedSpec,
)

__all__ = [
    "AdaptiveInterleaveSpec",
    "AlrightSpec",
    "AnyObjective",
    "AnySchedule",
    "CispoSpec",
    "ClippedSpec",
    "CombinerSpec",
    "DapoSpec",
    "DataSpec",
    "DpoSpec",
    "DrGrpoSpec",
    "DroSpec",
    "GkdSpec",
    "GroupedSpec",
    "GrpoSpec",
    "GspoSpec",
    "InterleaveSpec",
    "LanguagePolicySpec",
    "LcoSpec",
    "LoraSpec",
    "MaxrightSpec",
    "MinillmSpec",
    "MixSpec",
    "NllSpec",
    "ObjectiveSpec",
    "OnPolicySpec",
    "PenalisedSpec",
    "PmdSpec",
    "PpoSpec",
    "PreferenceAdvantage",
    "Recipe",
    "ReinforceSpec",
    "RewardSpec",
    "RewardedSpec",
    "SequentialSpec",
    "StageSpec",
    "TokenizerSpec",
    "TrainingSpec",
    "WeightedSpec",
    "kinds",
    "names_of",
]
