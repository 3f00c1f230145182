import pytest

from holdfast.errors import DataError
from holdfast.language.columns import BadRow, demonstration, preference, texts
from holdfast.language.files import RawRow


def row(**values):
    return RawRow(values, "rows.jsonl:4")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def refusal(read, **values):
    with pytest.raises(DataError) as caught:
        read(row(**values))
    assert not isinstance(caught.value, BadRow)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:4: ")
    return message.removeprefix("rows.jsonl:4: ")


def badness(read, **values):
    with pytest.raises(BadRow) as caught:
        read(row(**values))
    message = str(caught.value)
    assert message.startswith("rows.jsonl:4: ")
    assert message.endswith("Mend the row, or set bad_rows: drop to leave such rows out.")
    return caught.value.reason, message.removeprefix("rows.jsonl:4: ")


# Demonstrations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b", "more": 1}, "a", "b"),
        ({"prompt": "", "completion": "b"}, "", "b"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "a", "b"),
        ({"text": "c"}, "", "c"),
        ({"text": "c", "prompt": "a"}, "", "c"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a")], [assistant("b")]),
        ({"messages": [user("a"), assistant("b")]}, [], [user("a"), assistant("b")]),
        ({"messages": [user("a"), assistant("b")], "prompt": "a"}, [], [user("a"), assistant("b")]),
    ],
)
def test_demonstrations_of_every_type_are_read(values, prompt, completion):
    example = demonstration(row(**values))
    assert (example.prompt, example.completion) == (prompt, completion)
    assert example.origin == "rows.jsonl:4"


def test_missing_column_names_what_was_found_what_is_near_and_what_is_expected():
    assert refusal(demonstration, prompt="a", Completions="b", id=1) == (
        'no column "completion". Columns found: "prompt", "Completions", "id". Nearest to '
        '"completion": "Completions"; rename it. Expected {"prompt", "completion"}, {"messages"} '
        'or {"text"}.'
    )


def test_missing_columns_without_any_similar_name_suggest_none():
    message = refusal(demonstration, instruction="a", output="b")
    assert message.startswith('no column "prompt", "completion". Columns found: "instruction"')
    assert "Nearest" not in message
    assert "Columns found: none." in refusal(demonstration)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "completion": 7}, '"completion" is a number (7), expected text'),
        ({"prompt": None, "completion": "b"}, '"prompt" is null, expected text'),
        ({"text": {"a": 1}}, '"text" is an object, expected text'),
        ({"messages": "a"}, '"messages" is text, expected a list of messages'),
        ({"messages": []}, '"messages" is an empty list, expected a list of messages'),
        ({"messages": ["a"]}, 'messages[0] is text, expected {"role": …, "content": …}'),
        (
            {"messages": [user("a"), {"from": "gpt", "content": "b"}]},
            'messages[1] has no "role". Keys found: "from", "content". Expected "role" and',
        ),
        (
            {"prompt": [user("a")], "completion": [assistant(None)]},
            "completion[0].content is null, expected text",
        ),
        (
            {"prompt": "a", "completion": [assistant("b")]},
            '"prompt" is text, but "completion" is a list of messages. Expected both',
        ),
        (
            {"messages": [assistant("b"), user("a")]},
            "the conversation begins with the assistant",
        ),
    ],
)
def test_wrong_types_are_named(values, expected):
    assert refusal(demonstration, **values).startswith(expected)


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "a", "completion": " \n\u3000"}, '"completion" is empty'),
        ({"text": "\t"}, '"text" is empty'),
        ({"messages": [user("a")]}, '"messages" has no message from the assistant'),
        (
            {"messages": [user("a"), assistant(" "), user("b"), assistant("c")]},
            '"messages" has an empty message of the assistant',
        ),
        (
            {"prompt": [user("a")], "completion": [user("b")]},
            '"completion" has no message from the assistant',
        ),
    ],
)
def test_empty_completion_is_a_bad_row(values, detail):
    reason, message = badness(demonstration, **values)
    assert reason == "empty completion"
    assert message.startswith(detail)


# Preferences ----------------------------------------------------------------------------------


def test_standard_preference_is_read():
    chosen, rejected = preference(row(prompt="a", chosen="b", rejected="c"))
    assert (chosen.prompt, chosen.completion) == ("a", "b")
    assert (rejected.prompt, rejected.completion) == ("a", "c")


START = [{"role": "system", "content": "s"}, user("a")]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "a"}, {"prompt": None}])
def test_prompt_of_conversations_is_what_both_begin_with(prompt):
    chosen, rejected = preference(
        row(chosen=[*START, assistant("b")], rejected=[*START, assistant("c")], **prompt)
    )
    assert chosen.prompt == rejected.prompt == START
    assert chosen.completion == [assistant("b")]
    assert rejected.completion == [assistant("c")]


def test_explicit_prompt_of_conversations_is_kept():
    both = user("more")
    chosen, rejected = preference(
        row(prompt=START, chosen=[both, assistant("b")], rejected=[both, assistant("c")])
    )
    assert chosen.prompt == rejected.prompt == START
    assert chosen.completion == [both, assistant("b")]


def test_prompt_of_texts_that_begin_alike_is_not_guessed():
    message = refusal(preference, chosen="Q: a A: b", rejected="Q: a A: c")
    assert message.startswith('no column "prompt". Columns found: "chosen", "rejected".')
    assert 'Expected {"prompt", "chosen", "rejected"}' in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"prompt": "a", "choosen": "b", "rejected": "c"},
            'no column "chosen". Columns found: "prompt", "choosen", "rejected". Nearest to '
            '"chosen": "choosen"; rename it.',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": 0.5}, '"rejected" is a number (0.5)'),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, '"prompt" is a number (1)'),
        (
            {"prompt": "a", "chosen": [assistant("b")], "rejected": "c"},
            '"chosen" is a list of messages, but "rejected" is text',
        ),
        (
            {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
            '"prompt" is a list of messages, but "chosen" is text',
        ),
        (
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "chosen and rejected begin with different messages",
        ),
    ],
)
def test_wrong_preferences_are_explained(values, expected):
    assert refusal(preference, **values).startswith(expected)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
    ],
)
def test_identical_chosen_and_rejected_is_a_bad_row(values):
    assert badness(preference, **values)[0] == "identical chosen and rejected"


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_empty_side_of_a_preference_is_a_bad_row(column):
    sides = {"chosen": "b", "rejected": "c", column: " "}
    assert badness(preference, prompt="a", **sides) == (
        "empty completion",
        f'"{column}" is empty. Mend the row, or set bad_rows: drop to leave such rows out.',
    )
    turns = {
        name: [user("a"), *([] if name == column else [assistant("b")])]
        for name in ("chosen", "rejected")
    }
    assert badness(preference, **turns)[0] == "empty completion"


def test_texts_are_all_that_known_columns_hold():
    mixed = row(prompt="a", chosen=[user("b"), assistant("c")], rejected=7, text="d", other="e")
    assert list(texts(mixed)) == ["a", "b", "c", "d"]
