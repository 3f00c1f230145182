"""What is to be solved: logged transitions, a discount, and functions for Q and zeta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from holdfast.bellman import solve
from holdfast.bellman.inverse import inverse_values
from holdfast.bellman.mdp import TabularMDP, check_discount
from holdfast.bellman.networks import Approximator, Linear, Tables
from holdfast.bellman.saddle import saddle_elements, soft_value
from holdfast.bellman.table_gradients import table_directions
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]
DENSE = 1_000_000
"""Entries up to which an empirical model is dense."""


@dataclass(frozen=True)
class Batch:
    """Transitions of many replicas, as tensors.

    Attributes
    ----------
    state, next_state : Tensor
        ``(replicas, rows)``, or ``(replicas, rows, features)``.
    action, reward, terminal : Tensor
        ``(replicas, rows)``. A reward that was not observed is 0 here.
    weight : Tensor, optional
        ``(replicas, rows)``: the share of each row, summing to one a replica. By default alike.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    terminal: Tensor
    weight: Tensor | None = None

    @classmethod
    def stack(cls, datasets: Sequence[Transitions]) -> Batch:
        """One replica a data set; all of the same length."""
        lengths = {len(each) for each in datasets}
        if len(lengths) != 1:
            raise ValueError(f"datasets have {sorted(lengths)} rows: they must be of one length")

        def column(name: str) -> Tensor:
            return torch.as_tensor(np.stack([getattr(each, name) for each in datasets]))

        reward = torch.nan_to_num(column("reward"), nan=0.0)
        named = {name: column(name) for name in ("state", "action", "next_state", "terminal")}
        return cls(**named, reward=reward)

    def rows(self, index: Tensor) -> Batch:
        """The rows ``(replicas, k)`` of an index of that shape."""

        def pick(column: Tensor) -> Tensor:
            if column.ndim == 2:
                return column.gather(1, index)
            return column.gather(1, index[..., None].expand(*index.shape, column.shape[-1]))

        names = ("state", "action", "reward", "next_state", "terminal")
        return Batch(**{name: pick(getattr(self, name)) for name in names})

    def between(self, first: int, last: int) -> Batch:
        """The rows from ``first`` to before ``last``."""
        names = ("state", "action", "reward", "next_state", "terminal")
        return Batch(**{name: getattr(self, name)[:, first:last] for name in names})


