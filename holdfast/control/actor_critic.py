"""What is trained in control: a policy and, where reinforcement learning needs them, critics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.losses import soft_update
from holdfast.control.policies import Critic, ImplicitPolicy, Policy, TwinQ, untrained_copy
from holdfast.joint.fingerprint import digest_of


class ActorCritic(nn.Module):
    """A policy and its critics as one module, so that one optimiser and one checkpoint hold all.

    Learning rates of their own go by the names ``actor``, ``critic`` and ``q``.

    Parameters
    ----------
    actor : Policy
    critic : Critic, optional
        Of states. ``None``: nothing that is trained needs values.
    q : TwinQ, optional
        Of chunks of actions; a copy that is not trained follows it.
    candidates : int, optional
        Act with the best of so many chunks of the actor. ``None``: act as the actor does.
    tau : float
        See :class:`~holdfast.control.policies.ImplicitPolicy`.
    """

    def __init__(
        self,
        actor: Policy,
        critic: Critic | None = None,
        q: TwinQ | None = None,
        *,
        candidates: int | None = None,
        tau: float = 0.7,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.q = q
        self.target_q = None if q is None else untrained_copy(q)
        self.candidates, self.tau = candidates, tau

    def forward(self, read: Callable[[ActorCritic], Any]) -> Any:
        """``read(self)``: losses ask through here, so that a data-parallel wrapper sees it."""
        return read(self)

    def values(self, observations: Tensor) -> Tensor:
        """``(batch,)``, as the critic predicts them."""
        if self.critic is None:
            raise ValueError("this policy has no critic")
        found: Tensor = self.critic(observations)
        return found

    def qs(self, observations: Tensor, actions: Tensor, *, target: bool = False) -> Tensor:
        """``(2, batch)``: of chunks ``(batch, horizon, action_size)``. Target: the slow copy's."""
        network = self.target_q if target else self.q
        if network is None:
            raise ValueError("this policy has no critic of actions")
        found: Tensor = network(observations, actions)
        return found

    def follow(self, rate: float) -> None:
        """Move the slow copy of :attr:`q` towards it."""
        assert self.q is not None and self.target_q is not None
        soft_update(self.target_q, self.q, rate)

    @property
    def behaviour(self) -> Policy:
        """What acts in environments: the actor, or the best of its candidates."""
        if self.candidates is None:
            return self.actor
        assert self.q is not None and self.critic is not None
        return ImplicitPolicy(
            self.actor, self.q, self.critic, candidates=self.candidates, tau=self.tau
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what acts. Critics that serve training alone are in its checkpoints."""
        self.behaviour.save_pretrained(folder)

    def fingerprint(self) -> str:
        """Digest of weights and structure: equal for equal policies, wherever they came from."""
        return digest_of([self.actor.kind, self.actor.config()], self.state_dict())
