"""PPO and nothing else: no records, checks, checkpoints or resume, one file of plain torch.

What is left of the loop's time when a library takes none: the environment, the networks, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

OBSERVATION, ACTION = 11, 3
"""Sizes of Hopper's."""


def train(
    iterations: int, settings: dict[str, Any], task: str, done: Callable[[], None]
) -> list[float]:
    """Train, and call ``done`` after every iteration; returns of the episodes that ended."""
    count, steps = settings["environments"], settings["steps"]
    torch.manual_seed(0)
    policy, critic = _network(ACTION, settings["hidden"]), _network(1, settings["hidden"])
    log_std = nn.Parameter(torch.zeros(ACTION))
    parameters = [*policy.parameters(), log_std, *critic.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True
    )
    environments = SyncVectorEnv(
        [lambda: gymnasium.make(task, disable_env_checker=True)] * count,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    observations = environments.reset(seed=0)[0]
    running, returns = np.zeros(count), []
    for _ in range(iterations):
        seen = torch.empty(steps, count, OBSERVATION)
        actions, log_probs = torch.empty(steps, count, ACTION), torch.empty(steps, count)
        finals = torch.empty(steps, count, OBSERVATION)
        rewards, terminated, ended = (torch.empty(steps, count) for _ in range(3))
        for t in range(steps):
            with torch.no_grad():
                seen[t] = torch.from_numpy(observations)
                mean = policy(seen[t])
                actions[t] = mean + log_std.exp() * torch.randn(count, ACTION)
                log_probs[t] = _log_probs(actions[t], mean, log_std)
            observations, reward, terminations, truncations, infos = environments.step(
                actions[t].clamp(-1.0, 1.0).numpy()
            )
            over = terminations | truncations
            running += reward
            final = observations.copy()
            for slot in np.flatnonzero(over):
                final[slot] = infos["final_obs"][slot]
                returns.append(float(running[slot]))
                running[slot] = 0.0
            finals[t], rewards[t] = torch.from_numpy(final), torch.from_numpy(reward)
            terminated[t], ended[t] = torch.from_numpy(terminations), torch.from_numpy(over)
        with torch.no_grad():
            values = critic(seen).squeeze(-1)
            after = critic(finals).squeeze(-1) * (1.0 - terminated)
        errors = rewards + settings["discount"] * after - values
        advantages, following = torch.empty_like(errors), torch.zeros(count)
        for t in reversed(range(steps)):
            carried = settings["discount"] * settings["trace"] * (1.0 - ended[t])
            following = errors[t] + carried * following
            advantages[t] = following
        targets = (advantages + values).flatten()
        gains = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        rows = (seen.flatten(0, 1), actions.flatten(0, 1), log_probs.flatten(), gains.flatten())
        for _ in range(settings["epochs"]):
            for part in torch.randperm(steps * count).split(settings["batch_size"]):
                observed, acted, old, gain = (column[part] for column in rows)
                ratio = (_log_probs(acted, policy(observed), log_std) - old).exp()
                low, high = 1.0 - settings["epsilon"], 1.0 + settings["epsilon"]
                surrogate = torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
                error = (critic(observed).squeeze(-1) - targets[part]).square()
                optimizer.zero_grad()
                (settings["vf_coef"] * 0.5 * error.mean() - surrogate.mean()).backward()
                nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
                optimizer.step()
        done()
    environments.close()
    return returns


def _network(outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(OBSERVATION, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )


def _log_probs(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    deviation = (actions - mean) * torch.exp(-log_std)
    return -0.5 * deviation.square().sum(-1) - log_std.sum()
