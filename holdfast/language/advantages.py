"""Advantages: how much better an action was than what was expected.

Of whole sequences (group, leave-one-out and batch baselines), of every token (generalised
advantage estimation), and of every token of the vocabulary (sparse, from a language model's logits,
from a preference-tuned model). Every result is detached and at least float32.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
"""Whose standard deviation an advantage is divided by."""


# Of sequences -------------------------------------------------------------------------------------


def group_normalized(
    rewards: Tensor,
    num_generations: int,
    *,
    scale: Scale = "group",
    epsilon: float = 1e-4,
    floor: float = 0.0,
) -> Tensor:
    """Reward less the mean of its group, over a standard deviation.

    ``(R - mean_group) / (std + epsilon)``. Shao et al., "DeepSeekMath", section 4.1.2, with
    ``group``; Liu et al., "Understanding R1-Zero-Like Training", section 3.2, with ``none``; Liu et
    al., "Tricks or Traps? A Deep Dive into RL for LLM Reasoning", with ``batch``. Deviations have
    Bessel's correction, and that of the batch is of the rewards themselves, as in TRL.

    Parameters
    ----------
    rewards : Tensor
        ``(batch,)``: consecutive rows are a group. NaN stands for no reward: it takes part in no
        mean or deviation.
    num_generations : int
        Size of a group, at least 2.
    scale : str
        ``group``, ``batch`` or ``none``: the deviation to divide by.
    epsilon : float
        Added to the deviation. Positive.
    floor : float
        Smallest deviation of a group that is divided by, 0 or more, with ``group``. That of a group
        that is almost all right or all wrong is small, and dividing by it would make its few
        exceptions the largest advantages of the batch.

    Returns
    -------
    Tensor
        ``(batch,)``. 0 where there is no reward, or where the deviation is not defined because only
        one reward is left.

    Raises
    ------
    ValueError
        For a bad shape or number, an infinite reward, or no reward at all.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}: it must be one of {', '.join(get_args(Scale))}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon}: it must be positive and finite")
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"floor is {floor}: it must be finite and not negative")
    if floor and scale != "group":
        raise ValueError(f"floor is {floor}, but scale {scale} divides by no group's deviation")
    groups = _groups(rewards, num_generations)
    advantages = groups - groups.nanmean(-1, keepdim=True)
    if scale == "group":
        advantages = advantages / (_deviation(groups).clamp(min=floor) + epsilon)
    elif scale == "batch":
        advantages = advantages / (_deviation(groups.flatten()) + epsilon)
    return _without_nan(advantages).flatten()


def leave_one_out(rewards: Tensor, num_generations: int) -> Tensor:
    """Reward less the mean of the others of its group.

    ``A_i = R_i - mean_{j != i} R_j``. Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style
    Optimization for Learning from Human Feedback in LLMs" (RLOO). Parameters, errors and what NaN
    means as in :func:`group_normalized`.

    Returns
    -------
    Tensor
        ``(batch,)``. 0 where there is no reward, or no other one in the group.
    """
    groups = _groups(rewards, num_generations)
    others = (~groups.isnan()).sum(-1, keepdim=True) - 1
    baselines = (groups.nansum(-1, keepdim=True) - groups) / others  # NaN where there are none
    return _without_nan(groups - baselines).flatten()


def batch_baseline(rewards: Tensor) -> Tensor:
    """Reward less the mean of the batch.

    Parameters
    ----------
    rewards : Tensor
        ``(batch,)``, at least two. NaN stands for no reward: it takes no part in the mean.

    Returns
    -------
    Tensor
        ``(batch,)``. 0 where there is no reward.

    Raises
    ------
    ValueError
        For a bad shape, a batch of one, an infinite reward, or no reward at all.
    """
    rewards = _rewards(rewards)
    if len(rewards) == 1:
        raise ValueError(
            "rewards has one row: less the mean of the batch it is always 0. Use a larger batch, "
            "or no baseline"
        )
    return _without_nan(rewards - rewards.nanmean())


