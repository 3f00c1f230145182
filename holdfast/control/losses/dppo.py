"""Policy optimisation of a diffusion policy: every denoising step is an action of its own.

Ren et al., "Diffusion Policy Policy Optimization": the two-layer process. In the outer layer the
policy acts in the environment; in the inner one it denoises ``K`` times to find that action. The
last ``K'`` denoising steps are fine-tuned, and each is a Gaussian whose log-probability is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.control.losses.ppo import surrogate
from holdfast.control.losses.rows import check_positive, check_share, counted
from holdfast.joint import LossTerms


def dppo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    denoising_index: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon: float = 0.01,
    epsilon_base: float = 0.001,
    rate: float = 3.0,
    denoising_discount: float = 0.99,
    fine_tuned_steps: int,
    dimensions: int = 1,
) -> LossTerms:
    """The clipped surrogate of PPO over denoising steps.

    A denoising step of index ``i`` earns ``denoising_discount^(K' - 1 - i) A``: the noisier the
    step, the less of the action is its own. Its ratio may leave 1 by its :func:`clip_range`.

    Parameters
    ----------
    log_probs : Tensor
        ``(batch, K')``, or rows ``(rows,)`` drawn over environment and denoising steps: of what the
        step denoised to, given what it started from, in nats; the sum over the action's dimensions.
    old_log_probs : Tensor
        Same shape: the same at the rollout. A constant.
    advantages : Tensor
        Of the actions in the environment, ``(batch,)`` or the shape of ``log_probs``. Constants,
        finite in rows that count.
    denoising_index : Tensor
        The shape of ``log_probs``, or ``(K',)`` for all of a batch. Integers from 0, the noisiest
        step that is fine-tuned, to ``K' - 1``, the one that yields the action.
    mask : Tensor, optional
        The shape of ``log_probs``, bool: the rows that count, by default all.
    epsilon, epsilon_base : float
        How far the ratio may leave 1 at the last step, and at the noisiest. Positive.
    rate : float
        How steeply the one becomes the other. Positive.
    denoising_discount : float
        In [0, 1].
    fine_tuned_steps : int
        ``K'``, at least 1.
    dimensions : int
        What log-ratios are divided by. 1: the ratio of the paper, of whole actions. The number of
        numbers in a chunk of actions: the mean over dimensions, with which the reference code works
        and for which these clip ranges are made. That code also holds the log-density of each
        number in [-5, 2], which no number within three deviations of 0.1 to 0.6 ever leaves; here
        nothing does, so that every action keeps its gradient.

    Returns
    -------
    LossTerms
        Summed over rows, at least in float32. Metrics as of :func:`~ppo.ppo`, of the ratio that is
        clipped: with ``dimensions``, ``approx_kl`` is not the divergence of whole actions.

    Raises
    ------
    ValueError
        For a bad shape, dtype, index or number, or an advantage that is not finite.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions is {dimensions}: it must be at least 1")
    check_share("denoising_discount", denoising_discount)
    shape = log_probs.shape
    if denoising_index.shape not in (shape, shape[-1:]):
        raise ValueError(
            f"denoising_index has shape {tuple(denoising_index.shape)}: it must be that of "
            f"log_probs {tuple(shape)}, or its last dimension"
        )
    if advantages.shape not in (shape, shape[:-1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be that of log_probs "
            f"{tuple(shape)}, or that without the denoising steps"
        )
    if advantages.ndim < log_probs.ndim:
        advantages = advantages[..., None].expand(shape)
    new, old, gains = counted(
        mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    if mask is not None and denoising_index.shape == mask.shape:
        denoising_index = denoising_index.masked_fill(~mask, 0)
    bounds = clip_range(
        denoising_index,
        epsilon=epsilon,
        epsilon_base=epsilon_base,
        rate=rate,
        fine_tuned_steps=fine_tuned_steps,
    ).to(new.dtype)
    later = (fine_tuned_steps - 1 - denoising_index).to(new.dtype)
    gains = gains * torch.pow(denoising_discount, later)
    if dimensions > 1:
        new, old = new / dimensions, old / dimensions
    return surrogate(new, old, gains, mask, 1.0 - bounds, 1.0 + bounds)


def clip_range(
    denoising_index: Tensor,
    *,
    epsilon: float,
    epsilon_base: float,
    rate: float = 3.0,
    fine_tuned_steps: int,
) -> Tensor:
    """How far the ratio of a denoising step may leave 1.

    ``epsilon_base + (epsilon - epsilon_base) (exp(rate t) - 1) / (exp(rate) - 1)`` with ``t = i /
    (K' - 1)``. Noisy steps decide more of the action, so they are held closer. Where only one step
    is fine-tuned it is the last, with ``epsilon``. Parameters and errors as in :func:`dppo`.

    Returns
    -------
    Tensor
        The shape of ``denoising_index``, float64.
    """
    check_positive("epsilon", epsilon)
    check_positive("epsilon_base", epsilon_base)
    check_positive("rate", rate)
    if fine_tuned_steps < 1:
        raise ValueError(f"fine_tuned_steps is {fine_tuned_steps}: it must be at least 1")
    if denoising_index.is_floating_point() or denoising_index.dtype == torch.bool:
        raise ValueError(f"denoising_index has dtype {denoising_index.dtype}: it must be integer")
    if bool(((denoising_index < 0) | (denoising_index >= fine_tuned_steps)).any()):
        raise ValueError(
            f"denoising_index runs from {int(denoising_index.min())} to "
            f"{int(denoising_index.max())}: it must lie in [0, {fine_tuned_steps}), from the "
            "noisiest step that is fine-tuned to the last"
        )
    # Of the K' steps there are, not of the rows: the schedule is exact and cheap to look up.
    steps = torch.arange(fine_tuned_steps, dtype=torch.float64, device=denoising_index.device)
    through = steps / (fine_tuned_steps - 1) if fine_tuned_steps > 1 else torch.ones_like(steps)
    # The quotient of the formula, written so that a large rate does not overflow.
    share = torch.exp(rate * (through - 1)) * torch.expm1(-rate * through) / math.expm1(-rate)
    return (epsilon_base + (epsilon - epsilon_base) * share)[denoising_index.long()]
