"""What is to be solved: logged transitions, a discount, and functions for Q and zeta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.bellman.inverse import inverse_values
from holdfast.bellman.mdp import TabularMDP, check_discount
from holdfast.bellman.networks import Approximator, Tables
from holdfast.bellman.saddle import saddle_elements, soft_value
from holdfast.bellman.transitions import Transitions

Array = NDArray[np.float64]


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
    anchor_action : int, optional
        The action whose rewards are known: choices then carry the information of the others.
    weight : float
        Of the anchor's Bellman term against the likelihood.
    """

    transitions: Transitions
    discount: float
    approximator: Approximator
    anchor_action: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_discount(self.discount)
        data = self.transitions
        if not len(data):
            raise ValueError("transitions has no rows")
        if isinstance(self.approximator, Tables):
            data.check_tabular(self.approximator.states, self.approximator.actions)
        known = np.ones(len(data), bool)
        if self.anchor_action is not None:
            known = data.action == self.anchor_action
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
        anchor_action: int | None = None,
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
        counts = transitions.counts(tables.states, tables.actions)
        entered = np.zeros(tables.states, bool)
        entered[transitions.state] = True
        entered[transitions.next_state[~transitions.terminal]] = True
        missing = np.argwhere((counts == 0) & entered[:, None])
        if len(missing):
            s, a = missing[0]
            raise ValueError(
                f"state {s} with action {a} does not occur ({len(missing)} such pairs): its value "
                "is not identified; give more transitions, or use features"
            )
        return problem

    def with_transitions(self, transitions: Transitions) -> SaddleProblem:
        """The same problem on other data."""
        return replace(self, transitions=transitions)

    def losses(self, primal: Tensor, dual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the primal parameters descend in, and what the dual ones do, ``(replicas,)`` each.

        Means over rows. Offline RL: the saddle objective, and its negative. With an anchor: the
        likelihood and the anchor's saddle objective, and the fit of the dual on all rows.
        """
        rows = self.approximator.q(primal, batch.state)
        ahead = soft_value(self.approximator.q(primal, batch.next_state), batch.terminal)
        zeta = self.approximator.zeta(dual, batch.state, batch.action)
        chosen = rows.gather(-1, batch.action[..., None])[..., 0]
        bellman = saddle_elements(chosen, zeta, ahead, batch.reward, self.discount)

        def mean(values: Tensor) -> Tensor:
            return values.mean(-1) if batch.weight is None else (batch.weight * values).sum(-1)

        if self.anchor_action is None:
            saddle = mean(bellman)
            return saddle, -saddle
        anchored = bellman.masked_fill(batch.action != self.anchor_action, 0.0)
        likelihood = torch.logsumexp(rows, -1) - chosen
        return mean(likelihood + self.weight * anchored), mean((ahead - zeta).square())

    def directions(
        self, primal: Tensor, dual: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What a step of size one takes off the parameters, ``(replicas, ...)`` each.

        Replicas do not mix, so the gradient of a sum over them holds the gradient of each.
        """
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
        observed frequencies of choices. Pairs that do not occur, or states that end episodes,
        have 0.

        Raises
        ------
        ValueError
            If the functions are no tables, or a pair that matters does not occur.
        """
        if not isinstance(self.approximator, Tables):
            raise ValueError("only tables have an exact solution")
        size = (self.approximator.states, self.approximator.actions)
        data = self.transitions
        counts = data.counts(*size)
        if self.anchor_action is not None:
            known = np.where(data.action == self.anchor_action, data.reward, 0.0)
            data = replace(data, reward=known)
        model = TabularMDP.empirical(data, *size, self.discount)
        if self.anchor_action is None:
            solved = model.soft_policy_iteration(1e-12)
            q, v = solved.q, solved.v
        else:
            frequencies = counts / counts.sum(1, keepdims=True).clip(min=1)
            q, v = inverse_values(
                frequencies,
                model.transitions,
                self.anchor_action,
                model.rewards[:, self.anchor_action],
                self.discount,
                terminal=model.terminal,
            )
        return q, np.where(counts > 0, model.expected(v), 0.0)

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
