"""Policies from their descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.control.policies import files
from holdfast.control.policies.interface import Policy
from holdfast.errors import ModelError, nearest


def load_policy(folder: str | Path) -> Policy:
    """Read what :meth:`Policy.save_pretrained` wrote.

    Returns
    -------
    Policy
        On the CPU, of the class that was saved, with its normalisers.

    Raises
    ------
    ModelError
        If a file is missing or damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    kind, config, tensors = files.read(folder)
    try:
        policy = policy_from_config(kind, config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / files.DESCRIPTION} does not describe a policy of the kind {kind!r} "
            f"({type(error).__name__}: {error}). Save the policy again."
        ) from error
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split()[:40])  # torch lists every tensor
        raise ModelError(
            f"{folder / files.WEIGHTS} does not fit {files.DESCRIPTION} beside it: {said} ... Save "
            "the policy again."
        ) from error
    return policy


def policy_from_config(kind: str, config: Mapping[str, Any]) -> Policy:
    """A policy of the described structure, with initial weights.

    Parameters
    ----------
    kind : str
        :attr:`Policy.kind`.
    config : mapping
        From :meth:`Policy.config`.

    Raises
    ------
    ModelError
        For an unknown kind.
    KeyError, TypeError, ValueError
        For a configuration that does not fit it.
    """
    if kind not in Policy.kinds:
        raise ModelError(
            f"the kind of policy {kind!r} is not known: it must be one of "
            f"{', '.join(Policy.kinds)}{nearest(kind, Policy.kinds)}"
        )
    return Policy.kinds[kind].from_config(config)
