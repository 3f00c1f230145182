"""What a reward function is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.language.columns import Message
from holdfast.language.files import kind_of

Text = str | list[Message]
"""A prompt or a completion, standard or conversational."""

RewardFunction = Callable[..., Sequence[float | None]]
"""``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, as in TRL.

Called by keyword with lists of one length: prompts and completions as texts or lists of messages,
the sampled tokens, and every other column of the data. It returns one number a completion, or
``None`` for a completion that it does not judge.
"""


def completion_text(completion: Text) -> str:
    """The text of a completion: of a conversation, what the assistant said last.

    Raises
    ------
    ValueError
        If the assistant said nothing, or something that is not text.
    """
    if isinstance(completion, str):
        return completion
    said = [message["content"] for message in completion if message["role"] == "assistant"]
    if not said or not isinstance(said[-1], str):
        found = kind_of(said[-1]) if said else "no message from the assistant"
        raise ValueError(f"the completion is {found}, expected text")
    return said[-1]


def finite(value: Any) -> bool:
    """Whether a number is finite and can be held by a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def shorten(value: Any, length: int = 200) -> str:
    """A value for a message: its beginning and its end, where it is long."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > length:
        text = f"{text[: length // 2]} … {text[-(length // 2) :]}"
    return repr(text)
