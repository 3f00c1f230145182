"""Loading rows end to end, on small rows, on real ones, and against TRL's own tokenisation."""

import gzip
import hashlib
import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.language.data import (
    BadRow,
    Demonstration,
    Encoded,
    Preference,
    RawRow,
    fingerprint,
    load_demonstrations,
    load_preferences,
    read_rows,
    split_rows,
    texts,
)
from holdfast.language.tokenizers import build_tokenizer, train_bpe

BYTES = build_tokenizer("bytes")
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def raw(*rows):
    return [RawRow(values, f"rows.jsonl:{line}") for line, values in enumerate(rows, start=1)]


def counted_text(tokens, tokenizer=BYTES):
    return tokenizer.decode(tokens.input_ids[tokens.counted].tolist(), skip_special_tokens=True)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# Loading --------------------------------------------------------------------------------------


def test_demonstrations_of_all_types_may_be_mixed():
    rows, dropped = load_demonstrations(
        raw(
            {"prompt": "ab", "completion": "cd"},
            {"messages": [user("ab"), assistant("cd")]},
            {"text": "abcd"},
            {"prompt": [user("ab")], "completion": [assistant("cd")]},
        ),
        BYTES,
        max_length=100,
    )
    assert [counted_text(row.tokens) for row in rows] == ["cd", "cd\n", "abcd", "cd\n"]
    assert [row.origin for row in rows] == [f"rows.jsonl:{line}" for line in range(1, 5)]
    assert rows[1].tokens.input_ids.tolist() == rows[3].tokens.input_ids.tolist()
    assert rows[0].length == 5
    assert dropped == {}


def test_preferences_standard_and_conversational():
    rows, dropped = load_preferences(
        raw(
            {"prompt": "ab", "chosen": "cdef", "rejected": "g"},
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        ),
        BYTES,
        max_length=100,
    )
    assert [(counted_text(row.chosen), counted_text(row.rejected)) for row in rows] == [
        ("cdef", "g"),
        ("b\n", "c\n"),
    ]
    assert rows[0].length == 7  # The longer side and its end token.
    assert rows[0].reference_chosen_logps is None
    assert dropped == {}


def test_bad_rows_are_dropped_and_counted_by_reason_or_named():
    rows = raw(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " "},
        {"prompt": "a" * 10, "completion": "b"},
        {"prompt": "a", "completion": "\udc00"},
        {"prompt": "a" * 9, "completion": "cde"},
        {"prompt": "a", "completion": ""},
    )
    kept, dropped = load_demonstrations(rows, BYTES, max_length=10, bad_rows="drop")
    assert [row.origin for row in kept] == ["rows.jsonl:1", "rows.jsonl:5"]
    assert counted_text(kept[1].tokens) == "c"
    assert dropped == {
        "empty completion": 2,
        "prompt longer than the limit": 1,
        "not valid Unicode": 1,
    }
    with pytest.raises(BadRow, match=r"rows.jsonl:2: .* set bad_rows: drop"):
        load_demonstrations(rows, BYTES, max_length=10)
    with pytest.raises(BadRow, match=r"rows.jsonl:3: the prompt has 10 tokens"):
        load_demonstrations(rows[2:3], BYTES, max_length=10)


def test_bad_preferences_are_dropped_and_counted_by_reason():
    rows = raw(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "bcdefg", "rejected": "bcdefh"},
        {"prompt": "abcde", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
    )
    kept, dropped = load_preferences(rows, BYTES, max_length=5, bad_rows="drop")
    assert [row.origin for row in kept] == ["rows.jsonl:1"]
    assert dropped == {
        "identical chosen and rejected": 2,
        "prompt longer than the limit": 1,
        "empty completion": 1,
    }
    with pytest.raises(BadRow, match=r"rows.jsonl:3: .* the same within max_length 5 tokens"):
        load_preferences(rows[2:3], BYTES, max_length=5)


def test_malformed_rows_are_an_error_even_where_bad_rows_are_dropped():
    rows = raw({"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"})
    with pytest.raises(DataError, match='rows.jsonl:2: no column "completion"'):
        load_demonstrations(rows, BYTES, max_length=9, bad_rows="drop")


