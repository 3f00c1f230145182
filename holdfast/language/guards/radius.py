"""How far a step may go before the softmax of a token leaves its radius of convergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_radius(directional_logits: Tensor) -> Tensor:
    """``pi / (max_k a_k - min_k a_k)`` of every row, ``a`` the derivative of logits along a step.

    Sao, "Ghosts of Softmax" (multiclass bound): along a direction in which logits change at the
    rates ``a``, every zero of ``sum_k exp(z_k + a_k t)`` in the complex plane has an imaginary part
    of at least this size. Within it the log-partition is given by its Taylor series; to linear
    order, a step of length ``t`` changes no log-probability by more than ``t (max - min)``, which
    is ``pi`` at the radius. This bounds how far a step moves the policy. It does not promise that a
    loss falls.

    Parameters
    ----------
    directional_logits : Tensor
        ``(..., vocab)``: derivative of the logits along the step, per unit of its length; for the
        step itself in place of a direction the radius is in steps. Entries of minus infinity or
        NaN stand for ids that are left out of the spread (banned ones, or improbable ones).

    Returns
    -------
    Tensor
        ``(...)``, at least float32, positive; infinite where no id moves against another.

    Raises
    ------
    ValueError
        For a tensor without a vocabulary.
    """
    if directional_logits.ndim == 0 or directional_logits.shape[-1] == 0:
        raise ValueError(
            f"directional_logits has shape {tuple(directional_logits.shape)}: it must be "
            "(..., vocab)"
        )
    kind = torch.promote_types(directional_logits.dtype, torch.float32)
    rates = directional_logits.to(kind)
    left_out = rates.isnan() | rates.isneginf()
    highest = rates.masked_fill(left_out, -math.inf).amax(-1)
    lowest = rates.masked_fill(left_out, math.inf).amin(-1)
    # A row of which everything is left out has no spread: its radius is infinite as well.
    return math.pi / (highest - lowest).clamp(min=0.0)
