"""Checkpoints: safetensors and JSON, whole or not there at all.

A checkpoint is written under a temporary name, listed in a manifest with sizes and digests, flushed
to disk and then renamed. A reader trusts a checkpoint only if every file matches its manifest, and
otherwise falls back on the one before it. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import CheckpointError

_PREFIX = "step-"
_STATE = "state.json"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after ``step`` optimiser steps.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    tensors : mapping of str to mapping of str to Tensor
        Groups of tensors, one file each: ``{"policy": {...}, "optimizer": {...}}``.
    state : mapping
        Everything else, as JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    folder : Path
        Where they lie, one sub-folder each. Created when the first is written.
    keep : int
        How many of the newest are kept, at least 1. Keep two or more to survive a damaged one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: it must be at least 1")
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint, *, spare: Collection[int] = ()) -> Path:
        """Write a checkpoint, then delete the oldest beyond ``keep``.

        Parameters
        ----------
        checkpoint : Checkpoint
        spare : collection of int
            Steps of those that are kept as well, however old.

        Raises
        ------
        CheckpointError
            If it cannot be written (a full disk, missing rights). Earlier checkpoints are intact.
        """
        final = self.folder / f"{_PREFIX}{checkpoint.step:08d}"
        partial = final.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for group, tensors in checkpoint.tensors.items():
                save_file(_detached(tensors), partial / f"{group}.safetensors")
            (partial / _STATE).write_text(json.dumps(checkpoint.state), encoding="utf-8")
            listed = {path.name: _entry(path) for path in sorted(partial.iterdir())}
            (partial / _MANIFEST).write_text(json.dumps(listed, indent=1), encoding="utf-8")
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            partial.rename(final)
            _flush_folder(self.folder)
        except Exception as error:  # safetensors has an exception type of its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            known = self.steps()
            kept = f"the one of step {known[-1]} is intact" if known else "there is none before"
            raise CheckpointError(
                f"cannot write the checkpoint of step {checkpoint.step} to {self.folder}: {error}; "
                f"{kept}. Free some space (or mend the rights), then run 'holdfast resume'."
            ) from error
        # Later ones were passed over as damaged when the run was resumed from an earlier one.
        earlier = [step for step in self.steps() if step < checkpoint.step]
        kept_steps = {checkpoint.step, *spare, *earlier[max(0, len(earlier) - self.keep + 1) :]}
        for step in set(self.steps()) - kept_steps:
            shutil.rmtree(self.folder / f"{_PREFIX}{step:08d}", ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first. Their contents are not checked."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(
            int(name.removeprefix(_PREFIX))
            for name in names
            if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal()
        )

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each damaged one passed over."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), damaged
            except CheckpointError as error:
                damaged.append(str(error))
        return None, damaged

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises
        ------
        CheckpointError
            If it is damaged or not there.
        """
        folder = self.folder / f"{_PREFIX}{step:08d}"
        try:
            listed = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            for name, entry in listed.items():
                if _entry(folder / name) != entry:
                    raise CheckpointError(
                        f"checkpoint {folder} is damaged: {name} does not match its manifest"
                    )
            tensors = {
                Path(name).stem: load_file(folder / name)
                for name in listed
                if name.endswith(".safetensors")
            }
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from error
        return Checkpoint(step, tensors, state)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            kind = tensors if isinstance(value, Tensor) else values
            kind[f"{index}.{key}"] = value
    return tensors, {"groups": state["param_groups"], "values": values}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]
) -> None:
    """Load what :func:`pack_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for source in (tensors, packed["values"]):
        for name, value in source.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed["groups"]})


def separate(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested mappings and lists into JSON values, and numbered tensors that they refer to."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return value

    return plain(state), tensors


def reunite(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`separate`; tuples come back as lists."""
    if isinstance(plain, Mapping):
        if plain.keys() == {_TENSOR}:
            return tensors[plain[_TENSOR]]
        return {key: reunite(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [reunite(value, tensors) for value in plain]
    return plain


_TENSOR = "\0tensor"
"""Key of what stands in the place of a tensor."""


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