def test_nothing_left_is_an_error_with_the_reasons():
    rows = raw({"text": " "}, {"text": ""})
    with pytest.raises(DataError, match=r"no rows are left \(empty completion: 2\)"):
        load_demonstrations(rows, BYTES, max_length=9, bad_rows="drop")


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_impossible_arguments_are_named(load):
    with pytest.raises(ValueError, match="max_length is 1"):
        load([], BYTES, max_length=1)
    with pytest.raises(ValueError, match="bad_rows is 'skip'"):
        load([], BYTES, max_length=9, bad_rows="skip")


# Groups and splits ----------------------------------------------------------------------------


def test_rows_share_a_group_exactly_if_they_share_the_prompt():
    # "ab" is one token, so the second prompt is not the same tokens in both of its rows.
    merging = train_bpe(["ab ab ab"], 261)
    rows, _ = load_demonstrations(
        raw(
            {"prompt": "x", "completion": "y"},
            {"prompt": "xa", "completion": "b"},
            {"prompt": "xa", "completion": "c"},
            {"text": "x"},
            {"text": "y"},
            {"text": "y"},
            {"messages": [user("x"), assistant("y")]},
            {"messages": [user("x"), assistant("z"), user("q"), assistant("r")]},
        ),
        merging,
        max_length=99,
    )
    groups = [row.group for row in rows]
    same = [(i, j) for i in range(8) for j in range(i) if groups[i] == groups[j]]
    # A text has no prompt: it is grouped by itself, here with a prompt of the same characters.
    assert same == [(2, 1), (3, 0), (5, 4), (7, 6)]
    pairs, _ = load_preferences(
        raw(
            {"prompt": "x", "chosen": "a", "rejected": "b"},
            {"prompt": "x", "chosen": "c", "rejected": "d"},
        ),
        merging,
        max_length=99,
    )
    assert pairs[0].group == pairs[1].group == groups[0]


def grouped(labels):
    one = Encoded(np.array([1, 2], np.int32), np.array([False, True]))
    return [Demonstration(one, f"rows:{i}", label) for i, label in enumerate(labels)]


labelled = st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"]), max_size=30).map(grouped)


@settings(deadline=None)
@given(labelled, st.integers(0, 8), st.integers(0, 8), st.integers(0, 3))
def test_parts_are_disjoint_exact_and_share_no_prompt(rows, held_out, probe, seed):
    try:
        parts = split_rows(rows, held_out=held_out, probe=probe, seed=seed)
    except DataError:
        return
    assert len(parts.held_out) == held_out
    assert len(parts.probe) == probe
    assert parts.train
    origins = Counter(row.origin for part in parts for row in part)
    assert set(origins.values()) == {1}
    groups = [{row.group for row in part if row.group} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    # Only rows whose prompt is held out or in the probe may be left out.
    left = [row for row in rows if row.origin not in origins]
    assert all(row.group in groups[1] | groups[2] for row in left)
    again = split_rows(rows, held_out=held_out, probe=probe, seed=seed)
    assert [[row.origin for row in part] for part in again] == [
        [row.origin for row in part] for part in parts
    ]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 12), st.integers(0, 12))
def test_rows_with_prompts_of_their_own_are_split_unless_none_would_remain(count, held_out, probe):
    rows = grouped([""] * count)
    if held_out + probe >= count:
        with pytest.raises(DataError, match=f"^{count} rows with {count} different prompts are"):
            split_rows(rows, held_out=held_out, probe=probe, seed=0)
        return
    train, _, _ = split_rows(rows, held_out=held_out, probe=probe, seed=0)
    assert len(train) == count - held_out - probe


def test_one_prompt_for_all_rows_cannot_be_split():
    rows = grouped(["a"] * 9)
    assert len(split_rows(rows, held_out=0, probe=0, seed=0).train) == 9
    with pytest.raises(DataError, match="9 rows with 1 different prompts are too few"):
        split_rows(rows, held_out=1, probe=0, seed=0)


