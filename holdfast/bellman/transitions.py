"""Logged decisions: what was seen, done, received, and seen next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Transitions:
    """Transitions ``(s, a, r, s')``, one a row; tensors and lists become arrays.

    Attributes
    ----------
    state : NDArray
        ``(n,)`` integers, or observations ``(n, features)``.
    action : NDArray
        ``(n,)``, integers.
    reward : NDArray
        ``(n,)``. NaN where it was not observed, as for all but the anchor in inverse problems.
    next_state : NDArray
        Like ``state``.
    terminal : NDArray, optional
        ``(n,)``, bool: the episode ended in ``next_state``, so nothing is earned from there. By
        default none.
    trajectory : NDArray, optional
        ``(n,)``, integers: which trajectory the row belongs to; rows of one stand together, in
        order of time. By default unknown, as for independent draws.

    Raises
    ------
    ValueError
        For shapes or types that do not fit, or an infinite reward.
    """

    state: NDArray[Any]
    action: NDArray[np.int64]
    reward: NDArray[np.float64]
    next_state: NDArray[Any]
    terminal: NDArray[np.bool_] = None  # type: ignore[assignment]
    trajectory: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        state, next_state = _states("state", self.state), _states("next_state", self.next_state)
        if state.shape != next_state.shape or state.dtype != next_state.dtype:
            raise ValueError(
                f"state is {state.dtype} {state.shape} and next_state {next_state.dtype} "
                f"{next_state.shape}: both must be alike"
            )
        n = len(state)
        reward = _column("reward", self.reward, n).astype(np.float64)
        if np.isinf(reward).any():
            row = int(np.flatnonzero(np.isinf(reward))[0])
            raise ValueError(f"reward is infinite in row {row}: it must be a number, or NaN unseen")
        terminal = np.zeros(n, bool) if self.terminal is None else self.terminal
        object.__setattr__(self, "state", state)
        object.__setattr__(self, "action", _integers("action", _column("action", self.action, n)))
        object.__setattr__(self, "reward", reward)
        object.__setattr__(self, "next_state", next_state)
        object.__setattr__(self, "terminal", _truths("terminal", _column("terminal", terminal, n)))
        if self.trajectory is not None:
            trajectory = _integers("trajectory", _column("trajectory", self.trajectory, n))
            object.__setattr__(self, "trajectory", trajectory)

    def __len__(self) -> int:
        return len(self.state)

    def __getitem__(self, rows: Any) -> Transitions:
        """The rows of an index array, mask or slice, as transitions."""
        return Transitions(**{name: column[rows] for name, column in self._columns()})

    def replaced(self, row: int, other: Transitions) -> Transitions:
        """A neighbour: the same but for ``row``, which is the one row of ``other``.

        The trajectory a row stood in is forgotten: one triple of a chain is not exchanged without
        breaking the chain.
        """
        if len(other) != 1:
            raise ValueError(f"other has {len(other)} rows: it must have one")
        columns = {}
        for name, column in self._columns():
            if name != "trajectory":
                columns[name] = column.copy()
                columns[name][row] = getattr(other, name)[0]
        return Transitions(**columns)

    def check_tabular(self, states: int, actions: int) -> None:
        """Refuse rows outside a table of ``states`` and ``actions``.

        Raises
        ------
        ValueError
            Naming the column, the first row and what it holds.
        """
        for name, limit in (("state", states), ("action", actions), ("next_state", states)):
            column = getattr(self, name)
            if column.ndim != 1 or not np.issubdtype(column.dtype, np.integer):
                raise ValueError(f"{name} is {column.dtype} {column.shape}: a table needs integers")
            outside = np.flatnonzero((column < 0) | (column >= limit))
            if len(outside):
                row = int(outside[0])
                raise ValueError(
                    f"{name} is {column[row]} in row {row}: it must lie in 0 ... {limit - 1}"
                )

    def counts(self, states: int, actions: int) -> NDArray[np.int64]:
        """How often each pair occurs, ``(states, actions)``."""
        self.check_tabular(states, actions)
        pairs = self.state * actions + self.action
        return np.bincount(pairs, minlength=states * actions).reshape(states, actions)

    def entered(self, states: int) -> NDArray[np.bool_]:
        """``(states,)``: states that are decided in, or that a row leads to and goes on from."""
        found = np.zeros(states, bool)
        found[self.state] = True
        found[self.next_state[~self.terminal]] = True
        return found

    def _columns(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for each in fields(self):
            column = getattr(self, each.name)
            if column is not None:
                yield each.name, column


def _states(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {array.shape}: it must be (n,) or (n, features)")
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} has dtype {array.dtype}: it must be integer or floating point")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise ValueError(f"{name} is not finite in row {row}")
    return array


def _column(name: str, values: ArrayLike, n: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(
            f"{name} has shape {array.shape}: it must be ({n},), as state has {n} rows"
        )
    return array


def _truths(name: str, array: NDArray[Any]) -> NDArray[np.bool_]:
    bad = np.flatnonzero((array != 0) & (array != 1))
    if len(bad):
        raise ValueError(
            f"{name} is {array[bad[0]]} in row {bad[0]}: it must be true or false, 1 or 0"
        )
    return array.astype(bool)


def _integers(name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: it must be integer")
    return array.astype(np.int64)
