"""The steps of a diffusion sampler, as one small table of numbers.

Every step draws ``x' ~ N(to_clean x0 + to_noisy x, std^2)``, where ``x0`` is the prediction of the
clean chunk, clipped. That is the family of Song et al., "Denoising Diffusion Implicit Models",
equation 12, with the noise taken from the clipped ``x0``: ``eta = 1`` over all steps is DDPM (Ho et
al., "Denoising Diffusion Probabilistic Models", equation 7), ``eta = 0`` draws nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdfast.errors import ModelError

Sampler = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class DenoisingTable:
    """Numbers of the sampling steps, noisiest first, and of the forward process.

    Attributes
    ----------
    timesteps : Tensor
        ``(sampling_steps,)``, int64: the training step that each sampling step undoes.
    to_clean, to_noisy, std : Tensor
        ``(sampling_steps,)``: weights of the mean, and the deviation.
    signal, noise : Tensor
        ``(steps,)``, by training step: a noised chunk is ``signal x0 + noise eps``.
    """

    timesteps: Tensor
    to_clean: Tensor
    to_noisy: Tensor
    std: Tensor
    signal: Tensor
    noise: Tensor


def denoising_table(
    steps: int, sampler: Sampler, sampling_steps: int, *, eta: float = 1.0
) -> DenoisingTable:
    """The numbers for a cosine schedule (Nichol & Dhariwal, equation 17), from diffusers.

    Parameters
    ----------
    steps : int
        Of the forward process, at least 1.
    sampler : str
        ``ddpm`` takes every step; ``ddim`` may skip, ending at the noisiest step and at the data
        (diffusers' spacing ``trailing``).
    sampling_steps : int
        Steps that are taken: a divisor of ``steps``.
    eta : float
        Share of DDPM's deviation that is drawn, in [0, 1].

    Returns
    -------
    DenoisingTable
        In float32, computed in float64.

    Raises
    ------
    ValueError
        For an unknown sampler, or numbers of steps that do not fit it.
    ModelError
        If diffusers is not installed.
    """
    if sampler not in get_args(Sampler):
        known = ", ".join(get_args(Sampler))
        raise ValueError(f"sampler is {sampler!r}: it must be one of {known}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    if sampling_steps < 1 or steps % sampling_steps:
        raise ValueError(f"sampling_steps is {sampling_steps}: it must divide steps, {steps}")
    if sampler == "ddpm" and sampling_steps != steps:
        raise ValueError(
            f"sampling_steps is {sampling_steps}: ddpm takes all {steps} steps; ddim can skip some"
        )
    scheduler = _scheduler(steps, sampler)
    scheduler.set_timesteps(sampling_steps)
    timesteps: Tensor = scheduler.timesteps.cpu().long()
    kept: Tensor = scheduler.alphas_cumprod.double()  # share of the data's variance, by step
    before = timesteps - steps // sampling_steps
    now, then = kept[timesteps], torch.where(before >= 0, kept[before.clamp(min=0)], 1.0)
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    # Rounding makes the difference negative at the last step, where it is 0.
    to_noisy = ((1 - then - variance).clamp(min=0.0) / (1 - now)).sqrt()
    to_clean = then.sqrt() - to_noisy * now.sqrt()
    numbers = (to_clean, to_noisy, variance.sqrt(), kept.sqrt(), (1 - kept).sqrt())
    return DenoisingTable(timesteps, *(number.float() for number in numbers))


def _scheduler(steps: int, sampler: Sampler) -> Any:
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ModelError(
            "a diffusion policy needs diffusers, which cannot be imported "
            f"({error}); install it with: pip install 'holdfast[control]'"
        ) from error
    kind = diffusers.DDPMScheduler if sampler == "ddpm" else diffusers.DDIMScheduler
    return kind(
        num_train_timesteps=steps,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
    )
