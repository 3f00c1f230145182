"""Interleaving: a turn of one objective, then m turns of another, over and over; m fixed or found.

Source: Gao et al., "IN-RIL: Interleaved Reinforcement and Imitation Learning for Policy
Fine-Tuning". There the first objective is imitation (IL), the second reinforcement (RL).

What the paper says of the ratio, and what its formulas do, are not the same. Its text lets m grow
when the two gradients oppose each other (ρ = −cos rises). The balance of the two objectives'
progress does that. The form printed for practice, with ρ in the denominator under a root, does the
opposite: it falls to 1 as the gradients oppose each other, and ends at its bound as soon as they
agree (ρ ≤ 0). It also subtracts quantities of unlike units, so that it is not free of the
parametrisation. Both are here, so that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from holdfast.joint.geometry import Gradient
from holdfast.joint.progress import CycleEstimates, Form, optimal_ratio
from holdfast.joint.turn import Probe, Turn

if TYPE_CHECKING:  # torch is slow to import and recipes are checked without it
    from torch import Tensor

Every = Literal["update", "iteration"]


class Interleave:
    """A fixed cycle: one turn of ``first``, then ``ratio`` turns of ``second``, and over again.

    ``Interleave("imitation", "reward", 5)`` is the 1:m interleave of IN-RIL.
    ``Interleave({"a": 2, "b": 3, "c": 1})`` is any other cycle: so many turns of each, in order.

    Parameters
    ----------
    first : str, or mapping of str to int
        The objective that a cycle begins with; or all objectives with their turns, at least 1 each.
    second : str
        The objective of the other turns.
    ratio : int or inf
        m, at least 1. ``math.inf``: ``second`` alone.
    combine : bool
        Whether the turn of ``first`` holds ``second`` as well, each with weight 1, for a combiner.
    every : "update" or "iteration"
        What m counts: turns, or iterations of the second objective of ``updates_per_iteration``
        turns each.
    updates_per_iteration : int, optional
        At least 1; given if ``every`` is ``"iteration"``, and only then.

    Raises
    ------
    ValueError
        For a range as above, or if both forms are mixed.
    """

    gaps: dict[str, float] = {}

    def __init__(
        self,
        first: str | Mapping[str, int],
        second: str | None = None,
        ratio: float | None = None,
        *,
        combine: bool = False,
        every: Every = "update",
        updates_per_iteration: int | None = None,
    ) -> None:
        self.cycle: list[tuple[dict[str, float], int]]
        if isinstance(first, str):
            if second is None or ratio is None:
                raise ValueError("second and ratio are needed beside the name of the first")
            check_ratio(ratio)
            unit = turns_per_unit(every, updates_per_iteration)
            together = _together(first, second, combine)
            self.cycle = [({second: 1.0}, 1)]
            if ratio != math.inf:
                turns = _turns_left(ratio, unit, combine)
                self.cycle = [(together, 1), ({second: 1.0}, turns)]
        elif not isinstance(first, Mapping):
            raise ValueError(f"first is {first!r}: it must be a name, or counts by name")
        else:
            beside = (second, ratio, updates_per_iteration)
            if combine or every != "update" or any(value is not None for value in beside):
                raise ValueError("counts say how many turns each objective has: nothing else fits")
            self.cycle = [({name: 1.0}, count) for name, count in check_counts(first).items()]
        self.step = 0

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for weights, _ in self.cycle for name in weights))

    def next(self, probe: Probe) -> Turn:
        left = self.step % sum(count for _, count in self.cycle)
        self.step += 1
        stretches = iter(self.cycle)
        weights, count = next(stretches)
        while left >= count:
            left -= count
            weights, count = next(stretches)
        return Turn(dict(weights))

    def observe(self, name: str, loss: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


class WatchedInterleave(Interleave):
    """A fixed cycle of two objectives that estimates what its updates gain.

    The record then has the cosine and norms of both gradients, the benefit of an update by
    ``first``, and the efficiency ratio: see :class:`~holdfast.joint.progress.CycleEstimates`. Costs
    two copies of the trainable parameters per objective.

    Parameters
    ----------
    first, second, ratio, combine, every, updates_per_iteration
        As in :class:`Interleave`. With an infinite ratio there is nothing to estimate but the
        gradient of ``second``.
    smoothing : float
        Share of the previous value that the averages keep, in [0, 1).
    """

    def __init__(
        self,
        first: str,
        second: str,
        ratio: float,
        *,
        combine: bool = False,
        every: Every = "update",
        updates_per_iteration: int | None = None,
        smoothing: float = 0.9,
    ) -> None:
        super().__init__(
            first,
            second,
            ratio,
            combine=combine,
            every=every,
            updates_per_iteration=updates_per_iteration,
        )
        self.ratio = math.inf if ratio == math.inf else float(self.cycle[1][1])
        """Turns of ``second`` in a cycle."""
        self.averages = CycleEstimates((first, second), smoothing, combine=combine)

    @property
    def estimates(self) -> dict[str, float]:
        """m in turns, and the running averages as they stand."""
        return {"ratio": self.ratio, **self.averages.record(self.ratio)}

    def watch(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> None:
        self.averages.update(gradients, parameters)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "averages": self.averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "averages" in state:  # A run that began without them goes on with them.
            self.averages.load_state_dict(state["averages"])


class AdaptiveInterleave:
    """One turn of ``first``, then m(t) of ``second``, with m(t) from the geometry of gradients.

    At the start of each cycle :func:`~holdfast.joint.progress.optimal_ratio` is taken of running
    averages, since the cosine of a single pair of batches is mostly noise; see
    :class:`~holdfast.joint.geometry.PairEstimates` for what is averaged. m is 1 until two gradients
    of each objective have been seen.

    Parameters
    ----------
    first, second : str
        Imitation, and what it is interleaved into.
    form : "root" or "balance"
        Of the ratio. Only ``balance`` does what the paper's text says.
    maximum : float
        Largest m, finite and at least 1.
    smoothing : float
        Share of the previous value that the averages keep, in [0, 1).
    c_il, c_rl : float
        As in :func:`~holdfast.joint.progress.optimal_ratio`.
    combine, every, updates_per_iteration
        As in :class:`Interleave`. The number of turns is m times the turns of an iteration, rounded
        to a whole number.

    Raises
    ------
    ValueError
        For a range as above.
    """

    gaps: dict[str, float] = {}

    def __init__(
        self,
        first: str,
        second: str,
        *,
        form: Form = "balance",
        maximum: float = 15.0,
        smoothing: float = 0.9,
        c_il: float = 1.0,
        c_rl: float = 1.0,
        combine: bool = False,
        every: Every = "update",
        updates_per_iteration: int | None = None,
    ) -> None:
        if not math.isfinite(maximum):
            raise ValueError(f"maximum is {maximum}: it must be finite")
        # What it is made of is checked now, not at the first turn that needs it.
        optimal_ratio(
            1.0, 1.0, 0.0, variance_term=0.0, form=form, maximum=maximum, c_il=c_il, c_rl=c_rl
        )
        self.first, self.second = first, second
        self.form, self.maximum = form, maximum
        self.together = _together(first, second, combine)
        self.unit = turns_per_unit(every, updates_per_iteration)
        self.averages = CycleEstimates(
            (first, second), smoothing, c_il=c_il, c_rl=c_rl, combine=combine
        )
        self.ratio = 1.0
        """m of the current cycle."""
        self.left = 0
        """Turns of ``second`` until the next cycle."""

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.first, self.second)

    @property
    def estimates(self) -> dict[str, float]:
        """m of the current cycle in turns, and the running averages as they stand."""
        turns = self.ratio * self.unit
        return {"ratio": turns, **self.averages.record(turns)}

    def next(self, probe: Probe) -> Turn:
        if self.left > 0:
            self.left -= 1
            return Turn({self.second: 1.0})
        self.ratio = self.averages.ratio(self.form, self.maximum)
        self.left = _turns_left(self.ratio, self.unit, self.second in self.together)
        return Turn(dict(self.together))

    def observe(self, name: str, loss: float) -> None:
        pass

    def watch(self, gradients: Mapping[str, Gradient], parameters: Sequence[Tensor]) -> None:
        self.averages.update(gradients, parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "left": self.left, "averages": self.averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ratio = float(state["ratio"])
        self.left = int(state["left"])
        self.averages.load_state_dict(state["averages"])


def check_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Turns of each objective in a cycle, as a plain dict.

    Raises
    ------
    ValueError
        If there are none, or one is not a whole number of at least 1.
    """
    if not counts:
        raise ValueError("counts is empty: name at least one objective")
    for name, count in counts.items():
        if not _whole(count):
            raise ValueError(
                f"counts[{name!r}] is {count!r}: it must be a whole number of at least 1"
            )
    return {name: int(count) for name, count in counts.items()}


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is neither a whole number of at least 1 nor infinite.

    Raises
    ------
    ValueError
    """
    if not (_whole(ratio) or ratio == math.inf):
        raise ValueError(f"ratio is {ratio!r}: it must be a whole number of at least 1, or inf")


def turns_per_unit(every: Every, updates_per_iteration: int | None) -> int:
    """Turns in one unit of m.

    Raises
    ------
    ValueError
        If ``every`` is not known, or ``updates_per_iteration`` is absent, out of place or below 1.
    """
    if every not in ("update", "iteration"):
        raise ValueError(f"every is {every!r}: it must be update or iteration")
    if every == "update":
        if updates_per_iteration is not None:
            raise ValueError(
                f"updates_per_iteration is {updates_per_iteration}, but every is update, which "
                "does not use it"
            )
        return 1
    if not _whole(updates_per_iteration):
        raise ValueError(
            f"updates_per_iteration is {updates_per_iteration!r}: with every iteration it must be "
            "a whole number of at least 1"
        )
    assert updates_per_iteration is not None
    return int(updates_per_iteration)


def _whole(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int | float) and 1 <= value < math.inf and value == int(value)


def _turns_left(ratio: float, unit: int, combine: bool) -> int:
    """Turns of the second objective alone in a cycle.

    An iteration's updates include the one that both objectives share, or cycles would drift through
    the iterations.
    """
    shared = 1 if combine and unit > 1 else 0
    return max(1, round(ratio * unit) - shared)


def _together(first: str, second: str, combine: bool) -> dict[str, float]:
    """The turn that a cycle begins with."""
    if first == second:
        raise ValueError(f"first and second are both {first!r}: two objectives are needed")
    return {first: 1.0, second: 1.0} if combine else {first: 1.0}
