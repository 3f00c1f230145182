"""A batch of rollouts as padded tensors, and what every run shows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.language.data import collate
from holdfast.language.head import TokenStatistics
from holdfast.language.losses.policy_gradient import kl_k3
from holdfast.language.rollouts import Rollout


class RolloutBatch:
    """Rollouts as padded tensors; signals are put where their tokens are."""

    def __init__(self, policy: nn.Module, rows: Sequence[Rollout], pad_id: int) -> None:
        self.rows = rows
        self.device = next(policy.parameters()).device
        input_ids, labels = collate([row.tokens for row in rows], pad_id)
        self.input_ids, self.labels = input_ids.to(self.device), labels.to(self.device)
        self.mask = self.labels[:, 1:] >= 0
        hints = torch.tensor([[row.hint] for row in rows], device=self.device)
        self.hinted = self.mask & (self.mask.cumsum(-1) <= hints)
        """``(batch, time)``: counted tokens that the data gave the policy to go on from."""
        self.given = torch.tensor([row.demonstration for row in rows], device=self.device)
        """``(batch,)``: the data's own completions."""
        self.own = self.mask & ~self.hinted & ~self.given.unsqueeze(-1)
        """``(batch, time)``: counted tokens that the policy drew."""

    def has(self, name: str) -> bool:
        return name in self.rows[0].signals

    def flat(self, name: str) -> Tensor:
        """``(counted, ...)``: the signals of all rows, one after another."""
        return torch.cat([row.signals[name] for row in self.rows]).to(self.device)

    def padded(self, name: str) -> Tensor:
        """``(batch, time)``."""
        return torch.zeros(self.mask.shape, device=self.device).masked_scatter(
            self.mask, self.flat(name).float()
        )

    def metrics(self, seen: TokenStatistics) -> dict[str, Tensor]:
        """What every run shows of its rollouts and of how the policy sees them.

        ``seen`` may know fewer tokens than count in the rollouts.
        """
        tokens = self.own & seen.mask
        rows, drawn = self.rows, [row for row in self.rows if not row.demonstration]
        per_token = {
            "sampled_probability": seen.logps.detach().exp(),
            "entropy": seen.entropy,
        }
        # Rollouts that serve one update were sampled by the very policy that is updated.
        sampled_by = self.padded("old_logps") if self.has("old_logps") else seen.logps.detach()
        per_token["approx_kl"] = kl_k3(sampled_by, seen.logps.detach())
        if self.has("reference_logps"):
            per_token["kl"] = kl_k3(seen.logps.detach(), self.padded("reference_logps"))
        found = {
            name: pair(values[tokens]) for name, values in per_token.items() if values is not None
        }
        for name in (name for name in rows[0].signals if name.startswith("guard/")):
            found[name] = pair(self.flat(name))
            found |= which(name, (self.padded(name) > 0) & seen.mask, seen)
        by_row: dict[str, list[float]] = {
            "reward": [row.reward for row in rows],
            "reward_std": [row.group_std for row in rows],
            "frac_reward_zero_std": [
                math.nan if math.isnan(row.group_std) else float(row.group_std == 0) for row in rows
            ],
            "completions/mean_length": [row.counted for row in drawn],
            "completions/clipped_ratio": [float(not row.completed) for row in drawn],
            "samples": [row.samples for row in rows],
        }
        for name in rows[0].rewards:
            by_row[f"rewards/{name}/mean"] = [row.rewards[name] for row in rows]
        for name, numbers in by_row.items():
            values = torch.tensor(numbers, dtype=torch.float64)
            found[name] = pair(values[values.isfinite()])
        return found


def which(name: str, tokens: Tensor, seen: TokenStatistics) -> dict[str, Tensor]:
    """Which ``tokens`` a guard chose: their mean probability, as a metric."""
    return {f"{name}/probability": pair(seen.logps[tokens].exp())}


def pair(values: Tensor) -> Tensor:
    """A metric with a count of its own, ``(2,)``: the sum of some values, and their number."""
    values = values.detach().double()
    return torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
