"""Simulators are optional: what is missing is named when it is asked for, never at import."""

from __future__ import annotations

import importlib
from typing import Any

from holdfast.errors import HoldfastError

_INSTALL = "pip install 'holdfast[control]'"


class SimulatorError(HoldfastError):
    """An environment cannot be made or used as asked."""


def require(module: str, purpose: str, *, install: str = _INSTALL) -> Any:
    """Import an optional package.

    Parameters
    ----------
    module : str
        Dotted name.
    purpose : str
        What needs it, for the message: ``"Hopper-v5"``.
    install : str
        The command that brings it.

    Raises
    ------
    SimulatorError
        If it is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SimulatorError(
            f"{purpose} needs {error.name}, which is not installed; install it with: {install}"
        ) from error
    except (ImportError, OSError) as error:
        raise SimulatorError(
            f"{purpose} needs {module}, which is installed but cannot be loaded: {error}. "
            "A newer mujoco may have left files behind; mend it with: pip uninstall -y mujoco "
            f"mujoco-core mujoco-studio, then {install}"
        ) from error
