import math

import pytest

from holdfast.language.rewards.contract import completion_text, finite, shorten


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        (" as it is ", " as it is "),
        ([said("assistant", "a")], "a"),
        ([said("assistant", "a"), said("tool", "b"), said("assistant", "c")], "c"),
        ([said("assistant", "a"), said("tool", "b")], "a"),
    ],
)
def test_a_completion_says_what_the_assistant_said_last(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ([], "no message from the assistant"),
        ([said("tool", "b")], "no message from the assistant"),
        ([said("assistant", None)], "null"),
        ([said("assistant", [{"type": "text"}])], "a list"),
    ],
)
def test_a_completion_without_text_is_refused(completion, found):
    with pytest.raises(ValueError, match=f"the completion is {found}, expected text"):
        completion_text(completion)


def test_a_number_that_no_float_holds_is_not_finite():
    assert finite(2) and finite(-0.5) and finite(True)
    assert not any(map(finite, (math.nan, math.inf, -math.inf, 10**400)))


def test_long_values_keep_their_beginning_and_end():
    assert shorten("a\nb") == repr("a\nb")
    assert shorten("x" * 200) == repr("x" * 200)
    short = shorten("begin" + "x" * 500 + "end")
    assert short.startswith("'begin") and short.endswith("end'") and len(short) < 210
    assert shorten([said("user", "hi")]) == repr(str([said("user", "hi")]))
