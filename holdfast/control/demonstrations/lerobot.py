"""LeRobot data sets, version 3: a folder with ``meta/info.json`` and ``data/**/*.parquet``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.control.demonstrations.building import build_episode
from holdfast.control.demonstrations.episodes import Demonstrations, Episode
from holdfast.control.demonstrations.faults import fault
from holdfast.control.environments import require

INFO = Path("meta") / "info.json"


def read_lerobot(folder: Path, observation_keys: Sequence[str] | None = None) -> Demonstrations:
    """Read the vectors of a data set; images and videos are left alone.

    Parameters
    ----------
    observation_keys : sequence of str, optional
        Features and their order. By default all vectors named ``observation.*``, in the order of
        the data set's own list.

    Raises
    ------
    DataError
        If it is damaged, empty, of another version, or its columns do not fit together.
    """
    info = _info(folder / INFO)
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith("v3"):
        raise fault(
            folder / INFO,
            f"this is {version}; only v3 can be read. LeRobot converts older data sets",
            field="codebase_version",
        )
    features = info.get("features") or {}
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise fault(folder / INFO, "this is not an object of objects", field="features")
    keys = list(observation_keys or _vectors(features))
    missing = [key for key in [*keys, "action"] if key not in features]
    if missing or not keys:
        raise fault(
            folder / INFO,
            f"there is no {', '.join(missing) or 'vector of observations'}; "
            f"found: {', '.join(features)}",
            field="features",
        )
    optional = [k for k in ("next.reward", "next.done", "next.success") if k in features]
    columns = _columns(folder, [*keys, "action", *optional, "episode_index", "frame_index"])
    # Frames of an episode stand together and in order, but nothing guards it.
    order = np.lexsort((columns["frame_index"], columns["episode_index"]))
    columns = {key: values[order] for key, values in columns.items()}
    numbers, starts = np.unique(columns["episode_index"], return_index=True)
    lengths = _lengths(folder)
    cuts = np.append(starts, len(order)).tolist()
    episodes = []
    for number, start, stop in zip(numbers.tolist(), cuts, cuts[1:], strict=False):
        rows = {key: values[start:stop] for key, values in columns.items()}
        length = lengths.get(int(number))
        episodes.append(_episode(folder, int(number), rows, keys, length))
    expected = info.get("total_episodes")
    if not episodes or (expected is not None and str(expected) != str(len(episodes))):
        raise fault(folder, f"there are {len(episodes)} episodes in data/, but it says {expected}")
    return Demonstrations(tuple(episodes), str(folder), details={"fps": info.get("fps")})


def _episode(
    folder: Path,
    number: int,
    rows: dict[str, NDArray[Any]],
    keys: Sequence[str],
    length: int | None,
) -> Episode:
    expected = np.arange(len(rows["frame_index"]))
    if (rows["frame_index"] != expected).any():
        step = int(np.argmax(rows["frame_index"] != expected))
        raise fault(
            folder,
            f"found frame {rows['frame_index'][step]}: one is missing or there twice",
            episode=number,
            step=step,
            field="frame_index",
        )
    success = bool(rows["next.success"].any()) if "next.success" in rows else None
    flags: dict[str, Any] = {}
    if "next.done" in rows:
        done = rows["next.done"].astype(np.bool_)
        flags = {"terminations": done & bool(success), "truncations": done & (not success)}
    return build_episode(
        str(folder),
        number,
        observations=np.concatenate([rows[key] for key in keys], axis=1),
        actions=rows["action"],
        rewards=rows.get("next.reward"),
        success=success,
        length=length,
        **flags,
    )


def _vectors(features: dict[str, Any]) -> list[str]:
    return [
        key
        for key, feature in features.items()
        if key.startswith("observation.")
        and str(feature.get("dtype", "")).startswith(("float", "int"))
        and len(feature.get("shape") or ()) <= 1
    ]


def _columns(folder: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    parquet = require("pyarrow.parquet", str(folder), install="pip install pyarrow")
    files = sorted((folder / "data").glob("**/*.parquet"))
    if not files:
        raise fault(folder, "there are no data/**/*.parquet files in it")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for path in files:
        found = _read(parquet.read_schema, path).names
        for name in names:
            if name not in found:
                raise fault(path, f"it is missing; found: {', '.join(found)}", field=name)
        # Images may stand in the same files, and take many times as much.
        table = _read(parquet.read_table, path, columns=list(names))
        for name in names:
            try:
                column = np.array(table.column(name).to_pylist())
            except ValueError:  # Rows of lists of several lengths.
                column = np.array(None, dtype=object)
            if column.dtype == object:
                raise fault(path, "rows differ in length, or some are empty", field=name)
            if len(column):  # A file may have no rows.
                vector = name == "action" or name.startswith("observation.")
                shape = (len(column), -1) if vector else -1
                parts[name].append(column.reshape(shape))
    if not parts["action"]:
        raise fault(folder, "there are no rows in data/")
    return {name: np.concatenate(values) for name, values in parts.items()}


def _lengths(folder: Path) -> dict[int, int]:
    """Steps of each episode, where the data set says so."""
    parquet = require("pyarrow.parquet", str(folder), install="pip install pyarrow")
    lengths: dict[int, int] = {}
    for path in sorted((folder / "meta" / "episodes").glob("**/*.parquet")):
        table = _read(parquet.read_table, path)
        if {"episode_index", "length"} <= set(table.column_names):
            numbers, steps = (table.column(k).to_pylist() for k in ("episode_index", "length"))
            lengths.update(zip(numbers, steps, strict=True))
    return lengths


def _read(read: Callable[..., Any], path: Path, **options: Any) -> Any:
    try:
        return read(path, **options)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise fault(path, f"this is not a readable Parquet file: {error}") from error


def _info(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault(path, f"this is not a readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise fault(path, "this is not a JSON object")
    return found
