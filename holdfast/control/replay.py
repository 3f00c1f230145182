"""What a policy did, kept to be drawn from again: a replay buffer, and batches from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.cloning import draw_noise
from holdfast.control.collecting import Collector
from holdfast.control.environments import VectorEnvironment
from holdfast.joint.table import Table

COLUMNS = (
    "observations",
    "actions",
    "mask",
    "rewards",
    "final_observations",
    "terminated",
)
"""Of a transition. A chunk's rewards are summed; ``mask`` says which of its actions were executed;
``final_observations`` are those it led to, even where the next episode has begun."""


class ReplayBuffer:
    """The latest rows, in memory-mapped files: a million of them need not fit into memory.

    The files have no name, and so are gone with the process, however it ends. The state holds the
    rows themselves, so a checkpoint is whole without them; taking it copies nothing, since the
    tensors are views of the files.

    Parameters
    ----------
    capacity : int
        Rows that are kept, at least 1. Further ones take the places of the oldest.
    folder : str or Path, optional
        Where the files are made; by default where the system makes temporary ones.

    Raises
    ------
    ValueError
        For a capacity below 1.
    OSError
        If no files can be made there.
    """

    def __init__(self, capacity: int, folder: str | Path | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: it must be at least 1")
        self.capacity = capacity
        self.added = 0
        """Rows added so far, those that were overwritten included."""
        self._folder = folder
        with tempfile.TemporaryFile(dir=folder):
            pass  # Where none can be made it is said now, not after the first episodes.
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows ``(count, ...)``, the oldest first.

        Raises
        ------
        ValueError
            For other columns, or another form of row, than those before.
        """
        count = len(next(iter(rows.values())))
        if not self._columns:
            self._columns = {name: self._file(column) for name, column in rows.items()}
        for name, column in self._columns.items():
            if name not in rows or rows[name].shape != (count, *column.shape[1:]):
                raise ValueError(
                    f"rows[{name!r}] must have the shape {(count, *column.shape[1:])}, "
                    f"not {tuple(rows[name].shape) if name in rows else 'be absent'}"
                )
        kept = min(count, self.capacity)
        places = (self.added + torch.arange(count - kept, count)) % self.capacity
        for name, column in self._columns.items():
            column[places] = rows[name][count - kept :].to("cpu", column.dtype)
        self.added += count

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """Copies of the rows at ``places`` ``(count,)``, in [0, len)."""
        return {name: column[places] for name, column in self._columns.items()}

    def put(self, name: str, places: Tensor, values: Tensor) -> None:
        """Overwrite one column of the rows at ``places`` ``(count,)``."""
        # numpy says what happens to a place that is named twice: the last value stays.
        self._columns[name].numpy()[places.numpy()] = values.cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """The rows, as views: they change when rows are added."""
        rows = {name: column[: len(self)] for name, column in self._columns.items()}
        return {"added": self.added, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; ``ValueError`` if it has more rows than there is room for."""
        rows, added = state["rows"], int(state["added"])
        count = len(next(iter(rows.values()))) if rows else 0
        if count != min(added, self.capacity):
            raise ValueError(
                f"state has {count} rows of {added} that were added, which a buffer of capacity "
                f"{self.capacity} cannot have had"
            )
        self.added, self._columns = 0, {}
        if rows:
            self.add(rows)
        self.added = added

    def _file(self, column: Tensor) -> Tensor:
        # A file with holes: the disk is taken as rows are written, and given back with the map.
        with tempfile.TemporaryFile(dir=self._folder) as file:
            array = np.memmap(
                file,
                dtype=column.numpy().dtype,
                mode="w+",
                shape=(self.capacity, *column.shape[1:]),
            )
        return torch.from_numpy(array)


@dataclass(frozen=True)
class ReplayOptions:
    """How much is collected, and how often it is used.

    Attributes
    ----------
    steps : int
        Chunks of actions that are collected at a time, in every environment.
    updates : int
        Batches that are drawn before the next are collected.
    batch_size : int
        Rows of an update.
    capacity : int
        Chunks that are remembered, at least those collected at a time.
    demonstration_share : float
        Of every batch, in [0, 1]: rows of demonstrations in place of the buffer's (Ball et al.,
        "Efficient Online Reinforcement Learning with Offline Data", section 4.1, take a half).
    critic_warmup : int
        Times of collecting after which only critics are trained.
    reward_scale : float
        What rewards are multiplied by.
    """

    steps: int
    updates: int
    batch_size: int
    capacity: int
    demonstration_share: float = 0.0
    critic_warmup: int = 0
    reward_scale: float = 1.0

    @property
    def demonstrated(self) -> int:
        """Rows of demonstrations in a batch."""
        return round(self.demonstration_share * self.batch_size)


Prepare = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
"""From the columns of a batch, on the CPU, to those that are added to it or replaced."""


class ReplaySource:
    """Batches of transitions, without end.

    A batch has the columns :data:`COLUMNS`, ``cloned`` ``(batch, horizon, action_size)``, what the
    policy is to be cloned from, and the noise that a diffusion policy is cloned with.

    Parameters
    ----------
    policy : ActorCritic
        Acts as it stands when transitions are collected.
    environments : VectorEnvironment
    options : ReplayOptions
    seed : int
        Of the policy's noise, and of the choice of rows.
    demonstrations : mapping of str to Tensor, optional
        Columns from :func:`~holdfast.control.transitions.transitions`.
    prepare : callable, optional
        Called with every batch (see :data:`Prepare`). What it makes of ``cloned`` is written back
        into the buffer; demonstrations stay as they are.
    folder : str or Path, optional
        As of :class:`ReplayBuffer`.
    """

    def __init__(
        self,
        policy: ActorCritic,
        environments: VectorEnvironment,
        options: ReplayOptions,
        *,
        seed: int,
        demonstrations: Mapping[str, Tensor] | None = None,
        prepare: Prepare | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if options.demonstrated and demonstrations is None:
            raise ValueError("demonstration_share is above 0, but there are no demonstrations")
        self.policy = policy
        self.options = options
        self.seed = seed
        self.demonstrations = demonstrations
        self.prepare = prepare
        self.buffer = ReplayBuffer(options.capacity, folder)
        self.round = 0
        """Times that transitions were collected."""
        self.used = 0
        """Batches that were drawn since."""
        self._collector = Collector(policy, environments, seed=seed)
        self._facts: dict[str, tuple[float, float]] = {}

    @property
    def environment_steps(self) -> int:
        """Single actions executed so far, over all environments."""
        return self._collector.environment_steps

    @property
    def updates(self) -> int:
        """Batches that are drawn before the next transitions are collected."""
        return self.options.updates

    def next(self) -> Table:
        """The rows of the next update: the buffer's, then those of demonstrations."""
        if self.round == 0 or self.used >= self.options.updates:
            self._collect()
        draw = torch.Generator().manual_seed(hash((self.seed, self.round, self.used)) & (2**62 - 1))
        self.used += 1
        demonstrated = self.options.demonstrated
        own = self.options.batch_size - demonstrated
        places = torch.randint(len(self.buffer), (own,), generator=draw)
        columns = self.buffer.take(places)
        if demonstrated:
            assert self.demonstrations is not None
            chosen = torch.randint(
                len(self.demonstrations["rewards"]), (demonstrated,), generator=draw
            )
            others = {name: self.demonstrations[name][chosen] for name in COLUMNS}
            others["cloned"] = others["actions"]
            columns = {name: torch.cat([column, others[name]]) for name, column in columns.items()}
        columns["rewards"] = columns["rewards"] * self.options.reward_scale
        critic_only = self.round <= self.options.critic_warmup
        if self.prepare is not None:
            before = columns["cloned"]
            columns.update(self.prepare(columns, draw))
            # A critic that has learnt nothing yet improves nothing.
            changed = 0 if critic_only else own
            self.buffer.put("cloned", places[:changed], columns["cloned"][:changed])
            columns["cloned"] = torch.cat([columns["cloned"][:changed], before[changed:]])
        columns.update(draw_noise(self.policy.actor, self.options.batch_size, draw))
        return Table(columns, {**self._facts, "critic_only": (float(critic_only), 1.0)})

    def _collect(self) -> None:
        seen = self._collector.collect(self.options.steps).columns
        self._facts = self._collector.facts()
        rows = {name: seen[name].flatten(0, 1) for name in COLUMNS}
        self.buffer.add({**rows, "cloned": rows["actions"]})
        self.round += 1
        self.used = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "used": self.used,
            "facts": {name: list(pair) for name, pair in self._facts.items()},
            "collector": self._collector.state_dict(),
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.round, self.used = int(state["round"]), int(state["used"])
        self._facts = {name: (float(a), float(b)) for name, (a, b) in state["facts"].items()}
        self._collector.load_state_dict(state["collector"])
        self.buffer.load_state_dict(state["buffer"])
