"""A policy's files: a JSON description and safetensors. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import ModelError

DESCRIPTION = "policy.json"
WEIGHTS = "policy.safetensors"
_FORMAT = 1


def write(
    folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a policy. An existing one in ``folder`` is replaced.

    Raises
    ------
    ModelError
        If it cannot be written.
    """
    described = {"format": _FORMAT, "kind": kind, "config": config}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    weights, description = folder / f"{WEIGHTS}.partial", folder / f"{DESCRIPTION}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(plain, weights)
        description.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        weights.replace(folder / WEIGHTS)
        description.replace(folder / DESCRIPTION)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the policy to {folder}: {error}. Free some space, or mend the rights."
        ) from error


def read(folder: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write` wrote: kind, configuration and tensors, on the CPU.

    Raises
    ------
    ModelError
        If a file is missing, damaged, or of another version.
    """
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            inside = folder / "model"  # of a run's directory
            meant = f" Did you mean {inside}?" if (inside / name).is_file() else ""
            raise ModelError(
                f"{folder} holds no control policy: {name} is not there. A saved policy is a "
                f"folder with {DESCRIPTION} and {WEIGHTS}.{meant}"
            )
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        found = described["format"]
        kind, config = str(described["kind"]), dict(described["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} does not describe a control policy ({type(error).__name__}: {error}). Save "
            "the policy again."
        ) from error
    if found != _FORMAT:
        raise ModelError(
            f"{path} has format {found!r}, but this version of Holdfast reads format {_FORMAT}. "
            "Use the version that wrote it, or save the policy again."
        )
    try:
        return kind, config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder / WEIGHTS} is damaged: {error}. Save the policy again."
        ) from error
