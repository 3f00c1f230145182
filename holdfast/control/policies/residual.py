"""A small Gaussian correction on top of another policy.

Ankile et al., "From Imitation to Refinement: Residual RL for Precise Assembly" (ResiP); with the
base still trained on demonstrations it is the network separation of Gao et al., "IN-RIL". ResiP's
residual looks at every step of the environment; this one corrects a chunk at once, so the two are
alike only where the horizon is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.control.policies.gaussian import GaussianHead
from holdfast.control.policies.interface import Decision, Policy
from holdfast.control.policies.loading import policy_from_config
from holdfast.control.policies.networks import Activation
from holdfast.control.policies.normalization import Normalizer


class ResidualPolicy(Policy):
    """``action = base + scale * residual``, in normalised units, chunk by chunk.

    The residual sees the observation and the base's chunk. It alone is trained by reinforcement
    learning, since the base's chunk is part of the record; imitation trains :attr:`base`. Its last
    layer starts at 0, so a deterministic decision is the base's own at first.

    The base always acts deterministically: only the residual explores. :attr:`Decision.record`
    holds ``base`` and ``residual``, both ``(batch, horizon, action_size)``, the base's normalised
    chunk and the correction before it is scaled, and ``log_probs (batch,)`` of the correction.

    Parameters
    ----------
    base : Policy
        What is corrected. Sizes and normalisers are its own.
    hidden : sequence of int
        Sizes of the residual's hidden layers.
    activation : str
        ``mish``, ``relu`` or ``tanh``.
    scale : float
        Of the correction: how much of half the range of the demonstrations is 1.
    std : float
        Standard deviation of the correction before it is scaled.
    learn_std : bool
        Whether it is learnt, one number per action dimension.
    std_range : tuple of float
        The range of a learnt deviation, around ``std``.
    seed : int
        Of the initial weights.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    kind = "residual"

    def __init__(
        self,
        base: Policy,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: Activation = "relu",
        scale: float = 0.1,
        std: float = 0.37,
        learn_std: bool = False,
        std_range: tuple[float, float] = (0.05, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}: it must be positive and finite")
        self.observation_size, self.action_size = base.observation_size, base.action_size
        self.horizon, self.history = base.horizon, base.history
        self.scale = scale
        self._options = {
            "hidden": list(hidden),
            "activation": activation,
            "std": std,
            "learn_std": learn_std,
            "std_range": list(std_range),
        }
        self.base = base
        self.residual = GaussianHead(
            base.history * base.observation_size + base.horizon * base.action_size,
            base.horizon,
            base.action_size,
            hidden=hidden,
            activation=activation,
            bounded=False,
            std=std,
            learn_std=learn_std,
            std_range=std_range,
            last_gain=0.0,
            generator=torch.Generator().manual_seed(seed),
        )

    # Not registered here a second time: a state names every tensor once.
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
        """The base's chunk with a sampled correction, or the mean one where ``deterministic``."""
        decided = self.base.act(observations, generator, deterministic=True).actions
        chunk = self.actions.normalize(decided)
        residual, record = self.residual.sample(
            self._inputs(observations, chunk), generator, deterministic=deterministic
        )
        # In the environment's units, so that a correction of 0 changes no bit.
        actions = decided + self.scale * self.actions.scale * residual
        return Decision(actions, {"base": chunk, "residual": residual, **record} if record else {})

    def log_probs(self, observations: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """``(batch,)``: see :meth:`Policy.log_probs`. Without a gradient to the base."""
        self.check_chunks("record['base']", record["base"])
        self.check_chunks("record['residual']", record["residual"])
        inputs = self._inputs(observations, record["base"])
        return self.residual.position_log_probs(inputs, record["residual"]).sum(-1)

    def config(self) -> dict[str, Any]:
        """See :meth:`Policy.config`."""
        base = {"kind": self.base.kind, "config": self.base.config()}
        return {"base": base, "scale": self.scale, **self._options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ResidualPolicy:
        """See :meth:`Policy.from_config`."""
        arguments = dict(config)
        base = arguments.pop("base")
        return cls(policy_from_config(base["kind"], base["config"]), **arguments)

    def _inputs(self, observations: Tensor, base: Tensor) -> Tensor:
        return torch.cat([self.features(observations), base.detach().flatten(1)], dim=-1)
