"""Reward functions by name: built in, in a file, or in a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.errors import RecipeError, nearest
from holdfast.language.files import kind_of
from holdfast.language.rewards import built_in
from holdfast.language.rewards.classifier import sequence_classifier
from holdfast.language.rewards.contract import RewardFunction

BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    factory.__name__: factory
    for factory in (
        built_in.exact_match,
        built_in.numeric_answer,
        built_in.math_verify,
        built_in.regex,
        built_in.soft_overlong,
        sequence_classifier,
    )
}
"""Rewards by the name that a recipe uses: each takes its options and returns the function."""


def load_reward(path: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """A reward function by name.

    Parameters
    ----------
    path : str
        The name of one in :data:`BUILT_IN`; ``file.py:name``, a function in a file, which is
        executed; or ``package.module.name``, a function in a module that can be imported.
    options : mapping of str to Any, optional
        Of a reward that is built in. A function of one's own takes none.

    Raises
    ------
    RecipeError
        If there is no such function, it cannot be called as a reward, or an option is not valid.
    ModelError
        If a reward model cannot be used.
    """
    if path in BUILT_IN:
        return _build(path, options or {})
    file, colon, name = path.rpartition(":")
    if not colon and "." not in path:
        raise RecipeError(
            f"there is no reward {path!r}{nearest(path, BUILT_IN)} Built in: "
            f"{', '.join(BUILT_IN)}. Name one of your own as file.py:name or package.module.name."
        )
    if options:
        raise RecipeError(
            f"reward {path!r} is a function, which takes no options (found: "
            f"{', '.join(map(str, options))}): name a function that has them set"
        )
    if colon:
        module = _module_from_file(path, Path(file).expanduser())
    else:
        module_name, _, name = path.rpartition(".")
        module = _module_by_name(path, module_name)
    return _member(path, module, name)


def _build(name: str, options: Mapping[str, Any]) -> RewardFunction:
    factory = BUILT_IN[name]
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise RecipeError(
                f"reward {name!r} has no option {option!r}{nearest(str(option), known)} Options: "
                f"{', '.join(known)}"
            )
    missing = [
        option
        for option, parameter in known.items()
        if parameter.default is parameter.empty and option not in options
    ]
    if missing:
        raise RecipeError(f"reward {name!r} needs the option {', '.join(missing)}")
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"reward {name!r}: {error}") from error


def _module_from_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        names = [entry.name for entry in file.parent.glob("*.py")]
        raise RecipeError(f"reward {path!r}: there is no file {file}{nearest(file.name, names)}")
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{digest}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"reward {path!r}: {file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module they are defined in
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _unimportable(path, str(file), error) from error
    return module


def _module_by_name(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _unimportable(path, name, error) from error  # it exists, but imports what is not
        raise RecipeError(
            f"reward {path!r}: there is no module {error.name!r}{nearest(path, BUILT_IN)} Install "
            "it, or name a file: file.py:name"
        ) from error
    except Exception as error:
        raise _unimportable(path, name, error) from error


def _unimportable(path: str, module: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"reward {path!r}: {module} cannot be imported ({type(error).__name__}: {error})"
    )


def _member(path: str, module: ModuleType, name: str) -> RewardFunction:
    where = module.__file__ or module.__name__
    if not hasattr(module, name):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise RecipeError(f"reward {path!r}: {where} has no {name!r}{nearest(name, callables)}")
    found = getattr(module, name)
    if inspect.isclass(found) or not callable(found):
        what = "a class" if inspect.isclass(found) else kind_of(found)
        raise RecipeError(
            f"reward {path!r}: {name!r} in {where} is {what}, expected a function "
            "f(prompts, completions, completion_ids, **columns)"
        )
    try:
        kinds = {parameter.kind for parameter in inspect.signature(found).parameters.values()}
    except ValueError:  # a function written in C may not tell
        kinds = {inspect.Parameter.VAR_KEYWORD}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise RecipeError(
            f"reward {path!r}: every column of the data is passed to {name!r} by name, so its "
            "signature must end with **columns"
        )
    return found
