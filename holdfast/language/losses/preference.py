"""Preference losses: the chosen completion should gain on the rejected one."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.joint import LossTerms

Variant = Literal["sigmoid", "ipo", "hinge"]


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    variant: Variant = "sigmoid",
    label_smoothing: float = 0.0,
) -> LossTerms:
    """Direct preference optimisation.

    With ``delta`` the log-ratio of policy to reference of the chosen completion, less that of the
    rejected one:

    - ``sigmoid``: ``-log sigmoid(beta delta)`` (Rafailov et al., "Direct Preference Optimization",
      equation 7); with smoothing ``e``, ``-(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta
      delta)`` (Mitchell, "A note on DPO with noisy preferences & relationship to IPO", equation 3).
    - ``ipo``: ``(delta - 1 / (2 beta))^2`` (Azar et al., "A General Theoretical Paradigm to
      Understand Learning from Human Preferences", equation 17). For the length-normalised form,
      which TRL uses, pass log-probabilities divided by the number of tokens of the completion.
    - ``hinge``: ``max(0, 1 - beta delta)`` (Zhao et al., "SLiC-HF", on log-ratios).

    Parameters
    ----------
    chosen_logps, rejected_logps : Tensor
        ``(pairs,)``: log-probability of each completion under the policy, in nats.
    reference_chosen_logps, reference_rejected_logps : Tensor
        ``(pairs,)``: the same under the frozen reference.
    beta : float
        Strength of the pull towards the reference, in (0, inf).
    variant : str
        ``sigmoid``, ``ipo`` or ``hinge``.
    label_smoothing : float
        Probability that a label is the wrong way round, in [0, 0.5). ``sigmoid`` only.

    Returns
    -------
    LossTerms
        Summed over pairs, at least in float32. Metrics, as sums over pairs: ``rewards/chosen`` and
        ``rewards/rejected`` (``beta`` times the log-ratio), ``rewards/accuracies`` (the chosen
        reward is the larger), ``rewards/margins``, ``logps/chosen``, ``logps/rejected``.

    Raises
    ------
    ValueError
        For a bad shape or dtype, an unknown variant, or a number out of range.
    """
    given = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    for name, logps in given.items():
        if logps.ndim != 1 or logps.shape != chosen_logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(logps.shape)}: all log-probabilities must be (pairs,), "
                f"and chosen_logps has shape {tuple(chosen_logps.shape)}"
            )
        if not logps.is_floating_point():
            raise ValueError(f"{name} has dtype {logps.dtype}: it must be floating point")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}: it must be positive and finite")
    if variant not in get_args(Variant):
        known = ", ".join(get_args(Variant))
        raise ValueError(f"variant is {variant!r}: it must be one of {known}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must lie in [0, 0.5)")
    if label_smoothing and variant != "sigmoid":
        raise ValueError(
            f"label_smoothing is {label_smoothing}: the variant {variant} has none, only sigmoid"
        )

    chosen, rejected, reference_chosen, reference_rejected = (
        logps.to(torch.promote_types(logps.dtype, torch.float32)) for logps in given.values()
    )
    chosen_ratio = chosen - reference_chosen
    rejected_ratio = rejected - reference_rejected
    delta = chosen_ratio - rejected_ratio
    match variant:
        case "sigmoid":
            losses = -(1.0 - label_smoothing) * F.logsigmoid(beta * delta)
            if label_smoothing:
                losses = losses - label_smoothing * F.logsigmoid(-beta * delta)
        case "ipo":
            losses = (delta - 1.0 / (2.0 * beta)).square()
        case "hinge":
            losses = torch.relu(1.0 - beta * delta)

    chosen_rewards = beta * chosen_ratio.detach()
    rejected_rewards = beta * rejected_ratio.detach()
    metrics = {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(losses.dtype).sum(),
        "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
        "logps/chosen": chosen.detach().sum(),
        "logps/rejected": rejected.detach().sum(),
    }
    pairs = torch.full((), len(losses), device=losses.device)
    return LossTerms(losses.sum(), pairs, metrics)
