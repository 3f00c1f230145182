"""What a recipe may say: every entry, its type, its range and its default.

A recipe is validated whole, and without importing torch, before anything is loaded.
"""

from holdfast.schema.objectives import DataSpec, DpoSpec, NllSpec, ObjectiveSpec
from holdfast.schema.policies import LanguagePolicySpec, LoraSpec, TokenizerSpec
from holdfast.schema.recipe import AnyObjective, AnySchedule, Recipe, TrainingSpec, kinds
from holdfast.schema.schedules import (
    AlrightSpec,
    MaxrightSpec,
    MixSpec,
    SequentialSpec,
    StageSpec,
    WeightedSpec,
)

__all__ = [
    "AlrightSpec",
    "AnyObjective",
    "AnySchedule",
    "DataSpec",
    "DpoSpec",
    "LanguagePolicySpec",
    "LoraSpec",
    "MaxrightSpec",
    "MixSpec",
    "NllSpec",
    "ObjectiveSpec",
    "Recipe",
    "SequentialSpec",
    "StageSpec",
    "TokenizerSpec",
    "TrainingSpec",
    "WeightedSpec",
    "kinds",
]
