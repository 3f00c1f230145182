"""Losses of language models: pure functions from tensors to loss terms."""

from holdfast.language.losses.aggregation import Aggregation, aggregate, average
from holdfast.language.losses.likelihood import nll, nll_from_statistics, sequence_logps
from holdfast.language.losses.preference import Variant, dpo

__all__ = [
    "Aggregation",
    "Variant",
    "aggregate",
    "average",
    "dpo",
    "nll",
    "nll_from_statistics",
    "sequence_logps",
]
