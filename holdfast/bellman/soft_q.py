"""What is trained on logged decisions: a soft Q-function and its dual, as one module."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.bellman.networks import mlp
from holdfast.bellman.saddle import recovered_reward
from holdfast.errors import ModelError
from holdfast.joint.fingerprint import digest_of

WEIGHTS, DESCRIPTION = "soft_q.safetensors", "soft_q.json"


class SoftQ(nn.Module):
    """``Q(s, .)`` and ``zeta(s, .)`` on separate parameters, ``q`` and ``zeta``; float64.

    Parameters
    ----------
    size : int
        States, numbered from 0; or with ``hidden`` numbers in an observation.
    actions : int
    hidden : sequence of int, optional
        Hidden layers of two networks. ``None``: tables, which start at 0.
    seed : int
        Of the networks' initial weights.
    """

    def __init__(
        self, size: int, actions: int, hidden: Sequence[int] | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.size, self.actions = size, actions
        self.hidden = None if hidden is None else list(hidden)
        self.q, self.zeta = (
            nn.Embedding.from_pretrained(
                torch.zeros(size, actions, dtype=torch.float64), freeze=False
            )
            if hidden is None
            else mlp(size, hidden, actions, seed=2 * seed + index)
            for index in range(2)
        )

    def forward(self, read: Callable[[SoftQ], Any]) -> Any:
        """``read(self)``: losses ask through here, so that a data-parallel wrapper sees it."""
        return read(self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rewards(self, discount: float) -> Tensor:
        """The reward that makes a table consistent, ``(states, actions)``."""
        q, zeta = self.tables()
        return recovered_reward(q, zeta, discount=discount)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Both tables ``(states, actions)``, without a graph."""
        if not (isinstance(self.q, nn.Embedding) and isinstance(self.zeta, nn.Embedding)):
            raise ValueError("networks have values for every observation, and no table of them")
        return self.q.weight.detach().cpu(), self.zeta.weight.detach().cpu()

    def config(self) -> dict[str, Any]:
        return {"size": self.size, "actions": self.actions, "hidden": self.hidden}

    def fingerprint(self) -> str:
        return digest_of(self.config(), self.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and structure; of tables also ``q.csv``, a row a pair."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(json.dumps(self.config(), indent=1) + "\n", "utf-8")
        if self.hidden is None:
            q, zeta = (table.tolist() for table in self.tables())
            with (folder / "q.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["state", "action", "q", "zeta"])
                for state in range(self.size):
                    for action in range(self.actions):
                        writer.writerow([state, action, q[state][action], zeta[state][action]])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SoftQ:
        """Read what :meth:`save_pretrained` wrote.

        Raises
        ------
        ModelError
            If a file is missing, or they do not fit each other.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / DESCRIPTION).read_text("utf-8"))
            found = cls(config["size"], config["actions"], config["hidden"])
            found.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"{folder} holds no soft Q-function that can be read: {error}"
            ) from error
        return found
