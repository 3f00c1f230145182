"""Rust's bus engines: replace an engine, or drive on at a cost that grows with mileage.

Rust, "Optimal Replacement of GMC Bus Engines", Econometrica 55(5), 1987. Every month a bus has a
mileage, counted in bins; driving on costs ``0.001 * cost_slope * bin``, replacing costs
``replacement_cost`` and sets the mileage to 0. In either case it then grows by a random number of
bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.estimators.choice_model import ChoiceModel, Solution
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.bellman.estimators.replaced import ParameterShift, parameter_shift
from holdfast.errors import DataError

if TYPE_CHECKING:
    import pandas

Array = NDArray[np.float64]

KEEP, REPLACE = 0, 1
_COLUMNS = ("bus_id", "period", "state", "replace", "usage")


@dataclass(frozen=True)
class BusEstimate:
    """Rust's parameters, estimated by the nested fixed point."""

    replacement_cost: float
    """In units of the shocks' scale."""
    cost_slope: float
    """Thousandfold growth of the monthly cost from one bin to the next."""
    log_likelihood: float
    """Of the choices, given the mileages, in nats."""
    standard_errors: Array
    """``(2,)``, of ``replacement_cost`` and ``cost_slope``: roots of ``covariance``'s diagonal."""
    covariance: Array
    """``(2, 2)``. Allows for the error of the estimated transitions."""
    covariance_given_transitions: Array
    """``(2, 2)``: the inverse of the observed information, as if the transitions were known."""
    covariance_from_scores: Array
    """``(2, 2)``: the inverse of the scores' summed outer products, transitions known."""
    increments: Array
    """``(J,)``: how often the mileage grew by 0, 1, … J - 1 bins."""
    probabilities: Array
    """``(J,)``: the estimated probability of each."""
    transition_log_likelihood: float
    """Of the increments, in nats."""
    observations: int
    """Decisions that the likelihood is over: all months but a bus's first."""
    solution: Solution
    """The fixed point: ``q``, ``values``, ``policy`` on ``bins`` states."""

    @property
    def full_log_likelihood(self) -> float:
        """Of choices and increments, in nats."""
        return self.log_likelihood + self.transition_log_likelihood

    @property
    def transition_errors(self) -> Array:
        """``(J,)``: standard errors of ``probabilities``."""
        return np.sqrt(np.diag(_multinomial_covariance(self.increments)))


def linear_cost(bins: int) -> Array:
    """``(bins,)``: the monthly cost of each bin at a slope of 1, Rust's ``0.001 x``."""
    return 0.001 * np.arange(bins, dtype=np.float64)


def bus_transitions(probabilities: ArrayLike, bins: int) -> Array:
    """Transitions of the mileage, ``(bins, 2, bins)``, linear in the increments' probabilities.

    Parameters
    ----------
    probabilities : array
        ``(J,)``: of growing by 0, 1, … J - 1 bins. A bus in the last bin stays there.
    bins : int
        Number of mileage bins, at least 2.
    """
    weights = np.asarray(probabilities, dtype=np.float64)
    if weights.ndim != 1 or len(weights) == 0:
        raise ValueError(f"probabilities has shape {weights.shape}: it must be (J,)")
    if bins < 2:
        raise ValueError(f"bins is {bins}: a bus needs at least 2")
    transitions = np.zeros((bins, 2, bins))
    state = np.arange(bins)
    for increment, weight in enumerate(weights):
        # Every state has one next state here, so no entry is added to twice.
        transitions[state, KEEP, np.minimum(state + increment, bins - 1)] += weight
        transitions[:, REPLACE, min(increment, bins - 1)] += weight
    return transitions


def bus_model(
    probabilities: ArrayLike,
    *,
    discount: float,
    bins: int,
    cost: Callable[[int], Array] = linear_cost,
) -> ChoiceModel:
    """Rust's model, with the parameters ``(replacement_cost, cost_slope)``.

    Parameters
    ----------
    probabilities : array
        ``(J,)``: of growing by 0, 1, … J - 1 bins.
    discount : float
        Per month, in [0, 1). Rust: 0.9999.
    bins : int
        Number of mileage bins. Rust: 90, of 5,000 miles.
    cost : callable
        ``bins`` to the monthly cost ``(bins,)`` at a slope of 1.
    """
    costs = cost(bins)
    features = np.zeros((bins, 2, 2))
    features[:, KEEP, 1] = -costs
    features[:, REPLACE, 0] = -1
    features[:, REPLACE, 1] = -costs[0]  # a new engine's first month has its cost too
    return ChoiceModel(features, bus_transitions(probabilities, bins), discount)


