"""Rewards that need no model: factories that take options and return the function."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from holdfast.errors import DataError, RecipeError, nearest
from holdfast.language.files import kind_of
from holdfast.language.rewards.contract import (
    RewardFunction,
    Text,
    completion_text,
    finite,
    shorten,
)
from holdfast.language.rewards.limits import cpu_limit
from holdfast.language.rewards.numbers import final_number, stated_number

_SECONDS = 5.0
"""Of computing that math-verify may spend on reading, and on comparing, one expression."""
_NEVER = 10**6
"""Seconds for math-verify's own limits, which are on the wall clock: rewards must not depend on how
busy the machine is."""


def exact_match(column: str = "answer") -> RewardFunction:
    """1 if the completion is the text of a column, else 0; white space around either is ignored.

    Parameters
    ----------
    column : str
        Holds text. A row where it is null is not judged.
    """
    return _against(column, "text", _text, lambda said, answer: said.strip() == answer.strip())


def numeric_answer(column: str = "answer") -> RewardFunction:
    r"""1 if the final number of the completion equals that of a column, else 0.

    Numbers are compared exactly. Which number is the final one:
    :func:`holdfast.language.rewards.numbers.final_number`.

    Parameters
    ----------
    column : str
        Holds a number, text that is one, or text that marks one with ``####`` or ``\boxed{}``. A
        row where it is null is not judged.
    """
    return _against(column, "a number", _number, lambda said, answer: final_number(said) == answer)


def math_verify(column: str = "answer") -> RewardFunction:
    r"""1 if the completion's final expression equals that of a column, as math-verify sees it.

    In a completion, ``\boxed{}`` goes before other LaTeX, and that before plain numbers. Reading
    and comparing may each compute for five seconds; what takes longer earns 0. These limits need a
    POSIX system and the main thread.

    Parameters
    ----------
    column : str
        Holds an expression, in plain LaTeX or between delimiters, or text that has one after
        ``####``. A row where it is null is not judged.

    Raises
    ------
    RecipeError
        If math-verify is not installed.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
        from math_verify.errors import TimeoutException
    except ImportError as error:
        raise RecipeError(
            "reward 'math_verify' needs the package math-verify: pip install holdfast[math]"
        ) from error
    boxed_first = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def limited(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result, or None where it takes too long."""
        with contextlib.suppress(TimeoutException), cpu_limit(_SECONDS, TimeoutException):
            return function(*arguments, **options)
        return None

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return None
        expression = value.rpartition("####")[2].strip()
        if not re.search(r"\$|\\boxed|\\\(|\\\[", expression):
            # Without delimiters math-verify looks for plain numbers and would read part of it.
            expression = rf"\boxed{{{expression}}}"
        return limited(parse, expression, parsing_timeout=_NEVER) or None

    def agrees(said: str, answer: Any) -> bool:
        found = limited(parse, said, boxed_first, parsing_timeout=_NEVER)
        return bool(found and limited(verify, answer, found, timeout_seconds=_NEVER))

    return _against(column, "an expression", read, agrees)


def regex(pattern: str, full_match: bool = False) -> RewardFunction:
    """1 if a regular expression matches the completion, else 0.

    Parameters
    ----------
    pattern : str
        In Python's syntax; flags are written inside, such as ``(?s)``.
    full_match : bool
        Whether it must match the whole completion instead of any part.

    Raises
    ------
    ValueError
        If the pattern is not valid.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    match = compiled.fullmatch if full_match else compiled.search

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        return [float(match(completion_text(completion)) is not None) for completion in completions]

    return reward


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """Punish completions that come near the limit on length.

    0 up to ``max_completion_len - soft_punish_cache`` tokens, from there linear to -1 at
    ``max_completion_len``, and -1 beyond (Yu et al., "DAPO", equation 13).

    Parameters
    ----------
    max_completion_len : int
        In tokens, at least 1.
    soft_punish_cache : int
        Width of the linear part in tokens, from 0 (a step) to ``max_completion_len``.

    Raises
    ------
    ValueError
        For a number out of range.
    """
    if max_completion_len < 1:
        raise ValueError(f"max_completion_len is {max_completion_len}: it must be at least 1")
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}: it must lie in [0, max_completion_len], "
            f"here [0, {max_completion_len}]"
        )

    def punishment(length: int) -> float:
        excess = length - (max_completion_len - soft_punish_cache)
        if excess <= 0:
            return 0.0
        return -1.0 if excess >= soft_punish_cache else -excess / soft_punish_cache

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        return [punishment(len(ids)) for ids in completion_ids]

    return reward


def _against(
    column: str,
    kind: str,
    read: Callable[[Any], Any],
    agrees: Callable[[str, Any], bool],
) -> RewardFunction:
    """1 where ``agrees(completion, read(value of the column))``, 0 elsewhere, None where null."""

    def expected(value: Any) -> Any:
        answer = read(value)
        if answer is None:
            shown = shorten(value) if isinstance(value, str) else kind_of(value)
            raise DataError(f"column {column!r} holds {shown}, expected {kind}")
        return answer

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        if column not in columns:
            raise DataError(
                f"the data has no column {column!r}{nearest(column, columns)} Columns: "
                f"{', '.join(columns) or 'none'}"
            )
        return [
            None if value is None else float(agrees(completion_text(completion), expected(value)))
            for completion, value in zip(completions, columns[column], strict=True)
        ]

    return reward


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> Fraction | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and finite(value):
        return Fraction(str(value))
    return stated_number(value) if isinstance(value, str) else None
