"""A controller of one's own, by name."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from functools import wraps
from pathlib import Path
from typing import Any

from holdfast.control.environments import Act
from holdfast.errors import RecipeError


def load_controller(path: str) -> Act:
    """A function from observations ``(count, history, size)`` to chunks ``(count, horizon, size)``.

    Parameters
    ----------
    path : str
        ``file.py:name``, a function in a file, which is executed; or ``package.module.name``.

    Raises
    ------
    RecipeError
        If there is no such function, or it cannot be called; and whenever it raises itself.
    """
    file, colon, name = path.rpartition(":")
    if colon:
        module = _from_file(path, Path(file).expanduser())
    else:
        module_name, _, name = path.rpartition(".")
        module = _by_name(path, module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"controller '{path}': there is no function '{name}' in it")

    @wraps(function)
    def act(observations: Any) -> Any:
        try:
            return function(observations)
        except Exception as error:  # Whatever a user's own function may raise.
            raise RecipeError(f"controller '{path}' raised {_named(error)}") from error

    return act


def _from_file(path: str, file: Path) -> Any:
    if not file.is_file():
        raise RecipeError(f"controller '{path}': there is no file {file}")
    specification = importlib.util.spec_from_file_location(f"_controller_{file.stem}", file)
    if specification is None or specification.loader is None:
        raise RecipeError(f"controller '{path}': {file} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # Whatever a user's own file may raise.
        raise RecipeError(f"controller '{path}' cannot be loaded: {_named(error)}") from error
    return module


def _by_name(path: str, module: str) -> Any:
    if not module:
        raise RecipeError(f"controller '{path}': name it as file.py:name or package.module.name")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise RecipeError(f"controller '{path}' cannot be loaded: {_named(error)}") from error


def _named(error: Exception) -> str:
    """What was raised, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
