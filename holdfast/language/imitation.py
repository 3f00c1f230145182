"""The data's own completions among the policy's: group members, hints, and a gate on solve rates.

Each is the :class:`~holdfast.language.rollouts.Group` of an on-policy source. The demonstrations
are those of the rows that the prompts come from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdfast.language.data import Demonstration
from holdfast.language.encoding import Encoded
from holdfast.language.guards.controllers import check_positive
from holdfast.language.rollouts import Rollout, masked

Score = Callable[[Sequence[Rollout]], list[Rollout]]
Action = Literal["imitate", "replace", "buffer"]


class Imitation:
    """Demonstrations by the origin of their prompt; does nothing with them by itself.

    Parameters
    ----------
    demonstrations : sequence of Demonstration
    """

    members = 0

    def __init__(self, demonstrations: Sequence[Demonstration]) -> None:
        self._tokens = {row.origin: row.tokens for row in demonstrations}

    def completion(self, origin: str) -> Encoded:
        return self._tokens[origin]

    def hint(self, origin: str, name: str, step: int) -> Sequence[int]:
        return ()

    def admit(self, rollouts: list[Rollout], num_generations: int, score: Score) -> list[Rollout]:
        return rollouts

    def due(self, batch_size: int) -> list[Rollout]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Members(Imitation):
    """Demonstrations are members of their prompts' groups, rewarded and compared like all others.

    Yan et al., "Learning to Reason under Off-Policy Guidance" (LUFFY), which has one among eight.

    Parameters
    ----------
    demonstrations : sequence of Demonstration
    members : int
        Of every group, at least 1. They are the same one: more than one only weighs it more.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], members: int = 1) -> None:
        super().__init__(demonstrations)
        if members < 1:
            raise ValueError(f"members is {members}: it must be at least 1")
        self.members = members

    def admit(self, rollouts: list[Rollout], num_generations: int, score: Score) -> list[Rollout]:
        # Their rewards have been compared, and are not what the policy earns.
        return [_unrewarded(row) if row.demonstration else row for row in rollouts]


class Hints(Imitation):
    """Completions go on from a beginning of the demonstration, which is shorter as time goes by.

    "UFT: Unifying Supervised and Reinforcement Fine-Tuning". A demonstration is cut into
    ``segments``; of them a binomial number with the probability ``p`` is given, and at least its
    last token is not. ``p`` falls along a cosine from ``start`` to ``end``; after ``steps`` there
    are no hints. All completions of a prompt get the same one.

    Parameters
    ----------
    demonstrations : sequence of Demonstration
    segments : int
        At least 1.
    start, end : float
        Probabilities, in [0, 1].
    steps : int
        Optimiser steps of the source, at least 1.
    """

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        *,
        segments: int = 5,
        start: float = 0.95,
        end: float = 0.05,
        steps: int = 300,
    ) -> None:
        super().__init__(demonstrations)
        if segments < 1 or steps < 1:
            raise ValueError(f"segments is {segments} and steps {steps}: they must be at least 1")
        if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
            raise ValueError(f"start is {start} and end {end}: they must lie in [0, 1]")
        self.segments, self.start, self.end, self.steps = segments, start, end, steps

    def probability(self, step: int) -> float:
        """Of a segment to be given, at an optimiser step of the source."""
        if step >= self.steps:
            return 0.0
        share = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.end + share * (self.start - self.end)

    def hint(self, origin: str, name: str, step: int) -> Sequence[int]:
        tokens = self._tokens[origin]
        ids = tokens.input_ids[tokens.counted].tolist()
        draw = random.Random(f"hint/{name}")
        probability = self.probability(step)
        given = sum(draw.random() < probability for _ in range(self.segments))
        return list(ids[: min(math.ceil(given * len(ids) / self.segments), len(ids) - 1)])


