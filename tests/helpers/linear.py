"""A linear policy and its objectives: the engine on something whose gradients are known."""

import torch
from torch import nn

from holdfast.joint import LossTerms, Objective
from holdfast.joint.batches import Batches


class Linear(nn.Module):
    """``x @ weight + bias`` in double precision, from a seed."""

    def __init__(self, width: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, 1, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight + self.bias


def squared_error(policy: nn.Module, rows: list) -> LossTerms:
    """Sum of squared errors over elements; rows have unequal numbers of elements."""
    inputs = torch.cat([row[0] for row in rows])
    targets = torch.cat([row[1] for row in rows])
    errors = (policy(inputs) - targets) ** 2
    return LossTerms(
        errors.sum(), torch.tensor(len(errors)), {"absolute": errors.detach().sqrt().sum()}
    )


def rows_of(seed: int, count: int = 24, width: int = 3) -> list:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, 1, generator=generator, dtype=torch.float64)
    rows = []
    for index in range(count):
        inputs = torch.randn(1 + index % 4, width, generator=generator, dtype=torch.float64)
        rows.append((inputs, inputs @ truth))
    return rows


def objective(name: str, seed: int, *, batch_size: int = 8, micro: int | None = None) -> Objective:
    rows = rows_of(seed)
    return Objective(
        name,
        squared_error,
        Batches(rows[:16], batch_size, seed=seed),
        held_out=rows[16:20],
        probe=rows[20:],
        micro_batch_size=micro,
    )
