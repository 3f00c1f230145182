"""Losses of language models: pure functions from tensors to loss terms."""

from holdfast.language.losses.aggregation import Aggregation, aggregate, average
from holdfast.language.losses.distillation import gkd, minillm_advantages
from holdfast.language.losses.likelihood import nll, nll_from_statistics, sequence_logps
from holdfast.language.losses.logits_convex import lco_kl, lco_log_cosh, lco_mse, optimal_logits
from holdfast.language.losses.policy_gradient import (
    cispo,
    dro,
    gspo,
    kl_k3,
    pmd,
    ppo_clip,
    reinforce,
    value_loss,
)
from holdfast.language.losses.preference import Variant, dpo

__all__ = [
    "Aggregation",
    "Variant",
    "aggregate",
    "average",
    "cispo",
    "dpo",
    "dro",
    "gkd",
    "gspo",
    "kl_k3",
    "lco_kl",
    "lco_log_cosh",
    "lco_mse",
    "minillm_advantages",
    "nll",
    "nll_from_statistics",
    "optimal_logits",
    "pmd",
    "ppo_clip",
    "reinforce",
    "sequence_logps",
    "value_loss",
]
