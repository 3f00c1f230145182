"""Rewards: functions that judge completions, with TRL's signature.

:func:`load_reward` finds one by name, :class:`Rewards` calls several and checks what they return.
Torch is imported only by the reward that runs a model, so that recipes are checked without it.
"""

from holdfast.language.rewards.built_in import (
    exact_match,
    math_verify,
    numeric_answer,
    regex,
    soft_overlong,
)
from holdfast.language.rewards.classifier import sequence_classifier
from holdfast.language.rewards.contract import RewardFunction, Text, completion_text
from holdfast.language.rewards.loading import BUILT_IN, load_reward
from holdfast.language.rewards.table import Rewards, RewardTable

__all__ = [
    "BUILT_IN",
    "RewardFunction",
    "RewardTable",
    "Rewards",
    "Text",
    "completion_text",
    "exact_match",
    "load_reward",
    "math_verify",
    "numeric_answer",
    "regex",
    "sequence_classifier",
    "soft_overlong",
]
