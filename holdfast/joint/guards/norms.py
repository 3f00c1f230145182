"""The plain controls: no more than a given length, of the gradient or of the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.joint.guards.base import Proposed, Stage, State, Verdict, check_positive


@dataclass(frozen=True)
class _NormLimit:
    limit: float

    def __post_init__(self) -> None:
        check_positive(limit=self.limit)

    def init(self) -> State:
        return {}

    def update(self, seen: Proposed, state: State) -> tuple[Verdict, State]:
        if not seen.norm > self.limit:
            return Verdict(), state
        return Verdict(self.limit / seen.norm), state


class GradientClip(_NormLimit):
    """Scale the gradient to at most ``limit``. In a recipe: ``training.max_grad_norm``.

    An optimiser that normalises, such as Adam, undoes most of it: a gradient that is always as long
    makes no other update than one that is always clipped.

    Parameters
    ----------
    limit : float
        Largest Euclidean norm of the whole gradient, above 0.

    Raises
    ------
    ValueError
        If ``limit`` is not positive.
    """

    name: ClassVar[str] = "gradient_clip"
    stage: ClassVar[Stage] = "gradient"


class UpdateNormCap(_NormLimit):
    """Scale the proposed update to at most ``limit``: after the optimiser's own scaling.

    Parameters
    ----------
    limit : float
        Largest Euclidean norm of the whole update, in units of the parameters, above 0.

    Raises
    ------
    ValueError
        If ``limit`` is not positive.
    """

    name: ClassVar[str] = "update_norm_cap"
    stage: ClassVar[Stage] = "update"
