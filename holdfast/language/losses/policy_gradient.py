"""Policy-gradient losses: make sampled tokens likelier by their advantage.

All take log-probabilities of the sampled tokens, and where a policy is improved more than once on
the same samples, those under the behaviour policy that sampled them. Both are at the temperature
of sampling. Which published method a loss is depends on its advantages, its clip range and its
aggregation:

- PPO: :func:`ppo_clip` and :func:`value_loss`, with ``advantages.gae``.
- RLOO: :func:`reinforce`, ``sequence-sum``, with ``advantages.leave_one_out``.
- GRPO: :func:`ppo_clip`, ``sequence-mean``, with ``advantages.group_normalized``.
- Dr. GRPO: the same, ``fixed-length``, and the advantages' scale ``none``.
- DAPO: the same as GRPO, ``token-mean`` and ``epsilon_high=0.28``.
- Lite PPO: :func:`ppo_clip`, ``token-mean``, with ``group_normalized`` of scale ``batch``.
- DCPO: :func:`ppo_clip` with :func:`dynamic_bounds`.
- GSPO, CISPO, PMD, DRO: the functions of these names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.joint import LossTerms
from holdfast.joint.likelihood_ratio import clipped_surrogate, exponential, kl_k3
from holdfast.language.losses.aggregation import Aggregation, aggregate, average


def reinforce(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> LossTerms:
    """``-A log pi`` at every counted token.

    Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning". The baseline is part of the advantages. With ``sequence-sum`` it is the sequence's
    log-probability that is weighed, as RLOO has it.

    Parameters
    ----------
    logps : Tensor
        ``(batch, time)``: log-probabilities of the sampled tokens under the policy, in nats.
    advantages : Tensor
        ``(batch,)``, or ``(batch, time)`` for one of every token. Finite where tokens count.
    mask : Tensor
        ``(batch, time)``, bool: the counted tokens. A sequence may have none.
    aggregation : str
        What the loss is the mean of: see :data:`~holdfast.language.losses.Aggregation`.
    length : int, optional
        Tokens that a sequence stands for; for ``fixed-length`` only.

    Returns
    -------
    LossTerms
        At least in float32. Metric ``negative_share``: the share of ``sum |A|`` over counted
        tokens that is of negative advantages, as its own sum and count.

    Raises
    ------
    ValueError
        For a bad shape, dtype, aggregation or length, or an advantage that is not finite.
    """
    (logps,), gains = _tokens(advantages, mask, logps=logps)
    total, count = aggregate(-gains * logps, mask, aggregation, length)
    return LossTerms(total, count, {"negative_share": negative_share(gains)})


def ppo_clip(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dynamic: bool = False,
    log_ratio_limit: float | None = None,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> LossTerms:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` with ``r`` the ratio of policies.

    Schulman et al., "Proximal Policy Optimization Algorithms", equation 7; a higher upper bound
    from Yu et al., "DAPO", section 3.1.

    Parameters
    ----------
    logps, advantages, mask, aggregation, length
        As in :func:`reinforce`.
    old_logps : Tensor
        ``(batch, time)``: log-probabilities under the behaviour policy. A constant.
    epsilon : float
        Ratios below ``1 - epsilon`` are clipped where the advantage is negative. Positive.
    epsilon_high : float, optional
        Ratios above ``1 + epsilon_high`` are clipped where it is positive. By default ``epsilon``.
    delta : float, optional
        Ratios above it are clipped whatever the advantage is, so that the loss of a token with a
        negative advantage is bounded too (dual clip: Ye et al., "Mastering Complex Control in MOBA
        Games with Deep Reinforcement Learning", equation 5). Above ``1 + epsilon_high``.
    dynamic : bool
        The bounds are :func:`dynamic_bounds`, with the same numbers.
    log_ratio_limit : float, optional
        Log-ratios are clipped to this size before they become ratios, so that a token far beyond
        has no gradient whatever its advantage is (StableReinforce). Positive.

    Returns
    -------
    LossTerms
        At least in float32. Metrics, each a mean over counted tokens with its own count:
        ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` and ``clip_ratio/region_mean`` (shares of
        tokens clipped for a negative advantage, for a positive one, for either), ``ratio``,
        ``approx_kl`` (:func:`kl_k3` of behaviour to policy); and ``negative_share``.

    Raises
    ------
    ValueError
        As :func:`reinforce`, and for a bound out of range.
    """
    (logps, old_logps), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    low, high = _bounds(epsilon, epsilon_high)
    if delta is not None and not high < delta < math.inf:
        raise ValueError(f"delta is {delta}: it must be finite and above 1 + epsilon_high = {high}")
    log_ratio = logps - old_logps
    metrics = {}
    if log_ratio_limit is not None:
        _positive("log_ratio_limit", log_ratio_limit)
        metrics["clip_ratio/log_ratio"] = _mean(log_ratio.abs() > log_ratio_limit, mask)
        log_ratio = log_ratio.clamp(-log_ratio_limit, log_ratio_limit)
    ratio = exponential(log_ratio)
    below, above = (ratio.new_tensor(bound) for bound in (low, high))
    if dynamic:
        below, above = dynamic_bounds(old_logps, epsilon, epsilon_high)
    if delta is not None:
        metrics["clip_ratio/delta"] = _mean((ratio > delta) & (gains < 0), mask)
    kept = ratio if delta is None else ratio.clamp(max=delta)
    total, count = aggregate(
        clipped_surrogate(kept, gains, below, above), mask, aggregation, length
    )
    metrics |= {
        **_clip_shares(ratio, gains, below, above, mask, "token-mean"),
        "ratio": _mean(ratio, mask),
        **_off_policy(logps, old_logps, gains, mask),
    }
    return LossTerms(total, count, metrics)


