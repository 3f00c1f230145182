import numpy as np
import pytest
import torch

from holdfast.bellman import Transitions


def three() -> Transitions:
    return Transitions([0, 1, 2], [0, 1, 0], [0.5, np.nan, 1.0], [1, 2, 0])


def test_tensors_and_lists_become_arrays():
    columns = ([0, 1], [1, 0], [0.5, 1.5], [1, 0])
    given = Transitions(*(torch.tensor(column) for column in columns))
    for name, column in zip(("state", "action", "reward", "next_state"), columns, strict=True):
        assert isinstance(getattr(given, name), np.ndarray)
        np.testing.assert_array_equal(getattr(given, name), column)
    assert not given.terminal.any() and len(given) == 2


def test_a_neighbour_differs_in_one_row_and_leaves_the_data_alone():
    data = three()
    other = Transitions([9], [1], [7.0], [8], terminal=[True])
    changed = data.replaced(1, other)
    assert (changed.state[1], changed.next_state[1], changed.reward[1]) == (9, 8, 7.0)
    assert changed.terminal.tolist() == [False, True, False]
    assert data.state.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(changed.state[[0, 2]], data.state[[0, 2]])


def test_rows_can_be_picked():
    assert three()[np.array([2, 0])].state.tolist() == [2, 0]
    assert len(three()[:2]) == 2


def test_counts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    state, action = rng.integers(4, size=50), rng.integers(3, size=50)
    expected = np.zeros((4, 3), int)
    for s, a in zip(state, action, strict=True):
        expected[s, a] += 1
    data = Transitions(state, action, np.zeros(50), state)
    np.testing.assert_array_equal(data.counts(4, 3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": [0]}, "action has shape"),
        ({"action": [0.5, 1.0]}, "action has dtype"),
        ({"reward": [0.0, np.inf]}, "reward is infinite in row 1"),
        ({"next_state": [[0.0], [1.0]]}, "must be alike"),
        ({"state": [[0.0], [np.nan]], "next_state": [[0.0], [1.0]]}, "not finite in row 1"),
    ],
)
def test_bad_columns_are_refused(change, message):
    columns = {"state": [0, 1], "action": [0, 1], "reward": [0.0, 1.0], "next_state": [1, 0]}
    with pytest.raises(ValueError, match=message):
        Transitions(**(columns | change))


def test_a_row_outside_the_table_is_named():
    with pytest.raises(ValueError, match="next_state is 2 in row 1"):
        Transitions([0, 1], [0, 1], [0.0, 0.0], [1, 2]).check_tabular(2, 2)


def test_ends_are_true_or_false():
    ended = Transitions([0, 0], [0, 0], [0.0, 0.0], [0, 0], terminal=[0.0, 1.0])
    assert ended.terminal.tolist() == [False, True]
    for bad in ([0, 2], [0.0, 0.5], [0.0, np.nan], [-1, 0]):
        with pytest.raises(ValueError, match="terminal is .* in row"):
            Transitions([0, 0], [0, 0], [0.0, 0.0], [0, 0], terminal=bad)


def test_states_that_only_end_are_not_entered():
    data = Transitions([0, 1], [0, 0], [0.0, 0.0], [3, 2], terminal=[True, False])
    assert data.entered(5).tolist() == [True, True, True, False, False]
