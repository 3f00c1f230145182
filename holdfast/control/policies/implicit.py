"""A policy that takes the best of several chunks another one would choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.control.losses import implicit_choice
from holdfast.control.policies.critic import Critic, TwinQ
from holdfast.control.policies.gaussian import GaussianPolicy
from holdfast.control.policies.interface import Decision, Policy, check_sizes
from holdfast.control.policies.loading import policy_from_config
from holdfast.control.policies.normalization import Normalizer


class ImplicitPolicy(Policy):
    """Draws chunks from a cloned policy, and chooses among them by what a critic makes of them.

    Hansen-Estruch et al., "IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion
    Policies", algorithm 2. A deterministic decision is the candidate with the largest Q. Otherwise
    one is drawn, those that are better than the state's value with weight ``tau``, the others with
    ``1 - tau``.

    The choice has no density to speak of: records are empty, and :meth:`log_probs` is not defined.

    Parameters
    ----------
    base : Policy
        What is cloned, and drawn from. Sizes and normalisers are its own.
    q : TwinQ
        Of chunks; the smaller of its two values counts.
    value : Critic
        Of states.
    candidates : int
        Chunks drawn for every decision, at least 1.
    tau : float
        In (0, 1).

    Raises
    ------
    ValueError
        For a number out of range.
    """

    kind = "implicit"

    def __init__(
        self, base: Policy, q: TwinQ, value: Critic, *, candidates: int = 16, tau: float = 0.7
    ) -> None:
        super().__init__()
        check_sizes(candidates=candidates)
        if not 0.0 < tau < 1.0:
            raise ValueError(f"tau is {tau}: it must lie in (0, 1)")
        self.observation_size, self.action_size = base.observation_size, base.action_size
        self.horizon, self.history = base.horizon, base.history
        self.base, self.q, self.value = base, q, value
        self.candidates, self.tau = candidates, tau

    @property
    def observations(self) -> Normalizer:  # type: ignore[override]
        """The base's."""
        return self.base.observations

    @property
    def actions(self) -> Normalizer:  # type: ignore[override]
        """The base's."""
        return self.base.actions

    @property
    def cloned(self) -> Policy:
        """The base."""
        return self.base.cloned

    @torch.no_grad()
    def act(
        self, observations: Tensor, generator: torch.Generator, *, deterministic: bool = False
    ) -> Decision:
        """Choose among candidates; see the class."""
        self.check_observations(observations)
        repeated = observations.repeat_interleave(self.candidates, dim=0)
        # The means of a Gaussian are all alike; a diffusion policy still starts from noise.
        quiet = deterministic and not isinstance(self.base, GaussianPolicy)
        drawn = self.base.act(repeated, generator, deterministic=quiet).actions
        shape = (len(observations), self.candidates)
        qs = self.q(repeated, drawn).amin(0).view(shape).to(generator.device)
        chosen = implicit_choice(
            qs,
            self.value(observations).to(generator.device),
            self.tau,
            generator=None if deterministic else generator,
        ).to(drawn.device)
        rows = torch.arange(len(observations), device=drawn.device)
        return Decision(drawn.unflatten(0, shape)[rows, chosen], {})

    def log_probs(self, observations: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """Always raises ``TypeError``."""
        raise TypeError("a choice among candidates has no log-probability; score the base instead")

    def config(self) -> dict[str, Any]:
        """See :meth:`Policy.config`."""
        return {
            "base": {"kind": self.base.kind, "config": self.base.config()},
            "q": self.q.structure,
            "value": self.value.structure,
            "candidates": self.candidates,
            "tau": self.tau,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImplicitPolicy:
        """See :meth:`Policy.from_config`."""
        arguments = dict(config)
        described, q, value = (arguments.pop(name) for name in ("base", "q", "value"))
        base = policy_from_config(described["kind"], described["config"])
        return cls(base, twin_q(base, **q), critic(base, **value), **arguments)


def critic(policy: Policy, **options: Any) -> Critic:
    """A critic of what ``policy`` sees, in its units; options as of :class:`Critic`."""
    return Critic(
        policy.observation_size, policy.history, observations=policy.observations, **options
    )


def twin_q(policy: Policy, **options: Any) -> TwinQ:
    """A critic of what ``policy`` sees and does, in its units; options as of :class:`TwinQ`."""
    return TwinQ(
        policy.observation_size,
        policy.action_size,
        horizon=policy.horizon,
        history=policy.history,
        observations=policy.observations,
        actions=policy.actions,
        **options,
    )
