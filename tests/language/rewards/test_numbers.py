"""The number that a text ends with is read exactly, or not at all."""

import gzip
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.language.rewards.numbers import final_number, stated_number

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", "72"),
        ("0", "0"),
        ("-3", "-3"),
        ("+3", "3"),
        ("−3", "-3"),
        ("1,234", "1234"),
        ("1,234,567.25", "1234567.25"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("0.10", "1/10"),
        ("1/2", "1/2"),
        ("-1/2", "-1/2"),
        ("1,000/3", "1000/3"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        ("72.", "72"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€5", "5"),
        ("5%", "5"),
        (r"\$5", "5"),
        (r"5\%", "5"),
        ("$5$", "5"),
        ("5 apples", "5"),
        ("x = 5", "5"),
        ("**5**", "5"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"1\frac{1}{2}", "3/2"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"5 \text{ apples}", "5"),
    ],
)
def test_one_number_is_read_in_all_its_places(text, expected):
    value = Fraction(expected)
    assert stated_number(text) == value
    assert final_number(text) == value
    assert final_number(f"First 8, then 9.\n#### {text}") == value
    assert final_number(rf"First 8, then 9: \boxed{{{text}}}, not 7") == value
    assert stated_number(rf"First 8, then 9: \boxed{{{text}}}, not 7") == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He has 3 apples and eats 2. The answer is 1.", 1),
        ("10-3", 3),
        ("(2)-3", 3),
        ("2 * -3", -3),
        ("It is 12:30", 30),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("costs Rs.500", 500),
        ("#### 5\n\nQuestion: 3 and 4?\n#### 7", 7),
        ("#### 7\nso 3 and 4 make 7, that is 8", 7),
        (r"\boxed{7}, so 8", 7),
        (r"\boxed{6} and \boxed{7}", 7),
        ("#### 6\n\\boxed{7}", 7),
        ("\\boxed{6}\n#### 7", 7),
        (r"#### \boxed{7}", 7),
        ("#### Step 1\nfinally 7", 7),
        ("#### 1. First step\nfinally 7", 7),
    ],
)
def test_the_final_number_is_the_last_marked_one_or_the_last(text, expected):
    assert final_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "1/0",
        "9" * 6000,
        r"\boxed{\sqrt{2}}",
        r"\boxed{3x}",
        r"\boxed{2^{10}}",
        r"\boxed{2\pi}",
        r"\boxed{3, 4}",
        r"\boxed{}",
        r"so 8 \boxed{",
        r"so 8 \boxed{72",
    ],
)
def test_what_is_no_number_is_not_taken_for_one(text):
    assert final_number(text) is None
    assert stated_number(text) is None


@pytest.mark.parametrize(
    "text", ["between 3 and 5", "3 or 5", "12345,678", "10-3", "3x", "it is 5"]
)
def test_a_stated_number_is_never_guessed(text):
    assert stated_number(text) is None
    assert final_number(text) is not None


@given(st.integers(-(10**30), 10**30), st.sampled_from(["", ",", "$", "$,"]), st.text("ab .\n"))
def test_formatted_integers_are_read_back(number, style, before):
    digits = f"{abs(number):,}" if "," in style else str(abs(number))
    text = ("-" if number < 0 else "") + style.rstrip(",") + digits
    assert stated_number(text) == number
    assert final_number(f"{before}\n#### {text}") == number
    assert final_number(f"{before} = {text}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9))
def test_decimals_are_read_without_rounding(number):
    text = format(number, "f")
    assert stated_number(text) == Fraction(Decimal(text))


@given(st.text("0123456789.,/-+ \n#$%\\{}=abfrocdxet€*"))
def test_no_text_is_refused(text):
    for read in (final_number, stated_number):
        assert isinstance(read(text), Fraction | None)


@given(st.text("0123456789.,/- $=x\n", max_size=30))
def test_a_stated_number_is_also_the_final_one(text):
    stated = stated_number(text)
    assert stated is None or final_number(text) == stated


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_every_published_answer_is_read(name):
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    wrong = [
        row["answer"]
        for row in rows
        if final_number(row["answer"]) != Fraction(row["final"].replace(",", ""))
        or stated_number(row["final"]) != Fraction(row["final"].replace(",", ""))
    ]
    assert len(rows) > 1000
    assert not wrong, f"{len(wrong)} of {len(rows)}, such as {wrong[0]!r}"