def test_seeds_give_different_splits_drawn_from_all_rows():
    rows = grouped([""] * 50)
    drawn = [
        {row.origin for row in split_rows(rows, held_out=10, probe=0, seed=seed).held_out}
        for seed in range(20)
    ]
    assert len(set(map(frozenset, drawn))) == 20
    assert len(set().union(*drawn)) > 40


def test_negative_sizes_are_named():
    with pytest.raises(ValueError, match="probe is -1"):
        split_rows(grouped(["", ""]), held_out=0, probe=-1, seed=0)


# Fingerprint and JSON -------------------------------------------------------------------------


def sequence(ids, counted):
    return Encoded(np.array(ids, np.int32), np.array(counted, bool))


def test_fingerprint_sees_tokens_masks_and_order_and_nothing_else():
    one, two = sequence([1, 2, 3], [0, 1, 1]), sequence([1, 2], [0, 1])
    rows = [Demonstration(one, "a:1"), Demonstration(two, "a:2")]
    changed = [
        [Demonstration(sequence([1, 2, 4], [0, 1, 1]), "a:1"), rows[1]],
        [Demonstration(sequence([1, 2, 3], [0, 0, 1]), "a:1"), rows[1]],
        rows[::-1],
        rows[:1],
        [Preference(one, two, "a:1")],
        [Preference(two, one, "a:1")],
        # The same tokens and masks in one row.
        [Demonstration(sequence([1, 2, 3, 1, 2], [0, 1, 1, 0, 1]), "a:1")],
    ]
    marks = [fingerprint(each) for each in (rows, *changed)]
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 64 for mark in marks)
    elsewhere = [Demonstration(row.tokens, "b:9", "group") for row in rows]
    assert fingerprint(elsewhere) == marks[0]
    pair = Preference(one, two, "a:1")
    assert fingerprint([replace(pair, reference_chosen_logps=-1.5)]) == fingerprint([pair])


def test_fingerprint_is_the_same_on_every_machine():
    rows = [Demonstration(sequence([1, 258], [0, 1]), "a:1")]
    by_hand = b"tokens 2 " + bytes([1, 0, 0, 0, 2, 1, 0, 0]) + bytes([0, 1])
    assert fingerprint(rows) == hashlib.sha256(by_hand).hexdigest()


def test_rows_become_json():
    tokens = sequence([1, 2], [0, 1])
    as_json = {"input_ids": [1, 2], "counted": [0, 1]}
    demonstration, pair = Demonstration(tokens, "a:1"), Preference(tokens, tokens, "a:2", -1.5)
    assert json.loads(json.dumps(demonstration.to_json())) == {"origin": "a:1", "tokens": as_json}
    assert json.loads(json.dumps(pair.to_json())) == {
        "origin": "a:2",
        "chosen": as_json,
        "rejected": as_json,
        "reference_chosen_logps": -1.5,
        "reference_rejected_logps": None,
    }


# Real rows ------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")


def lines(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def bpe():
    rows = read_rows("dolly_train.jsonl.gz", base=DATA)[:300]
    return train_bpe((text for row in rows for text in texts(row)), 600)


@needs_data
def test_counted_tokens_of_real_demonstrations_are_the_completions(bpe):
    name = "dolly_train.jsonl.gz"
    read = read_rows(name, base=DATA)
    assert [row.values for row in read] == lines(name)
    assert read[-1].origin == f"{name}:8000"
    sample = read[::5]
    rows, dropped = load_demonstrations(sample, bpe, max_length=4096)
    assert (len(rows), dropped) == (1600, {})
    exact = 0
    for row, source in zip(rows, sample, strict=True):
        prompt, completion = source.values["prompt"], source.values["completion"]
        counted = counted_text(row.tokens, bpe)
        # Where a token spans the boundary, it brings some of the prompt along.
        assert counted.endswith(completion)
        assert (prompt + completion).endswith(counted)
        exact += counted == completion
        assert row.tokens.input_ids[-1] == bpe.eos_token_id
        assert row.tokens.counted[-1]
    assert exact > 0.9 * len(rows)


@needs_data
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hh_helpful_train.jsonl.gz", 1455),
        ("qa_feedback_pairs.jsonl.gz", 2616),
        ("ultrafeedback_train.jsonl.gz", 994),
    ],
)
def test_counted_tokens_of_real_preferences_are_the_completions(name, count):
    read = read_rows(name, base=DATA)
    assert len(read) == count
    sample = read[::6]
    rows, dropped = load_preferences(sample, BYTES, max_length=20_000)
    assert (len(rows), dropped) == (len(sample), {})
    for row, source in zip(rows, sample, strict=True):
        assert counted_text(row.chosen) == source.values["chosen"]
        assert counted_text(row.rejected) == source.values["rejected"]


