"""A policy at work in environments: what it saw, did and got, and the state to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.control.acting import one_thread
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.environments import VectorEnvironment


@dataclass(frozen=True)
class Experience:
    """Chunks that were carried out.

    Attributes
    ----------
    columns : mapping of str to Tensor
        ``(steps, environments, ...)`` each: ``observations`` and ``final_observations`` ``(history,
        size)``, ``actions`` ``(horizon, action_size)`` within the environment's bounds, ``mask``
        ``(horizon,)``, which of them the episode lasted for, ``rewards``, ``terminated`` and
        ``truncated``.
    record : mapping of str to Tensor
        ``(steps, environments, ...)`` each: the policy's own (see
        :class:`~holdfast.control.policies.Decision`).
    """

    columns: dict[str, Tensor]
    record: dict[str, Tensor]


class Collector:
    """Acts in environments from where it left off.

    Parameters
    ----------
    policy : ActorCritic
        Acts as it stands.
    environments : VectorEnvironment
    seed : int
        Of the policy's noise.
    """

    def __init__(self, policy: ActorCritic, environments: VectorEnvironment, *, seed: int) -> None:
        self.policy = policy
        self.environments = environments
        self.environment_steps = 0
        """Single actions executed so far, over all environments."""
        self._generator = torch.Generator().manual_seed(seed)
        self._observations: np.ndarray[Any, Any] | None = None
        self._finished: list[tuple[float, int, bool]] = []

    @one_thread()
    def collect(self, steps: int) -> Experience:
        """Carry out ``steps`` chunks in every environment."""
        environments = self.environments
        if self._observations is None:
            self._observations = environments.reset()
        seen, done, records, results = [], [], [], []
        self._finished = []
        behaviour = self.policy.behaviour
        training = self.policy.training
        self.policy.eval()
        device = self.policy.device
        for _ in range(steps):
            observations = torch.from_numpy(self._observations)
            decision = behaviour.act(observations.to(device), self._generator)
            chunks = decision.actions.cpu().numpy()
            step = environments.step(chunks)
            seen.append(observations.clone())
            done.append(np.clip(chunks, environments.action_low, environments.action_high))
            records.append({name: part.cpu() for name, part in decision.record.items()})
            results.append(step)
            self.environment_steps += int(step.lengths.sum())
            for slot in np.flatnonzero(step.ended):
                self._finished.append(
                    (
                        float(step.episode_returns[slot]),
                        int(step.episode_lengths[slot]),
                        bool(step.success[slot]),
                    )
                )
            self._observations = step.observations
        self.policy.train(training)
        names = ("final_observations", "rewards", "terminated", "truncated", "lengths")
        columns = {
            name: torch.from_numpy(np.stack([getattr(step, name) for step in results]))
            for name in names
        }
        columns["observations"] = torch.stack(seen)
        columns["actions"] = torch.from_numpy(np.stack(done)).float()
        horizon = columns["actions"].shape[2]
        columns["mask"] = torch.arange(horizon) < columns.pop("lengths")[..., None]
        record = {name: torch.stack([each[name] for each in records]) for name in records[0]}
        return Experience(columns, record)

    def facts(self) -> dict[str, tuple[float, float]]:
        """Of the latest experience, as sums and counts: steps, and episodes that ended in it."""
        facts = {"environment_steps": (float(self.environment_steps), 1.0)}
        if self._finished:
            returns, lengths, success = zip(*self._finished, strict=True)
            count = float(len(returns))
            facts |= {
                "reward": (sum(returns), count),
                "episode_length": (float(sum(lengths)), count),
            }
            if self.environments.reports_success:
                facts["success"] = (float(sum(success)), count)
        return facts

    def state_dict(self) -> dict[str, Any]:
        began = self._observations is not None
        return {
            "environment_steps": self.environment_steps,
            "generator": self._generator.get_state(),
            "environments": self.environments.state_dict() if began else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.environment_steps = int(state["environment_steps"])
        self._generator.set_state(state["generator"])
        if state["environments"] is not None:
            self._observations = self.environments.load_state_dict(state["environments"])
