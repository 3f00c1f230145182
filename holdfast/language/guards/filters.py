"""What happens to advantages between rewards and loss, on the whole batch of rollouts at once.

A filter changes the advantages of some tokens and says which: it leaves a flag ``guard/NAME`` for
every token, whose share is in the metrics. Because it sees a batch of rollouts whole, what it does
does not depend on how the batch is cut into steps, micro-batches or ranks. Hints, which the data
gave and nobody drew, are no part of means, shares or choices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.language.guards.controllers import check_positive
from holdfast.language.rollouts import Rollout

Filter = Callable[[Sequence[Rollout], int], list[Rollout]]
"""From rollouts with advantages, groups in order, and the size of a group, to rollouts."""


@dataclass(frozen=True)
class OutlierFilter:
    """Advantages further than ``limit`` deviations from their mean are set to 0.

    "R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning"
    (StableReinforce): ``|z| <= 3``. Mean and deviation are over the tokens of the rollouts, and
    what is compared is the standardised advantage itself. The tokens stay in the normaliser.

    Attributes
    ----------
    limit : float
        In deviations. Positive.
    """

    limit: float = 3.0

    def __post_init__(self) -> None:
        check_positive(limit=self.limit)

    def __call__(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        everything = torch.cat([row.signals["advantages"][row.hint :] for row in rollouts])
        mean, deviation = everything.mean(), everything.std(correction=0)

        def far(row: Rollout) -> Tensor:
            return _drawn(row) & ((row.signals["advantages"] - mean).abs() > self.limit * deviation)

        return [_without(row, far(row), "advantage_filter") for row in rollouts]


class SmoothedAdvantages:
    """Advantages against all that a prompt has earned so far, where that is the gentler choice.

    DCPO, smooth advantage standardisation. With ``A_new`` of this visit of a prompt, ``A_tot``
    among all completions of its ``i`` visits, ``((i - 1) A_new + A_tot) / i`` and
    ``(A_new + (i - 1) A_tot) / i``, whichever is smaller in size. On a first visit nothing changes.

    Parameters
    ----------
    epsilon : float
        Added to deviations, as in :func:`~holdfast.language.advantages.group_normalized`.
    floor : float
        Smallest deviation that is divided by, as there.
    """

    def __init__(self, epsilon: float = 1e-4, floor: float = 0.0) -> None:
        self.epsilon, self.floor = epsilon, floor
        self.known: dict[str, tuple[int, int, float, float]] = {}
        """Of every prompt: visits, rewards, their mean, and their squares about it."""

    def __call__(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        found: list[Rollout] = []
        for start in range(0, len(rollouts), num_generations):
            found += self._group(rollouts[start : start + num_generations])
        return found

    def _group(self, group: Sequence[Rollout]) -> list[Rollout]:
        origin = group[0].origin
        visits, count, mean, squares = self.known.get(origin, (0, 0, 0.0, 0.0))
        for reward in (row.reward for row in group):
            if not math.isnan(reward):
                count += 1
                above = reward - mean
                mean += above / count
                squares += above * (reward - mean)
        visits += 1
        self.known[origin] = visits, count, mean, squares
        if visits == 1 or count < 2:
            return [_flagged(row, "smoothed", False) for row in group]
        deviation = max(math.sqrt(max(squares, 0.0) / (count - 1)), self.floor) + self.epsilon
        smoothed = []
        for row in group:
            new = row.signals["advantages"]
            total = 0.0 if math.isnan(row.reward) else (row.reward - mean) / deviation
            one = ((visits - 1) * new + total) / visits
            other = (new + (visits - 1) * total) / visits
            gentler = torch.where(one.abs() <= other.abs(), one, other)
            chosen = torch.where(_drawn(row), gentler, new)
            smoothed.append(_flagged(_with(row, advantages=chosen), "smoothed", chosen != new))
        return smoothed

    def state_dict(self) -> dict[str, Any]:
        return {"known": {origin: list(values) for origin, values in self.known.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.known = {
            origin: (int(visits), int(count), float(mean), float(squares))
            for origin, (visits, count, mean, squares) in state["known"].items()
        }


def covariances(rollouts: Sequence[Rollout]) -> Tensor:
    """``(A - mean A) (log pi - mean log pi)`` of all tokens, one rollout after another.

    Under the policy that sampled; NaN at hints. Cui et al., "The Entropy Mechanism of Reinforcement
    Learning for Reasoning Language Models": where it is large, an update lowers the entropy most.
    """
    drawn = torch.cat([_drawn(row) for row in rollouts])
    advantages = torch.cat([row.signals["advantages"] for row in rollouts])
    logps = torch.cat([row.signals["old_logps"] for row in rollouts]).to(advantages.dtype)
    advantages, logps = (x.masked_fill(~drawn, math.nan) for x in (advantages, logps))
    return (advantages - advantages.nanmean()) * (logps - logps.nanmean())


class ClipCov:
    """Some tokens of high covariance, drawn at random, do not learn.

    Cui et al., Clip-Cov: of those with ``lowest < cov < highest``, ``share`` of all tokens. They
    stay in the normaliser.

    Parameters
    ----------
    share : float
        Of all tokens, in (0, 1]; at least one token where any qualifies.
    lowest, highest : float
    seed : int
        Of the draws, with the number of the batch of rollouts.
    """

    def __init__(
        self, share: float = 2e-4, lowest: float = 1.0, highest: float = 5.0, seed: int = 0
    ) -> None:
        if not 0 < share <= 1 or not lowest < highest:
            raise ValueError(
                f"share is {share}, lowest {lowest} and highest {highest}: share must lie in "
                "(0, 1], and lowest below highest"
            )
        self.share, self.lowest, self.highest, self.seed = share, lowest, highest, seed
        self.batches = 0

    def __call__(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        cov = covariances(rollouts)
        fitting = ((self.lowest < cov) & (cov < self.highest)).nonzero().squeeze(-1).tolist()
        wanted = min(len(fitting), _share_of(cov, self.share))
        draw = random.Random(f"clip-cov/{self.seed}/{self.batches}")
        self.batches += 1
        chosen = torch.zeros(len(cov), dtype=torch.bool)
        chosen[draw.sample(fitting, wanted)] = True
        parts = chosen.split([row.counted for row in rollouts])
        return [_without(row, part, "clip_cov") for row, part in zip(rollouts, parts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = int(state["batches"])


@dataclass(frozen=True)
class KlCov:
    """Marks the tokens of highest covariance, which are to be held near the policy that sampled.

    Cui et al., KL-Cov: the loss adds a multiple of ``|log r|`` at ``share`` of all tokens.

    Attributes
    ----------
    share : float
        Of all tokens, in (0, 1]; at least one.
    """

    share: float = 2e-4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: it must lie in (0, 1]")

    def __call__(self, rollouts: Sequence[Rollout], num_generations: int) -> list[Rollout]:
        cov = covariances(rollouts)
        chosen = torch.zeros(len(cov), dtype=torch.bool)
        # NaN would be the largest of all.
        chosen[cov.nan_to_num(-math.inf).topk(_share_of(cov, self.share)).indices] = True
        parts = chosen.split([row.counted for row in rollouts])
        return [_flagged(row, "kl_cov", part) for row, part in zip(rollouts, parts, strict=True)]


def _share_of(cov: Tensor, share: float) -> int:
    """A share of the tokens that were drawn."""
    return math.ceil(share * int((~cov.isnan()).sum()))


def _drawn(row: Rollout) -> Tensor:
    """``(counted,)``, bool: all tokens but those of a hint."""
    return torch.arange(row.counted) >= row.hint


def _without(row: Rollout, dropped: Tensor, name: str) -> Rollout:
    advantages = row.signals["advantages"].masked_fill(dropped, 0.0)
    return _flagged(_with(row, advantages=advantages), name, dropped)


def _flagged(row: Rollout, name: str, flags: Tensor | bool) -> Rollout:
    if isinstance(flags, bool):
        flags = torch.full((row.counted,), flags)
    return _with(row, **{f"guard/{name}": flags})


def _with(row: Rollout, **signals: Tensor) -> Rollout:
    return replace(row, signals={**row.signals, **signals})
