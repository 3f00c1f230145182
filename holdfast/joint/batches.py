"""An endless, shuffled source of batches over rows that are held in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Batches(Generic[T]):
    """Shuffled batches without end.

    The order of an epoch depends on ``(seed, epoch)``, the number of rows and the batch size alone,
    so two integers are the whole state. Every row comes exactly once an epoch. Batches are always
    full: the last one of an epoch is filled up with the first rows of the next.

    Parameters
    ----------
    rows : sequence
        At least one.
    batch_size : int
        Rows a batch, at least 1.
    seed : int
        Seed of the shuffling.
    length : callable, optional
        ``length(row)``, for instance a number of tokens. Where it is given, rows of similar length
        share a batch, which saves padding: within each window of ``window * batch_size`` shuffled
        rows the rows are sorted by length, and the resulting batches are shuffled again.
    window : int
        Batches that are sorted together, at least 1. Larger: less padding and less randomness.

    Raises
    ------
    ValueError
        If there are no rows, or ``batch_size`` or ``window`` is below 1.
    """

    def __init__(
        self,
        rows: Sequence[T],
        batch_size: int,
        *,
        seed: int,
        length: Callable[[T], int] | None = None,
        window: int = 32,
    ) -> None:
        if not rows:
            raise ValueError("rows is empty: there is nothing to draw batches from")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if window < 1:
            raise ValueError(f"window is {window}: it must be at least 1")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.epoch = 0
        """Complete passes over the rows so far."""
        self.position = 0
        """Rows of the current epoch that have been handed out."""
        self._lengths = None if length is None else [length(row) for row in rows]
        self._order = self._shuffled(0)

    def next(self) -> list[T]:
        """The rows of the next batch: always ``batch_size`` of them."""
        batch: list[T] = []
        while len(batch) < self.batch_size:
            stop = self.position + self.batch_size - len(batch)
            taken = self._order[self.position : stop]
            batch += [self.rows[index] for index in taken]
            self.position += len(taken)
            if self.position == len(self.rows):
                self._go_to(self.epoch + 1, 0)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self.rows):
            raise ValueError(
                f"state points to row {position} of epoch {epoch}, "
                f"but this source has {len(self.rows)} rows"
            )
        self._go_to(epoch, position)

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self.epoch:
            self._order = self._shuffled(epoch)
        self.epoch, self.position = epoch, position

    def _shuffled(self, epoch: int) -> list[int]:
        draw = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.rows)))
        draw.shuffle(order)
        if self._lengths is None:
            return order
        # The batch that began in the epoch before takes the first rows; groups start after them,
        # or they would not line up with the batches that are handed out.
        size = self.batch_size
        start = -(epoch * len(order)) % size
        groups: list[list[int]] = []
        for first in range(start, len(order), self.window * size):
            near = order[first : first + self.window * size]
            near.sort(key=self._lengths.__getitem__)
            groups += [near[i : i + size] for i in range(0, len(near), size)]
        # For the same reason, an incomplete group stays at the end.
        rest = groups.pop() if groups and len(groups[-1]) < size else []
        draw.shuffle(groups)
        return [*order[:start], *(index for group in groups for index in group), *rest]