def dynamic_bounds(
    old_logps: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    *,
    highest: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Ratios that a token may have, wider the less probable it was.

    ``1/2 + 1/2 sqrt(max(1 - 4 epsilon / q, 0))`` and ``1/2 + 1/2 sqrt(1 + 4 epsilon_high / q)``,
    with ``q`` the probability under the behaviour policy: where ``|(r - 1) r q|`` is ``epsilon``.
    DCPO, dynamic adaptive clipping; its defaults are 0.16 and 0.2.

    Parameters
    ----------
    old_logps : Tensor
        ``(...)``: log-probabilities under the behaviour policy.
    epsilon, epsilon_high : float
        Positive; ``epsilon_high`` is ``epsilon`` by default.
    highest : float
        No ratio above it is allowed.

    Returns
    -------
    tuple of Tensor
        ``(...)`` each: lowest and highest ratio that is not clipped.
    """
    _bounds(epsilon, epsilon_high)
    above = epsilon if epsilon_high is None else epsilon_high
    inverse = exponential(-old_logps.detach())
    low = 0.5 + 0.5 * (1.0 - 4.0 * epsilon * inverse).clamp(min=0.0).sqrt()
    high = 0.5 + 0.5 * (1.0 + 4.0 * above * inverse).sqrt()
    return low, high.clamp(max=highest)


def off_policy_sequences(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Sequences of negative advantage that the policy has left further behind than ``threshold``.

    "DeepSeek-V3.2", equation 9, the off-policy sequence mask: ``A < 0`` and a mean of
    ``log pi_old - log pi`` over the counted tokens above the threshold. As in TRL they are to count
    in the normaliser, but not to learn.

    Parameters
    ----------
    logps, old_logps, advantages, mask : Tensor
        ``(batch, time)``, as in :func:`ppo_clip`.
    threshold : float
        In nats a token. Positive.

    Returns
    -------
    Tensor
        ``(batch, time)``, bool: the tokens that are not to learn.
    """
    _positive("threshold", threshold)
    (logps, old_logps), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    behind = (old_logps - logps.detach()).sum(-1) / mask.sum(-1).clamp(min=1)
    return (gains < 0) & (behind > threshold).unsqueeze(-1)


def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float = 4e-4,
    aggregation: Aggregation = "sequence-mean",
    length: int | None = None,
) -> LossTerms:
    """:func:`ppo_clip` with one ratio a sequence, the geometric mean over its counted tokens.

    Zheng et al., "Group Sequence Policy Optimization", equations 5 and 7. The gradient is that of
    the paper's token form (equation 14): the ratio has the value of the sequence's, and a token's
    advantage weighs the gradient of its own log-probability. With one advantage a sequence, this
    is the gradient of equation 5; with one a token, it keeps which token earned what.

    Parameters
    ----------
    logps, old_logps, advantages, mask, aggregation, length
        As in :func:`ppo_clip`.
    epsilon, epsilon_high : float
        As there, but of a ratio that hardly leaves 1: they must be far smaller. Positive.

    Returns
    -------
    LossTerms
        Metrics as in :func:`ppo_clip`, those of clipping and ``ratio`` as means over sequences.

    Raises
    ------
    ValueError
        As :func:`ppo_clip`.
    """
    (logps, old_logps), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    low, high = _bounds(epsilon, epsilon_high)
    log_ratio = (logps - old_logps).detach().sum(-1, keepdim=True)
    mean_log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    own = logps - logps.detach()  # 0, with the gradient of the token
    ratio = exponential(mean_log_ratio + own)
    total, count = aggregate(clipped_surrogate(ratio, gains, low, high), mask, aggregation, length)
    metrics = {
        **_clip_shares(ratio, gains, low, high, mask, "sequence-mean"),
        "ratio": _mean(ratio, mask, "sequence-mean"),
        **_off_policy(logps, old_logps, gains, mask),
    }
    return LossTerms(total, count, metrics)


