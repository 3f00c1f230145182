"""Errors a person can mend.

Each message says what was found, what was expected, where, and what to do. The command line prints
the message alone and exits with status 2; anything that is not a ``HoldfastError`` is a defect of
Holdfast and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class HoldfastError(Exception):
    """Base of every error that a user can mend."""


class RecipeError(HoldfastError):
    """A recipe, or a value given with ``--set``, is not valid."""


class DataError(HoldfastError):
    """A data file or one of its rows cannot be used."""


class ModelError(HoldfastError):
    """A model, tokenizer or adapter cannot be loaded or used."""


class CheckpointError(HoldfastError):
    """A checkpoint cannot be written or read."""


class RunError(HoldfastError):
    """A run directory is missing, holds another recipe, or cannot be continued."""


class TrainingError(HoldfastError):
    """Training had to stop: for instance too many steps were refused."""


def nearest(name: str, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: the nearest known one, or a full stop."""
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f"; did you mean '{near[0]}'?" if near else "."
