"""What can be wrong with demonstrations, said so that it can be found."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import DataError


def fault(
    source: str | Path,
    found: str,
    *,
    episode: object = None,
    step: int | None = None,
    field: str | None = None,
) -> DataError:
    """An error that names file, episode, step and field, as far as they are known."""
    places = [
        f"{word} {value}"
        for word, value in (("episode", episode), ("step", step), ("field", field))
        if value is not None
    ]
    return DataError(": ".join([str(source), *([", ".join(places)] if places else []), found]))
