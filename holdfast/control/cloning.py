"""Cloning of chunks, row by row: a term of objectives that clone what they themselves collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from holdfast.control.policies import DiffusionPolicy, GaussianPolicy, Policy

CloningLoss = Literal["nll", "mse", "denoising"]


def cloning_loss_of(actor: Policy) -> CloningLoss:
    """What a policy is cloned with unless a recipe says otherwise."""
    return "denoising" if isinstance(actor, DiffusionPolicy) else "mse"


def draw_noise(actor: Policy, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Columns ``timesteps`` and ``noise`` of ``count`` rows; none where nothing is denoised.

    Drawn with a batch, so that the loss of a row does not depend on how the batch is cut.
    """
    if not isinstance(actor, DiffusionPolicy):
        return {}
    steps: Literal["all", "fine-tuned"] = "fine-tuned" if actor.fine_tuning else "all"
    timesteps, noise = actor.draw_noise(count, generator, steps=steps)
    return {"timesteps": timesteps, "noise": noise}


def row_losses(actor: Policy, columns: Mapping[str, Tensor], kind: CloningLoss) -> Tensor:
    """The cloning loss of every chunk, a mean over the positions that count.

    Parameters
    ----------
    actor : Policy
        A diffusion policy for ``denoising``, else a Gaussian one.
    columns : mapping of str to Tensor
        ``observations`` ``(batch, history, size)``, ``actions`` ``(batch, horizon, action_size)``,
        ``mask`` ``(batch, horizon)`` with a position that counts in every row, and what
        :func:`draw_noise` drew.
    kind : str
        ``nll``, ``mse`` or ``denoising``, as in :mod:`holdfast.control.losses.cloning`.

    Returns
    -------
    Tensor
        ``(batch,)``, differentiable.
    """
    observations, actions, mask = (columns[n] for n in ("observations", "actions", "mask"))
    actions = actions.masked_fill(~mask[..., None], 0.0)
    if kind == "denoising":
        assert isinstance(actor, DiffusionPolicy)
        noise = columns["noise"]
        predicted = actor.predict_noise(observations, actions, columns["timesteps"], noise, mask)
        positions = (predicted - noise).square().mean(-1)
    else:
        assert isinstance(actor, GaussianPolicy)
        if kind == "nll":
            positions = -actor.position_log_probs(observations, actions)
        else:
            gap = actor.mean(observations) - actor.actions.normalize(actions)
            positions = gap.square().mean(-1)
    return positions.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
