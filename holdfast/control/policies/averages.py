"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


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
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the weights of ``network``; call it after every step of the optimiser."""
        done = int(self.updates)
        decay = min(self.decay, done / (done + 10))
        for average, present in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(present, 1.0 - decay)
        self.updates += 1
