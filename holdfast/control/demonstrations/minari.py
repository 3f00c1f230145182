"""Minari data sets on disk: a folder with ``data/main_data.hdf5`` and ``data/metadata.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.control.demonstrations import hdf5
from holdfast.control.demonstrations.building import build_episode
from holdfast.control.demonstrations.episodes import Demonstrations, Episode
from holdfast.control.demonstrations.faults import fault

FILE = Path("data") / "main_data.hdf5"
METADATA = Path("data") / "metadata.json"
_SUCCESS = ("success", "is_success")


def read_minari(folder: Path, observation_keys: Sequence[str] | None = None) -> Demonstrations:
    """Read a data set in Minari's HDF5 form.

    Parameters
    ----------
    observation_keys : sequence of str, optional
        Where observations are a dictionary: parts and their order. By default all vectors, by name,
        which is how Gymnasium flattens them.

    Raises
    ------
    DataError
        If it is damaged, empty, in Arrow form, or its arrays do not fit together.
    """
    metadata = _metadata(folder / METADATA)
    if not (folder / FILE).is_file():
        form = metadata.get("data_format", "another")
        raise fault(
            folder, f"there is no {FILE}; this data set is in {form} form, only hdf5 can be read"
        )
    path = folder / FILE
    with hdf5.opened(path) as file:
        names = hdf5.numbered(path, file, "episode_")
        if not names:
            raise fault(path, "there are no episodes (episode_0, episode_1, ...) in it")
        episodes = tuple(_episode(path, file[name], name, observation_keys) for name in names)
        expected = metadata.get("total_episodes", file.attrs.get("total_episodes"))
        specification = metadata.get("env_spec") or file.attrs.get("env_spec")
    if expected is not None and str(expected) != str(len(episodes)):
        raise fault(path, f"there are {len(episodes)} episodes, but it says {expected}")
    return Demonstrations(episodes, str(folder), _environment(specification))


def _episode(path: Path, group: Any, name: str, keys: Sequence[str] | None) -> Episode:
    infos = group.get("infos") or {}
    success = [bool(infos[key][()].any()) for key in _SUCCESS if key in infos]
    return build_episode(
        str(path),
        name,
        observations=hdf5.joined(path, group, "observations", name, keys),
        actions=hdf5.array(path, group, "actions", name),
        rewards=hdf5.optional(group, "rewards"),
        terminations=hdf5.optional(group, "terminations"),
        truncations=hdf5.optional(group, "truncations"),
        success=any(success) if success else None,
        seed=hdf5.integer_attribute(group, "seed"),
        length=hdf5.integer_attribute(group, "total_steps"),
    )


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}  # Older data sets keep it in the attributes of the HDF5 file.
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault(path, f"this is not a readable JSON file: {error}") from error
    return found if isinstance(found, dict) else {}


def _environment(specification: Any) -> str | None:
    if isinstance(specification, str | bytes):
        try:
            specification = json.loads(specification)
        except ValueError:
            return None
    return specification.get("id") if isinstance(specification, dict) else None
