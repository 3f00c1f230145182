"""Rows to clone from: what a policy sees, and the chunk of actions that followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from holdfast.control.demonstrations.episodes import Demonstrations


class Chunk(NamedTuple):
    """One row, or a batch of rows with an axis in front.

    Attributes
    ----------
    observations : Tensor
        ``(history, observation_size)``, oldest first. Before an episode's first observation stands
        that observation again, as environments do it.
    actions : Tensor
        ``(horizon, action_size)``. After an episode's last action stands that action again.
    mask : Tensor
        ``(horizon,)``, bool: which actions are of the episode, and so count.
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor


class Chunks(Sequence[Chunk]):
    """Every step of every episode as a row.

    Parameters
    ----------
    demonstrations : Demonstrations
        At least one episode.
    history : int
        Observations a row, at least 1.
    horizon : int
        Actions a row, at least 1.
    """

    def __init__(self, demonstrations: Demonstrations, *, history: int = 1, horizon: int = 1):
        if history < 1 or horizon < 1:
            raise ValueError(f"history is {history}, horizon {horizon}: both must be at least 1")
        if not len(demonstrations):
            raise ValueError("demonstrations is empty")
        self.history, self.horizon = history, horizon
        # Padded once, so that every row is a slice.
        seen, done, starts, left = [], [], [], []
        first = np.zeros(2, dtype=np.int64)
        for episode in demonstrations:
            steps = len(episode)
            seen.append(np.repeat(episode.observations[:1], history - 1, axis=0))
            seen.append(episode.observations[:steps])
            done.append(episode.actions)
            done.append(np.repeat(episode.actions[-1:], horizon - 1, axis=0))
            starts.append(np.stack([np.arange(steps)] * 2, axis=1) + first)
            left.append(np.arange(steps, 0, -1))
            first = first + np.array([steps + history - 1, steps + horizon - 1])
        self._observations = torch.from_numpy(np.concatenate(seen))
        self._actions = torch.from_numpy(np.concatenate(done))
        self._starts = torch.from_numpy(np.concatenate(starts))
        self._left = torch.from_numpy(np.concatenate(left))

    def __len__(self) -> int:
        return len(self._left)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...

    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        """Row ``index``, or the rows of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        seen, done = self._starts[index].tolist()
        return Chunk(
            self._observations[seen : seen + self.history],
            self._actions[done : done + self.horizon],
            torch.arange(self.horizon) < self._left[index],
        )

    def gather(self, indices: Tensor) -> Chunk:
        """The rows ``indices`` ``(batch,)`` as one batch: what :func:`stack` would give, faster."""
        starts = self._starts[indices]
        ahead = torch.arange(self.horizon)
        return Chunk(
            self._observations[starts[:, :1] + torch.arange(self.history)],
            self._actions[starts[:, 1:] + ahead],
            ahead < self._left[indices, None],
        )


def stack(rows: Sequence[Chunk]) -> Chunk:
    """Rows as one batch."""
    return Chunk(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
