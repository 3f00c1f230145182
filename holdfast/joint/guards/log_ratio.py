"""A budget for how far one step may move the log-probability of any outcome.

Source: Sao, "Ghosts of Softmax", arXiv 2603.13552, proposition 5.2. Along an update ``p`` logits
change at the rates ``a = J p``. The log-partition of a row is analytic up to the radius
``pi / (max a - min a)``, in lengths of the update; to linear order the update changes its
log-probabilities by at most ``max a - min a``, so a share ``r`` of the radius is a change of
``r pi``. The budget is given as that change, in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

from holdfast.joint.guards.base import (
    Derivative,
    ProposedStep,
    Stage,
    State,
    Verdict,
    check_positive,
)
from holdfast.joint.objective import Spread

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor


@dataclass(frozen=True)
class LogRatioBudget:
    """Scale the proposed update so that no log-probability changes by more than ``limit``.

    One derivative along the update, on the batch of the turn, finds the rates at which logits
    change. The update is multiplied by ``min(1, limit / spread)`` of the row whose rates spread
    most. This bounds every likelihood ratio *before* the step is taken, to the order of the
    linearisation, whatever the learning rate and the optimiser: within ``limit`` a ratio stays in
    ``[exp(-limit), exp(limit)]``, and the KL divergence of a row below ``limit^2 / 8``.

    It is no guarantee of descent: a small step may raise the loss. And it sees the batch of the
    turn alone: other rows may move further.

    Parameters
    ----------
    limit : float
        Largest change of a log-probability in one step, in nats, above 0. ``pi`` is the radius;
        ``log(1.2) = 0.18`` corresponds to the clipping range of PPO.
    quantile : float
        In (0, 1]. Below 1, the rows of the largest spreads are left out: at most a share ``1 -
        quantile`` of them may exceed the budget. A heuristic.
    probability_floor : float
        In [0, 1). Outcomes of a lower probability are left out of a row's spread, for over a large
        vocabulary some improbable one always moves far. A heuristic: what is left out may move
        further.
    derivative : {"jvp", "finite_difference"}
        Forward-mode automatic differentiation; or the difference quotient of two forward passes,
        which is cheaper and needs float32 weights.
    binary : bool
        Where there are two outcomes, take their exact radius, ``sqrt(gap^2 + pi^2)`` in place of
        ``pi`` over the spread: the budget is then ``limit / pi`` radii, and a log-probability may
        change by ``limit sqrt(gap^2 + pi^2) / pi``.

    Raises
    ------
    ValueError
        For a number out of its range.
    """

    limit: float
    quantile: float = 1.0
    probability_floor: float = 0.0
    derivative: Derivative = "jvp"
    binary: bool = False

    name: ClassVar[str] = "log_ratio_budget"
    stage: ClassVar[Stage] = "update"

    def __post_init__(self) -> None:
        check_positive(limit=self.limit)
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile}: it must lie in (0, 1]")
        if not 0 <= self.probability_floor < 1:
            raise ValueError(f"probability_floor is {self.probability_floor}: it must be in [0, 1)")
        if self.derivative not in get_args(Derivative):
            known = ", ".join(get_args(Derivative))
            raise ValueError(f"derivative is {self.derivative!r}: it must be one of {known}")

    def init(self) -> State:
        return {}

    def update(self, seen: ProposedStep, state: State) -> tuple[Verdict, State]:
        import torch

        if seen.norm == 0:
            return Verdict(), state
        by_objective = seen.radii(self.derivative, Spread(self.probability_floor, self.binary))
        radii = torch.cat(list(by_objective.values()))
        if not len(radii):
            return Verdict(), state
        if not bool((radii > 0).all()):
            return Verdict(refused="logits along the proposed update are not finite"), state
        # The change that a radius stands for; nothing is exceeded where it is infinite.
        changes = math.pi / radii
        largest = float(changes.kthvalue(math.ceil(self.quantile * len(changes))).values)
        factor = min(1.0, self.limit / largest) if largest > 0 else 1.0
        tightest = min(by_objective, key=lambda name: _smallest(by_objective[name]))
        record = {
            "change": largest,
            "change_after": largest * factor,
            "objective": tightest,
            "token": int(by_objective[tightest].argmin()),
            "over": float((changes > self.limit).double().mean()),
        }
        return Verdict(factor, record), state


def binary_radius(gap: Tensor, spread: Tensor) -> Tensor:
    """``sqrt(gap^2 + pi^2) / spread``: exact for the softmax of two outcomes.

    Parameters
    ----------
    gap : Tensor
        ``(...)``: the difference of the two logits.
    spread : Tensor
        ``(...)``: that of their rates of change along the step, at least 0.

    Returns
    -------
    Tensor
        ``(...)``, in lengths of the step; infinite where nothing moves.
    """
    return (gap.square() + math.pi**2).sqrt() / spread


def _smallest(radii: Tensor) -> float:
    return float(radii.min()) if len(radii) else math.inf
