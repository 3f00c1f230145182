"""Tokenizers built here, so that a model needs nothing from a hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML: each turn is ``<|im_start|>role``, line break, content, ``<|im_end|>``, line break."""


def build_tokenizer(
    kind: Literal["bytes", "bpe"] = "bytes",
    *,
    texts: Iterable[str] = (),
    vocab_size: int = 1024,
) -> PreTrainedTokenizerFast:
    """A tokenizer by name.

    Parameters
    ----------
    kind : {"bytes", "bpe"}
        ``bytes``: one token a byte, 260 in all, nothing to train. ``bpe``: see :func:`train_bpe`.
    texts, vocab_size
        Only for ``bpe``.
    """
    if kind == "bytes":
        return _wrap(Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[])), use_regex=False)
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    raise ValueError(f'kind is {kind!r}: it must be "bytes" or "bpe"')


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair encoding over bytes, learned from texts. The same texts give the same tokenizer.

    Parameters
    ----------
    texts : iterable of str
    vocab_size : int
        Tokens in all, special ones included; at least 260 (all bytes and the special tokens). Fewer
        come out where the texts hold fewer pairs that occur at least twice.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}: it must be at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, use_regex=True)


def _byte_vocabulary() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, mapped to that byte.

    Bytes that are printable Latin-1 characters stand for themselves; the others, in order, take the
    characters from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character) for character in alphabet if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in printable]
    return {
        character: ord(character) if ord(character) < 256 else others[ord(character) - 256]
        for character in alphabet
    }


def _wrap(tokenizer: Tokenizer, *, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    pad, end, start_of_turn, end_of_turn = SPECIAL_TOKENS
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=[start_of_turn, end_of_turn],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