def cispo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon_low: float | None = None,
    epsilon_high: float = 5.0,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> LossTerms:
    """``-clip(r, epsilon_low, epsilon_high) A log pi``, without a gradient through the ratio.

    MiniMax, "MiniMax-M1", equations 4 and 5: a clipped token keeps its gradient. The bounds are of
    the ratio itself, as TRL's ``epsilon_high`` is (5 in Khatri et al., "The Art of Scaling
    Reinforcement Learning Compute for LLMs"). Where bounds are given around 1, as the paper and
    verl do, ``(0.2, 0.28)`` there is ``epsilon_low=0.8, epsilon_high=1.28`` here.

    Parameters
    ----------
    logps, old_logps, advantages, mask, aggregation, length
        As in :func:`ppo_clip`.
    epsilon_low : float, optional
        Smallest weight, in (0, epsilon_high). By default there is none.
    epsilon_high : float
        Largest weight. Positive.

    Returns
    -------
    LossTerms
        Metrics ``cispo_clip_ratio`` (share of tokens with a positive advantage and a ratio above
        ``epsilon_high``), ``ratio``, ``approx_kl`` and ``negative_share`` as in :func:`ppo_clip`.

    Raises
    ------
    ValueError
        As :func:`ppo_clip`.
    """
    (logps, old_logps), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    _positive("epsilon_high", epsilon_high)
    if epsilon_low is not None and not 0 < epsilon_low < epsilon_high:
        raise ValueError(f"epsilon_low is {epsilon_low}: it must lie in (0, {epsilon_high})")
    ratio = exponential(logps - old_logps).detach()
    weights = ratio.clamp(min=epsilon_low, max=epsilon_high)
    total, count = aggregate(-weights * gains * logps, mask, aggregation, length)
    metrics = {
        "cispo_clip_ratio": _mean((ratio > epsilon_high) & (gains > 0), mask),
        "ratio": _mean(ratio, mask),
        **_off_policy(logps, old_logps, gains, mask),
    }
    return LossTerms(total, count, metrics)


def pmd(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, tau: float
) -> LossTerms:
    """``(tau / 2) (A / tau - log r)^2 / |y|``, with ``r`` the ratio of a whole sequence.

    Policy mirror descent with a squared log-ratio: Kimi Team, "Kimi k1.5: Scaling Reinforcement
    Learning with LLMs", section 2.3.2, over the length of the sequence. Its gradient is
    ``-(A - tau log r) grad log pi(y) / |y|``: there is no clipping, and a sequence is at rest at
    ``pi = pi_old exp(A / tau)``.

    Parameters
    ----------
    logps, old_logps, mask
        As in :func:`ppo_clip`.
    advantages : Tensor
        ``(batch,)``: of a sequence; or ``(batch, time)``, of which a sequence has the sum over its
        counted tokens.
    tau : float
        KL strength, in (0, inf).

    Returns
    -------
    LossTerms
        Summed over the sequences with a counted token. Metrics ``ratio`` (of tokens),
        ``approx_kl`` and ``negative_share`` as in :func:`ppo_clip`.

    Raises
    ------
    ValueError
        As :func:`ppo_clip`.
    """
    _positive("tau", tau)
    (new, old), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    tokens = mask.sum(-1)
    goals = gains.sum(-1)
    if advantages.ndim == 1:
        goals = goals / tokens.clamp(min=1)
    # (A - tau log r)^2 / (2 tau) is the same, and exact for a small tau.
    squares = (goals - tau * (new - old).sum(-1)).square() / (2.0 * tau)
    losses = squares / tokens.clamp(min=1)
    total, count = aggregate(losses[:, None], mask.any(-1, keepdim=True))
    metrics = {
        "ratio": _mean(exponential(new - old), mask),
        **_off_policy(new, old, gains, mask),
    }
    return LossTerms(total, count, metrics)


