"""Data sets and their neighbours: what a measurement over data repeats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.networks import Approximator, Tables
from holdfast.bellman.transitions import Transitions

LEAST_COUNT = 3
"""Occurrences of every pair that a data set must have: less, and one row is all there is."""
MAX_REDRAWS = 1000


class CoverageError(ValueError):
    """No data set of a size had every pair often enough."""


Drawer = Callable[[int, np.random.Generator], tuple[Transitions, Transitions]]


def drawer(
    source: TabularMDP | Transitions, largest: int, anchor: int | NDArray[np.int64] | None
) -> Drawer:
    """Draws data of a size, and as many spare rows to replace with."""
    if isinstance(source, Transitions):
        if len(source) < 2 * largest:
            raise ValueError(
                f"sizes goes up to {largest}, and there are {len(source)} transitions: half of "
                "them must be left to replace rows with"
            )

        def pick(n: int, rng: np.random.Generator) -> tuple[Transitions, Transitions]:
            rows = rng.permutation(len(source))
            return source[rows[:n]], source[rows[n:]]

        return pick
    live = (~source.terminal).astype(np.float64)
    law = np.repeat(live[:, None], source.actions, 1) / source.actions
    if anchor is not None:
        law = live[:, None] * source.soft_policy_iteration().policy
    law = law / law.sum()

    def sample(n: int, rng: np.random.Generator) -> tuple[Transitions, Transitions]:
        first, second = rng.integers(2**31, size=2)
        return (
            source.sample(n, seed=int(first), law=law),
            source.sample(n, seed=int(second), law=law),
        )

    return sample


def covered_dataset(
    draw: Drawer,
    n: int,
    approximator: Approximator | None,
    source: TabularMDP | Transitions,
    rng: np.random.Generator,
) -> tuple[Transitions, Transitions, int]:
    """Data in which every pair of a table is frequent enough, spare rows, and sets refused.

    Raises
    ------
    CoverageError
        If none of many data sets was.
    """
    if approximator is not None and not isinstance(approximator, Tables):
        return (*draw(n, rng), 0)
    size = table_size(source)
    if approximator is not None:
        size = (approximator.states, approximator.actions)
    live = np.zeros(size[0], bool)
    if isinstance(source, TabularMDP):
        live[: source.states] = ~source.terminal
    else:
        live = source.entered(size[0])
    for tries in range(MAX_REDRAWS):
        data, spare = draw(n, rng)
        if data.counts(*size)[live].min() >= LEAST_COUNT:
            return data, spare, tries
    raise CoverageError(
        f"sizes includes {n}: of {MAX_REDRAWS} data sets that small none had every pair "
        f"{LEAST_COUNT} times; begin with a larger size"
    )


def neighbours(
    data: Transitions, spare: Transitions, replaced: int, rng: np.random.Generator
) -> list[Transitions]:
    """The data, the data again, and one copy for each row replaced."""
    rows = rng.integers(len(data), size=replaced)
    others = rng.integers(len(spare), size=replaced)
    data = Transitions(data.state, data.action, data.reward, data.next_state, data.terminal)
    pairs = zip(rows, others, strict=True)
    return [data, data, *(data.replaced(i, spare[k : k + 1]) for i, k in pairs)]


def table_size(source: TabularMDP | Transitions) -> tuple[int, int]:
    """States and actions of a model, or as many as the rows show.

    Raises
    ------
    ValueError
        For observations, which have no table.
    """
    if isinstance(source, TabularMDP):
        return source.states, source.actions
    if source.state.ndim != 1 or not np.issubdtype(source.state.dtype, np.integer):
        raise ValueError(
            "transitions holds observations, and a table needs numbered states: give an "
            "approximator, as Networks(mlp(...), mlp(...)), and settings"
        )
    top = max(source.state.max(), source.next_state.max())
    return int(top) + 1, int(source.action.max()) + 1
