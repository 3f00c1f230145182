"""Objectives that clone what was collected, by what critics make of it: IDQL, AWC, DIPO, AWR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.cloning import CloningLoss, row_losses
from holdfast.control.losses import (
    advantage_weights,
    idql_critic,
    idql_value,
    improve_actions,
    value_loss,
    weighted_regression,
)
from holdfast.joint.objective import LossTerms
from holdfast.joint.table import Table


@dataclass
class ImplicitQ:
    """Implicit Q-learning: critics of the logged actions, and a clone of all of them.

    Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion
    Policies". The three losses are of networks that share nothing, so their sum is one step of
    each; where gradients are clipped, they are clipped as one. The clone is unweighted; what is
    better is chosen when it acts (see
    :class:`~holdfast.control.policies.ImplicitPolicy`). With a temperature it is advantage-weighted
    cloning (AWC): each chunk by ``min(exp((Q - V) / temperature), cap)``, and the clone acts itself
    (Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", equation 7).

    Attributes
    ----------
    clone : str
        Loss of the actor (see :func:`~holdfast.control.cloning.row_losses`).
    discount : float
        Per chunk, in [0, 1].
    tau : float
        Which expectile of Q the value is, in (0, 1).
    temperature : float, optional
        Of the weights, in units of reward. ``None``: all are cloned alike.
    cap : float
        The largest weight.
    """

    clone: CloningLoss
    discount: float
    tau: float = 0.8
    temperature: float | None = None
    cap: float = 100.0

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        terms: LossTerms = policy(lambda inner: self._terms(inner, rows))
        return terms

    def _terms(self, inner: ActorCritic, rows: Table) -> LossTerms:
        columns = rows.to(inner.device).columns
        observations, actions = columns["observations"], columns["actions"]
        with torch.no_grad():
            targets = inner.qs(observations, actions, target=True)
            after = inner.values(columns["final_observations"])
        values = inner.values(observations)
        value = idql_value(values, targets, tau=self.tau)
        q = idql_critic(
            inner.qs(observations, actions),
            columns["rewards"],
            after,
            columns["terminated"],
            discount=self.discount,
        )
        weights = None
        if self.temperature is not None:
            weights = advantage_weights(
                targets.amin(0) - values, temperature=self.temperature, cap=self.cap
            )
        return _with_clone(rows, {"value_loss": value, "q_loss": q}, inner, self.clone, weights)


@dataclass
class ImprovedActions:
    """DIPO: a critic of the policy's own actions, and a clone of actions that it improved.

    Yang et al., "Policy Representation via Diffusion Probability Model for Reinforcement Learning",
    algorithm 1.

    Attributes
    ----------
    clone : str
        Loss of the actor (see :func:`~holdfast.control.cloning.row_losses`).
    discount : float
        Per chunk, in [0, 1].
    """

    clone: CloningLoss
    discount: float

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        terms: LossTerms = policy(lambda inner: self._terms(inner, rows))
        return terms

    def _terms(self, inner: ActorCritic, rows: Table) -> LossTerms:
        columns = rows.to(inner.device).columns
        q = idql_critic(
            inner.qs(columns["observations"], columns["actions"]),
            columns["rewards"],
            columns["next_values"],
            columns["terminated"],
            discount=self.discount,
        )
        return _with_clone(rows, {"q_loss": q}, inner, self.clone)


@dataclass
class Improvement:
    """What DIPO adds to a batch before it is cut: improved actions, and values of what follows.

    Adam's steps are taken in normalised units, on the action as it was improved so far. Actions
    beyond the end of an episode are part of the chunk that the critic knows, and move with it.

    Attributes
    ----------
    policy : ActorCritic
        With a critic of actions.
    steps : int
        Of Adam, at least 1.
    rate : float
        Adam's learning rate, in normalised units. Positive.
    """

    policy: ActorCritic
    steps: int = 10
    rate: float = 1e-4

    def __call__(self, columns: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """``cloned``, improved; and ``next_values``, of the policy's own next actions."""
        policy, device = self.policy, self.policy.device
        units = policy.actor.actions
        observations = columns["observations"].to(device)

        def worth(chunks: Tensor) -> Tensor:
            return policy.qs(observations, units.denormalize(chunks)).amin(0)

        with torch.no_grad():
            following = columns["final_observations"].to(device)
            chunks = policy.actor.act(following, generator).actions
            after = policy.qs(following, chunks, target=True).amin(0)
            start = units.normalize(columns["cloned"].to(device))
        improved = improve_actions(worth, start, steps=self.steps, rate=self.rate)
        return {"cloned": units.denormalize(improved).cpu(), "next_values": after.cpu()}


@dataclass
class AdvantageWeighted:
    """Advantage-weighted regression: what went better than expected is cloned, and the more so.

    Peng et al., "Advantage-Weighted Regression". Advantages are TD(lambda) returns less the value
    when they were collected; they come with the rows.

    Attributes
    ----------
    clone : str
        Loss of the actor (see :func:`~holdfast.control.cloning.row_losses`).
    temperature, cap : float
        See :func:`~holdfast.control.losses.advantage_weights`.
    vf_coef : float
        Weight of the critic's loss.
    """

    clone: CloningLoss
    temperature: float = 0.1
    cap: float = 100.0
    vf_coef: float = 0.5

    def __call__(self, policy: nn.Module, rows: Sequence[Any]) -> LossTerms:
        assert isinstance(rows, Table)
        terms: LossTerms = policy(lambda inner: self._terms(inner, rows))
        return terms

    def _terms(self, inner: ActorCritic, rows: Table) -> LossTerms:
        columns = rows.to(inner.device).columns
        with torch.set_grad_enabled(torch.is_grad_enabled() and not _critic_only(rows)):
            losses = row_losses(inner.actor, columns, self.clone)
        weights = advantage_weights(
            columns["advantages"], temperature=self.temperature, cap=self.cap
        )
        actor = weighted_regression(losses, weights)
        error = value_loss(inner.values(columns["observations"]), columns["returns"])
        metrics = {
            **rows.metrics(),
            **actor.metrics,
            **error.metrics,
            "value_loss": error.total.detach(),
        }
        return LossTerms(actor.total + self.vf_coef * error.total, actor.count, metrics)


def _critic_only(rows: Table) -> bool:
    return bool(rows.facts.get("critic_only", (0.0, 1.0))[0])


def _with_clone(
    rows: Table,
    critics: Mapping[str, LossTerms],
    inner: ActorCritic,
    clone: CloningLoss,
    weights: Tensor | None = None,
) -> LossTerms:
    """Losses of critics, and the actor's, which is cloned from the column ``cloned``."""
    columns = rows.to(inner.device).columns
    with torch.set_grad_enabled(torch.is_grad_enabled() and not _critic_only(rows)):
        losses = row_losses(inner.actor, {**columns, "actions": columns["cloned"]}, clone)
    metrics = {**rows.metrics(), "cloning": losses.detach().sum()}
    total = losses.sum()
    if weights is not None:
        weighted = weighted_regression(losses, weights)
        total, metrics = weighted.total, {**metrics, **weighted.metrics}
    for name, terms in critics.items():
        total = total + terms.total
        metrics |= {**terms.metrics, name: terms.total.detach()}
    return LossTerms(total, torch.tensor(len(rows)), metrics)
