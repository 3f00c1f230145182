"""From text to tokens, with a mask of the tokens that the loss counts.

The whole text is tokenised once, and the mask follows from the character offsets of its tokens.
Tokenising the prompt alone instead would place the boundary wrongly wherever prompt and completion
share a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import torch
from torch import Tensor

from holdfast.errors import DataError, ModelError
from holdfast.language.columns import BadRow, Example, Message

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORE_INDEX = -100
"""The label of a position that the loss does not count."""

_ROWS_AT_ONCE = 512  # Bounds the memory that offsets take while a large set is tokenised.


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A sequence of tokens and which of them count.

    Attributes
    ----------
    input_ids : ndarray, (time,), int32
    counted : ndarray, (time,), bool
        Whether the loss counts the prediction *of* this token.
    """

    input_ids: np.ndarray
    counted: np.ndarray

    @property
    def length(self) -> int:
        return len(self.input_ids)

    def to_json(self) -> dict[str, list[int]]:
        """Plain lists; ``counted`` as 0 and 1."""
        return {
            "input_ids": self.input_ids.tolist(),
            "counted": self.counted.astype(int).tolist(),
        }


@dataclass(frozen=True, slots=True)
class Passage:
    """A text before it is tokenised.

    Attributes
    ----------
    text : str
    spans : tuple of (start, end)
        The stretches of characters that count.
    templated : bool
        Whether a chat template wrote the text. If so, its special tokens are already in it.
    origin : str
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    templated: bool
    origin: str

    @property
    def prompt_digest(self) -> str:
        """The same for passages with the same prompt; without a prompt, the same text."""
        prompt = self.text[: self.spans[0][0]] or self.text
        return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


def render(example: Example, tokenizer: Tokenizer) -> Passage:
    """The text of an example, through the chat template if it is conversational.

    Text counts from the end of the prompt; a conversation counts every turn of the assistant in the
    completion, up to and including what the template writes to end the turn.

    Raises
    ------
    BadRow
        If the text is not valid Unicode.
    DataError
        If the chat template refuses the conversation, or rewrites earlier turns.
    ModelError
        If there is no chat template.
    """
    if isinstance(example.prompt, str) and isinstance(example.completion, str):
        text = example.prompt + example.completion
        spans, templated = [(len(example.prompt), len(text))], False
    else:
        messages = [*example.prompt, *example.completion]
        text, spans = _converse(messages, len(example.prompt), example.origin, tokenizer)
        templated = True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            "not valid Unicode",
            example.origin,
            f"the text holds half of a surrogate pair (U+{ord(text[error.start]):04X})",
        ) from None
    return Passage(text, tuple(spans), templated, example.origin)


def _converse(
    messages: list[Message], first: int, origin: str, tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the assistant's turns from message ``first`` on."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"{origin} is a conversation, but the tokenizer has no chat template. Use a model that "
            "was made for conversations, or rows of plain text."
        )

    def chat(count: int, *, answer_next: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=answer_next
            )
        )

    try:
        whole = chat(len(messages))
        spans = []
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before = chat(index, answer_next=True)
            until = chat(index + 1)
            if not (until.startswith(before) and whole.startswith(until)):
                raise DataError(
                    f"{origin}: the chat template writes message {index} differently once it is "
                    "answered or followed by others, so the assistant's words cannot be located. "
                    "Use a chat template that leaves earlier turns as they are, or give the last "
                    'answer alone as the completion of a {"prompt", "completion"} row.'
                )
            spans.append((len(before), len(until)))
    except jinja2.TemplateError as error:
        raise DataError(f"{origin}: the chat template refuses the conversation: {error}.") from None
    return whole, spans


def encode(passages: Sequence[Passage], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenise every passage once, whole.

    A token counts if any of its characters lies in a counted span, which for a token that begins in
    the prompt means that it ends after the boundary. Text that no template wrote gets the
    tokenizer's special tokens (a leading BOS where the model has one) and, unless it already ends
    with it, the end token, which counts.

    Raises
    ------
    ModelError
        If the tokenizer gives no character offsets, or has no end token where one is needed.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets, which Holdfast needs to tell "
            "the prompt from the completion. Use a fast tokenizer (one with a tokenizer.json)."
        )
    encoded: list[Encoded] = []
    for templated, alike in groupby(passages, key=lambda passage: passage.templated):
        if not templated and tokenizer.eos_token_id is None:
            raise ModelError(
                f"{type(tokenizer).__name__} has no end token, so a completion would never end. "
                "Set eos_token in tokenizer_config.json."
            )
        while chunk := list(islice(alike, _ROWS_AT_ONCE)):
            tokenised = tokenizer(
                [passage.text for passage in chunk],
                add_special_tokens=not templated,
                padding=False,
                truncation=False,
                verbose=False,
            )
            for passage, encoding in zip(chunk, tokenised.encodings or (), strict=True):
                tokens = _counted(encoding, passage.spans)
                encoded.append(tokens if templated else _finished(tokens, tokenizer))
    return encoded


def encode_prompt(content: str | list[Message], tokenizer: Tokenizer, origin: str) -> np.ndarray:
    """Tokens that the policy is given to complete, ``(time,)``, int32.

    Text gets the tokenizer's leading special tokens, but no end token; a conversation is written
    by the chat template, up to where the assistant's next turn begins.

    Raises
    ------
    ModelError
        If a conversation is given and there is no chat template.
    DataError
        If the chat template refuses the conversation.
    """
    if isinstance(content, str):
        ids = list(tokenizer(content, verbose=False)["input_ids"])
        while (
            ids
            and ids[-1] == tokenizer.eos_token_id
            and not content.endswith(str(tokenizer.eos_token))
        ):
            ids.pop()
        return np.array(ids, dtype=np.int32)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{origin} is a conversation, but the tokenizer has no chat template. Use a model that "
            "was made for conversations, or rows of plain text."
        )
    try:
        text = tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise DataError(f"{origin}: the chat template refuses the conversation: {error}.") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(ids, dtype=np.int32)


def _counted(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> Encoded:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    counted = np.zeros(len(offsets), dtype=bool)
    # All bytes of a character share its offsets, so they count together. Special tokens that stand
    # for no character have the offsets (0, 0), which end before any span. A token of spaces may
    # have been trimmed to nothing: it then begins where it ends, be that the end of the span.
    for start, end in spans:
        counted |= (ends > start) & ((starts < end) | (ends <= end))
    return Encoded(np.array(encoding.ids, dtype=np.int32), counted)


def _finished(tokens: Encoded, tokenizer: Tokenizer) -> Encoded:
    ids, counted = tokens.input_ids, tokens.counted
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, counted = ids[1:], counted[1:]  # The text brought its own.
    if ids.size == 0 or ids[-1] != eos:
        ids, counted = np.append(ids, np.int32(eos)), np.append(counted, True)
    else:
        counted[-1] = True
    return Encoded(ids, counted)


def truncate(tokens: Encoded, max_length: int, origin: str) -> Encoded:
    """Keep the first ``max_length`` tokens. What is cut off gets no end token.

    Raises
    ------
    BadRow
        If no token that can be predicted remains counted. The first of a sequence cannot be.
    """
    if not tokens.counted[1:max_length].any():
        prompt = int(tokens.counted.argmax())
        raise BadRow(
            "prompt longer than the limit",
            origin,
            f"the prompt has {prompt} tokens, which leaves no room for a completion within "
            f"max_length {max_length}: raise max_length above {prompt}, or shorten the prompt",
        )
    if tokens.length <= max_length:
        return tokens
    # Copies, or the part that was cut off would stay in memory.
    return Encoded(tokens.input_ids[:max_length].copy(), tokens.counted[:max_length].copy())


def collate(rows: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows as one batch, padded on the right.

    Returns
    -------
    input_ids : Tensor, (batch, time), int64
        ``pad_id`` after the end of a row.
    labels : Tensor, (batch, time), int64
        The tokens that count, ``IGNORE_INDEX`` elsewhere. Not shifted: ``labels[:, t]`` is what
        the model predicts from the tokens before ``t``.
    """
    if not rows:
        raise ValueError("rows is empty: there is nothing to collate")
    shape = len(rows), max(row.length for row in rows)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : row.length] = row.input_ids
        labels[index, : row.length][row.counted] = row.input_ids[row.counted]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