@needs_data
def test_real_rows_are_cut_or_dropped_at_the_limit():
    sample = read_rows("hh_helpful_train.jsonl.gz", base=DATA)[:300]
    limit = 512
    rows, dropped = load_preferences(sample, BYTES, max_length=limit, bad_rows="drop")
    fits = [len(row.values["prompt"].encode()) < limit for row in sample]
    assert dropped == {"prompt longer than the limit": 300 - sum(fits)}
    assert 0 < sum(fits) < 300
    for row in rows:
        for tokens in (row.chosen, row.rejected):
            assert tokens.length <= limit
            ended = tokens.input_ids[-1] == BYTES.eos_token_id
            assert ended or tokens.length == limit


@needs_data
def test_answers_to_one_real_question_stay_in_one_part():
    read = read_rows("qa_feedback_pairs.jsonl.gz", base=DATA)[:600]
    rows, _ = load_preferences(read, BYTES, max_length=1024)
    prompts = {row.origin: row.values["prompt"] for row in read}
    parts = split_rows(rows, held_out=60, probe=30, seed=0)
    assert (len(parts.held_out), len(parts.probe)) == (60, 30)
    asked = [{prompts[row.origin] for row in part} for part in parts]
    assert sum(map(len, asked)) == len(set().union(*asked))


# Against TRL ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(BYTES),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


SPEECHES = [("Q: é?\nA:", " Yes."), ("Q: 😀?\nA:", " No, 数."), ("Q: c?\nA:", " " + "long " * 9)]
TRAINING = {"max_length": 64, "use_cpu": True, "bf16": False, "report_to": "none"}


def trl_trainer(kind, rows, model, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    common = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": build_tokenizer("bytes"),
    }
    if kind == "sft":
        return trl.SFTTrainer(model, args=trl.SFTConfig(str(tmp_path), **TRAINING), **common)
    return trl.DPOTrainer(
        model, deepcopy(model), args=trl.DPOConfig(str(tmp_path), **TRAINING), **common
    )


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_demonstrations_get_the_tokens_and_labels_of_trl(conversational, tiny, tmp_path):
    rows = [
        {"prompt": [user(p)], "completion": [assistant(c)]}
        if conversational
        else {"prompt": p, "completion": c}
        for p, c in SPEECHES
    ]
    trainer = trl_trainer("sft", rows, tiny, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    ours, _ = load_demonstrations(raw(*rows), BYTES, max_length=64)
    for index, row in enumerate(ours):
        ids, counted = row.tokens.input_ids, row.tokens.counted
        padding = batch["input_ids"].shape[1] - row.length
        assert batch["input_ids"][index].tolist()[: row.length] == ids.tolist()
        labels = np.where(counted, ids, -100).tolist() + [-100] * padding
        assert batch["labels"][index].tolist() == labels


@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_preferences_get_the_tokens_and_completions_of_trl(conversational, tiny, tmp_path):
    rows = [
        {"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant(c[::-1])]}
        if conversational
        else {"prompt": p, "chosen": c, "rejected": c[::-1]}
        for p, c in SPEECHES
    ]
    trainer = trl_trainer("dpo", rows, tiny, tmp_path)
    ours, _ = load_preferences(raw(*rows), BYTES, max_length=4096)
    for theirs, row in zip(trainer.train_dataset, ours, strict=True):
        for side, tokens in row.sequences.items():
            assert tokens.input_ids.tolist() == theirs["prompt_ids"] + theirs[f"{side}_ids"]
            assert tokens.counted.tolist() == [False] * len(theirs["prompt_ids"]) + [True] * len(
                theirs[f"{side}_ids"]
            )
