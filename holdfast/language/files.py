"""Reading rows and text, keeping where each row came from."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import DataError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read.

    Attributes
    ----------
    values : dict of str to Any
        Column name to value.
    origin : str
        Where it came from, for messages: ``file.jsonl:17``. Lines and rows count from 1.
    """

    values: dict[str, Any]
    origin: str


def read_rows(
    source: str | Path, *, base: Path, split: str = "train", name: str | None = None
) -> list[RawRow]:
    """All rows of a file, a folder of files, or a data set on the hub.

    Parameters
    ----------
    source : str or Path
        A ``.jsonl``, ``.csv`` (either may be ``.gz``) or ``.parquet`` file, a folder that
        ``datasets.load_dataset`` understands, or a hub id.
    base : Path
        The folder that relative paths start from.
    split, name : str
        As in ``datasets.load_dataset``; only for a folder or a hub id.

    Raises
    ------
    DataError
        If there is nothing to read, or what is there is damaged, empty, not UTF-8, or not rows.
    """
    source = str(source)
    path = base / Path(source).expanduser()
    if path.is_dir():
        rows = list(_data_set(str(path), source, split, name))
    elif path.is_file() or _must_be_file(source, path):
        if split != "train" or name is not None:
            raise DataError(f"{source} is one file: it has no splits or subsets to choose from.")
        existing = _existing(source, path)
        rows = list(_reader(source)(existing, source))
    else:
        rows = list(_data_set(source, source, split, name))
    if not rows:
        raise DataError(f"{source} is empty: it holds no rows ({path}).")
    return rows


def read_text(source: str | Path, *, base: Path) -> Iterator[str]:
    """The lines of a text file (``.gz`` or plain), each with its line end.

    Raises
    ------
    DataError
        If the file is missing, cut short or not UTF-8.
    """
    source = str(source)
    for _, line in _lines(_existing(source, base / Path(source).expanduser()), source):
        yield line


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"of type {type(value).__name__}"


# Which reader ---------------------------------------------------------------------------------


def _reader(source: str) -> Callable[[Path, str], Iterator[RawRow]]:
    for suffix, reader in _READERS.items():
        if source.lower().endswith(suffix):
            return reader
    raise DataError(f"{source}: unknown kind of file. Holdfast reads {', '.join(_READERS)}.")


def _must_be_file(source: str, path: Path) -> bool:
    """Whether a path that does not exist can only have been meant as a file.

    Hub ids look like ``name`` or ``owner/name`` and may contain dots, so a wrong guess would ask
    the hub for a misspelt file name and answer minutes later with a network error.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        return True
    if "/" in source and path.parent.is_dir():
        return True
    known = any(source.lower().endswith(suffix) for suffix in _READERS)
    return known or ("/" not in source and re.search(r"\.[A-Za-z]\w*$", source) is not None)


def _existing(source: str, path: Path) -> Path:
    if path.is_file():
        return path
    message = f"{source}: no such file. Looked for {path.absolute()}."
    if not path.parent.is_dir():
        raise DataError(f"{message} The folder {path.parent.absolute()} does not exist.")
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    hint = f" Close names in that folder: {', '.join(close)}." if close else ""
    raise DataError(message + hint)


# Readers --------------------------------------------------------------------------------------


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines with their ends. Only a line feed ends a line."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # A byte-order mark is no content.
                yield number, _decoded(raw, f"{source}:{number}")
    except EOFError:
        raise DataError(
            f"{source} is cut short: the compressed data end early, after line {number}. "
            "Copy or download it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{source} is not a sound gzip file ({error}), after line {number}. "
            "Copy or download it again."
        ) from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from None


def _decoded(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(raw):
            raise DataError(
                f"{origin}: the last line is cut short, within a character. Write the file again, "
                "or delete that line."
            ) from None
        raise DataError(
            f"{origin}: not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from None


def _read_jsonl(path: Path, source: str) -> Iterator[RawRow]:
    for number, line in _lines(path, source):
        if not line.strip():
            continue
        origin = f"{source}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.endswith("\n"):
                raise DataError(f"{origin}: not valid JSON: {error}.") from None
            raise DataError(
                f"{origin}: the last line is cut short: {error}. Write the file again, or delete "
                "that line."
            ) from None
        if not isinstance(values, dict):
            raise DataError(
                f"{origin}: found {kind_of(values)}, expected one object a line, such as "
                '{"prompt": "…", "completion": "…"}.'
            )
        yield RawRow(values, origin)


def _read_csv(path: Path, source: str) -> Iterator[RawRow]:
    limit = csv.field_size_limit(2**31 - 1)  # The default of 128 KiB is less than a long document.
    try:
        yield from _csv_rows(path, source)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, source: str) -> Iterator[RawRow]:
    reader = csv.reader((line for _, line in _lines(path, source)), strict=True)
    header: list[str] | None = None
    line = 1  # Where the coming row begins: a quoted field may span lines.
    try:
        for fields in reader:
            origin = f"{source}:{line}"
            line = reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                raise DataError(
                    f"{origin}: found {len(fields)} fields, expected {len(header)} as in the "
                    f"header ({', '.join(header)}). The row may be cut short, or a quote missing."
                )
            else:
                yield RawRow(dict(zip(header, fields, strict=True)), origin)
    except csv.Error as error:
        raise DataError(
            f"{source}:{line}: not valid CSV: {error}. The row may be cut short, or a quote "
            "missing."
        ) from None


def _read_parquet(path: Path, source: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{source} is not a sound parquet file, or is cut short: {_first_line(error)}."
        ) from None
    for number, row in enumerate(values, start=1):
        yield RawRow(row, f"{source}:{number}")


def _data_set(location: str, source: str, split: str, name: str | None) -> Iterator[RawRow]:
    """Rows of whatever ``datasets`` can load: a folder of files, or a hub id."""
    import datasets

    try:
        data = datasets.load_dataset(location, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        looked = f" There is no file {source} either." if location == source else ""
        raise DataError(
            f"{source} (split {split!r}) cannot be loaded: {_first_line(error)}{cause}.{looked}"
        ) from None
    for number, row in enumerate(data, start=1):
        yield RawRow(dict(row), f"{source}[{split}]:{number}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS: dict[str, Callable[[Path, str], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
