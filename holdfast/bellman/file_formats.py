"""The file formats of logged transitions: columns, and where a row of them stood."""

from __future__ import annotations

import csv
import gzip
import importlib
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import DataError, nearest

_KNOWN = ("state", "action", "reward", "next_state", "terminal", "trajectory", "time")
_FROM_ZERO = " (the first is row 0)"
_FORMATS = ".csv, .csv.gz, .parquet, .npz, or a folder of a Minari data set"

# Of Minari: an episode's number and arrays.
Episode = tuple[int, dict[str, NDArray[Any]]]
_FIELDS = ("observations", "actions", "rewards", "terminations")


@dataclass(frozen=True)
class Table:
    """Columns as they were read, and where a row of them stood."""

    source: str
    columns: dict[str, NDArray[Any]]
    where: Callable[[int], str]
    counting: str = ""

    def error(self, row: int, what: str) -> DataError:
        """An error to raise about a row."""
        return DataError(f"{self.source}, {self.where(row)}{self.counting}: {what}")


def read_table(path: Path, source: str, names: Mapping[str, str]) -> Table:
    """Read a file of any known format, with its columns renamed.

    Parameters
    ----------
    path : Path
        What to read.
    source : str
        What messages call it.
    names : mapping
        Names that Holdfast has for columns to the file's own.

    Raises
    ------
    DataError
        If there is nothing to read, or what is there is damaged or of no known format.
    """
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise ValueError(f"columns names {unknown[0]!r}{nearest(unknown[0], _KNOWN)}")
    if not path.exists():
        raise DataError(f"{source} does not exist.")
    if path.is_dir():
        table = _minari(path, source)
    elif path.suffix == ".npz":
        table = _npz(path, source)
    elif path.suffix == ".parquet" or path.name.endswith((".csv", ".csv.gz")):
        table = _frame(path, source)
    else:
        raise DataError(f"{source} is of no known format. Known: {_FORMATS}.")
    for ours, theirs in names.items():
        renamed = {
            key: f"{ours}{key.removeprefix(theirs)}"
            for key in table.columns
            if re.fullmatch(rf"{re.escape(theirs)}(_\d+)?", key)
        }
        if not renamed:
            raise DataError(
                f"{source} has no column {theirs}, which is to be {ours}. Found: "
                f"{', '.join(table.columns)}{nearest(theirs, table.columns)}"
            )
        for key, new in renamed.items():
            table.columns[new] = table.columns.pop(key)
    return table


def _frame(path: Path, source: str) -> Table:
    pandas = _needed("pandas", source)
    parquet = path.suffix == ".parquet"
    if parquet:
        _needed("pyarrow", source)
    try:
        frame = pandas.read_parquet(path) if parquet else pandas.read_csv(path)
    except Exception as error:  # pandas passes on what its many parsers raise
        raise DataError(f"{source} cannot be read ({type(error).__name__}: {error})") from error
    columns = {str(name): frame[name].to_numpy() for name in frame.columns}
    if parquet:
        return Table(source, columns, lambda row: f"row {row}", _FROM_ZERO)
    return Table(source, columns, lambda row: f"line {_line(path, row)}")


