"""Losses of imitation on chunks of actions.

A chunk may run past the end of its episode; a mask says which of its positions count. Every loss
sums over the counted positions and counts them, so neither padding nor the way a batch is cut
changes a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.joint import LossTerms


def nll(log_probs: Tensor, mask: Tensor) -> LossTerms:
    """Negative log-likelihood of the demonstrated actions.

    Parameters
    ----------
    log_probs : Tensor
        ``(batch, horizon)``: log-density of the action at each position, summed over its
        dimensions, in nats. Ignored where ``mask`` is False, whatever they are.
    mask : Tensor
        ``(batch, horizon)``, bool: the positions that count.

    Returns
    -------
    LossTerms
        Summed over positions, at least in float32. Metric ``nll``.

    Raises
    ------
    ValueError
        For a bad shape or dtype.
    """
    _check_mask(mask)
    if log_probs.shape != mask.shape:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)}: it must be that of mask, "
            f"{tuple(mask.shape)}"
        )
    return _terms("nll", -_wide("log_probs", log_probs), mask)


def mse(predicted: Tensor, target: Tensor, mask: Tensor) -> LossTerms:
    """Squared error of predicted actions, a mean over their dimensions.

    Parameters
    ----------
    predicted, target : Tensor
        ``(batch, horizon, action)``: normalised actions. ``target`` is a constant. Ignored where
        ``mask`` is False, whatever they are.
    mask : Tensor
        ``(batch, horizon)``, bool: the positions that count.

    Returns
    -------
    LossTerms
        Summed over positions, at least in float32. Metric ``mse``.

    Raises
    ------
    ValueError
        For a bad shape or dtype.
    """
    return _squared("mse", predicted, "predicted", target, "target", mask)


def denoising(predicted_noise: Tensor, noise: Tensor, mask: Tensor) -> LossTerms:
    """Squared error of predicted noise, a mean over action dimensions.

    Ho et al., "Denoising Diffusion Probabilistic Models", equation 14, with a mean in place of the
    norm.

    Parameters
    ----------
    predicted_noise, noise : Tensor
        ``(batch, horizon, action)``: of one random denoising step for each chunk. ``noise`` is a
        constant. Ignored where ``mask`` is False, whatever they are.
    mask : Tensor
        ``(batch, horizon)``, bool: the positions that count.

    Returns
    -------
    LossTerms
        Summed over positions, at least in float32. Metric ``denoising``.

    Raises
    ------
    ValueError
        For a bad shape or dtype.
    """
    return _squared("denoising", predicted_noise, "predicted_noise", noise, "noise", mask)


def _squared(
    metric: str, values: Tensor, name: str, targets: Tensor, target_name: str, mask: Tensor
) -> LossTerms:
    _check_mask(mask)
    if values.ndim != 3 or values.shape[:2] != mask.shape or not values.shape[2]:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}: it must be (batch, horizon, action), and "
            f"mask has shape {tuple(mask.shape)}"
        )
    if targets.shape != values.shape:
        raise ValueError(
            f"{target_name} has shape {tuple(targets.shape)}: it must be that of {name}, "
            f"{tuple(values.shape)}"
        )
    # Masked before they are subtracted: the gradient of a square at NaN would not be 0.
    ignored = ~mask[..., None]
    wide = _wide(name, values).masked_fill(ignored, 0.0)
    goal = _wide(target_name, targets).detach().masked_fill(ignored, 0.0)
    return _terms(metric, (wide - goal).square().mean(-1), mask)


def _terms(metric: str, losses: Tensor, mask: Tensor) -> LossTerms:
    total = losses.masked_fill(~mask, 0.0).sum()
    return LossTerms(total, mask.sum(), {metric: total.detach()})


def _check_mask(mask: Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: it must be (batch, "
            "horizon), of bool"
        )


def _wide(name: str, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}: it must be floating point")
    return values.to(torch.promote_types(values.dtype, torch.float32))
