"""Copies of a network that are not trained, and one that follows it slowly."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def untrained_copy(network: nn.Module) -> nn.Module:
    """A copy whose weights are buffers: no optimiser sees them, and every checkpoint holds them.

    A checkpoint has what is trained, and buffers. It leaves frozen parameters out, since those are
    read again from where they came from; but a copy that moves comes from nowhere else.
    """
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
    return copied


class ExponentialAverage(nn.Module):
    """A second copy of a network that follows it slowly.

    After the ``n``-th update its weights are ``d`` times what they were plus ``1 - d`` times those
    of the network, with ``d = min(decay, n / (n + 10))`` counting from ``n = 0``: the first update
    copies, so the initial weights are forgotten, and early averages are short. The copy and the
    number of updates are part of the state.

    Parameters
    ----------
    network : nn.Module
        What is averaged. Not kept: pass it to every :meth:`update`.
    decay : float
        Largest ``d``, in [0, 1).

    Raises
    ------
    ValueError
        For a decay out of range.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not (math.isfinite(decay) and 0.0 <= decay < 1.0):
            raise ValueError(f"decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self.network = untrained_copy(network)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the weights of ``network``; call it after every step of the optimiser."""
        done = int(self.updates)
        decay = min(self.decay, done / (done + 10))
        averages = dict(self.network.named_buffers())
        for name, present in network.named_parameters():
            averages[name].lerp_(present, 1.0 - decay)
        self.updates += 1
