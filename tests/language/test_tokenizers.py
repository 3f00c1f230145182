import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from holdfast.language.tokenizers import SPECIAL_TOKENS, build_tokenizer, train_bpe

CORPUS = ["the cat sat on the mat, the hat and the bat. " * 3, "où était l'été? 数 数 😀😀 " * 3]
BYTES = build_tokenizer("bytes")
BPE = train_bpe(CORPUS, 290)
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
any_text = st.text(st.characters(exclude_categories=["Cs"]))
CHAT = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello 😀"},
    {"role": "user", "content": "{{ bye }}"},
]


@both
@settings(deadline=None)
@given(any_text | st.lists(st.sampled_from([*SPECIAL_TOKENS, "é", " ", "\r\n", "a"])).map("".join))
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@both
@settings(deadline=None)
@given(any_text)
def test_offsets_cover_the_text_without_gaps(tokenizer, text):
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    covered = 0
    for start, end in offsets:
        assert start < end
        assert start <= covered <= end
        covered = end
    assert covered == len(text)


@settings(deadline=None)
@given(any_text.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_the_token_of_a_byte_is_its_value(text):
    assert BYTES(text)["input_ids"] == list(text.encode())


@both
def test_special_tokens_are_single_tokens_apart_from_the_bytes(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - 4, len(tokenizer)))
    assert tokenizer("".join(SPECIAL_TOKENS))["input_ids"] == ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == tuple(ids[:2])
    assert tokenizer.bos_token_id is None


def test_sizes():
    assert len(BYTES) == 260
    assert len(BPE) == 290
    assert len(train_bpe(["abc"], 300)) == 260
    assert len(build_tokenizer("bpe", texts=CORPUS, vocab_size=280)) == 280


def test_training_merges_what_is_frequent():
    (token,) = train_bpe(["ab ab ab"], 261)("ab")["input_ids"]
    assert token == 256
    assert len(BPE(CORPUS[0])["input_ids"]) < 0.7 * len(CORPUS[0])


def test_same_texts_give_the_same_tokenizer():
    again = train_bpe(iter(CORPUS), 290)
    assert again.backend_tokenizer.to_str() == BPE.backend_tokenizer.to_str()


@both
def test_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = CORPUS[0] + "<|im_start|> é" + CORPUS[1]
    for option in ({}, {"return_offsets_mapping": True}):
        assert dict(loaded(text, **option)) == dict(tokenizer(text, **option))
    assert loaded.is_fast
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )


@both
def test_chat_template_writes_chatml(tokenizer):
    whole = (
        "<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello 😀<|im_end|>\n"
        "<|im_start|>user\n{{ bye }}<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == whole
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked == whole + "<|im_start|>assistant\n"


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="vocab_size is 259: it must be at least 260"):
        train_bpe(CORPUS, 259)
    with pytest.raises(ValueError, match="kind is 'words'"):
        build_tokenizer("words")
