"""Rollouts of the policy in environments, as a source of batches for reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.cloning import draw_noise
from holdfast.control.collecting import Collector
from holdfast.control.environments import VectorEnvironment
from holdfast.control.losses import generalized_advantage, normalize_advantages
from holdfast.control.statistics import RunningScale, ValueNormalizer
from holdfast.joint.table import Table


@dataclass(frozen=True)
class RolloutOptions:
    """How much is collected, and how often it is used.

    Attributes
    ----------
    steps : int
        Chunks of actions in every environment of a batch of rollouts.
    batch_size : int
        Rows of an update.
    epochs : int
        Passes over a batch of rollouts.
    discount, trace : float
        Of generalised advantage estimation, in [0, 1], per chunk.
    normalize_advantages, normalize_values, scale_rewards : bool
        Advantages of mean 0 and deviation 1 over a batch of rollouts; a critic that predicts
        returns of mean 0 and deviation 1; rewards over the running deviation of the return.
    critic_warmup : int
        Batches of rollouts on which the critic alone is trained.
    target_kl : float, optional
        Once an update moved the policy by more than this, in nats, the rollouts are used no more.
    rows : str
        What an update learns from: whole ``decisions``, single ``denoising`` steps of a diffusion
        policy, or the ``actions`` that were carried out, to clone them.
    """

    steps: int
    batch_size: int
    epochs: int = 8
    discount: float = 0.99
    trace: float = 0.95
    normalize_advantages: bool = True
    normalize_values: bool = True
    scale_rewards: bool = False
    critic_warmup: int = 2
    target_kl: float | None = None
    rows: Literal["decisions", "denoising", "actions"] = "decisions"


class EnvironmentRollouts:
    """Batches of what the policy did, without end.

    Rollouts are collected when a batch is asked for and none are left. The state holds those that
    are half used, the environments, the running statistics and the generator, so that a resumed
    run goes on with them. See :mod:`holdfast.control.environments` for what of an environment is
    restored exactly.

    A batch has the columns ``observations``, ``advantages``, ``returns``, ``old_values``, and for
    decisions ``old_log_probs`` and the policy's record (for denoising steps ``before``, ``after``
    and ``position``). Actions have ``actions``, ``mask`` and the noise that a diffusion policy is
    cloned with. Returns and values are in the units of the critic.

    Parameters
    ----------
    policy : ActorCritic
        Acts as it stands when rollouts are collected.
    environments : VectorEnvironment
    options : RolloutOptions
    seed : int
        Of the policy's noise, and of the order of rows.
    """

    def __init__(
        self,
        policy: ActorCritic,
        environments: VectorEnvironment,
        options: RolloutOptions,
        *,
        seed: int,
    ) -> None:
        self.policy = policy
        self.environments = environments
        self.options = options
        self.seed = seed
        self.round = 0
        """Batches of rollouts collected so far."""
        self.used = 0
        """Batches that were handed out of the current rollouts."""
        self._collector = Collector(policy, environments, seed=seed)
        self._values = ValueNormalizer()
        self._scale = RunningScale(environments.count, discount=options.discount)
        self._rollouts: Table | None = None
        self._shuffled: int | None = None
        self._parts: Sequence[Tensor] = ()
        """Rows of each update of a pass, and what that pass was shuffled by."""

    @property
    def environment_steps(self) -> int:
        """Single actions executed so far, over all environments."""
        return self._collector.environment_steps

    @property
    def rows(self) -> int:
        """Rows of a batch of rollouts."""
        steps = getattr(self.policy.actor, "fine_tuned_steps", 1) if self._denoising else 1
        return self.options.steps * self.environments.count * steps

    @property
    def _denoising(self) -> bool:
        return self.options.rows == "denoising"

    @property
    def updates(self) -> int:
        """Updates that a batch of rollouts serves, unless it is stopped before."""
        return self.options.epochs * math.ceil(self.rows / self.options.batch_size)

    def next(self) -> Table:
        """The rows of the next update."""
        if self._rollouts is None or self.used >= self.updates:
            self._rollouts = self._collect()
            self.round += 1
            self.used = 0
        parts = math.ceil(self.rows / self.options.batch_size)
        epoch, part = divmod(self.used, parts)
        seed = hash((self.seed, self.round, epoch)) & (2**62 - 1)
        if seed != self._shuffled:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
            # Nearly equal parts: a few rows left over do not get a whole step of their own.
            self._shuffled, self._parts = seed, order.tensor_split(parts)
        indices = self._parts[part]
        self.used += 1
        if self._denoising:
            return _denoising_steps(self._rollouts, indices)
        rows = self._rollouts.take(indices)
        if self.options.rows == "actions":
            noise = torch.Generator().manual_seed(seed + 1 + part)
            rows.columns.update(draw_noise(self.policy.actor, len(rows), noise))
        return rows

    def observe(self, approx_kl: float) -> None:
        """Use the rollouts no more, if an update moved the policy too far."""
        if self.options.target_kl is not None and approx_kl > self.options.target_kl:
            self.used = self.updates

    # Collecting -----------------------------------------------------------------------------------

    def _collect(self) -> Table:
        experience = self._collector.collect(self.options.steps)
        seen = experience.columns
        observations = seen["observations"]  # (time, environments, history, size)
        terminated, truncated = seen["terminated"], seen["truncated"]
        rewards = seen["rewards"]
        if self.options.scale_rewards:
            self._scale.update(rewards, terminated | truncated)
            rewards = self._scale.scale(rewards)
        # What the critic says now, in its units: a clip of values is around it.
        old_values = self._predicted(observations)
        values = self._values.denormalize(old_values)
        after = self._values.denormalize(self._predicted(seen["final_observations"]))
        advantages, returns = generalized_advantage(
            rewards,
            values,
            after,
            terminated,
            truncated,
            discount=self.options.discount,
            trace=self.options.trace,
        )
        if self.options.normalize_values:
            self._values.update(returns)
            returns = self._values.normalize(returns)
        if self.options.normalize_advantages:
            advantages = normalize_advantages(advantages)
        columns = {
            "observations": observations,
            "advantages": advantages,
            "returns": returns,
            "old_values": old_values,
        }
        if self.options.rows == "actions":
            columns |= {"actions": seen["actions"], "mask": seen["mask"]}
        else:
            columns |= experience.record
            columns["old_log_probs"] = columns.pop("log_probs")
        flat = {name: column.flatten(0, 1) for name, column in columns.items()}
        floats = {k: v.float() if v.is_floating_point() else v for k, v in flat.items()}
        critic_only = (float(self.round < self.options.critic_warmup), 1.0)
        return Table(floats, {**self._collector.facts(), "critic_only": critic_only})

    def _predicted(self, observations: Tensor) -> Tensor:
        """Of ``(time, environments, history, size)``: ``(time, environments)``."""
        with torch.no_grad():
            rows = observations.flatten(0, 1).to(self.policy.device)
            found = torch.cat([self.policy.values(part) for part in rows.split(8192)])
        return found.cpu().view(observations.shape[:2])

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "used": self.used,
            "collector": self._collector.state_dict(),
            "values": self._values.state_dict(),
            "scale": self._scale.state_dict(),
            "rollouts": None if self._rollouts is None else self._rollouts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.round, self.used = int(state["round"]), int(state["used"])
        self._collector.load_state_dict(state["collector"])
        self._values.load_state_dict(state["values"])
        self._scale.load_state_dict(state["scale"])
        held = state["rollouts"]
        self._rollouts = None if held is None else Table.from_state(held)


def _denoising_steps(rollouts: Table, indices: Tensor) -> Table:
    """Rows over decisions and denoising steps alike: ``index = decision * K' + position``."""
    count = rollouts.columns["old_log_probs"].shape[1]
    rows, positions = indices // count, indices % count
    found = {
        name: column[rows]
        for name, column in rollouts.columns.items()
        if name not in ("chain", "old_log_probs")
    }
    chain = rollouts.columns["chain"]
    found |= {
        "before": chain[rows, positions],
        "after": chain[rows, positions + 1],
        "old_log_probs": rollouts.columns["old_log_probs"][rows, positions],
        "position": positions,
    }
    return Table(found, rollouts.facts)
