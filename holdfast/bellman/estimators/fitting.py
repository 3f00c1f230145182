"""Fitting a network to logged transitions, with the step chosen on transitions held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.bellman.transitions import Transitions
from holdfast.errors import TrainingError
from holdfast.joint import LossTerms

Columns = Mapping[str, Tensor]
NetworkLoss = Callable[[nn.Module, Columns], LossTerms]
"""Of a network and the columns of some transitions."""


@dataclass(frozen=True)
class FitOptions:
    """How a network is fitted, by Adam on minibatches drawn with replacement."""

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-2
    """At the first step; it falls to 0 along half a cosine."""
    check_every: int = 50
    """Steps between looks at the transitions held out."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}: it must be positive")


@dataclass(frozen=True)
class Fit:
    """How a fit went."""

    loss: float
    """Mean over all training transitions, at the end."""
    held_out_loss: float | None
    """Mean over the transitions held out, at the step that was chosen."""
    step: int
    """The step whose parameters the network has."""


def columns_of(transitions: Transitions, network: nn.Module) -> dict[str, Tensor]:
    """Transitions as tensors; observations and rewards in the network's precision and place."""
    like = next(network.parameters())
    columns = {}
    for name in ("state", "action", "reward", "next_state", "terminal"):
        column = torch.as_tensor(getattr(transitions, name)).to(like.device)
        columns[name] = column.to(like.dtype) if column.is_floating_point() else column
    return columns


def fit_network(
    network: nn.Module,
    loss: NetworkLoss,
    columns: Columns,
    options: FitOptions,
    *,
    held_out: Columns | None = None,
) -> Fit:
    """Fit ``network`` in place.

    Parameters
    ----------
    network : nn.Module
    loss : callable
        ``loss(network, columns) -> LossTerms``.
    columns : mapping of str to Tensor
        Of the training transitions, ``(n, ...)`` each.
    options : FitOptions
    held_out : mapping of str to Tensor, optional
        Of transitions that are not trained on: the network ends with the parameters that were best
        on them, of those looked at. By default it ends with the last.

    Raises
    ------
    TrainingError
        If the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    n = len(columns["action"])
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step in range(1, options.steps + 1):
        index = torch.randint(n, (min(options.batch_size, n),), generator=generator)
        terms = loss(network, {name: column[index] for name, column in columns.items()})
        mean = terms.total / terms.count
        if not torch.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean.item()} in step {step}: lower learning_rate, "
                f"{options.learning_rate:g}"
            )
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        schedule.step()
        if held_out is not None and (step % options.check_every == 0 or step == options.steps):
            value = _mean(network, loss, held_out)
            if best is None or value < best[0]:
                best = (value, step, copy.deepcopy(network.state_dict()))
    if best is not None:
        network.load_state_dict(best[2])
    return Fit(
        loss=_mean(network, loss, columns),
        held_out_loss=None if best is None else best[0],
        step=options.steps if best is None else best[1],
    )


def _mean(network: nn.Module, loss: NetworkLoss, columns: Columns) -> float:
    with torch.no_grad():
        terms = loss(network, columns)
        return float(terms.total / terms.count)
