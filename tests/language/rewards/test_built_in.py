"""Each reward that is built in, against cases made by hand and against TRL's where it has one."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import accuracy_reward, get_soft_overlong_punishment

from holdfast.errors import DataError, RecipeError
from holdfast.language.rewards import (
    built_in,
    exact_match,
    math_verify,
    numeric_answer,
    regex,
    soft_overlong,
)

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def judge(reward, completions, **columns):
    count = len(completions)
    return reward([""] * count, completions, [[]] * count, **columns)


def conversations(completions):
    return [[{"role": "assistant", "content": completion}] for completion in completions]


AGAINST = pytest.mark.parametrize("factory", [exact_match, numeric_answer, math_verify])


@AGAINST
def test_texts_and_conversations_are_judged_alike(factory):
    completions, answers = ["5", "6", " 5\n", ""], ["5"] * 4
    expected = [1.0, 0.0, 1.0, 0.0]
    assert judge(factory(), completions, answer=answers) == expected
    assert judge(factory(), conversations(completions), answer=answers) == expected
    assert all(type(value) is float for value in judge(factory(), completions, answer=answers))


@AGAINST
def test_the_column_can_be_named_and_a_missing_one_is_an_error(factory):
    assert judge(factory("final"), ["5"], final=["5"], answer=["6"]) == [1.0]
    with pytest.raises(DataError, match="no column 'answer'; did you mean 'answers'. Columns: que"):
        judge(factory(), ["5"], question=["?"], answers=["5"])


@AGAINST
def test_a_row_whose_answer_is_null_is_not_judged(factory):
    assert judge(factory(), ["5", "5"], answer=[None, "5"]) == [None, 1.0]


@pytest.mark.parametrize(
    ("factory", "value", "message"),
    [
        (exact_match, 5, r"column 'answer' holds a number \(5\), expected text"),
        (exact_match, ["5"], "column 'answer' holds a list, expected text"),
        (numeric_answer, "five", "column 'answer' holds 'five', expected a number"),
        (numeric_answer, "3 or 5", "column 'answer' holds '3 or 5', expected a number"),
        (numeric_answer, True, "holds a truth value"),
        (numeric_answer, float("nan"), r"holds a number \(nan\), expected a number"),
        (math_verify, 5, r"holds a number \(5\), expected an expression"),
        (math_verify, "", "holds '', expected an expression"),
    ],
)
def test_an_answer_of_the_data_that_cannot_be_read_is_an_error(factory, value, message):
    with pytest.raises(DataError, match=message):
        judge(factory(), ["5"], answer=[value])


def test_exact_match_ignores_white_space_around_and_nothing_else():
    completions = [" a b\n", "a  b", "A b", "a b."]
    assert judge(exact_match(), completions, answer=["a b "] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("It costs $1,234.00.", "1234", 1.0),
        ("so -3", "-3", 1.0),
        ("so -3", "3", 0.0),
        ("half: .5", "1/2", 1.0),
        ("half: 1/2", 0.5, 1.0),
        (r"\boxed{\frac{1}{2}}", "0.50", 1.0),
        ("#### 72", 72, 1.0),
        ("I think 71\n#### 72\nor 73", "She sold 48+24 = 72.\n#### 72", 1.0),
        ("0.3333333333333333", "1/3", 0.0),
        ("100000000000000000001", "100000000000000000000", 0.0),
        ("0.1", 0.1, 1.0),
        ("nothing", "0", 0.0),
        ("0", "0", 1.0),
        (r"\boxed{\sqrt{4}}", "4", 0.0),
    ],
)
def test_numbers_are_compared_exactly(completion, answer, expected):
    assert judge(numeric_answer(), [completion], answer=[answer]) == [expected]


def test_published_solutions_earn_the_reward_and_those_of_the_next_question_do_not():
    path = DATA / "gsm8k_train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    solutions = [row["answer"] for row in rows]
    finals = [row["final"] for row in rows]
    assert judge(numeric_answer("final"), solutions, final=finals) == [1.0] * len(rows)
    others = judge(numeric_answer("final"), solutions[1:] + solutions[:1], final=finals)
    assert sum(others) == sum(
        float(a.replace(",", "")) == float(b.replace(",", ""))
        for a, b in zip(finals, finals[1:] + finals[:1], strict=True)
    )


HALVES = [
    (r"\boxed{\frac{1}{2}}", 1.0),
    (r"\boxed{1/2}, not $3$", 1.0),
    (r"$\frac{2}{4}$", 1.0),
    ("the answer is 0.5", 1.0),
    (r"\boxed{2}", 0.0),
    (r"\boxed{", 0.0),
    ("no idea", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(
    "answer", [r"\frac{1}{2}", r"$\frac12$", r"\boxed{0.5}", "1/2", "First $3$.\n#### \\frac12"]
)
def test_math_verify_compares_expressions(answer):
    completions, expected = zip(*HALVES, strict=True)
    assert judge(math_verify(), completions, answer=[answer] * len(HALVES)) == [*expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{1 + x^2}", "x^2+1", 1.0),
        (r"\boxed{x+3}", "x+2", 0.0),
        (r"\boxed{2}", "x+2", 0.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{2}", r"2\sqrt{2}", 0.0),
        (r"\boxed{(1,2)}", "(1,2)", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
    ],
)
def test_math_verify_reads_the_whole_of_an_answer_without_delimiters(completion, answer, expected):
    assert judge(math_verify(), [completion], answer=[answer]) == [expected]


def test_math_verify_agrees_with_trl_on_boxed_answers():
    completions = [completion for completion, _ in HALVES if "boxed" in completion]
    answers = [r"\frac{1}{2}"] * len(completions)
    trl = accuracy_reward(conversations(completions), answers)
    assert judge(math_verify(), completions, answer=answers) == trl


def test_what_math_verify_computes_for_too_long_earns_nothing(monkeypatch):
    endless, fine = r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"
    assert judge(math_verify(), [fine], answer=["4"]) == [1.0]  # compiles its expressions
    monkeypatch.setattr(built_in, "_SECONDS", 0.5)
    assert judge(math_verify(), [endless, fine], answer=["4", "4"]) == [0.0, 1.0]


def test_math_verify_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError, match=r"pip install holdfast\[math\]"):
        math_verify()


@pytest.mark.parametrize(
    ("pattern", "full_match", "expected"),
    [
        ("b", False, [1.0, 1.0, 0.0]),
        ("b", True, [0.0, 1.0, 0.0]),
        ("a.c", False, [0.0, 0.0, 0.0]),
        ("(?s)a.*c", True, [1.0, 0.0, 0.0]),
    ],
)
def test_regex_matches_a_part_or_the_whole(pattern, full_match, expected):
    completions = ["a\nb\nc", "b", ""]
    reward = regex(pattern, full_match)
    assert judge(reward, completions) == expected
    assert judge(reward, conversations(completions)) == expected


def test_a_pattern_that_is_not_valid_is_refused():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression: missing \)"):
        regex("(")


def overlong(lengths, **options):
    count = len(lengths)
    return soft_overlong(**options)([""] * count, [""] * count, [[0] * n for n in lengths])


def test_overlong_completions_are_punished_as_worked_by_hand():
    options = {"max_completion_len": 100, "soft_punish_cache": 20}
    rewards = overlong([0, 80, 81, 85, 90, 99, 100, 101, 500], **options)
    assert rewards == [0, 0, -0.05, -0.25, -0.5, -0.95, -1, -1, -1]
    assert overlong([9, 10, 11], max_completion_len=10, soft_punish_cache=0) == [0, 0, -1]


@st.composite
def limits(draw):
    longest = draw(st.integers(1, 200))
    return {
        "max_completion_len": longest,
        "soft_punish_cache": draw(st.integers(0, longest)),
    }


@given(limits(), st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_the_punishment_is_monotone_bounded_and_that_of_trl(options, lengths):
    lengths = sorted(lengths)
    rewards = overlong(lengths, **options)
    assert rewards == sorted(rewards, reverse=True)
    assert all(-1 <= reward <= 0 for reward in rewards)
    for length, reward in zip(lengths, rewards, strict=True):
        assert (reward == 0) == (
            length <= options["max_completion_len"] - options["soft_punish_cache"]
        )
    trl = get_soft_overlong_punishment(**options)(completion_ids=[[0] * n for n in lengths])
    assert rewards == trl


@pytest.mark.parametrize(
    ("longest", "cache", "message"),
    [
        (0, 0, "max_completion_len is 0: it must be at least 1"),
        (10, -1, "soft_punish_cache is -1"),
        (10, 11, r"soft_punish_cache is 11: it must lie in \[0, max_completion_len\]"),
    ],
)
def test_limits_out_of_range_are_refused(longest, cache, message):
    with pytest.raises(ValueError, match=message):
        soft_overlong(longest, cache)