def _line(path: Path, row: int) -> int:
    """The line of a CSV file that a row of its table ends in: blank lines are no rows."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        records = csv.reader(file)
        filled = (records.line_num for each in records if len(each) > 1 or "".join(each).strip())
        return next(itertools.islice(filled, row + 1, None), row + 2)  # the header comes first


def _npz(path: Path, source: str) -> Table:
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{source} cannot be read ({error})") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{source}: its arrays differ in length: {told}.")
    return Table(source, columns, lambda row: f"row {row}", _FROM_ZERO)


def _minari(folder: Path, source: str) -> Table:
    """Minari's layout: an episode has one observation more than actions."""
    data = folder / "data" if (folder / "data").is_dir() else folder
    try:
        kind = json.loads((data / "metadata.json").read_text(encoding="utf-8"))["data_format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no Minari data set: its data/metadata.json cannot be read ({error})."
        ) from error
    readers = {"hdf5": _hdf5_episodes, "arrow": _arrow_episodes}
    if kind not in readers:
        raise DataError(f"{source} has Minari's data_format {kind!r}. Known: hdf5, arrow.")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in (*_KNOWN[:6], "step")}
    for episode, read in sorted(readers[kind](data, source), key=lambda each: each[0]):
        steps = len(read["actions"])
        seen = read["observations"]
        if len(seen) != steps + 1:
            raise DataError(
                f"{source}, episode {episode}: {len(seen)} observations for {steps} actions; "
                "expected one more."
            )
        for name in ("rewards", "terminations"):
            if len(read[name]) != steps:
                raise DataError(
                    f"{source}, episode {episode}: {len(read[name])} {name} for {steps} actions; "
                    "expected as many."
                )
        if parts["state"] and seen.shape[1:] != parts["state"][0].shape[1:]:
            raise DataError(
                f"{source}, episode {episode}: observations have the shape {seen.shape[1:]}, and "
                f"{parts['state'][0].shape[1:]} in episodes before; expected the same in all."
            )
        if read["actions"].ndim != 1 or not np.issubdtype(read["actions"].dtype, np.integer):
            raise DataError(
                f"{source}, episode {episode}: actions are {read['actions'].dtype} of shape "
                f"{read['actions'].shape}, expected integers: one discrete action a step."
            )
        parts["state"].append(seen[:-1])
        parts["next_state"].append(seen[1:])
        parts["action"].append(read["actions"])
        parts["reward"].append(read["rewards"])
        parts["terminal"].append(read["terminations"])
        parts["trajectory"].append(np.full(steps, episode))
        parts["step"].append(np.arange(steps))
    if not parts["state"]:
        raise DataError(f"{source} is empty: it holds no episodes.")
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    for name in ("state", "next_state"):
        if columns[name].ndim > 2:
            columns[name] = columns[name].reshape(len(columns[name]), -1)
    number, step = columns["trajectory"], columns.pop("step")
    return Table(source, columns, lambda row: f"episode {number[row]}, step {step[row]}")


def _hdf5_episodes(data: Path, source: str) -> Iterator[Episode]:
    h5py = _needed("h5py", source)
    try:
        file = h5py.File(data / "main_data.hdf5", "r")
    except OSError as error:
        raise DataError(f"{source}: data/main_data.hdf5 cannot be read ({error})") from error
    with file:
        for name, group in file.items():
            for field in _FIELDS:
                if field not in group:
                    raise DataError(f"{source}: {name} has no {field}. Found: {', '.join(group)}.")
                if not isinstance(group.get(field), h5py.Dataset):
                    raise DataError(
                        f"{source}: {name}/{field} is no array. Observations and actions that are "
                        "dictionaries or tuples cannot be read."
                    )
            episode = int(name.removeprefix("episode_"))
            yield episode, {field: group[field][()] for field in _FIELDS}


def _arrow_episodes(data: Path, source: str) -> Iterator[Episode]:
    _needed("pyarrow", source)
    from pyarrow import ArrowInvalid, ipc

    for folder in (each for each in data.iterdir() if each.name.isdigit()):
        try:
            with ipc.open_file(folder / "part-0.arrow") as stream:
                table = stream.read_all()
            steps = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            read = {field: np.array(table[field].to_pylist()) for field in _FIELDS}
            # The table is as long as the observations; the last row's other fields are filling.
            shorter = {key: value[: int(steps["total_steps"])] for key, value in read.items()}
        except (OSError, ValueError, KeyError, ArrowInvalid) as error:
            raise DataError(f"{source}, episode {folder.name} cannot be read ({error})") from error
        yield int(folder.name), shorter | {"observations": read["observations"]}


def _needed(package: str, source: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{source} needs the package {package}: pip install holdfast[bellman]"
        ) from error