def nfxp(frame: pandas.DataFrame, *, discount: float, bins: int) -> BusEstimate:
    """Estimate Rust's model from a bus file by the nested fixed point.

    In two stages, as in Rust (1987), Table IX: the increments' probabilities are their shares; then
    the costs maximise the likelihood of the choices. The stages' likelihoods factor, so the
    standard errors of the second are corrected for the first exactly to first order: with observed
    information ``H``, its derivative ``C`` in the probabilities and their covariance ``V``, the
    covariance is ``H^-1 + H^-1 C V C' H^-1``.

    Parameters
    ----------
    frame : pandas.DataFrame
        A row a bus and month, in order, with the columns

        - ``bus_id``, and ``group`` where ids are unique within a group only;
        - ``period``: consecutive integers;
        - ``state``: mileage bin at the time of the decision, 0 … ``bins`` - 1;
        - ``replace``: 1 where the engine is replaced, else 0;
        - ``usage``: bins by which the mileage grew since the month before; not read in a bus's
          first month, which enters no likelihood.
    discount : float
        Per month, in [0, 1). 0.9999 works.
    bins : int
        Number of mileage bins.

    Returns
    -------
    BusEstimate

    Raises
    ------
    ValueError
        If ``discount`` or ``bins`` is out of range.
    DataError
        If a column is missing, or a row holds what the model has no place for: the message names
        the first such row (the first row of the frame is row 0).
    TrainingError
        If the choices do not determine the two parameters.
    """
    model, counts, increments = _counted(frame, discount, bins)
    probabilities = increments / increments.sum()
    estimate = nested_fixed_point(model, counts)
    cross = np.stack(
        [
            estimate.solution.cross_derivative(counts, bus_transitions(unit, int(bins)))
            for unit in np.eye(len(probabilities))
        ],
        axis=1,
    )  # (2, J)
    moved = estimate.covariance @ cross
    covariance = estimate.covariance + moved @ _multinomial_covariance(increments) @ moved.T
    return BusEstimate(
        replacement_cost=float(estimate.parameters[0]),
        cost_slope=float(estimate.parameters[1]),
        log_likelihood=estimate.log_likelihood,
        standard_errors=np.sqrt(np.diag(covariance)),
        covariance=covariance,
        covariance_given_transitions=estimate.covariance,
        covariance_from_scores=estimate.covariance_from_scores,
        increments=increments,
        probabilities=probabilities,
        transition_log_likelihood=float(
            np.sum(increments * np.log(np.where(increments > 0, probabilities, 1)))
        ),
        observations=int(counts.sum()),
        solution=estimate.solution,
    )


def nfxp_shift(
    frame: pandas.DataFrame, *, discount: float, bins: int, draws: int = 4, seed: int = 0
) -> ParameterShift:
    """How far :func:`nfxp` would move, had one decision been another.

    The increments' probabilities are kept. Parameters are ``(replacement_cost, cost_slope)``, and
    those of the frame, with errors, as of :func:`nfxp`; the rest as of
    :func:`~holdfast.bellman.estimators.replaced.parameter_shift`.
    """
    model, counts, _ = _counted(frame, discount, bins)
    return parameter_shift(model, counts, draws=draws, seed=seed)


def _counted(
    frame: pandas.DataFrame, discount: float, bins: int
) -> tuple[ChoiceModel, Array, Array]:
    """The model, counts ``(bins, 2)`` of choices, and counts ``(J,)`` of increments."""
    if not 0 <= discount < 1:
        raise ValueError(f"discount is {discount}: it must lie in [0, 1)")
    if isinstance(bins, bool) or not isinstance(bins, (int, np.integer)) or bins < 2:
        raise ValueError(f"bins is {bins!r}: it must be an integer of at least 2")
    state, action, usage = _decisions(frame, int(bins))
    increments = np.bincount(usage).astype(np.float64)
    counts: Array = np.zeros((int(bins), 2))
    np.add.at(counts, (state, action), 1)
    shares = increments / increments.sum()
    return bus_model(shares, discount=discount, bins=int(bins)), counts, increments


def _multinomial_covariance(increments: Array) -> Array:
    total = increments.sum()
    shares = increments / total
    return (np.diag(shares) - np.outer(shares, shares)) / total


