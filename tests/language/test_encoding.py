"""Masks are checked against byte counts, transformers' own mask, TRL's trainers, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from holdfast.errors import DataError, ModelError
from holdfast.language.columns import BadRow, Example
from holdfast.language.encoding import (
    IGNORE_INDEX,
    Encoded,
    Passage,
    collate,
    encode,
    render,
    truncate,
)
from holdfast.language.tokenizers import build_tokenizer, train_bpe

BYTES = build_tokenizer("bytes")
BPE = train_bpe(["abab abba  baab: yes, no. 😀😀 数数 é é\n\n" * 9], 330)
AB = train_bpe(["ab ab ab"], 261)  # One merge: a, b -> ab.
WORDS = st.text(st.sampled_from("ab:. \né数😀😁"), max_size=12)
FILLED = WORDS.filter(lambda text: text != "")


def with_bos(**options):
    """The byte tokenizer of a model whose sequences begin with <s>."""
    backend = Tokenizer.from_str(BYTES.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    begin = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.post_processor = begin
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", **options
    )


def sentencepiece_like():
    """Spaces become ▁, one is put in front, and unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "▁a", "ab", "ba"])}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [("▁", "a"), ("a", "b"), ("b", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def trimming():
    """As GPT-2: offsets leave out the spaces that begin and end a token."""
    backend = Tokenizer.from_str(BPE.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tokens_of(prompt, completion, tokenizer):
    (tokens,) = encode([render(Example(prompt, completion, "rows:1"), tokenizer)], tokenizer)
    return tokens


def counted_text(tokens, tokenizer):
    return tokenizer.decode(tokens.input_ids[tokens.counted].tolist())


# Text -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(WORDS, FILLED)
def test_completion_bytes_and_the_end_token_count(prompt, completion):
    tokens = tokens_of(prompt, completion, BYTES)
    assert tokens.input_ids.tolist() == [*(prompt + completion).encode(), BYTES.eos_token_id]
    expected = [False] * len(prompt.encode()) + [True] * (len(completion.encode()) + 1)
    assert tokens.counted.tolist() == expected
    assert tokens.input_ids.dtype == np.int32
    assert tokens.length == len(expected)


@settings(deadline=None)
@given(WORDS, FILLED)
def test_a_token_counts_if_it_ends_after_the_boundary(prompt, completion):
    # In a byte-level vocabulary each character of a token stands for one byte.
    tokens = tokens_of(prompt, completion, BPE)
    sizes = [len(token) for token in BPE.convert_ids_to_tokens(tokens.input_ids[:-1].tolist())]
    expected = np.cumsum(sizes) > len(prompt.encode())
    assert tokens.counted.tolist() == [*expected.tolist(), True]


def test_a_token_across_the_boundary_counts():
    tokens = tokens_of("xa", "b", AB)
    assert AB.convert_ids_to_tokens(tokens.input_ids.tolist()) == ["x", "ab", "<|end|>"]
    assert tokens.counted.tolist() == [False, True, True]
    # The prompt alone has two tokens: counting them would leave the completion out of the loss.
    assert len(AB("xa")["input_ids"]) == 2


def test_a_token_across_the_end_of_a_span_counts():
    (tokens,) = encode([Passage("xabx", ((1, 2),), True, "rows:1")], AB)
    assert tokens.counted.tolist() == [False, True, False]


def test_all_bytes_of_a_character_count_together():
    tokens = tokens_of("😀", "😁", BYTES)  # They share their first three bytes.
    assert tokens.counted.tolist() == [False] * 4 + [True] * 5


@settings(deadline=None)
@given(WORDS, FILLED)
def test_trimmed_offsets_do_not_move_the_boundary(prompt, completion):
    plain, trimmed = (tokens_of(prompt, completion, each) for each in (BPE, trimming()))
    assert trimmed.input_ids.tolist() == plain.input_ids.tolist()
    # A space that begins a text has no offsets at all there; but no loss counts a first token.
    assert trimmed.counted[1:].tolist() == plain.counted[1:].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "pieces", "counted"),
    [
        ("a", "b", ["<s>", "▁a", "b", "</s>"], [0, 0, 1, 1]),
        ("a", " a", ["<s>", "▁a", "▁a", "</s>"], [0, 0, 1, 1]),
        ("a ", "ab", ["<s>", "▁a", "▁a", "b", "</s>"], [0, 0, 1, 1, 1]),
        ("", "a", ["<s>", "▁a", "</s>"], [0, 1, 1]),
        ("é", "é", ["<s>", "▁", *["<0xC3>", "<0xA9>"] * 2, "</s>"], [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_sentencepiece_offsets_are_understood(prompt, completion, pieces, counted):
    tokenizer = sentencepiece_like()
    tokens = tokens_of(prompt, completion, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids.tolist()) == pieces
    assert tokens.counted.astype(int).tolist() == counted


def test_text_counts_whole():
    tokens = tokens_of("", "ab", BYTES)
    assert tokens.counted.tolist() == [True, True, True]


@pytest.mark.parametrize("prompt", ["a", ""])
def test_bos_comes_once_and_does_not_count(prompt):
    tokenizer = with_bos()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in (prompt, "<s>" + prompt):
        tokens = tokens_of(text, "b", tokenizer)
        assert tokens.input_ids.tolist() == [bos, *prompt.encode(), ord("b"), eos]
        assert tokens.counted.tolist() == [False] * (1 + len(prompt)) + [True, True]


def test_end_token_of_the_text_is_not_doubled():
    tokens = tokens_of("a", "b<|end|>", BYTES)
    assert tokens.input_ids.tolist() == [*b"ab", BYTES.eos_token_id]
    assert tokens.counted.tolist() == [False, True, True]


def test_end_token_that_the_tokenizer_adds_is_not_doubled_and_counts():
    tokenizer = with_bos()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=special
    )
    tokens = tokens_of("a", "b", tokenizer)
    assert tokens.input_ids.tolist() == [special[0][1], *b"ab", special[1][1]]
    assert tokens.counted.tolist() == [False, False, True, True]


def test_half_a_surrogate_pair_is_a_bad_row():
    with pytest.raises(BadRow, match=r"rows:1: .*U\+D83D") as caught:
        tokens_of("a", "b\ud83d", BYTES)
    assert caught.value.reason == "not valid Unicode"


# Conversations --------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be kind."},
    user("Hi 😀"),
    assistant("Hello, 数!"),
    user("Bye"),
    assistant(" é \n"),
]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_turn_of_the_assistant_counts_with_its_end(tokenizer):
    tokens = tokens_of([], TALK, tokenizer)
    assert counted_text(tokens, tokenizer) == "Hello, 数!<|im_end|>\n é \n<|im_end|>\n"
    assert (
        tokens.input_ids.tolist()
        == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False))["input_ids"]
    )


def test_turns_in_the_prompt_do_not_count():
    tokens = tokens_of(TALK[:4], TALK[4:], BPE)
    assert tokens.input_ids.tolist() == tokens_of([], TALK, BPE).input_ids.tolist()
    assert counted_text(tokens, BPE) == " é \n<|im_end|>\n"


def test_turns_of_others_within_a_completion_do_not_count():
    tokens = tokens_of(TALK[:2], TALK[2:], BYTES)
    assert counted_text(tokens, BYTES) == "Hello, 数!<|im_end|>\n é \n<|im_end|>\n"


def test_conversations_get_neither_bos_nor_end_token_beyond_the_template():
    tokenizer = with_bos(chat_template="<s>" + BYTES.chat_template)
    ids = tokens_of([], TALK, tokenizer).input_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


turns = st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=3).map(
    lambda pairs: [turn for ask, answer in pairs for turn in (user(ask), assistant(answer))]
)


