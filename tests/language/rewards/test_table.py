"""Several rewards: totals as TRL's, and every bad result named with its completion."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DataError, RecipeError, TrainingError
from holdfast.language.rewards import Rewards

BATCH = (["p0", "p1", "p2"], ["c0", "c1", "c2"], [[1], [2, 3], []], {"answer": [4, 5, 6]})


def returning(value):
    return lambda **batch: value


def call(*functions, weights=None, batch=BATCH):
    named = {f"f{index}": function for index, function in enumerate(functions)}
    return Rewards(named, weights or dict.fromkeys(named, 1.0))(*batch)


def refusal(function, batch=BATCH):
    with pytest.raises(TrainingError) as caught:
        call(function, batch=batch)
    return str(caught.value)


def test_functions_are_called_as_trl_calls_them():
    seen = []

    def function(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids, columns))
        return [0.0] * len(prompts)

    conversation = [{"role": "user", "content": "hi"}]
    batch = ((conversation,), ([{"role": "assistant", "content": "ho"}],), ((7, 8),), {"n": (9,)})
    call(function, batch=batch)
    ((prompts, completions, ids, columns),) = seen
    assert prompts == [conversation] and completions == [*batch[1]] and columns == {"n": [9]}
    assert all(isinstance(values, list) for values in (prompts, completions, ids, columns["n"]))


def test_a_function_cannot_change_what_the_next_one_sees():
    def emptying(completions, **batch):
        count = len(completions)
        completions.clear()
        batch["answer"].clear()
        return [0.0] * count

    call(emptying, emptying)


def test_values_weights_and_nones():
    table = call(
        returning([1.0, None, None]),
        returning([True, 2, None]),
        returning([np.float32(0.5), np.int64(3), None]),
        weights={"f1": -1, "f0": 0.5, "f2": 0},
    )
    np.testing.assert_array_equal(table.by_function["f0"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(table.by_function["f1"], [1, 2, np.nan])
    np.testing.assert_array_equal(table.by_function["f2"], [0.5, 3, np.nan])
    np.testing.assert_array_equal(table.total, [-0.5, -2, np.nan])
    assert list(table.by_function) == ["f0", "f1", "f2"] and table.total.dtype == np.float64


def test_fractions_and_numpy_truth_values_are_numbers():
    table = call(returning([Fraction(1, 4), np.bool_(True), 0]))
    np.testing.assert_array_equal(table.total, [0.25, 1, 0])


values = st.none() | st.floats(-100, 100)


@given(st.lists(st.tuples(values, values, values), min_size=1), st.tuples(*[st.floats(-9, 9)] * 3))
def test_totals_are_those_of_torch_nansum(rows, weights):
    count = len(rows)
    functions = [returning(list(column)) for column in zip(*rows, strict=True)]
    batch = (["p"] * count, ["c"] * count, [[]] * count, {})
    table = torch.tensor([[math.nan if v is None else v for v in row] for row in rows]).double()
    expected = (table * torch.tensor(weights).double()).nansum(dim=1)
    expected[table.isnan().all(dim=1)] = math.nan
    named = dict(zip(("f0", "f1", "f2"), weights, strict=True))
    total = call(*functions, weights=named, batch=batch).total
    np.testing.assert_allclose(total, expected.numpy(), rtol=1e-6, atol=1e-4)


# Results that stop a run --------------------------------------------------------------------------


def test_a_function_that_raises_is_named_with_the_completion_it_raises_for():
    def function(completions, **batch):
        return [1 / (completion != "c1") for completion in completions]

    assert refusal(function) == (
        "reward 'f0' raised ZeroDivisionError: division by zero\n  prompt: 'p1'\n  completion: 'c1'"
    )


def test_a_function_that_raises_for_the_whole_batch_only_says_so():
    def function(completions, **batch):
        if len(completions) > 1:
            raise OSError("too many")
        return [0.0]

    assert refusal(function) == (
        "reward 'f0' raised OSError (for no completion of the batch alone): too many"
        "\n  prompt: 'p0'\n  completion: 'c0'"
    )


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_passed_on(interruption):
    def function(**batch):
        raise interruption

    with pytest.raises(interruption):
        call(function)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_wrong_number_of_rewards_says_how_many(count):
    assert refusal(returning([0.0] * count)) == (
        f"reward 'f0' returned {count} rewards, expected 3: one per completion, in their order"
        "\n  prompt: 'p0'\n  completion: 'c0'"
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (1.0, "a number (1.0)"),
        ({"a": 1}, "an object"),
        (np.zeros(3), "of type ndarray; call its .tolist()"),
        (torch.zeros(3), "of type Tensor; call its .tolist()"),
    ],
)
def test_what_is_no_list_is_refused(value, found):
    assert refusal(returning(value)).startswith(
        f"reward 'f0' returned {found}, expected a list of 3 numbers (or None), one per completion"
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1", "text"),
        ([1.0], "a list"),
        (1j, "of type complex"),
        (torch.tensor(1.0), "of type Tensor; call its .tolist()"),
    ],
)
def test_what_is_no_number_is_refused(value, found):
    assert refusal(returning([0.0, None, value])) == (
        f"reward 'f0' returned {found} for a completion, expected a number or None"
        "\n  prompt: 'p2'\n  completion: 'c2'"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400])
def test_what_is_not_finite_is_refused(value):
    assert refusal(returning([0.0, value, 0.0])) == (
        f"reward 'f0' returned a number that is not finite ({value}). Return None for a completion "
        "that cannot be judged.\n  prompt: 'p1'\n  completion: 'c1'"
    )


def test_a_total_that_is_not_finite_is_refused():
    with pytest.raises(TrainingError, match=r"weighted sum.*not finite(.|\n)*'p1'(.|\n)*'c1'"):
        call(returning([0, 1e300, 0]), weights={"f0": 1e300})


def test_a_part_of_a_batch_may_be_judged_by_nobody():
    nothing = returning([None] * 3)
    assert np.isnan(call(nothing, nothing).total).all()


def test_long_prompts_and_completions_are_shortened():
    batch = (["p" * 999], ["c" * 999], [[]], {})
    message = refusal(returning([math.nan]), batch=batch)
    assert "pppp … pppp" in message and "cccc … cccc" in message and len(message) < 600


# What is given to it ------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
def test_a_column_with_the_name_of_an_argument_is_refused(column):
    with pytest.raises(DataError, match=f"column '{column}'.*rename the column"):
        call(returning([0.0] * 3), batch=(*BATCH[:3], {column: [1, 2, 3]}))


@pytest.mark.parametrize("index", [0, 2, 3])
def test_arguments_of_different_lengths_are_refused(index):
    batch = list(BATCH)
    batch[index] = {"answer": [1]} if index == 3 else [[1]]
    name = ("prompts", "", "completion_ids", "answer")[index]
    with pytest.raises(ValueError, match=f"{name} has 1 entries, but there are 3 completions"):
        call(returning([0.0] * 3), batch=batch)


def test_no_completions_are_refused():
    with pytest.raises(ValueError, match="completions is empty"):
        call(returning([]), batch=([], [], [], {}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"exact": 1, "numeric": 1, "exat": 1}, "a weight is given for 'exat'.*mean 'exact'"),
        ({"exact": 1}, "reward 'numeric' has no weight"),
        ({"exact": 1, "numeric": math.inf}, "weight of reward 'numeric' is inf: it must be a fin"),
        ({"exact": 1, "numeric": math.nan}, "weight of reward 'numeric' is nan"),
        ({"exact": 1, "numeric": "2"}, "weight of reward 'numeric' is '2'"),
        ({"exact": True, "numeric": 1}, "weight of reward 'exact' is True"),
    ],
)
def test_weights_must_be_one_finite_number_each(weights, message):
    functions = dict.fromkeys(("exact", "numeric"), returning([0.0]))
    with pytest.raises(RecipeError, match=message):
        Rewards(functions, weights)


def test_at_least_one_function_is_needed():
    with pytest.raises(RecipeError, match="there is no reward"):
        Rewards({}, {})
