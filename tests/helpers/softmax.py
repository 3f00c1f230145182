"""A softmax policy on features, linear or with a hidden layer, and its objective."""

import torch
from torch import nn

from holdfast.joint import LossTerms, Objective
from holdfast.joint.batches import Batches
from holdfast.joint.guards import binary_radius


class Softmax(nn.Module):
    """Logits of ``outcomes`` classes from ``features``, in double precision, from a seed."""

    def __init__(self, features=3, outcomes=4, hidden=None, temperature=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.inner = drawn(features, hidden) if hidden else None
        self.outer = drawn(hidden or features, outcomes)
        self.temperature = temperature

    def forward(self, inputs):
        hidden = inputs if self.inner is None else torch.tanh(inputs @ self.inner)
        return (hidden @ self.outer / self.temperature,)


def cross_entropy(policy, rows):
    (logits,) = policy(torch.stack([row[0] for row in rows]))
    targets = torch.tensor([row[1] for row in rows])
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return LossTerms(loss, torch.tensor(len(rows)), {})


def radii(along, rows, spread):
    ((logits, rates),) = along(torch.stack([row[0] for row in rows]))
    if spread.floor:
        rates = rates.where(logits.softmax(-1) >= spread.floor, rates.mean(-1, keepdim=True))
    extent = rates.amax(-1) - rates.amin(-1)
    if spread.binary and logits.shape[-1] == 2:
        return binary_radius(logits[:, 0] - logits[:, 1], extent)
    return torch.pi / extent


def softmax_objective(name="a", seed=0, *, outcomes=4, features=3, batch_size=8, micro=None):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (
            torch.randn(features, generator=generator, dtype=torch.float64),
            int(torch.randint(outcomes, (), generator=generator)),
        )
        for _ in range(24)
    ]
    source = Batches(rows, batch_size, seed=seed)
    return Objective(name, cross_entropy, source, micro_batch_size=micro, radii=radii)