def dro(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    aggregation: Aggregation = "token-mean",
    length: int | None = None,
) -> LossTerms:
    """``-(A log pi - (beta / 2) (log r)^2)`` at every counted token.

    Richemond et al., "Offline Regularised Reinforcement Learning for Large Language Models
    Alignment", token by token as in verl. A token is at rest at ``log r = A / beta``.

    Parameters
    ----------
    logps, old_logps, advantages, mask, aggregation, length
        As in :func:`ppo_clip`.
    beta : float
        Strength of the penalty, in (0, inf).

    Returns
    -------
    LossTerms
        Metrics ``ratio``, ``approx_kl`` and ``negative_share`` as in :func:`ppo_clip`.

    Raises
    ------
    ValueError
        As :func:`ppo_clip`.
    """
    _positive("beta", beta)
    (new, old), gains = _tokens(advantages, mask, logps=logps, old_logps=old_logps)
    losses = 0.5 * beta * (new - old).square() - gains * new
    total, count = aggregate(losses, mask, aggregation, length)
    metrics = {
        "ratio": _mean(exponential(new - old), mask),
        **_off_policy(new, old, gains, mask),
    }
    return LossTerms(total, count, metrics)


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float = 0.2,
) -> LossTerms:
    """``max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2`` at every counted token.

    The value loss of PPO's reference implementation: a value earns nothing by moving further than
    ``c`` from where it was when the samples were drawn.

    Parameters
    ----------
    values : Tensor
        ``(batch, time)``: of the states in which the tokens were chosen.
    returns, old_values : Tensor
        ``(batch, time)``: the targets, and the values when the samples were drawn. Constants.
        ``returns`` are finite where tokens count.
    mask : Tensor
        ``(batch, time)``, bool: the counted tokens.
    cliprange_value : float
        ``c``, in (0, inf).

    Returns
    -------
    LossTerms
        Summed over tokens. Metric ``val/clipfrac_avg``: the share of tokens whose clipped square is
        the larger.

    Raises
    ------
    ValueError
        For a bad shape, dtype or range, or a return that is not finite.
    """
    _positive("cliprange_value", cliprange_value)
    values, old_values, returns = _counted(
        mask, values=values, old_values=old_values, returns=returns
    )
    _check_finite("returns", returns)
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    free, clipped = (values - returns).square(), (near - returns).square()
    total, count = aggregate(0.5 * torch.maximum(free, clipped), mask)
    return LossTerms(total, count, {"val/clipfrac_avg": average(clipped > free, mask)})


# Metrics: (2,), a sum and its count, so that they mean the same under every aggregation -----------


def _mean(values: Tensor, mask: Tensor, over: Aggregation = "token-mean") -> Tensor:
    total, count = aggregate(values.detach(), mask, over)
    return torch.stack([total, count.to(total.dtype)])


def _clip_shares(
    ratio: Tensor,
    advantages: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    mask: Tensor,
    over: Aggregation,
) -> dict[str, Tensor]:
    is_low = (ratio < low) & (advantages < 0)
    is_high = (ratio > high) & (advantages > 0)
    return {
        "clip_ratio/low_mean": _mean(is_low, mask, over),
        "clip_ratio/high_mean": _mean(is_high, mask, over),
        "clip_ratio/region_mean": _mean(is_low | is_high, mask, over),
    }


def _off_policy(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    return {
        "approx_kl": _mean(kl_k3(old_logps, logps.detach()), mask),
        "negative_share": negative_share(advantages),
    }


def negative_share(advantages: Tensor) -> Tensor:
    """Of advantages that are 0 where nothing counts."""
    return torch.stack([(-advantages).clamp(min=0.0).sum(), advantages.abs().sum()])


# Checks -------------------------------------------------------------------------------------------


def _tokens(advantages: Tensor, mask: Tensor, **logps: Tensor) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities and advantages, ``(batch, time)``, as :func:`_counted` makes them."""
    counted = _counted(mask, **logps)
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be (batch,) or (batch, time),"
            f" and mask has shape {tuple(mask.shape)}"
        )
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    (gains,) = _counted(mask, advantages=advantages.detach())
    _check_finite("advantages", gains)
    return counted, gains


def _counted(mask: Tensor, **given: Tensor) -> list[Tensor]:
    """Values at least in float32, 0 where nothing counts; all but the first are constants."""
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: it must be (batch, time), "
            "of bool"
        )
    for name, values in given.items():
        if values.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}: it must be that of mask "
                f"{tuple(mask.shape)}"
            )
        if not values.is_floating_point():
            raise ValueError(f"{name} has dtype {values.dtype}: it must be floating point")
    first, *others = (_wide(values).masked_fill(~mask, 0.0) for values in given.values())
    return [first, *(values.detach() for values in others)]


def _bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """Lowest and highest ratio that is not clipped."""
    _positive("epsilon", epsilon)
    if epsilon_high is None:
        epsilon_high = epsilon
    _positive("epsilon_high", epsilon_high)
    return 1.0 - epsilon, 1.0 + epsilon_high


def _positive(name: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {number}: it must be positive and finite")


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite at counted tokens")


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
