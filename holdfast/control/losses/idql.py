"""Implicit diffusion Q-learning: a critic learnt from logged actions alone, a policy that clones.

Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion
Policies". The policy is cloned from all the data, without weights; its samples are then chosen
among by the critic. No critic is ever asked about an action outside of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.control.losses.rows import check_finite, check_share, count_of, counted
from holdfast.joint import LossTerms


def expectile(diff: Tensor, tau: float) -> Tensor:
    """``|tau - 1(diff < 0)| diff^2``, element by element.

    Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", equation 5. The
    constant at which its mean is least is the mean for ``tau = 0.5`` and moves to the largest value
    as ``tau`` moves to 1.

    Parameters
    ----------
    diff : Tensor
        ``(...)``: what was seen less what was predicted.
    tau : float
        In (0, 1).

    Returns
    -------
    Tensor
        ``(...)``, differentiable.

    Raises
    ------
    ValueError
        For a ``tau`` out of range.
    """
    _check_tau(tau)
    return (tau - (diff < 0).to(diff.dtype)).abs() * diff.square()


def idql_value(
    values: Tensor, target_qs: Tensor, mask: Tensor | None = None, *, tau: float = 0.8
) -> LossTerms:
    """Expectile regression of the value to the smallest target Q of a logged action.

    Parameters
    ----------
    values : Tensor
        ``(batch,)``: of the observations.
    target_qs : Tensor
        ``(critics, batch)``: of the actions taken there, under the slowly moving copies of the
        critics. Constants.
    mask : Tensor, optional
        ``(batch,)``, bool: the rows that count, by default all.
    tau : float
        In (0, 1).

    Returns
    -------
    LossTerms
        Summed over rows, at least in float32. Metrics, as sums over rows: ``value``, ``advantage``
        (Q less V) and ``better_than_value`` (the advantage is positive).

    Raises
    ------
    ValueError
        For a bad shape, dtype or ``tau``.
    """
    qs = _critics("target_qs", target_qs).amin(0)
    found, lowest = counted(mask, values=values, target_qs=qs)
    losses = expectile(lowest - found, tau)
    advantages = (lowest - found).detach()
    metrics = {
        "value": found.detach().sum(),
        "advantage": advantages.sum(),
        "better_than_value": (advantages > 0).sum().float(),
    }
    return LossTerms(losses.sum(), count_of(losses, mask), metrics)


def idql_critic(
    qs: Tensor,
    rewards: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    mask: Tensor | None = None,
    *,
    discount: float,
) -> LossTerms:
    """``sum over critics of (Q - r - discount V')^2``, with ``V' = 0`` where the episode ended.

    Parameters
    ----------
    qs : Tensor
        ``(critics, batch)``: of the actions taken.
    rewards : Tensor
        ``(batch,)``: with action chunks, the sum over the chunk. Constants.
    next_values : Tensor
        ``(batch,)``: of the observations that followed; of its own final observation where an
        episode was cut. Constants, ignored where it ended.
    terminated : Tensor
        ``(batch,)``, bool: the action ended the episode.
    mask : Tensor, optional
        ``(batch,)``, bool: the rows that count, by default all.
    discount : float
        In [0, 1], of one row: with action chunks, of a chunk.

    Returns
    -------
    LossTerms
        Summed over rows and critics, counted over rows, at least in float32. Metrics, as sums over
        rows: ``q`` (mean over critics) and ``q_target``.

    Raises
    ------
    ValueError
        For a bad shape, dtype or discount, or a target that is not finite.
    """
    check_share("discount", discount)
    if terminated.dtype != torch.bool or terminated.shape != next_values.shape:
        raise ValueError(
            f"terminated has shape {tuple(terminated.shape)} and dtype {terminated.dtype}: it must "
            f"be bool, of the shape of next_values {tuple(next_values.shape)}"
        )
    after = next_values.masked_fill(terminated, 0.0)
    mean, gained, after = counted(
        mask, qs=_critics("qs", qs).mean(0), rewards=rewards, next_values=after
    )
    goals = gained + discount * after
    check_finite("rewards and next_values", goals)
    (each,) = counted(None if mask is None else mask.expand(qs.shape), qs=qs)
    squares = (each - goals).square()
    metrics = {"q": mean.detach().sum(), "q_target": goals.sum()}
    return LossTerms(squares.sum(), count_of(goals, mask), metrics)


def implicit_weights(q: Tensor, v: Tensor, tau: float) -> Tensor:
    """How likely each candidate is to be the action: ``tau`` if ``Q > V``, else ``1 - tau``.

    Among actions of the cloned policy, the weights of the policy that is implicit in a value learnt
    with :func:`expectile` (Hansen-Estruch et al., section 4).

    Parameters
    ----------
    q : Tensor
        ``(batch, candidates)``: of the actions the cloned policy drew.
    v : Tensor
        ``(batch,)``: of the observations.
    tau : float
        In (0, 1).

    Returns
    -------
    Tensor
        ``(batch, candidates)``, not normalised.

    Raises
    ------
    ValueError
        For a bad shape or ``tau``.
    """
    _check_tau(tau)
    if q.ndim != 2 or not q.shape[1] or v.shape != q.shape[:1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}: they must be (batch, "
            "candidates), with a candidate, and (batch,)"
        )
    return (1.0 - tau) + (2.0 * tau - 1.0) * (q > v[:, None]).to(q.dtype)


def implicit_choice(
    q: Tensor, v: Tensor, tau: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Which candidate to act with.

    Parameters
    ----------
    q, v, tau
        As in :func:`implicit_weights`.
    generator : torch.Generator, optional
        Draws a candidate by its weight, as in training. Without it the candidate with the largest
        Q is taken, as in evaluation.

    Returns
    -------
    Tensor
        ``(batch,)``, int64, in [0, candidates).

    Raises
    ------
    ValueError
        As :func:`implicit_weights`.
    """
    weights = implicit_weights(q, v, tau)
    if generator is None:
        return q.argmax(-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move a target network towards the one it follows: ``target += rate (online - target)``.

    Parameters
    ----------
    target, online : nn.Module
        Of the same structure; the target's weights may be buffers. What are buffers of ``online``
        is copied.
    rate : float
        In (0, 1]; 1 copies.

    Raises
    ------
    ValueError
        For a bad rate, or networks whose parameters or buffers do not match.
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate is {rate}: it must lie in (0, 1]")
    trained = dict(online.named_parameters())
    followed = {**trained, **dict(online.named_buffers())}
    following = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    if {name: part.shape for name, part in followed.items()} != {
        name: part.shape for name, part in following.items()
    }:
        raise ValueError("target and online differ in their parameters or buffers")
    for name, part in following.items():
        if name in trained:
            part.lerp_(followed[name], rate)
        else:
            part.copy_(followed[name])


def _check_tau(tau: float) -> None:
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau is {tau}: it must lie in (0, 1)")


def _critics(name: str, qs: Tensor) -> Tensor:
    if qs.ndim != 2 or not len(qs):
        raise ValueError(f"{name} has shape {tuple(qs.shape)}: it must be (critics, batch)")
    return qs
