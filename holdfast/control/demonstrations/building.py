"""From the arrays of a file to an episode, refusing what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.demonstrations.episodes import Episode, Floats
from holdfast.control.demonstrations.faults import fault


def build_episode(
    source: str,
    name: object,
    *,
    observations: Any,
    actions: Any,
    rewards: Any = None,
    terminations: Any = None,
    truncations: Any = None,
    success: bool | None = None,
    seed: int | None = None,
    length: int | None = None,
) -> Episode:
    """Make one episode of a file's arrays.

    Parameters
    ----------
    source, name
        The file and the episode, for messages.
    observations, actions : array
        ``(T or T + 1, ...)`` and ``(T, ...)``; further axes are flattened.
    rewards : array, optional
        ``(T,)``.
    terminations, truncations : array, optional
        ``(T,)``, a flag a step. Where a file has neither, the episode counts as truncated: nothing
        says that it was cut short.
    success, seed
        As in :class:`Episode`.
    length : int, optional
        Steps that the file says the episode has.

    Raises
    ------
    DataError
        For an empty episode, arrays of other lengths, or a flag before the last step.
    """
    found = matrix(source, name, "actions", actions)
    steps = len(found)
    if steps == 0:
        raise fault(source, "there are no steps", episode=name, field="actions")
    if length is not None and steps != length:
        raise fault(
            source,
            f"the file says that there are {length} steps, but holds {steps}: it was cut short",
            episode=name,
            field="actions",
        )
    seen = matrix(source, name, "observations", observations)
    if len(seen) not in (steps, steps + 1):
        raise fault(
            source,
            f"there are {len(seen)} for {steps} actions; there must be as many, or one more",
            episode=name,
            field="observations",
        )
    earned = None
    if rewards is not None:
        earned = _vector(source, name, "rewards", rewards, steps).astype(np.float32)
    ends = {
        field: None if flags is None else _flags(source, name, field, flags, steps)
        for field, flags in (("terminations", terminations), ("truncations", truncations))
    }
    for field, flags in ends.items():
        if flags is not None and flags[:-1].any():
            step = int(np.argmax(flags))
            raise fault(
                source,
                f"the episode ends here, but {steps - step - 1} more steps follow; "
                "split the episode, or correct the flag",
                episode=name,
                step=step,
                field=field,
            )
    last = {field: flags is not None and bool(flags[-1]) for field, flags in ends.items()}
    silent = all(flags is None for flags in ends.values())
    return Episode(
        observations=seen,
        actions=found,
        rewards=earned,
        terminated=last["terminations"],
        truncated=(last["truncations"] and not last["terminations"]) or silent,
        success=success,
        seed=seed,
    )


def matrix(source: str | Path, name: object, field: str, values: Any) -> Floats:
    """Numbers ``(rows, size)``, float32: axes after the first are flattened.

    Raises
    ------
    DataError
        For anything but an array of real numbers.
    """
    array = _numbers(source, name, field, values)
    if array.ndim == 0:
        raise fault(source, "this is one number, not one a step", episode=name, field=field)
    width = int(np.prod(array.shape[1:]))
    with np.errstate(over="ignore"):  # What is too large becomes infinite, and validation names it.
        return np.ascontiguousarray(array.reshape(len(array), width), dtype=np.float32)


def _vector(
    source: str | Path, name: object, field: str, values: Any, steps: int
) -> NDArray[np.float64]:
    array = _numbers(source, name, field, values)
    if array.size != steps or len(array) != steps:
        raise fault(
            source,
            f"the shape is {array.shape}; it must be ({steps},), one number for every action",
            episode=name,
            field=field,
        )
    return array.reshape(steps)


def _flags(
    source: str | Path, name: object, field: str, values: Any, steps: int
) -> NDArray[np.bool_]:
    flags = _vector(source, name, field, values, steps)
    if np.isnan(flags).any():
        step = int(np.argmax(np.isnan(flags)))
        raise fault(source, "this is nan, not a flag", episode=name, step=step, field=field)
    return flags != 0


def _numbers(source: str | Path, name: object, field: str, values: Any) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise fault(
            source, f"these are not real numbers but {array.dtype}", episode=name, field=field
        )
    return array.astype(np.float64)