Integers = NDArray[np.int64]


def _decisions(frame: pandas.DataFrame, bins: int) -> tuple[Integers, Integers, Integers]:
    """State, action and usage ``(N,)`` of all months but a bus's first, checked."""
    missing = [name for name in _COLUMNS if name not in frame.columns]
    if missing:
        raise DataError(
            f"the bus file has no column {', '.join(missing)}. Found: "
            f"{', '.join(map(str, frame.columns))}. Needed: {', '.join(_COLUMNS)}."
        )
    if len(frame) == 0:
        raise DataError("the bus file has no rows.")
    bus = _bus_numbers(frame)
    follows = np.zeros(len(frame), dtype=bool)
    follows[1:] = bus[1:] == bus[:-1]
    # The order first: in rows that are mixed up, any of the rest may look wrong.
    first = np.flatnonzero(~follows)
    opening = np.unique(bus[first], return_index=True)[1]
    again = np.delete(first, opening)
    if len(again):
        raise DataError(
            f"row {again[0]}: bus {frame['bus_id'].iloc[again[0]]} goes on here after other buses. "
            "Sort the rows by bus and period."
        )
    period, state = _integers(frame, "period"), _integers(frame, "state")
    action, usage = _integers(frame, "replace"), _integers(frame, "usage", follows)

    _refuse((state < 0) | (state >= bins), state, "state", f"a bin from 0 to {bins - 1}")
    _refuse((action != KEEP) & (action != REPLACE), action, "replace", "0 (keep) or 1 (replace)")
    _refuse(follows & ((usage < 0) | (usage >= bins)), usage, "usage", f"0 to {bins - 1} bins")

    before = np.concatenate([[0], period[:-1]])
    gap = np.flatnonzero(follows & (period != before + 1))
    if len(gap):
        row = gap[0]
        raise DataError(
            f"row {row}: gap in the trajectory of bus {frame['bus_id'].iloc[row]}: period "
            f"{period[row]} comes after period {before[row]}. Months must follow each other; give "
            "the part after a gap another bus_id."
        )
    came_from = np.concatenate([[0], state[:-1]])
    kept = follows & (np.concatenate([[REPLACE], action[:-1]]) == KEEP)
    jump = np.flatnonzero(kept & (state != np.minimum(came_from + usage, bins - 1)))
    if len(jump):
        row = jump[0]
        raise DataError(
            f"row {row}: bus {frame['bus_id'].iloc[row]} is in state {state[row]}, but state "
            f"{came_from[row]} and usage {usage[row]} lead to "
            f"{min(came_from[row] + usage[row], bins - 1)}. Was a replacement left out?"
        )
    if not follows.any():
        raise DataError("every bus has one month only: its first, which enters no likelihood.")
    for value, name in ((REPLACE, "replacement"), (KEEP, "month without a replacement")):
        if not (action[follows] == value).any():
            raise DataError(
                f"column replace is never {value} in rows 0 to {len(frame) - 1} (a bus's first "
                f"month does not count): without a single {name} the costs are not identified."
            )
    return state[follows], action[follows], usage[follows]


def _bus_numbers(frame: pandas.DataFrame) -> Integers:
    keys = [name for name in ("group", "bus_id") if name in frame.columns]
    for name in keys:
        empty = np.flatnonzero(frame[name].isna().to_numpy())
        if len(empty):
            raise DataError(f"row {empty[0]}: {name} is empty.")
    return frame.groupby(keys, sort=False).ngroup().to_numpy(dtype=np.int64)


def _integers(
    frame: pandas.DataFrame, name: str, where: NDArray[np.bool_] | None = None
) -> Integers:
    """A column ``(N,)`` of whole numbers; 0 in rows that are not in ``where``."""
    try:
        values = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        for row, value in enumerate(frame[name]):
            try:
                float(value)
            except (TypeError, ValueError):
                raise DataError(f"row {row}: {name} is {value!r}, not a number.") from None
        raise
    if where is not None:
        values = np.where(where, values, 0.0)
    bad = np.flatnonzero(~np.isfinite(values) | (values != np.round(values)))
    if len(bad):
        raise DataError(f"row {bad[0]}: {name} is {values[bad[0]]:g}, not a whole number.")
    return values.astype(np.int64)


def _refuse(bad: NDArray[np.bool_], values: Integers, name: str, expected: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise DataError(f"row {rows[0]}: {name} is {values[rows[0]]}, expected {expected}.")
