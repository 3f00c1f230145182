"""Rows that a language model trains on: demonstrations and preferences.

Rows are read (:mod:`~holdfast.language.files`), understood (:mod:`~holdfast.language.columns`) and
tokenised once (:mod:`~holdfast.language.encoding`) before training starts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from holdfast.errors import DataError
from holdfast.language.columns import (
    BadRow,
    Message,
    demonstration,
    preference,
    prompt,
    texts,
)
from holdfast.language.encoding import (
    IGNORE_INDEX,
    Encoded,
    Passage,
    collate,
    encode,
    encode_prompt,
    render,
    truncate,
)
from holdfast.language.files import RawRow, read_rows, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "BadRow",
    "Demonstration",
    "Encoded",
    "Preference",
    "Prompt",
    "RawRow",
    "Split",
    "collate",
    "fingerprint",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "read_rows",
    "read_text",
    "split_rows",
    "texts",
]

A = TypeVar("A")
B = TypeVar("B")
BadRows = Literal["error", "drop"]


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """Tokens to imitate.

    Attributes
    ----------
    tokens : Encoded
        Prompt and completion; the completion counts.
    origin : str
        Where the row came from: ``file.jsonl:17``.
    group : str
        Rows with equal prompts share it and stay together in a split. Empty: a group of its own.
    """

    tokens: Encoded
    origin: str
    group: str = ""

    @property
    def sequences(self) -> dict[str, Encoded]:
        return {"tokens": self.tokens}

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.tokens.length

    def to_json(self) -> dict[str, Any]:
        return {"origin": self.origin, "tokens": self.tokens.to_json()}


@dataclass(frozen=True, slots=True, eq=False)
class Preference:
    """Two completions of one prompt, of which the first is preferred.

    Attributes
    ----------
    chosen, rejected : Encoded
        Prompt and completion; the completion counts.
    origin, group : str
        As in :class:`Demonstration`.
    reference_chosen_logps, reference_rejected_logps : float, optional
        Log-probability of the completion under the reference, in nats, once it has been computed.
    """

    chosen: Encoded
    rejected: Encoded
    origin: str
    reference_chosen_logps: float | None = None
    reference_rejected_logps: float | None = None
    group: str = ""

    @property
    def sequences(self) -> dict[str, Encoded]:
        return {"chosen": self.chosen, "rejected": self.rejected}

    @property
    def length(self) -> int:
        """Tokens of the longer sequence: what both are padded to."""
        return max(self.chosen.length, self.rejected.length)

    def to_json(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "chosen": self.chosen.to_json(),
            "rejected": self.rejected.to_json(),
            "reference_chosen_logps": self.reference_chosen_logps,
            "reference_rejected_logps": self.reference_rejected_logps,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the policy is asked to complete.

    Attributes
    ----------
    input_ids : ndarray, (time,), int32
    content : str or list of Message
        The prompt as the row has it: what reward functions are given.
    columns : dict
        The row's other columns: passed on to reward functions.
    origin, group : str
        As in :class:`Demonstration`.
    """

    input_ids: np.ndarray
    content: str | list[Message]
    columns: dict[str, Any]
    origin: str
    group: str = ""

    @property
    def sequences(self) -> dict[str, Encoded]:
        return {"prompt": Encoded(self.input_ids, np.zeros(self.length, dtype=bool))}

    @property
    def length(self) -> int:
        return len(self.input_ids)

    def to_json(self) -> dict[str, Any]:
        return {"origin": self.origin, "prompt": self.content, **self.columns}


R = TypeVar("R", Demonstration, Preference, Prompt)


