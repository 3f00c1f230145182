"""The simulated bus engines of GLADIUS: an inverse problem with a known answer.

Kang, Yoganarasimhan & Jain, "An Empirical Risk Minimization Approach for Offline Inverse RL and
Dynamic Discrete Choice Model", section 7: a bus of mileage 1 to 20 is kept, at a reward of minus
its mileage, or replaced, at minus 5, by an agent who is soft-optimal at discount 0.95. Dummy
variables, uniform on -10 … 10 and drawn anew every period, are seen but change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.mdp import TabularMDP
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]

ANCHOR = 1
"""The action whose reward is known: replacing."""


@dataclass(frozen=True, eq=False)
class SimulatedBuses:
    """Logged decisions, and what is true of them.

    Attributes
    ----------
    problem : TabularMDP
        On the mileages only, 0 … 19 for 1 … 20; action 1 replaces.
    table : Transitions
        States are mileages, numbered as in ``problem``.
    observed : Transitions
        The same rows; a state is ``(1 + dummies,)``: the mileage, 1 … 20, and the dummies.
    reward : Array
        ``(n,)``: the true rewards. In ``table`` and ``observed`` they are NaN but for the anchor.
    """

    problem: TabularMDP
    table: Transitions
    observed: Transitions
    reward: Array

    def split(self, share: float = 0.8) -> tuple[SimulatedBuses, SimulatedBuses]:
        """The first ``share`` of the trajectories, which are drawn alike, and the rest."""
        number = self.table.trajectory
        assert number is not None  # drawn along trajectories
        buses = np.unique(number)
        first = round(share * len(buses))
        if not 0 < first < len(buses):
            raise ValueError(
                f"share is {share}: of {len(buses)} trajectories some must stay on either side"
            )
        early = number < buses[first]
        return self._rows(early), self._rows(~early)

    def _rows(self, rows: NDArray[np.bool_]) -> SimulatedBuses:
        return SimulatedBuses(
            self.problem, self.table[rows], self.observed[rows], self.reward[rows]
        )


def simulate_buses(
    trajectories: int,
    *,
    seed: int,
    periods: int = 100,
    dummies: int = 0,
    random_anchor: bool = False,
) -> SimulatedBuses:
    """Draw logged decisions of the soft-optimal agent; every bus starts at mileage 1.

    Parameters
    ----------
    trajectories, periods : int
        How many buses, and decisions of each.
    seed : int
    dummies : int
        How many variables without meaning.
    random_anchor : bool
        Whether a replaced bus drives on in the same period, from mileage 1. What follows the
        anchor is then random, and its temporal-difference error holds the variance of the next
        value; otherwise it is always mileage 1, and the standard task does not test that.
    """
    for name, value, least in (
        ("trajectories", trajectories, 1),
        ("periods", periods, 1),
        ("dummies", dummies, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    problem = TabularMDP.bus(drives_on=random_anchor)
    start = np.eye(problem.states)[0]
    drawn = problem.sample_trajectories(trajectories, periods, seed=seed, initial=start)
    # A stream apart: the decisions are the same whatever the number of dummies.
    random = np.random.default_rng([seed, 1])
    noise = random.integers(-10, 11, size=(trajectories, periods + 1, dummies)).astype(np.float64)
    known = drawn.action == ANCHOR
    table = replace(drawn, reward=np.where(known, drawn.reward, np.nan))

    def seen(mileage: NDArray[np.int64], dummy: Array) -> Array:
        return np.column_stack([mileage + 1.0, dummy.reshape(len(mileage), dummies)])

    return SimulatedBuses(
        problem=problem,
        table=table,
        observed=replace(
            table,
            state=seen(drawn.state, noise[:, :-1]),
            next_state=seen(drawn.next_state, noise[:, 1:]),
        ),
        reward=drawn.reward,
    )


def reward_error(estimate: ArrayLike, truth: ArrayLike) -> float:
    """Mean absolute percentage error, ``100 mean |estimate - truth| / |truth|``.

    Parameters
    ----------
    estimate, truth : array
        ``(n,)`` each, at the decisions of the test trajectories; ``truth`` is nowhere 0.
    """
    guess, true = np.asarray(estimate, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if guess.shape != true.shape or not guess.size:
        raise ValueError(f"estimate has shape {guess.shape}, truth {true.shape}: both must be (n,)")
    if not (abs(true) > 0).all():
        raise ValueError("truth is 0 somewhere: a percentage of it means nothing")
    return float(100 * (abs(guess - true) / abs(true)).mean())
