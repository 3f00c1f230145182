"""What guards see, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from holdfast.joint.objective import Spread, Summary

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

State = dict[str, Any]
"""What a guard remembers: JSON values."""

Derivative = Literal["jvp", "finite_difference"]

Stage = Literal["gradient", "update", "turn"]
"""What a guard looks at: the combined gradient before the optimiser; the update that the optimiser
proposes, after its own scaling; or the metrics of a turn that is over."""


class Proposed(Protocol):
    """A gradient or an update that may still be scaled."""

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole, earlier guards included. Finite."""
        ...


class ProposedStep(Proposed, Protocol):
    """An update that softmaxes can be followed along."""

    def radii(self, derivative: Derivative, spread: Spread) -> Mapping[str, Tensor]:
        """By objective of the turn: the radius of every softmax ``(counted,)``, in updates."""
        ...


@dataclass(frozen=True)
class Seen:
    """A turn that is over.

    Attributes
    ----------
    summaries : mapping of str to Summary
        By objective of the turn.
    grad_norm : float
        Of the combined gradient, before any guard.
    refused : str, optional
        Why the step was not taken. ``None``: it was.
    """

    summaries: Mapping[str, Summary]
    grad_norm: float
    refused: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a guard wants done with a gradient or an update.

    Attributes
    ----------
    factor : float
        To be multiplied by, in [0, 1]. 1: it stays as it is, to the bit.
    record : mapping
        What the record should say beside the factor.
    refused : str, optional
        Why the step must not be taken. ``None``: it may be.
    """

    factor: float = 1.0
    record: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Trip:
    """What a guard wants done after a turn.

    Attributes
    ----------
    reason : str
        What was seen, and where.
    then : {"stop", "reduce", "roll_back"}
        End the run; multiply learning rates by ``rate_factor``; or that and return to the last good
        checkpoint.
    rate_factor : float
    """

    reason: str
    then: Literal["stop", "reduce", "roll_back"]
    rate_factor: float


class Guard(Protocol):
    """The interface shared by all guards; its options are its attributes.

    ``update`` takes a :class:`Proposed` in the stage ``gradient``, a :class:`ProposedStep` in the
    stage ``update``, and gives a :class:`Verdict`. In the stage ``turn`` it takes a :class:`Seen`
    and gives a :class:`Trip`, or ``None``. The other half of what it gives is the next state.
    """

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    def init(self) -> State: ...

    def update(self, seen: Any, state: State) -> tuple[Any, State]: ...


def check_positive(**numbers: float | None) -> None:
    """Refuse a number that is neither ``None`` nor positive.

    Raises
    ------
    ValueError
        Naming it.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}: it must be positive")
