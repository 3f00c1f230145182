"""Running statistics of rewards and returns, so that critics see numbers of a steady size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Count, mean and squared distance from the mean of all numbers seen, in float64.

    Chan et al., "Algorithms for Computing the Sample Variance": what batches the numbers came in
    makes no difference.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """See ``values`` ``(...)``; ``ValueError`` for one that is not finite."""
        if not values.numel():
            return
        precise = values.detach().double()
        if not bool(precise.isfinite().all()):
            raise ValueError("values has numbers that are not finite")
        count, mean = precise.numel(), float(precise.mean())
        squares = float((precise - mean).square().sum())
        total = self.count + count
        away = mean - self.mean
        self._squares += squares + away**2 * self.count * count / total
        self.mean += away * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation, without Bessel's correction; 1 as long as nothing has varied."""
        found = math.sqrt(self._squares / self.count) if self.count else 0.0
        # Numbers that are equal but for rounding have not varied.
        return found if found > 1e-7 * abs(self.mean) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that was seen."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.count = int(state["count"])
        self.mean, self._squares = float(state["mean"]), float(state["squares"])


class RunningScale:
    """Divides rewards by the deviation of the discounted return so far.

    The return of a step is that up to it, ``R_t = r_t + discount R_{t-1}``, from 0 at the start of
    an episode; it needs no look ahead and has the same scale as the return from it (Engstrom et
    al., "Implementation Matters in Deep Policy Gradients", section 3, "reward scaling"). Rewards
    are not centred: that would change what is optimal.

    Parameters
    ----------
    environments : int
        How many are stepped side by side, at least 1.
    discount : float
        The one that returns are discounted with elsewhere, in [0, 1].
    clip : float, optional
        Scaled rewards are held in ``[-clip, clip]``. Positive; None for no bounds. Where rewards
        are sparse, the first of them meets a deviation of nearly 0.
    """

    def __init__(self, environments: int, *, discount: float, clip: float | None = 10.0) -> None:
        if environments < 1:
            raise ValueError(f"environments is {environments}: it must be at least 1")
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount is {discount}: it must lie in [0, 1]")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: it must be positive, or None")
        self.discount, self.clip = discount, clip
        self.moments = RunningMoments()
        self._returns = torch.zeros(environments, dtype=torch.float64)

    def update(self, rewards: Tensor, ended: Tensor) -> None:
        """See the rewards of some time steps.

        Parameters
        ----------
        rewards : Tensor
            ``(time, environments)``, or ``(environments,)`` for one step.
        ended : Tensor
            Same shape, bool: the episode ended, or was cut, with this reward.

        Raises
        ------
        ValueError
            For a bad shape or dtype, or a reward that is not finite.
        """
        if rewards.ndim not in (1, 2) or rewards.shape[-1:] != self._returns.shape:
            raise ValueError(
                f"rewards has shape {tuple(rewards.shape)}: it must be (time, environments) or "
                f"(environments,), for {len(self._returns)} environments"
            )
        if ended.shape != rewards.shape or ended.dtype != torch.bool:
            raise ValueError(
                f"ended has shape {tuple(ended.shape)} and dtype {ended.dtype}: it must be bool, "
                f"of the shape of rewards {tuple(rewards.shape)}"
            )
        if not bool(rewards.isfinite().all()):
            raise ValueError("rewards has values that are not finite")
        steps = torch.atleast_2d(rewards.detach().to("cpu", torch.float64))
        ends = torch.atleast_2d(ended.cpu())
        returns = torch.empty_like(steps)
        for time, (reward, end) in enumerate(zip(steps, ends, strict=True)):
            returns[time] = reward + self.discount * self._returns
            self._returns = returns[time].masked_fill(end, 0.0)
        self.moments.update(returns)

    def scale(self, rewards: Tensor) -> Tensor:
        """Rewards ``(...)`` over the deviation, in bounds; as they are if nothing has varied."""
        scaled = rewards / self.moments.deviation
        return scaled if self.clip is None else scaled.clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, and the returns of the episodes under way."""
        return {"moments": self.moments.state_dict(), "returns": self._returns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; ``ValueError`` for another number of environments."""
        returns = state["returns"]
        if returns.shape != self._returns.shape:
            raise ValueError(
                f"state has the returns of {returns.numel()} environments, not of "
                f"{len(self._returns)}"
            )
        self.moments.load_state_dict(state["moments"])
        self._returns = returns.to("cpu", torch.float64)


class ValueNormalizer:
    """Lets a critic predict returns of mean 0 and deviation 1, whatever their scale.

    Update with the returns of a rollout, train the critic on ``normalize(returns)``, and read its
    predictions with ``denormalize``. Until it has seen returns it changes nothing.
    """

    def __init__(self) -> None:
        self.moments = RunningMoments()

    def update(self, returns: Tensor) -> None:
        """See returns ``(...)``; ``ValueError`` for one that is not finite."""
        self.moments.update(returns)

    def normalize(self, returns: Tensor) -> Tensor:
        """Returns ``(...)`` as the critic is to predict them."""
        return (returns - self.moments.mean) / self.moments.deviation

    def denormalize(self, predictions: Tensor) -> Tensor:
        """Predictions ``(...)`` of the critic as returns, differentiable."""
        return predictions * self.moments.deviation + self.moments.mean

    def state_dict(self) -> dict[str, Any]:
        """What was seen."""
        return self.moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.moments.load_state_dict(state)