# Of tokens ----------------------------------------------------------------------------------------


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    discount: float,
    trace: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    ``A_t = sum_k (discount trace)^k delta_{t+k}`` with ``delta_t = r_t + discount V_{t+1} - V_t``.
    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    equation 16. A sequence ends after its last counted token: what follows is worth 0. A position
    that does not count is stepped over, wherever it lies.

    Parameters
    ----------
    rewards, values : Tensor
        ``(batch, time)``: the reward of a token, and the value of the state it was chosen in.
    discount, trace : float
        Gamma and lambda, in [0, 1].
    mask : Tensor, optional
        ``(batch, time)``, bool: the counted tokens. By default all.

    Returns
    -------
    advantages, returns : Tensor
        ``(batch, time)``; ``returns`` are ``advantages + values``. 0 where nothing counts.

    Raises
    ------
    ValueError
        For a bad shape or number, or a value that is not finite at a counted token.
    """
    if rewards.ndim != 2 or rewards.shape != values.shape:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)} and values {tuple(values.shape)}: both must "
            "be (batch, time)"
        )
    for name, number in (("discount", discount), ("trace", trace)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} is {number}: it must lie in [0, 1]")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if mask.shape != rewards.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: it must be bool, and "
            f"{tuple(rewards.shape)} as the rewards are"
        )
    rewards = _finite("rewards", _wide(rewards).masked_fill(~mask, 0.0))
    values = _finite("values", _wide(values).masked_fill(~mask, 0.0))

    columns: list[Tensor] = []
    advantage = next_value = values.new_zeros(len(values))
    for time in reversed(range(values.shape[1])):
        delta = rewards[:, time] + discount * next_value - values[:, time]
        counted = mask[:, time]
        advantage = torch.where(counted, delta + discount * trace * advantage, advantage)
        next_value = torch.where(counted, values[:, time], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], -1) if columns else torch.zeros_like(values)
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


# Of the vocabulary --------------------------------------------------------------------------------


def sparse(token_ids: Tensor, advantages: Tensor, vocab_size: int) -> Tensor:
    """The advantage of the sampled token, and 0 for every other.

    Chen et al., "Stabilizing Policy Optimization via Logits Convexity", equation 11.

    Parameters
    ----------
    token_ids : Tensor
        ``(..., time)``, integer, in [0, vocab_size): the sampled tokens.
    advantages : Tensor
        ``(..., time)``, or ``(...)`` where all tokens of a sequence have the same.
    vocab_size : int
        Positive.

    Returns
    -------
    Tensor
        ``(..., time, vocab)``.

    Raises
    ------
    ValueError
        For a bad shape or dtype, an id out of range, or an advantage that is not finite.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: it must be positive")
    if token_ids.ndim == 0 or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            f"token_ids has shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}: it must be "
            "(..., time), of integers"
        )
    if bool(((token_ids < 0) | (token_ids >= vocab_size)).any()):
        raise ValueError(
            f"token_ids has ids from {int(token_ids.min())} to {int(token_ids.max())}: they must "
            f"lie in [0, {vocab_size})"
        )
    if advantages.shape not in (token_ids.shape, token_ids.shape[:-1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be that of token_ids "
            f"{tuple(token_ids.shape)}, or that without the last dimension"
        )
    amounts = _finite("advantages", _wide(advantages))
    if amounts.ndim < token_ids.ndim:
        amounts = amounts[..., None].expand(token_ids.shape)
    dense = amounts.new_zeros((*token_ids.shape, vocab_size))
    return dense.scatter_(-1, token_ids.long()[..., None], amounts[..., None])


def from_logits(logits: Tensor) -> Tensor:
    """Advantages of a language model that is read as a soft Q-function: its log-probabilities.

    Chen et al., equation 12. The entropy-regularised Bellman equations of a deterministic token
    process are ``Q(s, a) = r(s, a) + V(s')`` and ``V(s) = log sum_a exp Q(s, a)``, and their
    optimal policy is ``exp(Q - V)``. With the model's logits as ``Q``, that policy is the model
    itself, and ``A = Q - V`` its log-softmax: never positive, and 0 in the exponential mean. The
    reward behind it, ``r = Q - V(s')``, need not be known.

    Parameters
    ----------
    logits : Tensor
        ``(..., vocab)``. Finite.

    Returns
    -------
    Tensor
        ``(..., vocab)``, in nats.

    Raises
    ------
    ValueError
        For a bad shape, or a logit that is not finite.
    """
    return _finite("logits", _wide(_over_vocabulary("logits", logits))).log_softmax(-1)


def preference(dpo_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """Advantages of a preference-tuned model: ``beta (log pi_dpo - log pi_ref)``.

    Chen et al., equation 13: the reward of a token that makes the tuned model optimal for a KL
    strength of ``beta`` against the reference it was tuned from.

    Parameters
    ----------
    dpo_logps, reference_logps : Tensor
        ``(..., vocab)``: log-probabilities under both, in nats. Finite.
    beta : float
        KL strength that the model was tuned with, in (0, inf).

    Returns
    -------
    Tensor
        ``(..., vocab)``.

    Raises
    ------
    ValueError
        For a bad shape or number, or a log-probability that is not finite.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}: it must be positive and finite")
    if dpo_logps.shape != reference_logps.shape:
        raise ValueError(
            f"dpo_logps has shape {tuple(dpo_logps.shape)} and reference_logps "
            f"{tuple(reference_logps.shape)}: both must be (..., vocab), over the same vocabulary"
        )
    tuned = _finite("dpo_logps", _wide(_over_vocabulary("dpo_logps", dpo_logps)))
    return beta * (tuned - _finite("reference_logps", _wide(reference_logps)))


def centred(advantages: Tensor) -> Tensor:
    """Advantages less their mean over the vocabulary.

    A constant added to the advantages of a token moves the targets of the squared error and of log
    cosh, but not that of the divergence (Chen et al., section 4.4).

    Parameters
    ----------
    advantages : Tensor
        ``(..., vocab)``. Finite.

    Returns
    -------
    Tensor
        ``(..., vocab)``: every row has mean 0.

    Raises
    ------
    ValueError
        For a bad shape, or an advantage that is not finite.
    """
    wide = _finite("advantages", _wide(_over_vocabulary("advantages", advantages)))
    return wide - wide.mean(-1, keepdim=True)


# Checks -------------------------------------------------------------------------------------------


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    """``(groups, num_generations)``."""
    rewards = _rewards(rewards)
    if num_generations < 2:
        raise ValueError(
            f"num_generations is {num_generations}: a group of fewer than 2 has no baseline of its "
            "own. Generate at least 2 completions a prompt, or use another baseline"
        )
    if len(rewards) % num_generations:
        raise ValueError(
            f"rewards has {len(rewards)} rows: num_generations ({num_generations}) must divide them"
        )
    return rewards.view(-1, num_generations)


def _rewards(rewards: Tensor) -> Tensor:
    if rewards.ndim != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: it must be (batch,)")
    if bool(rewards.isinf().any()):
        raise ValueError("rewards has an infinite value: only NaN may stand for no reward")
    if bool(rewards.isnan().all()):
        raise ValueError(f"rewards has no reward: all of its {len(rewards)} rows are NaN")
    return _wide(rewards)


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the last dimension with Bessel's correction; NaN of one value."""
    count = (~values.isnan()).sum(-1, keepdim=True)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1)).sqrt()


def _without_nan(advantages: Tensor) -> Tensor:
    return advantages.masked_fill(advantages.isnan(), 0.0)


def _over_vocabulary(name: str, values: Tensor) -> Tensor:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: it must be (..., vocab)")
    return values


def _finite(name: str, values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    return values


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