@dataclass(frozen=True, eq=False)
class SaddleProblem:
    """Offline RL, or, given an anchor action, offline inverse RL.

    Attributes
    ----------
    transitions : Transitions
        With every reward observed; with an anchor action, where that was taken.
    discount : float
        In [0, 1).
    approximator : Approximator
        Functions for Q and zeta.
    anchor_action : int or NDArray, optional
        The action whose rewards are known: choices then carry the information of the others. One
        for all states, or, where these are numbered, ``(states,)``.
    weight : float
        Of the anchor's Bellman term against the likelihood, positive.

    Raises
    ------
    ValueError
        For numbers out of range, a row outside the functions' states and actions, an anchor that
        was never taken, or an unobserved reward where it is needed.
    """

    transitions: Transitions
    discount: float
    approximator: Approximator
    anchor_action: int | NDArray[np.int64] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_discount(self.discount)
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight is {self.weight}: it must be positive and finite")
        data = self.transitions
        if not len(data):
            raise ValueError("transitions has no rows")
        if isinstance(self.approximator, Tables | Linear):
            data.check_tabular(self.approximator.states, self.approximator.actions)
        self._check_anchor()
        known = np.ones(len(data), bool)
        if self.anchor_action is not None:
            known = self.anchored(data)
            if not known.any():
                raise ValueError(
                    f"anchor_action is {self.anchor_action}: it was never taken in {len(data)} rows"
                )
        unseen = np.flatnonzero(known & np.isnan(data.reward))
        if len(unseen):
            raise ValueError(f"reward is NaN in row {unseen[0]}: it must be known there")

    @classmethod
    def tabular(
        cls,
        transitions: Transitions,
        discount: float,
        *,
        states: int | None = None,
        actions: int | None = None,
        anchor_action: int | NDArray[np.int64] | None = None,
        weight: float = 1.0,
    ) -> SaddleProblem:
        """With tables, as large as the data say unless told.

        Raises
        ------
        ValueError
            Besides bad data: if a pair that matters does not occur. Nothing would hold its value
            down, and the values of all that leads there with it.
        """
        if transitions.state.ndim != 1:
            raise ValueError("transitions holds observations: tables need numbered states")
        top = max(transitions.state.max(initial=0), transitions.next_state.max(initial=0))
        tables = Tables(
            states or int(top) + 1, actions or int(transitions.action.max(initial=0)) + 1
        )
        problem = cls(transitions, discount, tables, anchor_action, weight)
        problem.check_covered()
        return problem

    def check_covered(self) -> NDArray[np.bool_]:
        """Refuse tables some of whose values nothing holds down.

        Returns
        -------
        NDArray
            ``(states,)``: which states are decided in, or lead on.

        Raises
        ------
        ValueError
            Naming a pair of such a state that does not occur.
        """
        tables, data = self.approximator, self.transitions
        assert isinstance(tables, Tables)
        entered = data.entered(tables.states)
        counts = data.counts(tables.states, tables.actions)
        missing = np.argwhere((counts == 0) & entered[:, None])
        if len(missing):
            s, a = missing[0]
            raise ValueError(
                f"state {s} with action {a} does not occur ({len(missing)} such pairs): its value "
                "is not identified; give more transitions, or use features"
            )
        return entered

    def anchored(self, transitions: Transitions) -> NDArray[np.bool_]:
        """``(n,)``: the rows that took the anchor."""
        anchor = np.asarray(self.anchor_action)
        found = transitions.action == (anchor[transitions.state] if anchor.ndim else anchor)
        return np.asarray(found)

    def _check_anchor(self) -> None:
        if self.anchor_action is None:
            return
        anchor = np.asarray(self.anchor_action)
        if not np.issubdtype(anchor.dtype, np.integer):
            raise ValueError(f"anchor_action has dtype {anchor.dtype}: it must be integer")
        numbered = self.approximator
        states = numbered.states if isinstance(numbered, Tables | Linear) else None
        if anchor.ndim and anchor.shape != (states,):
            raise ValueError(
                f"anchor_action has shape {anchor.shape}: it must be a number, or one for each "
                "state of a table"
            )

    @cached_property
    def _anchors(self) -> Tensor:
        return torch.as_tensor(self.anchor_action)

    def _took_anchor(self, batch: Batch) -> Tensor:
        anchor = self._anchors
        return batch.action == (anchor[batch.state] if anchor.ndim else anchor)

    def with_transitions(self, transitions: Transitions) -> SaddleProblem:
        """The same problem on other data."""
        return replace(self, transitions=transitions)

    def losses(self, primal: Tensor, dual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the primal parameters descend in, and what the dual ones do, ``(replicas,)`` each.

        Means over rows. Offline RL: the saddle objective, and its negative. With an anchor: the
        likelihood and the anchor's saddle objective, and the fit of the dual on all rows.
        """
        both = self.approximator.q(primal, torch.cat([batch.state, batch.next_state], 1))
        rows, after = both.chunk(2, 1)
        ahead = soft_value(after, batch.terminal)
        zeta = self.approximator.zeta(dual, batch.state, batch.action)
        chosen = rows.gather(-1, batch.action[..., None])[..., 0]
        bellman = saddle_elements(chosen, zeta, ahead, batch.reward, self.discount)

        def mean(values: Tensor) -> Tensor:
            return values.mean(-1) if batch.weight is None else (batch.weight * values).sum(-1)

        if self.anchor_action is None:
            saddle = mean(bellman)
            return saddle, -saddle
        anchored = bellman.masked_fill(~self._took_anchor(batch), 0.0)
        likelihood = torch.logsumexp(rows, -1) - chosen
        return mean(likelihood + self.weight * anchored), mean((ahead - zeta).square())

    def directions(
        self, primal: Tensor, dual: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What a step of size one takes off the parameters, ``(replicas, ...)`` each.

        Replicas do not mix, so the gradient of a sum over them holds the gradient of each. With
        ``differentiable``, it has a graph of its own.
        """
        if isinstance(self.approximator, Tables) and not differentiable:
            anchored = None if self.anchor_action is None else self._took_anchor(batch)
            with torch.no_grad():
                return table_directions(
                    primal, dual, batch, self.approximator, self.discount, anchored, self.weight
                )
        down, up = self.losses(primal, dual, batch)
        if self.anchor_action is None:
            first, second = torch.autograd.grad(
                down.sum(), (primal, dual), create_graph=differentiable
            )
            return first, -second
        (first,) = torch.autograd.grad(
            down.sum(), primal, create_graph=differentiable, retain_graph=True
        )
        (second,) = torch.autograd.grad(up.sum(), dual, create_graph=differentiable)
        return first, second

    def exact(self) -> tuple[Array, Array]:
        """Q and zeta at the saddle of a tabular problem, ``(states, actions)`` each.

        Soft value iteration on the empirical model; with an anchor, the inverse solution of the
        observed frequencies of choices. Pairs of states that are never decided in have 0.

        Raises
        ------
        ValueError
            If the functions are no tables, or a pair that matters does not occur.
        """
        if not isinstance(self.approximator, Tables):
            raise ValueError("only tables have an exact solution")
        states, actions = self.approximator.states, self.approximator.actions
        counts = self.transitions.counts(states, actions)
        model = self._empirical(self.check_covered())
        if self.anchor_action is None:
            solved = model.soft_policy_iteration(1e-12)
            q, v = solved.q, solved.v
        else:
            anchor = np.append(np.broadcast_to(self.anchor_action, states), 0)
            frequencies = np.append(counts, np.zeros((1, actions)), axis=0)
            q, v = inverse_values(
                frequencies / frequencies.sum(1, keepdims=True).clip(min=1),
                model.transitions,
                anchor,
                model.rewards[np.arange(states + 1), anchor],
                self.discount,
                terminal=model.terminal,
            )
        return q[:states], np.where(counts > 0, model.expected(v)[:states], 0.0)

    def _empirical(self, entered: NDArray[np.bool_]) -> TabularMDP:
        """The empirical model with one state more, in which all ends are.

        Rows say by themselves whether they end, so a state may be an end in some and not in others.
        States that are not ``entered``, ``(states,)``, are ends too.
        """
        data, states = self.transitions, len(entered)
        known = data.reward
        if self.anchor_action is not None:
            known = np.where(self.anchored(data), known, 0.0)
        ahead = np.where(data.terminal, states, data.next_state)
        assert isinstance(self.approximator, Tables)
        actions, size = self.approximator.actions, states + 1
        pairs = np.arange(size * actions)
        stay: Any = sparse.csr_array((np.ones(len(pairs)), (pairs, pairs // actions)))
        if size * size * actions <= DENSE:
            stay = stay.toarray().reshape(size, actions, size)
        ended = np.append(~entered, True)
        rest = TabularMDP(stay, np.zeros((size, actions)), self.discount, terminal=ended)
        return TabularMDP.empirical(
            Transitions(data.state, data.action, known, ahead, data.terminal),
            size,
            actions,
            self.discount,
            fallback=rest,
        )

    def residuals(self, q: Array) -> Array:
        """Empirical Bellman residuals of ``q``, both ``(states, actions)``; 0 without rows.

        With an anchor action, its rows alone have any.
        """
        data = self.transitions
        ahead = np.where(data.terminal, 0.0, solve.soft_value(q)[data.next_state])
        delta = np.nan_to_num(data.reward) + self.discount * ahead - q[data.state, data.action]
        if self.anchor_action is not None:
            delta = np.where(self.anchored(data), delta, 0.0)
        pair = data.state * q.shape[1] + data.action
        sums = np.bincount(pair, delta, minlength=q.size).reshape(q.shape)
        return sums / data.counts(*q.shape).clip(min=1)

    def compact(self) -> Batch:
        """All transitions as one replica, equal rows of a table once, with their share."""
        data = self.transitions
        if data.state.ndim != 1:
            return Batch.stack([data])
        columns = np.stack(
            [data.state, data.action, data.next_state, data.terminal, np.nan_to_num(data.reward)]
        )
        _, first, counts = np.unique(columns, axis=1, return_index=True, return_counts=True)
        share = torch.as_tensor(counts / len(data))[None]
        return replace(Batch.stack([data[first]]), weight=share)
