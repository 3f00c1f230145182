"""What is trained in control: a policy and, where reinforcement learning needs one, its critic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.policies import Critic, Policy


class ActorCritic(nn.Module):
    """A policy and its critic as one module, so that one optimiser and one checkpoint hold both.

    Parameters
    ----------
    actor : Policy
    critic : Critic, optional
        ``None``: nothing that is trained needs values.
    """

    def __init__(self, actor: Policy, critic: Critic | None = None) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(self, read: Callable[[ActorCritic], Any]) -> Any:
        """``read(self)``: losses ask through here, so that a data-parallel wrapper sees it."""
        return read(self)

    def values(self, observations: Tensor) -> Tensor:
        """``(batch,)``, as the critic predicts them."""
        if self.critic is None:
            raise ValueError("this policy has no critic")
        found: Tensor = self.critic(observations)
        return found

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy. The critic serves training alone, and is in its checkpoints."""
        self.actor.save_pretrained(folder)

    def fingerprint(self) -> str:
        """Digest of weights and structure: equal for equal policies, wherever they came from."""
        described = json.dumps([self.actor.kind, self.actor.config()], sort_keys=True)
        digest = hashlib.sha256(described.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()
