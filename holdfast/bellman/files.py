"""Reading logged transitions: CSV, parquet, npz and Minari, checked row by row.

A table has a row a decision and the columns

- ``state``, an integer or a number; or ``state_0``, ``state_1``, … for observations;
- ``action``, 0 … number of actions - 1;
- ``reward``, where it is observed;
- ``next_state``, like ``state``; without it, it is the state of the following row, so the last row
  of a trajectory is dropped unless it is terminal;
- ``terminal``, whether the episode ended with this decision; by default never;
- ``trajectory`` and ``time``: rows of one trajectory stand together, one time step apart. Needed
  where there is no ``next_state``.

In an npz file these are arrays, and ``state`` may be ``(n, features)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman.file_formats import Table, read_table
from holdfast.bellman.transitions import Transitions
from holdfast.errors import DataError, nearest


def read_transitions(
    path: str | Path,
    *,
    actions: int,
    states: int | None = None,
    anchor_action: int | None = None,
    anchor_reward: float | None = None,
    rewards: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Transitions:
    """Read and check a file of logged transitions.

    Parameters
    ----------
    path : str or Path
        ``.csv`` (also ``.csv.gz``), ``.parquet``, ``.npz``, or a folder of a Minari data set.
    actions : int
        How many actions there are.
    states : int, optional
        How many states there are. Given, states must be integers in 0 … ``states`` - 1.
    anchor_action : int, optional
        The action whose reward is known, for inverse problems. Rewards of others become NaN,
        whatever the file holds, so that nothing can learn from them.
    anchor_reward : float, optional
        The reward of the anchor in every state; otherwise the file's.
    rewards : bool
        False where none are needed, as for the likelihood of choices: all become NaN.
    columns : mapping, optional
        Names above to the file's own: ``{"state": "mileage"}``.

    Returns
    -------
    Transitions

    Raises
    ------
    DataError
        If the file cannot be read, or the first bad row, named: a missing column, a number that is
        missing or infinite, an action or state outside its set, a gap in a trajectory, an anchor
        that is never observed.
    """
    source = str(path)
    table = read_table(Path(path).expanduser(), source, columns or {})
    if not table.columns or min(map(len, table.columns.values())) == 0:
        raise DataError(f"{source} is empty: it holds no rows.")

    state = _states(table, "state", states)
    action = _whole(table, "action", 0, actions - 1, f", as actions is {actions}")
    n = len(state)
    terminal = _whole(table, "terminal", 0, 1) > 0 if "terminal" in table.columns else _never(n)
    reward = np.full(n, np.nan)
    if rewards:
        reward = _rewards(table, action, anchor_action, anchor_reward)
    number = _trajectories(table, n)
    follows = _never(n)
    if number is not None:
        follows[1:] = number[1:] == number[:-1]
        _check_order(table, number, follows, terminal)

    if "next_state" in table.columns or "next_state_0" in table.columns:
        next_state = _states(table, "next_state", states)
        if next_state.shape != state.shape or next_state.dtype != state.dtype:
            raise DataError(
                f"{source}: next_state is {next_state.dtype} {next_state.shape} and state "
                f"{state.dtype} {state.shape}: both must be alike."
            )
        _check_continuity(table, state, next_state, follows)
        kept = np.ones(n, dtype=bool)
    elif number is None:
        raise DataError(
            f"{source} has no column next_state, and none from which to tell it: trajectory and "
            f"time. Found: {', '.join(table.columns)}."
        )
    else:
        next_state = np.concatenate([state[1:], state[-1:]])
        next_state[terminal] = state[terminal]  # nothing is read there
        kept = np.append(follows[1:], False) | terminal
    if not kept.any():
        raise DataError(f"{source} has no row with a next state: every trajectory has one row.")
    if anchor_action is not None and not (action[kept] == anchor_action).any():
        raise DataError(
            f"{source}: anchor action {anchor_action} is never observed in its {n} rows ("
            f"{table.where(0)} to {table.where(n - 1)}), so no reward is known. Observed: "
            f"{', '.join(map(str, np.unique(action[kept])))}. Take one of these as the anchor, or "
            "give rows in which it was taken."
        )
    return Transitions(state, action, reward, next_state, terminal, number)[kept]


# What a row must hold


def _rewards(
    table: Table,
    action: NDArray[np.int64],
    anchor_action: int | None,
    anchor_reward: float | None,
) -> NDArray[np.float64]:
    if anchor_action is None:
        if anchor_reward is not None:
            raise ValueError("anchor_reward needs an anchor_action")
        reward = _numbers(table, "reward")
        _refuse(table, ~np.isfinite(reward), "reward", reward, "expected a number")
        return reward
    known = action == anchor_action
    if anchor_reward is not None:
        if not np.isfinite(anchor_reward):
            raise ValueError(f"anchor_reward is {anchor_reward}: it must be finite")
        return np.where(known, float(anchor_reward), np.nan)
    reward = _numbers(table, "reward")
    expected = f"but action {anchor_action} is the anchor, whose reward must be known"
    _refuse(table, known & ~np.isfinite(reward), "reward", reward, expected)
    return np.where(known, reward, np.nan)


def _states(table: Table, name: str, states: int | None) -> NDArray[Any]:
    if name not in table.columns and f"{name}_0" in table.columns:
        names = _numbered(table, name)
        wide = np.column_stack([_numbers(table, each) for each in names])
    else:
        wide = _numbers(table, name)
        names = [name] * (wide.shape[1] if wide.ndim == 2 else 1)
    for axis, column in enumerate(wide.T if wide.ndim == 2 else [wide]):
        _refuse(table, ~np.isfinite(column), names[axis], column, "expected a number")
    if wide.ndim == 2 and states is not None:
        raise DataError(
            f"{table.source}: {name} has {wide.shape[1]} columns, but a table needs one"
        )
    if wide.ndim == 1 and (states is not None or _is_integer(table.columns[name])):
        why = "" if states is None else f", as states is {states}"
        return _whole(table, name, 0, (states or 2**31) - 1, why)
    return wide if wide.ndim == 2 else wide[:, None]


def _numbered(table: Table, name: str) -> list[str]:
    """``name_0``, ``name_1``, … up to the highest there is, all present."""
    found = [m for key in table.columns if (m := re.fullmatch(rf"{name}_(\d+)", key))]
    count = max(int(match[1]) for match in found) + 1
    names = [f"{name}_{i}" for i in range(count)]
    for each in names:
        if each not in table.columns:
            raise DataError(f"{table.source} has a column {names[-1]}, but no column {each}.")
    return names


def _whole(table: Table, name: str, least: int, most: int, why: str = "") -> NDArray[np.int64]:
    values = _numbers(table, name)
    if values.ndim != 1:
        raise DataError(f"{table.source}: {name} has shape {values.shape}: it must be (n,).")
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(values) | (values != np.round(values))
        bad |= (values < least) | (values > most)
    expected = f"expected a whole number from {least} to {most}{why}"
    _refuse(table, bad, name, values, expected)
    return values.astype(np.int64)


def _numbers(table: Table, name: str) -> NDArray[np.float64]:
    if name not in table.columns:
        raise DataError(
            f"{table.source} has no column {name}. Found: {', '.join(table.columns)}"
            f"{nearest(name, table.columns)} Where it has another name, say so in columns."
        )
    column = table.columns[name]
    try:
        return np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(column):
            try:
                float(value)
            except (TypeError, ValueError):
                raise table.error(row, f"{name} is {value!r}, not a number.") from None
        raise


def _refuse(
    table: Table, bad: NDArray[np.bool_], name: str, values: NDArray[Any], expected: str
) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        value = values[rows[0]]
        found = "empty or not a number (NaN)" if np.isnan(value) else f"{value:g}"
        raise table.error(int(rows[0]), f"{name} is {found}, {expected}.")


# What rows must be to each other


def _trajectories(table: Table, n: int) -> NDArray[np.int64] | None:
    """Numbers ``(n,)`` of the trajectories, by first appearance."""
    if "trajectory" not in table.columns:
        return None
    named = table.columns["trajectory"]
    empty = np.flatnonzero([value is None or value != value for value in named])
    if len(empty):
        raise table.error(int(empty[0]), "trajectory is empty.")
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in named.tolist()])


def _check_order(
    table: Table,
    number: NDArray[np.int64],
    follows: NDArray[np.bool_],
    terminal: NDArray[np.bool_],
) -> None:
    name = table.columns["trajectory"]
    # Numbers count up by first appearance: where one falls, an earlier trajectory goes on.
    again = np.flatnonzero(np.diff(number, prepend=0) < 0)
    if len(again):
        row = int(again[0])
        raise table.error(
            row,
            f"trajectory {name[row]} goes on here after others. Sort by trajectory and time.",
        )
    over = np.flatnonzero(follows[1:] & terminal[:-1])
    if len(over):
        row = int(over[0]) + 1
        raise table.error(row, f"trajectory {name[row]} goes on after a terminal row.")
    if "time" in table.columns:
        time = _numbers(table, "time")
        _refuse(table, ~np.isfinite(time), "time", time, "expected a number")
        gap = np.flatnonzero(follows[1:] & (np.diff(time) != 1))
        if len(gap):
            row = int(gap[0]) + 1
            raise table.error(
                row,
                f"gap in trajectory {name[row]}: time {time[row]:g} comes after {time[row - 1]:g}. "
                "Give the part after a gap another trajectory.",
            )
    elif not {"next_state", "next_state_0"} & set(table.columns):
        raise DataError(
            f"{table.source} has no column time: without it, or next_state, a gap in a trajectory "
            "could not be seen."
        )


def _check_continuity(
    table: Table,
    state: NDArray[Any],
    next_state: NDArray[Any],
    follows: NDArray[np.bool_],
) -> None:
    differs = (next_state[:-1] != state[1:]).reshape(len(state) - 1, -1).any(-1)
    gap = np.flatnonzero(follows[1:] & differs)
    if len(gap):
        row = int(gap[0]) + 1
        raise table.error(
            row,
            f"gap in trajectory {table.columns['trajectory'][row]}: its state is {state[row]}, but "
            f"the row before leads to {next_state[row - 1]}.",
        )


def _never(n: int) -> NDArray[np.bool_]:
    return np.zeros(n, dtype=bool)


def _is_integer(column: NDArray[Any]) -> bool:
    return bool(np.issubdtype(column.dtype, np.integer))