class SolveRateGate(Imitation):
    """A prompt that the policy solves too rarely is learnt from its demonstration.

    A completion solves its prompt with a reward above ``solved_above``; a prompt none of whose
    completions was judged is not known to be unsolved. What happens to a group of which at most
    ``threshold`` completions do:

    - ``imitate``: the demonstration takes the place of the group, whose own completions leave the
      normaliser. "Towards a Unified View of Large Language Model Post-Training" (HPT), with a
      threshold of 0 or 2 of 8; "SuperRL", with 0.
    - ``replace``: the demonstration takes the place of the first completion; the others have an
      advantage of 0 and stay in the normaliser. "DyME".
    - ``buffer``: the prompt is put by. Once there are as many as an optimiser step has rows, a step
      on their demonstrations alone goes before the next rollouts. "ReLIFT".

    Parameters
    ----------
    demonstrations : sequence of Demonstration
    action : str
    threshold : int
        At least 0.
    coefficient : float
        Advantage of a demonstration's tokens: what its log-likelihood is multiplied by. Positive.
    solved_above : float
        In the units of the reward.
    """

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        *,
        action: Action = "imitate",
        threshold: int = 0,
        coefficient: float = 1.0,
        solved_above: float = 0.0,
    ) -> None:
        super().__init__(demonstrations)
        if action not in get_args(Action):
            raise ValueError(
                f"action is {action!r}: it must be one of {', '.join(get_args(Action))}"
            )
        if threshold < 0:
            raise ValueError(f"threshold is {threshold}: it must not be negative")
        check_positive(coefficient=coefficient)
        self.action, self.threshold = action, threshold
        self.coefficient, self.solved_above = coefficient, solved_above
        self.buffer: list[str] = []
        """Origins of prompts that were put by."""
        self._template: list[str] = []

    def admit(self, rollouts: list[Rollout], num_generations: int, score: Score) -> list[Rollout]:
        size = num_generations
        groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        unsolved = [index for index, group in enumerate(groups) if self._fails(group)]
        self._template = [name for name in rollouts[0].signals if name.startswith("guard/")]
        if self.action == "buffer":
            self.buffer += [groups[index][0].origin for index in unsolved]
            return rollouts
        given = score([self._row(groups[index][0]) for index in unsolved])
        for index, row in zip(unsolved, given, strict=True):
            others = groups[index][1:]
            kept = [masked(x) if self.action == "imitate" else _worthless(x) for x in others]
            groups[index] = [self._with_advantages(row), *kept]
        return [row for group in groups for row in group]

    def due(self, batch_size: int) -> list[Rollout]:
        if len(self.buffer) < batch_size:
            return []
        taken, self.buffer = self.buffer[:batch_size], self.buffer[batch_size:]
        return [
            self._with_advantages(
                Rollout(self.completion(origin), origin, True, demonstration=True)
            )
            for origin in taken
        ]

    def _fails(self, group: Sequence[Rollout]) -> bool:
        judged = [row.reward for row in group if not math.isnan(row.reward)]
        return bool(judged) and sum(r > self.solved_above for r in judged) <= self.threshold

    def _row(self, instead: Rollout) -> Rollout:
        """In the place of a completion, whose reward stays in the record."""
        tokens = self.completion(instead.origin)
        return replace(
            instead, tokens=tokens, completed=True, demonstration=True, hint=0, signals={}
        )

    def _with_advantages(self, row: Rollout) -> Rollout:
        counted = row.counted
        signals = {"advantages": torch.full((counted,), self.coefficient)}
        signals |= {name: torch.zeros(counted, dtype=torch.bool) for name in self._template}
        return replace(row, signals={**row.signals, **signals})

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": list(self.buffer), "template": list(self._template)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer, self._template = list(state["buffer"]), list(state["template"])


@dataclass(frozen=True)
class DemonstrationLoss:
    """How the data's own completions are learnt from among the policy's.

    Attributes
    ----------
    shaping : float, optional
        ``gamma`` of ``-A pi / (pi + gamma)``, whose gradient does not fade where the policy would
        hardly write the token. Yan et al., "Learning to Reason under Off-Policy Guidance" (LUFFY),
        policy shaping. ``None``: ``-A log pi``, plain imitation.
    entropy_weights : bool
        Imitation with the weight ``0.5 exp(-H)`` is added, and advantages of the policy's own
        completions are multiplied by ``0.1 exp(H)`` where they are positive, ``H`` the mean entropy
        of a sequence. "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning
        for Reasoning".
    """

    shaping: float | None = None
    entropy_weights: bool = False

    def __post_init__(self) -> None:
        if self.shaping is not None:
            check_positive(shaping=self.shaping)

    def __call__(self, logps: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
        """Losses ``(rows, time)`` of demonstrations; ``entropy`` of each ``(rows, 1)``."""
        likelihood = logps
        if self.shaping is not None:
            likelihood = logps.exp() / (logps.exp() + self.shaping)
        losses = -advantages * likelihood
        if self.entropy_weights:
            losses = losses - 0.5 * torch.exp(-entropy) * logps
        return losses

    def own_advantages(self, advantages: Tensor, entropy: Tensor) -> Tensor:
        """What becomes of those of the policy's own completions, ``(rows, time)``."""
        if not self.entropy_weights:
            return advantages
        return torch.where(advantages > 0, advantages * 0.1 * torch.exp(entropy), advantages)


def _unrewarded(row: Rollout) -> Rollout:
    return replace(row, reward=math.nan, rewards=dict.fromkeys(row.rewards, math.nan))


def _worthless(row: Rollout) -> Rollout:
    advantages = torch.zeros_like(row.signals["advantages"])
    return replace(row, signals={**row.signals, "advantages": advantages})
