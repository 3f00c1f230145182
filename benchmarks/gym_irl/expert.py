"""An expert who is soft-optimal, trained here: deep soft Q-learning with a slow target.

Rewards are divided by the temperature, so that the expert's choices are ``softmax Q`` of *those*
rewards, and an inverse method has something true to recover.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.bellman import Transitions, soft_value

Array = NDArray[np.float64]
RUNS = Path(__file__).parent / "runs"
WORKERS = 8
"""Episodes that are collected at a time."""
BATCH = 128
HIDDEN = 64
SLOWNESS = 0.01
"""Share by which the target follows, each update."""
Policy = Callable[[Tensor], Tensor]
"""From observations ``(n, features)`` to ``Q(s, .)``."""


@dataclass(frozen=True)
class Task:
    """An environment, and how its expert is trained.

    Attributes
    ----------
    name : str
        Of gymnasium.
    temperature : float
        Rewards are divided by it. Below the reward of a step over the logarithm of the number of
        actions, so that acting at random for ever does not pay.
    steps : int
        Decisions to learn from.
    updates : int
        Of the network for each ``WORKERS`` decisions.
    scale : float
        Size of the values.
    inputs : tuple of float
        What each number of an observation is multiplied by.
    """

    name: str
    temperature: float
    steps: int
    updates: int
    scale: float
    inputs: tuple[float, ...]
    actions: int
    discount: float = 0.99


TASKS = {
    task.name: task
    for task in (
        Task("CartPole-v1", 1.0, 40_000, 8, 50.0, (0.5, 0.5, 5.0, 0.5), 2),
        Task("Acrobot-v1", 0.3, 80_000, 4, 50.0, (1.0, 1.0, 1.0, 1.0, 0.25, 0.1), 3),
        Task("LunarLander-v3", 0.4, 300_000, 2, 50.0, (1.0,) * 8, 4),
    )
}


def available(task: Task) -> bool:
    """Whether the environment's dependencies are installed."""
    try:
        gymnasium.make(task.name).close()
    except gymnasium.error.DependencyNotInstalled:
        return False
    return True


class QNetwork(nn.Module):
    """``scale * network(observation * inputs)``, float32."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(len(task.inputs), HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, task.actions),
            )
        self.register_buffer("inputs", torch.tensor(task.inputs), persistent=False)
        self.scale = task.scale

    def forward(self, state: Tensor) -> Tensor:
        return self.scale * self.body(state.float() * self.inputs)


def expert(task: Task) -> QNetwork:
    """The trained expert; trained if it is not there yet."""
    file = RUNS / f"{task.name}.safetensors"
    network = QNetwork(task, seed=0)
    if not file.exists():
        train(task, network, seed=0)
        RUNS.mkdir(exist_ok=True)
        save_file(network.state_dict(), file)
    network.load_state_dict(load_file(file))
    return network.eval().requires_grad_(False)


def train(task: Task, network: QNetwork, *, seed: int) -> None:
    """Soft Q-learning from a replay of all transitions, in place."""
    random = np.random.default_rng(seed)
    slow = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    iterations = task.steps // WORKERS
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimiser, 1.0, 0.02, total_iters=iterations * task.updates
    )
    environments = Environments(task, WORKERS, seed)
    features = len(task.inputs)
    memory = {
        "state": np.zeros((task.steps, features), np.float32),
        "action": np.zeros(task.steps, np.int64),
        "reward": np.zeros(task.steps, np.float32),
        "next_state": np.zeros((task.steps, features), np.float32),
        "terminal": np.zeros(task.steps, bool),
    }
    for iteration in range(iterations):
        rows = environments.step(draw(network, environments.observations, random))
        place = slice(iteration * WORKERS, (iteration + 1) * WORKERS)
        for name, column in memory.items():
            column[place] = rows[name]
        if iteration * WORKERS < 1000:
            continue
        for _ in range(task.updates):
            index = random.integers((iteration + 1) * WORKERS, size=BATCH)
            batch = {name: torch.from_numpy(column[index]) for name, column in memory.items()}
            ahead = soft_value(slow(batch["next_state"]), batch["terminal"])
            wanted = batch["reward"] + task.discount * ahead
            q = network(batch["state"]).gather(1, batch["action"][:, None])[:, 0]
            loss = nn.functional.smooth_l1_loss(q / task.scale, wanted / task.scale)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for old, new in zip(slow.parameters(), network.parameters(), strict=True):
                    old.lerp_(new, SLOWNESS)
    environments.close()


def draw(policy: Policy, observations: Array, random: np.random.Generator) -> NDArray[np.int64]:
    """Actions ``(n,)`` by ``softmax Q``."""
    with torch.no_grad():
        q = policy(torch.from_numpy(observations)).double().numpy()
    # The largest of values plus Gumbel noise is a draw from their softmax.
    return (q + random.gumbel(size=q.shape)).argmax(1)


class Environments:
    """Several copies of one environment; those whose episode ended begin another."""

    def __init__(self, task: Task, count: int, seed: int) -> None:
        self._task = task
        self._copies = [gymnasium.make(task.name) for _ in range(count)]
        self._random = np.random.default_rng([seed, 1])
        self.observations = np.stack([self._begin(each) for each in self._copies])
        self.returns = np.zeros(count)
        """Undiscounted, of the episodes under way, in the environment's own rewards."""

    def step(self, actions: NDArray[np.int64]) -> dict[str, Any]:
        """One decision in each; ``ended`` and ``returns`` say which episodes did, and with what."""
        rows: dict[str, Any] = {"state": self.observations.copy(), "action": actions}
        seen, reward, terminal, ended = [], [], [], []
        for copy_, action in zip(self._copies, actions, strict=True):
            observation, gain, terminated, truncated, _ = copy_.step(int(action))
            seen.append(np.asarray(observation, np.float32))
            reward.append(float(gain))
            terminal.append(terminated)
            ended.append(terminated or truncated)
        self.returns += reward
        rows |= {
            "reward": np.array(reward) / self._task.temperature,
            "next_state": np.stack(seen),
            "terminal": np.array(terminal),
            "ended": np.array(ended),
            "returns": self.returns.copy(),
        }
        self.observations = np.stack(seen)
        for place in np.flatnonzero(ended):
            self.observations[place] = self._begin(self._copies[place])
            self.returns[place] = 0.0
        return rows

    def close(self) -> None:
        for each in self._copies:
            each.close()

    def _begin(self, environment: Any) -> NDArray[np.float32]:
        observation, _ = environment.reset(seed=int(self._random.integers(2**31)))
        return np.asarray(observation, np.float32)


def play(
    task: Task, policy: Policy, episodes: int, *, seed: int
) -> tuple[Transitions, NDArray[np.float64]]:
    """Whole episodes of ``softmax Q``: transitions, and undiscounted returns ``(episodes,)``."""
    random = np.random.default_rng([seed, 2])
    environments = Environments(task, episodes, seed)
    parts: list[dict[str, Any]] = []
    returns = np.zeros(episodes)
    live = np.ones(episodes, bool)
    while live.any():
        rows = environments.step(draw(policy, environments.observations, random))
        who = np.flatnonzero(live)
        parts.append({name: column[live] for name, column in rows.items()} | {"who": who})
        done = live & rows["ended"]
        returns[done] = rows["returns"][done]
        live &= ~rows["ended"]
    environments.close()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["who"], kind="stable")
    data = Transitions(
        columns["state"][order].astype(np.float64),
        columns["action"][order],
        columns["reward"][order],
        columns["next_state"][order].astype(np.float64),
        columns["terminal"][order],
        columns["who"][order],
    )
    return data, returns
