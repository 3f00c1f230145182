"""Demonstrations as NumPy archives: this project's own form, easy to write from anywhere.

``observations`` and ``actions`` of all episodes, one after another; ``lengths``, the number of
actions of each. There are as many observations as actions, or one more in every episode. Optional:
``rewards``, one an action, which only objectives that learn from logged rewards need. Optional, one
an episode: ``terminated``, ``truncated``, ``success`` (-1: not known), ``seeds``
(-1: not known). ``metadata``: JSON with ``environment`` and ``details``.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.demonstrations.building import build_episode
from holdfast.control.demonstrations.episodes import Demonstrations
from holdfast.control.demonstrations.faults import fault


def read_npz(path: Path) -> Demonstrations:
    """Read an archive.

    Raises
    ------
    DataError
        If it is damaged, empty, or its arrays do not fit together.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise fault(path, "this is one array, not an archive of several: write it by np.savez")
        with loaded as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise fault(path, f"this is not a readable .npz file of numbers: {error}") from error
    for key in ("observations", "actions", "lengths"):
        if key not in arrays:
            raise fault(path, "it is missing; see the guide for the form of .npz files", field=key)
    for key in ("observations", "actions", "rewards"):
        if key in arrays and arrays[key].ndim == 0:
            raise fault(path, "this is one number, not one a step", field=key)
    lengths = _whole(path, arrays, "lengths").reshape(-1)
    if len(lengths) == 0:
        raise fault(path, "there are no episodes", field="lengths")
    if (lengths < 1).any():
        number = int(np.argmax(lengths < 1))
        raise fault(path, f"the length is {lengths[number]}", episode=number, field="lengths")
    total, extra = int(lengths.sum()), len(arrays["observations"]) - int(lengths.sum())
    if extra not in (0, len(lengths)):
        raise fault(
            path,
            f"there are {len(arrays['observations'])}, but the lengths sum to {total}: there must "
            f"be as many, or one more an episode ({total + len(lengths)})",
            field="observations",
        )
    for key in ("actions", "rewards"):
        if key in arrays and len(arrays[key]) != total:
            raise fault(
                path, f"there are {len(arrays[key])}, but the lengths sum to {total}", field=key
            )
    for key in ("terminated", "truncated", "success", "seeds"):
        if key in arrays and arrays[key].shape != lengths.shape:
            raise fault(
                path,
                f"the shape is {arrays[key].shape}; it must be ({len(lengths)},), one an episode",
                field=key,
            )
        if key in arrays:
            arrays[key] = _whole(path, arrays, key)
    metadata = _metadata(path, arrays.get("metadata"))
    stops = np.cumsum(lengths)
    seen = np.cumsum(lengths + (extra > 0))
    episodes = []
    for number, length in enumerate(lengths.tolist()):
        rows = slice(int(stops[number]) - length, int(stops[number]))
        episodes.append(
            build_episode(
                str(path),
                number,
                observations=arrays["observations"][
                    int(seen[number]) - length - (extra > 0) : int(seen[number])
                ],
                actions=arrays["actions"][rows],
                rewards=arrays["rewards"][rows] if "rewards" in arrays else None,
                success=_known(arrays, "success", number, bool),
                seed=_known(arrays, "seeds", number, int),
                terminations=_at_end(arrays, "terminated", number, length),
                truncations=_at_end(arrays, "truncated", number, length),
            )
        )
    return Demonstrations(
        tuple(episodes),
        str(path),
        metadata.get("environment"),
        metadata.get("details") or {},
    )


def write_npz(demonstrations: Demonstrations, path: Path) -> None:
    """Write an archive. Last observations and rewards are kept if every episode has its own."""
    episodes = demonstrations.episodes
    whole = all(len(e.observations) == len(e) + 1 for e in episodes)
    metadata = {
        "environment": demonstrations.environment,
        "details": dict(demonstrations.details),
    }
    rewards = [e.rewards for e in episodes if e.rewards is not None]
    rewarded: dict[str, Any] = {}
    if len(rewards) == len(episodes):
        rewarded["rewards"] = np.concatenate(rewards)
    np.savez_compressed(
        path,
        observations=np.concatenate([e.observations[: len(e) + whole] for e in episodes]),
        actions=demonstrations.actions,
        **rewarded,
        lengths=np.array([len(e) for e in episodes], dtype=np.int64),
        terminated=np.array([e.terminated for e in episodes]),
        truncated=np.array([e.truncated for e in episodes]),
        success=np.array([-1 if e.success is None else e.success for e in episodes], np.int8),
        seeds=np.array([-1 if e.seed is None else e.seed for e in episodes], np.int64),
        metadata=np.array(json.dumps(metadata)),
    )


def _whole(path: Path, arrays: dict[str, Any], key: str) -> NDArray[np.int64]:
    """Counts and flags, which a NaN or a text would make something else of."""
    given = arrays[key]
    with np.errstate(invalid="ignore"):
        whole = given.astype(np.int64) if given.dtype.kind in "biuf" else None
    if whole is None or (whole != given).any():
        raise fault(path, "these are not whole numbers", field=key)
    return whole


def _at_end(arrays: dict[str, Any], key: str, number: int, length: int) -> Any:
    """The flag of an episode as a flag of its last step."""
    if key not in arrays:
        return None
    return (np.arange(length) == length - 1) & bool(arrays[key][number])


def _known(arrays: dict[str, Any], key: str, number: int, kind: Any) -> Any:
    if key not in arrays or arrays[key][number] < 0:
        return None
    return kind(arrays[key][number])


def _metadata(path: Path, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        found = json.loads(str(value))
    except json.JSONDecodeError as error:
        raise fault(path, f"this is not JSON: {error}", field="metadata") from error
    if not isinstance(found, dict):
        raise fault(path, "this is not a JSON object", field="metadata")
    if not isinstance(found.get("details") or {}, dict):
        raise fault(path, "its details are not a JSON object", field="metadata")
    return found