@settings(deadline=None)
@given(turns)
def test_mask_equals_that_of_transformers_where_a_template_marks_the_answers(talk):
    marking = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant\\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    expected = BPE.apply_chat_template(
        talk,
        chat_template=marking,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens = tokens_of([], talk, BPE)
    assert tokens.input_ids.tolist() == expected["input_ids"]
    assert tokens.counted.astype(int).tolist() == expected["assistant_masks"]


def talking(template):
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        # Drops all but the last turn's words.
        "{% for m in messages %}[{{ m.role }}]{% if loop.last %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        # Thinks only in the last turn.
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}(hm)"
        "{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        # Invites an answer in other words than it writes one.
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}",
    ],
)
def test_template_that_rewrites_earlier_turns_is_refused(template):
    with pytest.raises(DataError, match="rows:1: the chat template writes message 2 differently"):
        tokens_of(TALK[:2], TALK[2:], talking(template))


def test_refusal_of_the_template_is_passed_on():
    template = "{{ raise_exception('only two may speak') }}"
    with pytest.raises(DataError, match=r"rows:1: the chat template refuses .*only two may speak"):
        tokens_of([], TALK, talking(template))


# Tokenizers that cannot be used ---------------------------------------------------------------


def test_tokenizer_without_chat_template_is_refused_for_conversations():
    with pytest.raises(ModelError, match="rows:1 is a conversation, but .* no chat template"):
        tokens_of([], TALK, with_bos())


