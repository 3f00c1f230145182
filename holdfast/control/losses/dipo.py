"""Improve logged actions along the gradient of a critic, then clone the improved ones.

Yang et al., "Policy Representation via Diffusion Probability Model for Reinforcement Learning"
(DIPO). The improved actions take the place of the old ones in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.control.losses.rows import check_positive


def improve_actions(
    q: Callable[[Tensor], Tensor],
    actions: Tensor,
    *,
    steps: int = 10,
    rate: float = 1e-4,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Adam steps on actions that make a critic value them more.

    Parameters
    ----------
    q : callable
        From actions, of the shape given, to the value of each ``(batch,)``, differentiable; for
        twin critics, the smaller. It knows the observations. Its parameters get no gradient.
    actions : Tensor
        ``(batch, ...)``, floating point: from the buffer. Left as they are.
    steps : int
        At least 1.
    rate : float
        Adam's learning rate, in the units of actions. Positive.
    bounds : tuple of float
        Smallest and largest number in an action; held after every step.

    Returns
    -------
    Tensor
        ``(batch, ...)``: new actions, without a graph. One of them does not depend on the others if
        its value does not.

    Raises
    ------
    ValueError
        For a bad dtype or number, or values of a wrong shape.
    """
    if not actions.is_floating_point():
        raise ValueError(f"actions has dtype {actions.dtype}: it must be floating point")
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    check_positive("rate", rate)
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds are {bounds}: the first must be the smaller")
    improved = actions.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([improved], lr=rate)
    for _ in range(steps):
        with torch.enable_grad():
            values = q(improved)
            if values.shape != actions.shape[:1]:
                raise ValueError(
                    f"q returns shape {tuple(values.shape)}: it must be (batch,), and actions has "
                    f"shape {tuple(actions.shape)}"
                )
            # A sum, not a mean: an action's step is then the same in a batch of any size.
            (improved.grad,) = torch.autograd.grad(-values.sum(), improved)
        optimizer.step()
        with torch.no_grad():
            improved.clamp_(*bounds)
    return improved.detach()
