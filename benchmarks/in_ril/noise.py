"""A control: an objective whose gradient is a random direction, new in every update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.actor_critic import ActorCritic
from holdfast.joint import Objective
from holdfast.joint.objective import LossTerms


@dataclass
class Numbers:
    """A source of batches of one number each: the seed of a direction."""

    next_number: int

    def next(self) -> list[int]:
        self.next_number += 1
        return [self.next_number]

    def state_dict(self) -> dict[str, Any]:
        return {"next_number": self.next_number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_number = int(state["next_number"])


def random_direction(policy: nn.Module, rows: Sequence[int]) -> LossTerms:
    """``ξ · θ`` over the parameters that imitation trains, with ξ standard normal: its gradient."""

    def read(inner: ActorCritic) -> Tensor:
        generator = torch.Generator().manual_seed(rows[0])
        parts = [
            (torch.randn(parameter.shape, generator=generator) * parameter).sum()
            for parameter in inner.actor.cloned.parameters()
            if parameter.requires_grad
        ]
        return torch.stack(parts).sum()

    return LossTerms(policy(read), torch.tensor(1))


def in_place_of(imitation: Objective, seed: int) -> Objective:
    """The objective with random gradients; what it is evaluated on stays."""
    return replace(
        imitation,
        loss=random_direction,
        source=Numbers(seed * 10**6),
        evaluate=imitation.loss,
        observed=lambda summary: summary.loss,
        micro_batch_size=None,
    )
