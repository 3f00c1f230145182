"""Reading HDF5 files, and saying what is not as it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.demonstrations.building import matrix
from holdfast.control.demonstrations.faults import fault
from holdfast.control.environments import require


@contextmanager
def opened(path: Path, mode: str = "r") -> Iterator[Any]:
    """An open HDF5 file.

    Raises
    ------
    DataError
        If it cannot be opened, or breaks off while it is read.
    """
    h5py = require("h5py", str(path))
    try:
        with h5py.File(path, mode) as file:
            yield file
    except OSError as error:
        raise fault(path, f"this is not a readable HDF5 file: {error}") from error


def numbered(path: Path, group: Any, prefix: str) -> list[str]:
    """Names of the groups in ``group`` that are ``prefix`` and a number, in order of the numbers.

    Raises
    ------
    DataError
        If something is no group, but data.
    """
    if hasattr(group, "shape"):
        raise fault(path, f"'{group.name}' holds data where episodes should be")
    names = [name for name in group if name.removeprefix(prefix).isdigit()]
    for name in names:
        if hasattr(group[name], "shape"):
            raise fault(path, "this is data, not a group of observations, actions, …", episode=name)
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def array(path: Path, group: Any, field: str, episode: str) -> NDArray[Any]:
    """The data set ``field`` of an episode's group.

    Raises
    ------
    DataError
        If there is none.
    """
    if field not in group or not hasattr(group[field], "shape"):
        raise fault(path, f"it is missing; found: {', '.join(group)}", episode=episode, field=field)
    return group[field][()]


def optional(group: Any, field: str) -> NDArray[Any] | None:
    """The same, or ``None`` where there is none."""
    return group[field][()] if field in group else None


def joined(
    path: Path, group: Any, field: str, episode: str, keys: Sequence[str] | None
) -> NDArray[np.float32]:
    """Observations ``(time, size)`` of a data set, or of the parts of a group side by side.

    Parameters
    ----------
    keys : sequence of str, optional
        Parts to take and their order. By default all that are numbers or vectors, by name.

    Raises
    ------
    DataError
        If there are none, or a part is not there.
    """
    if field not in group:
        raise fault(path, f"it is missing; found: {', '.join(group)}", episode=episode, field=field)
    whole = group[field]
    if hasattr(whole, "shape"):
        return matrix(path, episode, field, whole[()])
    parts = dict(_leaves(whole))
    names = vectors(whole) if keys is None else list(keys)
    if not names:
        raise fault(path, "there are no vectors in it", episode=episode, field=field)
    for name in names:
        if name not in parts:
            raise fault(
                path,
                f"it is missing; found: {', '.join(parts)}",
                episode=episode,
                field=f"{field}/{name}",
            )
    columns = [matrix(path, episode, f"{field}/{name}", parts[name][()]) for name in names]
    if len({len(column) for column in columns}) != 1:
        lengths = ", ".join(f"{n}: {len(c)}" for n, c in zip(names, columns, strict=True))
        raise fault(path, f"its parts differ in length ({lengths})", episode=episode, field=field)
    return np.concatenate(columns, axis=1)


def vectors(group: Any) -> list[str]:
    """The parts of a group that are numbers or vectors, by name."""
    return sorted(name for name, item in _leaves(group) if item.ndim <= 2)


def json_attribute(group: Any, name: str) -> dict[str, Any]:
    """An attribute that holds a JSON object; empty where it is not there or holds other things."""
    value = group.attrs.get(name)
    try:
        found = None if value is None else json.loads(value)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def integer_attribute(group: Any, name: str) -> int | None:
    """An attribute that is a whole number; ``None`` where it is missing, or the text ``None``."""
    try:
        return int(group.attrs.get(name))
    except (TypeError, ValueError):
        return None


def _leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in group.items():
        if hasattr(item, "shape"):
            yield prefix + name, item
        else:
            yield from _leaves(item, f"{prefix}{name}/")
