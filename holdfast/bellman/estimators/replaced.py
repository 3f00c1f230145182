"""How far a likelihood's parameters would move, had one observation been another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.bellman.estimators.choice_model import ChoiceModel, checked_counts
from holdfast.bellman.estimators.nfxp import Estimate, nested_fixed_point
from holdfast.errors import TrainingError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ParameterShift:
    """What one choice among those observed does to an estimate.

    Attributes
    ----------
    estimate : Estimate
        From all choices.
    shift : Array
        ``(K,)``: mean absolute change of each parameter as one random choice is replaced by another
        of the data.
    interval : Array
        ``(2, K)``: the middle 95 % of the signed changes.
    influence : Array
        ``(S, A)``: the largest change of a parameter, in its standard errors, as one such choice is
        replaced; mean over replacements. NaN where none was observed, infinite where the choices
        left would not determine the parameters.
    """

    estimate: Estimate
    shift: Array
    interval: Array
    influence: Array

    def ranking(self) -> NDArray[np.int64]:
        """``(k, 2)``: states and actions that were observed, by influence, the largest first."""
        seen = np.argwhere(~np.isnan(self.influence))
        return seen[np.argsort(-self.influence[tuple(seen.T)], kind="stable")]


def parameter_shift(
    model: ChoiceModel, counts: ArrayLike, *, draws: int = 4, seed: int = 0
) -> ParameterShift:
    """Replace a choice of every kind by others of the data, and estimate again exactly.

    Choices in one state of one action are alike, so one of each kind stands for all of it, with
    its count as weight. The transitions stay as they are.

    Parameters
    ----------
    model : ChoiceModel
        On ``S`` states with ``A`` actions and ``K`` parameters.
    counts : array
        ``(S, A)``: how often every action was chosen in every state.
    draws : int
        Replacements tried for each kind, the same for all; at least 1.
    seed : int
        Of the replacements.

    Raises
    ------
    ValueError
        For counts of another shape, or a number out of range.
    TrainingError
        If the choices do not determine the parameters.
    """
    counts = checked_counts(counts, model.offset.shape)
    if draws < 1:
        raise ValueError(f"draws is {draws}: it must be at least 1")
    base = nested_fixed_point(model, counts)
    rng = np.random.default_rng(seed)
    flat = rng.choice(counts.size, size=draws, p=(counts / counts.sum()).ravel())
    others = [tuple(map(int, each)) for each in np.argwhere(np.ones(counts.shape))[flat]]
    kinds = [tuple(map(int, each)) for each in np.argwhere(counts > 0)]
    changes = np.zeros((len(kinds), draws, model.parameters))
    for i, kind in enumerate(kinds):
        for k, other in enumerate(others):
            if other == kind:
                continue
            neighbour = counts.copy()
            neighbour[kind] -= 1
            neighbour[other] += 1
            try:
                found = nested_fixed_point(model, neighbour, start=base.parameters)
            except TrainingError:
                changes[i] = np.inf
                break
            changes[i, k] = found.parameters - base.parameters
    influence = np.full(counts.shape, np.nan)
    influence[tuple(np.transpose(kinds))] = np.abs(changes / base.standard_errors).max(-1).mean(-1)
    told = np.isfinite(changes).all((1, 2))
    weight = np.repeat(counts[tuple(np.transpose(kinds))][told], draws)
    each = changes[told].reshape(-1, model.parameters)
    return ParameterShift(
        base,
        np.average(np.abs(each), axis=0, weights=weight),
        np.stack([_quantiles(column, weight) for column in each.T], axis=1),
        influence,
    )


def _quantiles(values: Array, weight: Array) -> Array:
    """The quantiles 2.5 % and 97.5 % of weighted values."""
    order = np.argsort(values)
    below = np.cumsum(weight[order]) / weight.sum()
    return values[order][np.searchsorted(below, [0.025, 0.975])]
