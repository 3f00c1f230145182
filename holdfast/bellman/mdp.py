"""Markov decision problems small enough to be written down, and so to be solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from holdfast.bellman import solve
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]
ROW_SUM_TOLERANCE = 1e-6
"""How far a row of probabilities may sum from one, as rounding to float32 does."""
EXACT = 1e-12
"""Rows that sum to one up to that are used as given; others are divided by their sum."""


class TabularMDP:
    """States, actions, what happens and what it earns, under entropy regularisation.

    The agent is soft: ``V(s) = log sum_a exp Q(s, a)``, ``pi(a | s) = exp(Q(s, a) - V(s))`` and
    ``Q(s, a) = r(s, a) + discount * E[V(s') | s, a]``, with ``V = 0`` in terminal states. It is the
    dynamic discrete choice model with mean-zero Gumbel shocks, and maximum-entropy reinforcement
    learning with temperature one.

    Parameters
    ----------
    transitions : array or sparse matrix
        ``(states, actions, states)``: probability of the next state. Sparse: ``(states * actions,
        states)``, with the pair ``(s, a)`` in row ``s * actions + a``.
    rewards : array
        ``(states, actions)``, finite.
    discount : float
        In [0, 1).
    terminal : array, optional
        ``(states,)``, bool: the episode ends there. Rows of such states are never used. By default
        none.

    Raises
    ------
    ValueError
        For shapes that do not fit, numbers that are not finite, rows that are no probabilities, a
        discount outside [0, 1), or states that are all terminal.
    """

    def __init__(
        self,
        transitions: Any,
        rewards: ArrayLike,
        discount: float,
        *,
        terminal: ArrayLike | None = None,
    ) -> None:
        self.rewards: Array = np.array(rewards, dtype=np.float64)
        if self.rewards.ndim != 2 or not self.rewards.size:
            raise ValueError(
                f"rewards has shape {self.rewards.shape}: it must be (states, actions)"
            )
        if not np.isfinite(self.rewards).all():
            s, a = np.argwhere(~np.isfinite(self.rewards))[0]
            raise ValueError(f"rewards is {self.rewards[s, a]} in state {s}, action {a}")
        self.states, self.actions = self.rewards.shape
        self.discount = check_discount(discount)
        self.kernel = _kernel(transitions, self.states, self.actions)
        self.terminal: NDArray[np.bool_] = np.zeros(self.states, bool)
        if terminal is not None:
            self.terminal = np.array(terminal, dtype=bool)
            if self.terminal.shape != (self.states,):
                raise ValueError(
                    f"terminal has shape {self.terminal.shape}: it must be ({self.states},)"
                )
            if self.terminal.all():
                raise ValueError("terminal is true of every state: there is nothing to decide")

    def __repr__(self) -> str:
        kind = "sparse" if sparse.issparse(self.kernel) else "dense"
        return f"TabularMDP({self.states} states, {self.actions} actions, {self.discount}, {kind})"

    @property
    def transitions(self) -> Any:
        """As they were given: ``(states, actions, states)``, or sparse with a row for each pair."""
        if sparse.issparse(self.kernel):
            return self.kernel
        return self.kernel.reshape(self.states, self.actions, self.states)

    def expected(self, v: Array) -> Array:
        """``E[V(s') | s, a]`` of values ``(states,)``: ``(states, actions)``, 0 past an end."""
        ahead = np.where(self.terminal, 0.0, v)
        return np.asarray(self.kernel @ ahead).reshape(self.states, self.actions)

    def backup(self, q: ArrayLike) -> Array:
        """The soft Bellman operator on ``q``, both ``(states, actions)``."""
        return self.rewards + self.discount * self.expected(solve.soft_value(np.asarray(q)))

    def soft_value_iteration(self, tolerance: float = 1e-10) -> solve.Solution:
        """See :func:`holdfast.bellman.solve.soft_value_iteration`."""
        return solve.soft_value_iteration(self, tolerance)

    def soft_policy_iteration(self, tolerance: float = 1e-10) -> solve.Solution:
        """See :func:`holdfast.bellman.solve.soft_policy_iteration`."""
        return solve.soft_policy_iteration(self, tolerance)

    # Drawing data

    def sample(self, n: int, *, seed: int, law: ArrayLike | None = None) -> Transitions:
        """Independent transitions.

        Parameters
        ----------
        n : int
            How many, at least 1.
        seed : int
            The same draws for the same seed.
        law : array, optional
            ``(states, actions)``: probabilities of the pairs. By default the same for all pairs of
            states that are not terminal.
        """
        _check_counts(n=n)
        rng = np.random.default_rng(seed)
        if law is None:
            live = np.flatnonzero(~self.terminal)
            state = rng.choice(live, size=n)
            action = rng.integers(self.actions, size=n)
        else:
            weights = np.asarray(law, dtype=np.float64)
            if weights.shape != self.rewards.shape:
                raise ValueError(f"law has shape {weights.shape}: it must be {self.rewards.shape}")
            shares = probabilities("law", weights.ravel()[None], "all pairs together")[0]
            pairs = rng.choice(weights.size, size=n, p=shares)
            state, action = np.divmod(pairs, self.actions)
        return self._step(state, action, rng)

    def sample_trajectories(
        self,
        trajectories: int,
        length: int,
        *,
        seed: int,
        policy: ArrayLike | None = None,
        initial: ArrayLike | None = None,
    ) -> Transitions:
        """Transitions along trajectories, which end early in a terminal state.

        Parameters
        ----------
        trajectories, length : int
            How many, and of how many decisions each, at least 1.
        seed : int
            The same draws for the same seed.
        policy : array, optional
            ``(states, actions)``: probabilities of actions. By default the soft-optimal ones.
        initial : array, optional
            ``(states,)``: probabilities of the first state. By default the same for all that are
            not terminal.
        """
        _check_counts(trajectories=trajectories, length=length)
        rng = np.random.default_rng(seed)
        if policy is None:
            policy = self.soft_policy_iteration().policy
        choices = np.array(policy, dtype=np.float64)
        if choices.shape != self.rewards.shape:
            raise ValueError(f"policy has shape {choices.shape}: it must be {self.rewards.shape}")
        choices[self.terminal] = 1.0 / self.actions  # nothing is chosen there
        cumulative = np.cumsum(probabilities("policy", choices), axis=1)
        start: Array = (~self.terminal).astype(np.float64)
        start = start / start.sum()
        if initial is not None:
            start = np.array(initial, dtype=np.float64)
            if start.shape != (self.states,):
                raise ValueError(f"initial has shape {start.shape}: it must be ({self.states},)")
            start = probabilities("initial", start[None], "all states together")[0]
        state = rng.choice(self.states, size=trajectories, p=start)
        who = np.arange(trajectories)
        steps = []
        for time in range(length):
            live = ~self.terminal[state]
            state, who = state[live], who[live]
            below = rng.random(len(state))[:, None] >= cumulative[state, :-1]
            step = self._step(state, below.sum(1), rng)
            steps.append((step, who, np.full(len(who), time)))
            state = step.next_state
        trajectory = np.concatenate([each for _, each, _ in steps])
        order = np.lexsort((np.concatenate([each for _, _, each in steps]), trajectory))
        columns = {
            name: np.concatenate([getattr(step, name) for step, _, _ in steps])[order]
            for name in ("state", "action", "reward", "next_state", "terminal")
        }
        return Transitions(**columns, trajectory=trajectory[order])

    def _step(
        self, state: NDArray[Any], action: NDArray[Any], rng: np.random.Generator
    ) -> Transitions:
        row = state * self.actions + action
        cumulative, columns = self._draw
        # Row i of the kernel covers [i, i + 1) of one long, increasing array.
        next_state = columns[np.searchsorted(cumulative, row + rng.random(len(row)), side="right")]
        terminal = self.terminal[next_state]
        return Transitions(state, action, self.rewards[state, action], next_state, terminal)

    @cached_property
    def _draw(self) -> tuple[Array, NDArray[Any]]:
        kernel = sparse.csr_array(self.kernel)
        rows = np.repeat(np.arange(kernel.shape[0]), np.diff(kernel.indptr))
        running = np.cumsum(kernel.data)
        before = np.concatenate([[0.0], running])[kernel.indptr[:-1]]
        cumulative = np.clip(rows + running - before[rows], rows, rows + 1)
        cumulative[kernel.indptr[1:] - 1] = np.arange(1, kernel.shape[0] + 1)
        return cumulative, kernel.indices

    # Constructors

    @classmethod
    def empirical(
        cls,
        transitions: Transitions,
        states: int,
        actions: int,
        discount: float,
        *,
        fallback: TabularMDP | None = None,
    ) -> TabularMDP:
        """The model that the data suggest: frequencies, and mean rewards.

        Sparse where ``fallback`` is. A state is terminal if transitions into it are.

        Parameters
        ----------
        transitions : Transitions
            With every reward observed.
        states, actions : int
            Size of the table.
        discount : float
            In [0, 1).
        fallback : TabularMDP, optional
            What to take for pairs that do not occur. By default there must be none.

        Raises
        ------
        ValueError
            For a row outside the table, an unobserved reward, a state that is terminal in some
            rows only, or, without ``fallback``, a pair that does not occur.
        """
        seen = transitions.counts(states, actions).ravel() > 0
        if np.isnan(transitions.reward).any():
            row = int(np.flatnonzero(np.isnan(transitions.reward))[0])
            raise ValueError(f"reward is not observed in row {row}: an empirical model needs all")
        terminal = np.zeros(states, bool)
        terminal[transitions.next_state[transitions.terminal]] = True
        mixed = np.flatnonzero(terminal[transitions.next_state] & ~transitions.terminal)
        if len(mixed):
            row = int(mixed[0])
            raise ValueError(
                f"state {transitions.next_state[row]} is terminal in some rows but not in row {row}"
            )
        # Nothing happens in a terminal state: it stays where it is.
        ended = np.flatnonzero(np.repeat(terminal, actions) & ~seen)
        seen[ended] = True
        pair = np.concatenate([transitions.state * actions + transitions.action, ended])
        target = np.concatenate([transitions.next_state, ended // actions])
        reward = np.concatenate([transitions.reward, np.zeros(len(ended))])
        share = 1.0 / np.bincount(pair, minlength=len(seen))[pair]
        kernel = sparse.csr_array((share, (pair, target)), shape=(len(seen), states))
        rewards = np.bincount(pair, reward * share, minlength=len(seen))
        if not seen.all():
            if fallback is None:
                s, a = divmod(int(np.flatnonzero(~seen)[0]), actions)
                raise ValueError(
                    f"state {s} with action {a} does not occur ({(~seen).sum()} of {len(seen)} "
                    "pairs do not): draw more, or give a fallback for such pairs"
                )
            unseen = sparse.diags_array((~seen).astype(np.float64))
            kernel = kernel + unseen @ sparse.csr_array(fallback.kernel)
            rewards = np.where(seen, rewards, fallback.rewards.ravel())
            terminal = terminal | fallback.terminal
        rewards = rewards.reshape(states, actions)
        if fallback is None or not sparse.issparse(fallback.kernel):
            kernel = kernel.toarray().reshape(states, actions, states)
        return cls(kernel, rewards, discount, terminal=terminal)

    @classmethod
    def random(
        cls,
        states: int,
        actions: int,
        discount: float,
        *,
        seed: int,
        successors: int | None = None,
    ) -> TabularMDP:
        """Next states by Dirichlet(1) probabilities, rewards uniform in [0, 1).

        With ``successors``, each pair leads to at most that many states, and the model is sparse.
        """
        rng = np.random.default_rng(seed)
        rewards = rng.random((states, actions))
        pairs = states * actions
        if successors is None:
            dense = rng.dirichlet(np.ones(states), size=(states, actions))
            return cls(dense, rewards, discount)
        probabilities = rng.dirichlet(np.ones(successors), size=pairs)
        targets = rng.integers(states, size=(pairs, successors))
        rows = np.repeat(np.arange(pairs), successors)
        kernel = sparse.csr_array(
            (probabilities.ravel(), (rows, targets.ravel())), shape=(pairs, states)
        )
        return cls(kernel, rewards, discount)

    @classmethod
    def chain(cls, states: int, discount: float, *, slip: float = 0.1) -> TabularMDP:
        """A line: action 0 goes back, 1 forth; with probability ``slip`` the other way. Sparse.

        Walls hold. Action 0 in the first state earns 0.1, action 1 in the last state 1.
        """
        if not 0.0 <= slip <= 1.0:
            raise ValueError(f"slip is {slip}: it must lie in [0, 1]")
        here = np.arange(states)
        back, forth = np.maximum(here - 1, 0), np.minimum(here + 1, states - 1)
        targets = np.stack([np.stack([back, forth], 1), np.stack([forth, back], 1)], 1)
        kernel = _scattered(targets, np.broadcast_to([1 - slip, slip], targets.shape), states)
        rewards = np.zeros((states, 2))
        rewards[0, 0], rewards[-1, 1] = 0.1, 1.0
        return cls(kernel, rewards, discount)

    @classmethod
    def gridworld(
        cls, rows: int, columns: int, discount: float, *, slip: float = 0.1, goal: float = 1.0
    ) -> TabularMDP:
        """A walled grid with four moves and a terminal last corner. Sparse.

        Actions 0 to 3 go up, right, down, left; with probability ``slip`` one of the two moves
        across happens instead. A move costs 0.04, and entering the corner earns ``goal``, in
        expectation over where the move leads.
        """
        if not 0.0 <= slip <= 1.0:
            raise ValueError(f"slip is {slip}: it must lie in [0, 1]")
        row, column = np.divmod(np.arange(rows * columns), columns)
        reached = np.stack(
            [
                np.clip(row + down, 0, rows - 1) * columns + np.clip(column + right, 0, columns - 1)
                for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1))
            ],
            1,
        )
        targets = np.stack([np.roll(reached, shift, axis=1) for shift in (0, 1, -1)], 2)
        chances = np.broadcast_to([1 - slip, slip / 2, slip / 2], targets.shape)
        last = rows * columns - 1
        rewards = -0.04 + goal * np.where(targets == last, chances, 0.0).sum(-1)
        terminal = np.arange(rows * columns) == last
        return cls(
            _scattered(targets, chances, rows * columns), rewards, discount, terminal=terminal
        )

    @classmethod
    def bus(
        cls,
        states: int = 20,
        discount: float = 0.95,
        *,
        cost: float = 1.0,
        replacement: float = 5.0,
        increments: Sequence[float] = (0.0, 0.25, 0.25, 0.25, 0.25),
        drives_on: bool = False,
    ) -> TabularMDP:
        """Bus-engine replacement: keep (action 0) or replace (action 1).

        State ``x`` is the mileage ``x + 1``. Keeping earns ``-cost`` times the mileage, which then
        grows by a random increment up to the cap ``states``; replacing earns ``-replacement`` and
        leads to mileage 1. The defaults are the simulated task of Kang et al., "Empirical risk
        minimization approach for offline inverse RL and dynamic discrete choice", section 7.

        Parameters
        ----------
        increments : sequence of float
            Probabilities of growing by 0, 1, 2, …
        drives_on : bool
            Whether a replaced bus also drives from mileage 1 on, as in Rust (1987), which makes
            what follows a replacement random.
        """
        chances = np.asarray(increments, dtype=np.float64)
        steps = np.arange(len(chances))
        kept = np.minimum(np.arange(states)[:, None] + steps, states - 1)
        replaced = np.minimum(steps if drives_on else 0 * steps, states - 1)
        targets = np.stack([kept, np.broadcast_to(replaced, kept.shape)], 1)
        kernel = _scattered(targets, np.broadcast_to(chances, targets.shape), states)
        mileage = np.arange(1, states + 1)
        rewards = np.stack([-cost * mileage, np.full(states, -replacement)], 1)
        return cls(kernel.toarray().reshape(states, 2, states), rewards, discount)


def check_discount(discount: float) -> float:
    """The discount, or a ``ValueError`` if it does not lie in [0, 1)."""
    if not 0.0 <= discount < 1.0:
        raise ValueError(f"discount is {discount}: it must lie in [0, 1)")
    return float(discount)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def probabilities(name: str, rows: Array, what: str = "") -> Array:
    """Rows that sum to one, of rows ``(n, k)`` that do up to :data:`ROW_SUM_TOLERANCE`.

    ``what`` is summed over, in a message; by default the row is named, as a state.
    """
    sums = rows.sum(-1)
    bad = ~(np.abs(sums - 1.0) <= ROW_SUM_TOLERANCE) | (rows < 0).any(-1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name} sums to {sums[row]:.12g} in {what or f'state {row}'}, its least entry is "
            f"{rows[row].min():.3g}: probabilities are at least 0 and must sum to 1"
        )
    return rows / _divisors(sums)[:, None]


def _divisors(sums: Array) -> Array:
    return np.where(np.abs(sums - 1.0) > EXACT, sums, 1.0)


def _scattered(targets: NDArray[Any], chances: NDArray[Any], states: int) -> Any:
    """A sparse kernel from next states and their chances, both ``(states, actions, outcomes)``."""
    pairs = targets.shape[0] * targets.shape[1]
    rows = np.repeat(np.arange(pairs), targets.shape[2])
    return sparse.csr_array((chances.ravel(), (rows, targets.ravel())), shape=(pairs, states))


def _kernel(transitions: Any, states: int, actions: int) -> Any:
    if sparse.issparse(transitions):
        kernel = sparse.csr_array(transitions, dtype=np.float64, copy=True)
        expected: tuple[int, ...] = (states * actions, states)
        entries = kernel.data
    else:
        kernel = np.array(transitions, dtype=np.float64)
        expected = (states, actions, states)
        entries = kernel
    if kernel.shape != expected:
        raise ValueError(
            f"transitions has shape {kernel.shape}: with rewards ({states}, {actions}) it must be "
            f"{expected}"
        )
    if not np.isfinite(entries).all():
        raise ValueError("transitions has entries that are not finite")
    if (entries < 0).any():
        raise ValueError(f"transitions has the entry {entries.min()}: probabilities are at least 0")
    sums = np.asarray(kernel.sum(-1)).ravel()
    wrong = np.flatnonzero(np.abs(sums - 1.0) > ROW_SUM_TOLERANCE)
    if len(wrong):
        s, a = divmod(int(wrong[0]), actions)
        raise ValueError(
            f"transitions sum to {sums[wrong[0]]:.12g} in state {s}, action {a} "
            f"({len(wrong)} such rows): they must sum to 1"
        )
    if sparse.issparse(kernel):
        kernel.data /= np.repeat(_divisors(sums), np.diff(kernel.indptr))
        kernel.sum_duplicates()
        kernel.eliminate_zeros()
        return kernel
    return kernel.reshape(states * actions, states) / _divisors(sums)[:, None]
