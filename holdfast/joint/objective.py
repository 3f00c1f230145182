"""What the engine trains on: loss terms, sources and objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor, nn

Row = Any
"""One training example. The engine never looks inside; the objective's loss does."""


@dataclass(frozen=True)
class LossTerms:
    """What every loss returns.

    The trainer divides by the count over *all* micro-batches and ranks of a step, so a loss never
    averages on its own. This is what makes gradients independent of how a batch is cut.

    Attributes
    ----------
    total : Tensor
        Scalar, differentiable: the sum of the loss over the counted elements.
    count : Tensor
        Scalar: how many elements (tokens, sequences, pairs, transitions) were summed.
    metrics : Mapping[str, Tensor]
        Detached. Like ``total`` they are sums; the mean is their sum divided by ``count``. A metric
        that is an average over something else is a tensor ``(2,)``: its sum and its own count.
    """

    total: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Means over a batch or a set of rows, and the count they were taken over."""

    loss: float
    count: float
    metrics: dict[str, float]

    def as_record(self) -> dict[str, Any]:
        return {"loss": self.loss, "count": self.count, "metrics": self.metrics}


class Along(Protocol):
    """The policy, evaluated together with how its outputs change along a proposed step."""

    policy: nn.Module
    """In evaluation mode; its parameters are those after the step, so look at nothing but shapes
    and devices."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Call the policy as it was before the step, with these arguments.

        Returns
        -------
        list of (Tensor, Tensor or None)
            Each tensor of the tuple that the policy's forward pass returned, and its derivative
            along the whole step; ``None`` where it does not depend on what is trained.
        """
        ...


@dataclass(frozen=True)
class Spread:
    """Which outcomes of a softmax count in how far a step spreads its logits.

    Attributes
    ----------
    floor : float
        Outcomes of a lower probability are left out. 0: none are.
    binary : bool
        Where there are two outcomes, take their exact radius ``sqrt(gap^2 + pi^2) / spread``.
    """

    floor: float = 0.0
    binary: bool = False


class Source(Protocol):
    """An endless, resumable stream of batches."""

    def next(self) -> Sequence[Row]:
        """The rows of the next batch, the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: nested JSON values and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position in ``state``."""
        ...


@dataclass
class Objective:
    """A named reason to change the policy: a loss bound to a source.

    Attributes
    ----------
    name : str
        Unique within a run.
    loss : callable
        ``loss(policy, rows) -> LossTerms``. Must accept any non-empty part of a batch: the trainer
        cuts batches into micro-batches and shards them over ranks.
    source : Source
        Where training batches come from. Advanced only when the objective is in the turn.
    evaluate : callable, optional
        ``evaluate(policy, rows) -> LossTerms`` on held-out and probe rows, where that is not the
        training loss: a reward, for instance, of which the training loss is only a surrogate.
        Smaller is better.
    observed : callable
        From the means of a training batch to what stands for them in a schedule's gaps, in the
        units of ``evaluate``; ``None`` where the batch says nothing of it. By default their loss.
    held_out : sequence of rows
        Rows for evaluation. Never trained on, and used to choose an update only through
        an optimum that was found on them.
    probe : sequence of rows
        Rows on which a schedule's optimality gap is evaluated; apart from the training rows and
        from ``held_out``.
    optimum : float, optional
        The objective's optimum ``f*``, in the units of its mean loss.
    micro_batch_size : int, optional
        Rows a forward pass takes at a time. ``None``: the whole batch.
    radii : callable, optional
        ``radii(along, rows, spread) -> Tensor (counted,)``: for every softmax that the rows count,
        its radius of convergence along a proposed step, in lengths of that step; NaN where logits
        are not finite. ``None``: the objective is not about softmaxes.
    """

    name: str
    loss: Callable[[nn.Module, Sequence[Row]], LossTerms]
    source: Source
    evaluate: Callable[[nn.Module, Sequence[Row]], LossTerms] | None = None
    observed: Callable[[Summary], float | None] = field(default=lambda summary: summary.loss)
    held_out: Sequence[Row] = ()
    probe: Sequence[Row] = ()
    optimum: float | None = None
    micro_batch_size: int | None = None
    radii: Callable[[Along, Sequence[Row], Spread], Tensor] | None = None
