"""A chunk to clone beside every row of rollouts: imitation as a term of reinforcement learning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.control.cloning import CloningLoss, draw_noise, row_losses
from holdfast.control.demonstrations import Chunks
from holdfast.control.losses import Cloned, with_cloning
from holdfast.control.policies import Policy
from holdfast.control.rollouts import EnvironmentRollouts
from holdfast.joint.objective import LossTerms
from holdfast.joint.table import Table

_PREFIX = "cloned/"

Companion = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
"""From observations ``(batch, history, size)`` of rows to ``observations``, ``actions`` and
``mask`` of as many chunks to clone."""


def of_demonstrations(chunks: Chunks) -> Companion:
    """Chunks drawn from demonstrations, whatever the row."""

    def draw(observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(chunks), (len(observations),), generator=generator)
        return chunks.gather(chosen)._asdict()

    return draw


def of_teacher(policy: Policy) -> Companion:
    """What ``policy``, as it is now and stays, would have done where the row was."""
    teacher = copy.deepcopy(policy).requires_grad_(False)

    def draw(observations: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        device = next(teacher.parameters()).device
        actions = teacher.act(observations.to(device), generator).actions.cpu()
        mask = torch.ones(actions.shape[:2], dtype=torch.bool)
        return {"observations": observations, "actions": actions, "mask": mask}

    return draw


class Accompanied:
    """Batches of rollouts, with a chunk to clone beside every row.

    As many chunks as rows, so that the cloning term does not depend on how a batch is cut. They
    depend on the seed and the position of the rollouts, which are the whole state.

    Parameters
    ----------
    rollouts : EnvironmentRollouts
    companion : callable
    seed : int
    """

    def __init__(self, rollouts: EnvironmentRollouts, companion: Companion, *, seed: int) -> None:
        self.rollouts = rollouts
        self.companion = companion
        self.seed = seed

    @property
    def updates(self) -> int:
        """Updates that a batch of rollouts serves, unless it is stopped before."""
        return self.rollouts.updates

    def next(self) -> Table:
        """The rows of the next update, with columns of what is cloned."""
        rows = self.rollouts.next()
        key = (self.seed, self.rollouts.round, self.rollouts.used)
        draw = torch.Generator().manual_seed(hash(key) & (2**62 - 1))
        beside = self.companion(rows.columns["observations"], draw)
        beside |= draw_noise(self.rollouts.policy.actor, len(rows), draw)
        rows.columns.update({f"{_PREFIX}{name}": column for name, column in beside.items()})
        return rows

    def state_dict(self) -> dict[str, Any]:
        return self.rollouts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts.load_state_dict(state)


@dataclass
class Regularisation:
    """The cloning term of :class:`Accompanied` batches.

    Attributes
    ----------
    weight : float
        At least 0.
    of : str
        ``demonstrations`` or ``teacher``.
    clone : str
        See :func:`~holdfast.control.cloning.row_losses`.
    """

    weight: float
    of: Cloned
    clone: CloningLoss

    def losses(self, actor: Policy, columns: Mapping[str, Tensor]) -> Tensor:
        """``(batch,)``: of the chunk beside each row, differentiable."""
        beside = {
            name.removeprefix(_PREFIX): column
            for name, column in columns.items()
            if name.startswith(_PREFIX)
        }
        return row_losses(actor, beside, self.clone)

    def add(self, terms: LossTerms, losses: Tensor) -> LossTerms:
        """The terms of the rows, with those of what stands beside them."""
        count = torch.tensor(len(losses), device=losses.device)
        return with_cloning(terms, LossTerms(losses.sum(), count), weight=self.weight, of=self.of)