def load_demonstrations(
    rows: Sequence[RawRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    bad_rows: BadRows = "error",
) -> tuple[list[Demonstration], dict[str, int]]:
    """Tokenise demonstrations.

    Parameters
    ----------
    rows : sequence of RawRow
    tokenizer : Tokenizer
        A fast one.
    max_length : int
        Tokens a sequence may have, at least 2. Longer ones lose their end.
    bad_rows : {"error", "drop"}
        What to do with rows that cannot be trained on: an empty completion, text that is not valid
        Unicode, a prompt that leaves no room for a completion.

    Returns
    -------
    rows : list of Demonstration
        In the order of the input.
    dropped : dict of str to int
        How many rows were dropped, by reason.

    Raises
    ------
    DataError
        If a row has missing or mistyped columns, a row is bad and ``bad_rows`` is ``"error"``, or
        no row is left.
    ModelError
        If the tokenizer lacks offsets, an end token, or a chat template that the rows need.
    """
    _check_max_length(max_length)
    sieve = _Sieve(bad_rows)
    passages = sieve(lambda row: render(demonstration(row), tokenizer), rows)

    def finish(item: tuple[Passage, Encoded]) -> Demonstration:
        passage, tokens = item
        short = truncate(tokens, max_length, passage.origin)
        return Demonstration(short, passage.origin, passage.prompt_digest)

    encoded = sieve(finish, zip(passages, encode(passages, tokenizer), strict=True))
    return sieve.result(encoded)


def load_preferences(
    rows: Sequence[RawRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    bad_rows: BadRows = "error",
) -> tuple[list[Preference], dict[str, int]]:
    """Tokenise preferences. As :func:`load_demonstrations`; identical completions are bad as well.

    Completions that differ only after the first ``max_length`` tokens count as identical.
    """
    _check_max_length(max_length)
    sieve = _Sieve(bad_rows)

    def begin(row: RawRow) -> tuple[Passage, Passage]:
        chosen, rejected = preference(row)
        return render(chosen, tokenizer), render(rejected, tokenizer)

    pairs = sieve(begin, rows)
    encoded = encode([passage for pair in pairs for passage in pair], tokenizer)

    def finish(item: tuple[tuple[Passage, Passage], Encoded, Encoded]) -> Preference:
        (passage, _), chosen, rejected = item
        chosen = truncate(chosen, max_length, passage.origin)
        rejected = truncate(rejected, max_length, passage.origin)
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            raise BadRow(
                "identical chosen and rejected",
                passage.origin,
                f"chosen and rejected are the same within max_length {max_length} tokens",
            )
        return Preference(chosen, rejected, passage.origin, group=passage.prompt_digest)

    return sieve.result(sieve(finish, zip(pairs, encoded[::2], encoded[1::2], strict=True)))


def load_prompts(
    rows: Sequence[RawRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    bad_rows: BadRows = "error",
) -> tuple[list[Prompt], dict[str, int]]:
    """Tokenise prompts. As :func:`load_demonstrations`; a prompt over ``max_length`` is bad.

    A prompt is never cut: what is asked would no longer be what is rewarded.
    """
    _check_max_length(max_length)
    sieve = _Sieve(bad_rows)

    def finish(row: RawRow) -> Prompt:
        content = prompt(row)
        ids = encode_prompt(content, tokenizer, row.origin)
        if len(ids) > max_length:
            raise BadRow(
                "prompt longer than the limit",
                row.origin,
                f"the prompt has {len(ids)} tokens, more than max_length {max_length}",
            )
        others = {name: value for name, value in row.values.items() if name != "prompt"}
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
        group = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Prompt(ids, content, others, row.origin, group)

    return sieve.result(sieve(finish, rows))


class Split(NamedTuple, Generic[R]):
    """Rows to train on, to evaluate optimality gaps on, and to report on."""

    train: list[R]
    probe: list[R]
    held_out: list[R]


def split_rows(rows: Sequence[R], *, held_out: int, probe: int, seed: int) -> Split[R]:
    """Cut rows into three disjoint parts; rows with the same prompt stay in one of them.

    Whole groups of equal prompts are drawn at random until a part is full. Rows of the last group
    that no longer fit are left out altogether.

    Parameters
    ----------
    rows : sequence of Demonstration or Preference
    held_out, probe : int
        Rows of these parts, exactly; 0 or more. The others are for training.
    seed : int
        The split depends on it and on the rows alone.

    Raises
    ------
    DataError
        If nothing would remain to train on.
    """
    for name, count in (("held_out", held_out), ("probe", probe)):
        if count < 0:
            raise ValueError(f"{name} is {count}: it must not be negative")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.group or f"row {index}"].append(index)
    order = list(groups.values())
    random.Random(f"split/{seed}").shuffle(order)
    parts: list[list[R]] = []
    for count in (held_out, probe):
        taken: list[int] = []
        while order and len(taken) < count:
            taken += order.pop()
        parts.append([rows[index] for index in sorted(taken[:count])])
    train = [rows[index] for index in sorted(index for group in order for index in group)]
    if not train:
        raise DataError(
            f"{len(rows)} rows with {len(groups)} different prompts are too few: {held_out} held "
            f"out and {probe} for the probe leave none to train on. Ask for fewer, or add rows."
        )
    return Split(train, parts[1], parts[0])


def fingerprint(rows: Iterable[Demonstration | Preference | Prompt]) -> str:
    """A digest of the tokens of rows and which of them count, in order: 64 hexadecimal digits.

    Of prompts the other columns count as well, since rewards depend on them. Origins and reference
    log-probabilities have no part in it.
    """
    digest = hashlib.sha256()
    for row in rows:
        for name, tokens in row.sequences.items():
            digest.update(f"{name} {tokens.length} ".encode())
            digest.update(tokens.input_ids.astype("<i4").tobytes())
            digest.update(tokens.counted.tobytes())
        if isinstance(row, Prompt):
            digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class _Sieve:
    """Makes something of each item; bad rows are dropped and counted, or end the loading."""

    def __init__(self, bad_rows: BadRows) -> None:
        if bad_rows not in ("error", "drop"):
            raise ValueError(f'bad_rows is {bad_rows!r}: it must be "error" or "drop"')
        self.drop = bad_rows == "drop"
        self.dropped: Counter[str] = Counter()

    def __call__(self, make: Callable[[A], B], items: Iterable[A]) -> list[B]:
        made = []
        for item in items:
            try:
                made.append(make(item))
            except BadRow as bad:
                if not self.drop:
                    raise
                self.dropped[bad.reason] += 1
        return made

    def result(self, rows: list[B]) -> tuple[list[B], dict[str, int]]:
        if not rows:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in self.dropped.items())
            raise DataError(f"no rows are left ({reasons or 'there were none'}).")
        return rows, dict(self.dropped)


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}: it must be at least 2")
