"""Several reward functions over one batch, every result checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import DataError, RecipeError, TrainingError, nearest
from holdfast.language.files import kind_of
from holdfast.language.rewards.contract import RewardFunction, Text, finite, shorten


@dataclass(frozen=True)
class RewardTable:
    """What the reward functions said about a batch.

    Attributes
    ----------
    by_function : dict of str to ndarray, (completions,), float64
        Unweighted, NaN where a function returned ``None``.
    total : ndarray, (completions,), float64
        Weighted sum over the functions that did judge a completion; NaN where none did.
    """

    by_function: dict[str, NDArray[np.float64]]
    total: NDArray[np.float64]


class Rewards:
    """Named reward functions with weights.

    Parameters
    ----------
    functions : mapping of str to RewardFunction
        At least one.
    weights : mapping of str to float
        One a function, finite. A weight of 0 records a reward without training on it.

    Raises
    ------
    RecipeError
        If there is no function, or the weights are not one finite number each.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float]
    ) -> None:
        if not functions:
            raise RecipeError("there is no reward: name at least one function")
        for name in weights:
            if name not in functions:
                raise RecipeError(
                    f"a weight is given for {name!r}, which is no reward{nearest(name, functions)} "
                    f"Rewards: {', '.join(functions)}"
                )
        for name in functions:
            if name not in weights:
                raise RecipeError(f"reward {name!r} has no weight: give one per reward")
            weight = weights[name]
            if isinstance(weight, bool) or not isinstance(weight, Real) or not finite(weight):
                raise RecipeError(
                    f"the weight of reward {name!r} is {weight!r}: it must be a finite number"
                )
        self.functions = dict(functions)
        self.weights = {name: float(weights[name]) for name in functions}

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardTable:
        """Judge a batch.

        Parameters
        ----------
        prompts, completions : sequence of Text, (completions,)
        completion_ids : sequence of sequences of int, (completions, lengths)
        columns : mapping of str to sequence, (completions,)
            The other columns of the data.

        Raises
        ------
        TrainingError
            If a function raises, returns anything but one finite number or ``None`` per completion,
            or a weighted sum is not finite.
        DataError
            If a column has the name of another argument.
        ValueError
            If the arguments differ in length, or there are no completions.
        """
        batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for column in columns:
            if column in batch:
                raise DataError(
                    f"the data has a column {column!r}, which is the name of an argument of every "
                    "reward function: rename the column"
                )
        batch = {**batch, **columns}
        for argument, values in batch.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"{argument} has {len(values)} entries, but there are {len(completions)} "
                    "completions"
                )
        if not completions:
            raise ValueError("completions is empty: there is nothing to reward")
        judged = {name: _judge(name, function, batch) for name, function in self.functions.items()}
        table = np.stack(list(judged.values()))
        unjudged = np.isnan(table)
        weights = np.array(list(self.weights.values()))[:, None]
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
            total = (weights * np.where(unjudged, 0.0, table)).sum(axis=0)
        for index in np.flatnonzero(~np.isfinite(total)):
            raise TrainingError(
                f"the weighted sum of the rewards is not finite (weights: {self.weights}): scale "
                "rewards or weights down" + _shown(batch, int(index))
            )
        total[unjudged.all(axis=0)] = np.nan
        return RewardTable(judged, total)


def _judge(
    name: str, function: RewardFunction, batch: Mapping[str, Sequence[Any]]
) -> NDArray[np.float64]:
    size = len(batch["completions"])
    try:
        returned = function(**{argument: list(values) for argument, values in batch.items()})
    except Exception as error:
        index = _culprit(function, batch)
        alone = "" if index is not None else " (for no completion of the batch alone)"
        raise TrainingError(
            f"reward {name!r} raised {type(error).__name__}{alone}: {error}"
            + _shown(batch, index or 0)
        ) from error
    if not isinstance(returned, list | tuple):
        raise TrainingError(
            f"reward {name!r} returned {_found(returned)}, expected a list of {size} numbers (or "
            "None), one per completion" + _shown(batch, 0)
        )
    if len(returned) != size:
        raise TrainingError(
            f"reward {name!r} returned {len(returned)} rewards, expected {size}: one per "
            "completion, in their order" + _shown(batch, 0)
        )
    for index, value in enumerate(returned):
        if value is None:
            continue
        if not isinstance(value, Real | np.bool_):
            raise TrainingError(
                f"reward {name!r} returned {_found(value)} for a completion, expected a number or "
                "None" + _shown(batch, index)
            )
        if not finite(value):
            raise TrainingError(
                f"reward {name!r} returned a number that is not finite ({value}). Return None for "
                "a completion that cannot be judged." + _shown(batch, index)
            )
    return np.array([math.nan if value is None else float(value) for value in returned])


def _culprit(function: RewardFunction, batch: Mapping[str, Sequence[Any]]) -> int | None:
    """The first completion on which a function that raised also raises alone."""
    for index in range(len(batch["completions"])):
        try:
            function(**{argument: [values[index]] for argument, values in batch.items()})
        except Exception:
            return index
    return None


def _found(value: Any) -> str:
    found = kind_of(value)
    return f"{found}; call its .tolist()" if hasattr(value, "tolist") else found


def _shown(batch: Mapping[str, Sequence[Any]], index: int) -> str:
    """The prompt and the completion that a message is about."""
    prompt, completion = batch["prompts"][index], batch["completions"][index]
    return f"\n  prompt: {shorten(prompt)}\n  completion: {shorten(completion)}"
