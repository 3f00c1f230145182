"""The output layer of a language model, evaluated tile by tile.

Losses over the whole vocabulary are computed from hidden states and vocabulary matrices. No
``(tokens, vocab)`` tensor is ever held, forward or backward, but for what fits in one tile.
"""

from holdfast.language.head.matching import (
    Bonus,
    Source,
    Watch,
    chunked_gkd,
    chunked_lco_kl,
    chunked_lco_log_cosh,
    chunked_lco_mse,
    mean_logits,
)
from holdfast.language.head.statistics import TokenStatistics, dense_statistics, token_statistics
from holdfast.language.head.tiles import Head

__all__ = [
    "Bonus",
    "Head",
    "Source",
    "TokenStatistics",
    "Watch",
    "chunked_gkd",
    "chunked_lco_kl",
    "chunked_lco_log_cosh",
    "chunked_lco_mse",
    "dense_statistics",
    "mean_logits",
    "token_statistics",
]
