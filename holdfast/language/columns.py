"""What the columns of a row mean: TRL's data types, standard and conversational.

Demonstrations are ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"text"}``; preferences are
``{"prompt", "chosen", "rejected"}``, where conversations may leave the prompt implicit. A standard
value is text, a conversational one a list of ``{"role", "content"}`` messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import DataError
from holdfast.language.files import RawRow, kind_of

Message = dict[str, Any]
"""``{"role": str, "content": str}``; other keys are left to the chat template."""

_DEMONSTRATIONS = '{"prompt", "completion"}, {"messages"} or {"text"}'
_PREFERENCES = (
    '{"prompt", "chosen", "rejected"}, or conversations {"chosen", "rejected"} that begin alike'
)


@dataclass(frozen=True, slots=True)
class Example:
    """What stands before a completion, and the completion.

    Attributes
    ----------
    prompt, completion : str or list of Message
        Both text or both messages. The prompt is empty for ``text`` and ``messages`` rows.
    origin : str
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    origin: str


class BadRow(DataError):
    """A row that is well formed but cannot be trained on. Such rows may be dropped.

    Parameters
    ----------
    reason : str
        A short name, the same for all rows with this fault.
    origin, detail : str
        Where the row is, and what is wrong with it.
    """

    def __init__(self, reason: str, origin: str, detail: str) -> None:
        super().__init__(
            f"{origin}: {detail}. Mend the row, or set bad_rows: drop to leave such rows out."
        )
        self.reason = reason


def demonstration(row: RawRow) -> Example:
    """Read a row as a demonstration.

    Raises
    ------
    BadRow
        If the completion is empty.
    DataError
        If columns are missing or of the wrong type.
    """
    if "messages" in row.values:
        example = Example([], _messages(row, "messages"), row.origin)
        _check_completion(example, "messages")
    elif "text" in row.values and not row.values.keys() >= {"prompt", "completion"}:
        example = Example("", _text(row, "text"), row.origin)
        _check_completion(example, "text")
    else:
        _require(row, ("prompt", "completion"), _DEMONSTRATIONS)
        example = Example(*_alike(row, "prompt", "completion"), row.origin)
        _check_completion(example, "completion")
    return example


def preference(row: RawRow) -> tuple[Example, Example]:
    """Read a row as ``(chosen, rejected)``, with the prompt in both.

    Raises
    ------
    BadRow
        If a completion is empty, or both are the same.
    DataError
        If columns are missing or of the wrong type.
    """
    _require(row, ("chosen", "rejected"), _PREFERENCES)
    chosen, rejected = _alike(row, "chosen", "rejected")
    # Some published sets hold whole conversations and repeat their first message as a text in
    # "prompt": the conversation then says more than that column.
    implicit = isinstance(row.values.get("prompt"), str | None) and not isinstance(chosen, str)
    if not implicit:
        _require(row, ("prompt",), _PREFERENCES)
        prompt, _ = _alike(row, "prompt", "chosen")
    if chosen == rejected:
        raise BadRow(
            "identical chosen and rejected", row.origin, "chosen and rejected are identical"
        )
    if implicit:
        prompt = _common_start(row, chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    pair = Example(prompt, chosen, row.origin), Example(prompt, rejected, row.origin)
    _check_completion(pair[0], "chosen")
    _check_completion(pair[1], "rejected")
    return pair


def prompt(row: RawRow) -> str | list[Message]:
    """Read a row as a prompt; its other columns are for reward functions.

    Raises
    ------
    BadRow
        If the prompt is empty.
    DataError
        If the column is missing or of the wrong type.
    """
    _require(row, ("prompt",), '{"prompt"} and the columns that rewards need')
    if isinstance(row.values["prompt"], list):
        return _messages(row, "prompt")
    content = _text(row, "prompt")
    if not content:
        raise BadRow("empty prompt", row.origin, '"prompt" is empty')
    return content


def texts(row: RawRow) -> Iterator[str]:
    """Every text in the columns that Holdfast knows, for instance to train a tokenizer on."""
    for column in ("prompt", "completion", "chosen", "rejected", "text", "messages"):
        value = row.values.get(column)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (message["content"] for message in _messages(row, column))


# Columns and their types ----------------------------------------------------------------------


def _require(row: RawRow, columns: Sequence[str], expected: str) -> None:
    missing = [column for column in columns if column not in row.values]
    if not missing:
        return
    found = ", ".join(f'"{column}"' for column in row.values) or "none"
    hints = ""
    for column in missing:
        near = _nearest(column, [name for name in row.values if name not in columns])
        if near is not None:
            hints += f' Nearest to "{column}": "{near}"; rename it.'
    listed = ", ".join(f'"{column}"' for column in missing)
    raise DataError(
        f"{row.origin}: no column {listed}. Columns found: {found}.{hints} Expected {expected}."
    )


def _nearest(wanted: str, names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wanted, by_lower, n=1)
    return by_lower[close[0]] if close else None


def _alike(row: RawRow, first: str, second: str) -> tuple[Any, Any]:
    """Two columns, both text or both lists of messages."""
    values = [
        _messages(row, column) if isinstance(row.values[column], list) else _text(row, column)
        for column in (first, second)
    ]
    if isinstance(values[0], str) != isinstance(values[1], str):
        kinds = ["text" if isinstance(value, str) else "a list of messages" for value in values]
        raise DataError(
            f'{row.origin}: "{first}" is {kinds[0]}, but "{second}" is {kinds[1]}. Expected both '
            "to be text, or both lists of messages."
        )
    return values[0], values[1]


def _text(row: RawRow, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(
            f'{row.origin}: "{column}" is {kind_of(value)}, expected text or a list of messages.'
        )
    return value


def _messages(row: RawRow, column: str) -> list[Message]:
    value = row.values[column]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise DataError(f'{row.origin}: "{column}" is {found}, expected a list of messages.')
    for index, message in enumerate(value):
        where = f"{row.origin}: {column}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f'{where} is {kind_of(message)}, expected {{"role": …, "content": …}}.')
        for key in ("role", "content"):
            if key not in message:
                found = ", ".join(f'"{name}"' for name in message) or "none"
                raise DataError(
                    f'{where} has no "{key}". Keys found: {found}. Expected "role" and "content".'
                )
            if not isinstance(message[key], str):
                raise DataError(f"{where}.{key} is {kind_of(message[key])}, expected text.")
    return value


# Content --------------------------------------------------------------------------------------


def _common_start(
    row: RawRow, chosen: Sequence[Message], rejected: Sequence[Message]
) -> list[Message]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise DataError(
            f"{row.origin}: chosen and rejected begin with different messages, so the prompt "
            'cannot be told from the completions. Give it as a list of messages in "prompt".'
        )
    return list(chosen[:shared])


def _check_completion(example: Example, column: str) -> None:
    """Refuse a completion in which there is nothing to learn."""
    if isinstance(example.completion, str):
        if not example.completion.strip():
            raise BadRow("empty completion", example.origin, f'"{column}" is empty')
        return
    answers = [message for message in example.completion if message["role"] == "assistant"]
    if not answers:
        raise BadRow(
            "empty completion", example.origin, f'"{column}" has no message from the assistant'
        )
    if not all(message["content"].strip() for message in answers):
        raise BadRow(
            "empty completion", example.origin, f'"{column}" has an empty message of the assistant'
        )
    if not example.prompt and example.completion[0]["role"] == "assistant":
        raise DataError(
            f"{example.origin}: the conversation begins with the assistant. Expected a message of "
            "the user or system first."
        )