def test_tokenizer_without_end_token_is_refused_for_text_alone():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BYTES.backend_tokenizer, chat_template=BYTES.chat_template
    )
    with pytest.raises(ModelError, match="no end token"):
        tokens_of("a", "b", tokenizer)
    assert tokens_of([], TALK, tokenizer).counted.any()


def test_tokenizer_without_offsets_is_refused():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert not slow.is_fast
    with pytest.raises(ModelError, match="ByT5Tokenizer gives no character offsets"):
        tokens_of("a", "b", slow)


def test_padding_and_truncation_of_the_tokenizer_file_are_not_applied():
    tokenizer = build_tokenizer("bytes")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokens_of("abc", "def", tokenizer).length == 7


def test_many_passages_keep_their_order():
    passages = [
        Passage(f"{number}", ((0, len(str(number))),), number % 7 == 0, "rows:1")
        for number in range(1200)
    ]
    encoded = encode(passages, BYTES)
    assert [
        BYTES.decode(tokens.input_ids.tolist(), skip_special_tokens=True) for tokens in encoded
    ] == [str(number) for number in range(1200)]
    ended = [tokens.input_ids[-1] == BYTES.eos_token_id for tokens in encoded]
    assert ended == [number % 7 != 0 for number in range(1200)]


# Length ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(WORDS, FILLED, st.integers(2, 40))
def test_truncation_keeps_the_start_and_invents_no_end(prompt, completion, max_length):
    whole = tokens_of(prompt, completion, BPE)
    if not whole.counted[1:max_length].any():
        with pytest.raises(BadRow):
            truncate(whole, max_length, "rows:1")
        return
    short = truncate(whole, max_length, "rows:1")
    assert short.length == min(max_length, whole.length)
    assert short.input_ids.tolist() == whole.input_ids[:max_length].tolist()
    assert short.counted.tolist() == whole.counted[:max_length].tolist()
    assert (short.input_ids[-1] == BPE.eos_token_id) == (whole.length <= max_length)


def test_prompt_that_leaves_no_room_is_a_bad_row_with_its_length():
    whole = tokens_of("abcd", "efgh", BYTES)
    assert truncate(whole, 5, "rows:1").counted.tolist() == [False] * 4 + [True]
    with pytest.raises(BadRow) as caught:
        truncate(whole, 4, "rows:1")
    assert caught.value.reason == "prompt longer than the limit"
    assert str(caught.value) == (
        "rows:1: the prompt has 4 tokens, which leaves no room for a completion within max_length "
        "4: raise max_length above 4, or shorten the prompt. Mend the row, or set bad_rows: drop "
        "to leave such rows out."
    )


def test_a_row_of_which_only_the_first_token_fits_is_a_bad_row():
    with pytest.raises(BadRow, match="the prompt has 0 tokens"):
        truncate(tokens_of("", "ab", BYTES), 1, "rows:1")


# Batches --------------------------------------------------------------------------------------


def test_batch_is_padded_on_the_right_and_labels_are_what_counts():
    rows = [
        Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True])),
        Encoded(np.array([8], np.int32), np.array([True])),
    ]
    input_ids, labels = collate(rows, pad_id=9)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert labels.tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]


def test_pad_token_that_also_ends_rows_still_counts_as_their_end():
    tokens = tokens_of("a", "b", BYTES)
    longer = tokens_of("aa", "bb", BYTES)
    _, labels = collate([tokens, longer], pad_id=BYTES.eos_token_id)
    assert labels[0].tolist() == [IGNORE_INDEX, ord("b"), BYTES.eos_token_id] + [IGNORE_INDEX] * 2


def test_empty_batch_is_named():
    with pytest.raises(ValueError, match="rows is empty"):
        collate([], pad_id=0)
