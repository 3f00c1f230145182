"""A task whose best action is known, stepped as one batch: no simulator needed."""

import numpy as np
import torch

from holdfast.control.environments import Step


class Target:
    """Reward ``-(mean action - target)^2`` after every chunk; the target is what is observed.

    Episodes are ``length`` chunks long and then truncated, or terminated where ``terminates``.
    """

    reports_success = False

    def __init__(self, count=8, *, length=3, terminates=False, action_size=1, seed=0):
        self.count, self.length, self.terminates = count, length, terminates
        self.observation_size, self.action_size = 1, action_size
        self.action_low = np.full(action_size, -1.0, dtype=np.float32)
        self.action_high = -self.action_low
        self.draw = np.random.default_rng(seed)
        self.targets = np.zeros((count, 1, 1), dtype=np.float32)
        self.times = np.zeros(count, dtype=np.int64)
        self.returns = np.zeros(count)

    def reset(self, seed=None):
        self.times[:], self.returns[:] = 0, 0.0
        self.targets = self.draw.uniform(-0.5, 0.5, self.targets.shape).astype(np.float32)
        return self.targets.copy()

    def step(self, chunks):
        rewards = -((chunks.mean((1, 2)) - self.targets[:, 0, 0]) ** 2)
        self.times += 1
        self.returns += rewards
        lengths, returns = self.times.copy(), self.returns.copy()
        ended = self.times == self.length
        final = self.targets.copy()
        new = self.draw.uniform(-0.5, 0.5, self.targets.shape).astype(np.float32)
        self.targets = np.where(ended[:, None, None], new, self.targets)
        self.times[ended], self.returns[ended] = 0, 0.0
        never = np.zeros_like(ended)
        return Step(
            observations=self.targets.copy(),
            final_observations=final,
            rewards=rewards.astype(np.float32),
            terminated=ended if self.terminates else never,
            truncated=never if self.terminates else ended,
            success=never,
            lengths=np.full(self.count, chunks.shape[1]),
            episodes=np.zeros(self.count, dtype=np.int64),
            episode_lengths=lengths,
            episode_returns=returns,
        )

    def state_dict(self):
        return {
            "targets": torch.from_numpy(self.targets.copy()),
            "times": self.times.tolist(),
            "returns": self.returns.tolist(),
            "draw": self.draw.bit_generator.state,
        }

    def load_state_dict(self, state):
        self.targets = state["targets"].numpy().copy()
        self.times[:], self.returns[:] = state["times"], state["returns"]
        self.draw.bit_generator.state = state["draw"]
        return self.targets.copy()
