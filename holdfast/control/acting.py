"""A policy as an environment sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from holdfast.control.environments import Act
from holdfast.control.policies import Policy


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for batches as small as those of acting, more only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def acting(policy: Policy, *, seed: int, deterministic: bool = True) -> Act:
    """A function from observations to chunks of actions.

    Parameters
    ----------
    policy : Policy
        Asked as it stands whenever the function is called.
    seed : int
        Of the noise that a diffusion policy starts from, and of exploration.
    deterministic : bool
        See :meth:`Policy.act`.
    """
    generator = torch.Generator().manual_seed(seed)

    def act(observations: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen = torch.from_numpy(observations).to(next(policy.parameters()).device)
        decision = policy.act(seen, generator, deterministic=deterministic)
        return decision.actions.float().cpu().numpy()

    return act
