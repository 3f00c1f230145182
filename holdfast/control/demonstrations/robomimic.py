"""robomimic's HDF5 files: ``data/demo_0/{obs/<key>, actions, rewards, dones}``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.control.demonstrations import hdf5
from holdfast.control.demonstrations.building import build_episode
from holdfast.control.demonstrations.episodes import Demonstrations, Episode
from holdfast.control.demonstrations.faults import fault

_OURS = "holdfast"


def read_robomimic(path: Path, observation_keys: Sequence[str] | None = None) -> Demonstrations:
    """Read a file of low-dimensional demonstrations.

    robomimic's tasks reward success and nothing else, so an episode with a positive reward counts
    as a success. Its ``dones`` are set at success or at the end of a recording, depending on how
    the file was made: with success an episode counts as terminated, without as truncated.

    Parameters
    ----------
    observation_keys : sequence of str, optional
        Parts of ``obs`` and their order, such as ``robot0_eef_pos``, ``robot0_eef_quat``,
        ``robot0_gripper_qpos``, ``object``. By default all vectors, by name.

    Raises
    ------
    DataError
        If the file is damaged, empty, or its arrays do not fit together.
    """
    with hdf5.opened(path) as file:
        if "data" not in file:
            raise fault(path, "there is no group 'data', so this is no robomimic file")
        data = file["data"]
        names = hdf5.numbered(path, data, "demo_")
        if not names:
            raise fault(path, "there are no demonstrations (demo_0, demo_1, ...) in it")
        episodes = tuple(_episode(path, data[name], name, observation_keys) for name in names)
        arguments = hdf5.json_attribute(data, "env_args")
        details = hdf5.json_attribute(data, _OURS)
    return Demonstrations(episodes, str(path), arguments.get("env_name"), details)


def write_robomimic(demonstrations: Demonstrations, path: Path) -> None:
    """Write a file that robomimic reads, with one observation key, ``flat``."""
    with hdf5.opened(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = demonstrations.steps
        data.attrs["env_args"] = json.dumps(
            {"env_name": demonstrations.environment, "type": 2, "env_kwargs": {}}
        )
        data.attrs[_OURS] = json.dumps(dict(demonstrations.details))
        for number, episode in enumerate(demonstrations):
            group = data.create_group(f"demo_{number}")
            steps = len(episode)
            group.attrs["num_samples"] = steps
            for key in ("terminated", "truncated", "success", "seed"):
                value = getattr(episode, key)
                if value is not None:
                    group.attrs[key] = value
            group["obs/flat"] = episode.observations[:steps]
            if len(episode.observations) > steps:
                group["next_obs/flat"] = episode.observations[1:]
            group["actions"] = episode.actions
            if episode.rewards is not None:
                group["rewards"] = episode.rewards
            group["dones"] = (np.arange(steps) == steps - 1).astype(np.int64)


def _episode(path: Path, group: Any, name: str, keys: Sequence[str] | None) -> Episode:
    observations = hdf5.joined(path, group, "obs", name, keys)
    if "next_obs" in group and len(observations):
        # The same parts, or the last observation would be another quantity.
        own = hdf5.vectors(group["obs"]) if keys is None else keys
        after = hdf5.joined(path, group, "next_obs", name, own)
        if after.shape != observations.shape:
            raise fault(
                path,
                f"the shape is {after.shape}, that of obs is {observations.shape}",
                episode=name,
                field="next_obs",
            )
        observations = np.concatenate([observations, after[-1:]])
    rewards, dones = hdf5.optional(group, "rewards"), hdf5.optional(group, "dones")
    success = None if rewards is None else bool(np.max(rewards, initial=0.0) > 0)
    attributes = group.attrs
    success = bool(attributes["success"]) if "success" in attributes else success
    flags: dict[str, Any] = {}
    actions = hdf5.array(path, group, "actions", name)
    if "terminated" in attributes:
        last = np.arange(np.size(actions, 0)) == np.size(actions, 0) - 1
        flags["terminations"] = last & bool(attributes["terminated"])
        flags["truncations"] = last & bool(attributes.get("truncated", False))
    elif dones is not None:
        # robomimic also sets the flag at every step in which success holds, not at the first alone.
        last = np.zeros(np.shape(dones), dtype=np.bool_)
        last[-1:] = np.asarray(dones[-1:]) > 0
        flags["terminations"] = last & bool(success)
        flags["truncations"] = last & (not success)
    return build_episode(
        str(path),
        name,
        observations=observations,
        actions=actions,
        rewards=rewards,
        success=success,
        seed=hdf5.integer_attribute(group, "seed"),
        length=hdf5.integer_attribute(group, "num_samples"),
        **flags,
    )
