import numpy as np
import pytest

from holdfast.bellman import CoverageError, Networks, TabularMDP, Transitions, mlp
from holdfast.bellman.draws import covered_dataset, drawer, neighbours, table_size

BUS = TabularMDP.bus(3, 0.6, cost=0.5, replacement=0.6, increments=(0.6, 0.3, 0.1), drives_on=True)
GRID = TabularMDP.gridworld(2, 2, 0.8)


def shares(data: Transitions, states: int, actions: int) -> np.ndarray:
    return data.counts(states, actions) / len(data)


def test_with_an_anchor_choices_are_those_of_the_soft_optimal_policy():
    data, _ = drawer(BUS, 10, 1)(40_000, np.random.default_rng(0))
    wanted = BUS.soft_policy_iteration().policy / 3
    # Six standard errors of a share.
    np.testing.assert_allclose(shares(data, 3, 2), wanted, atol=6 * 0.5 / np.sqrt(40_000))
    assert np.abs(wanted - 1 / 6).max() > 0.05


def test_without_one_all_pairs_that_are_decided_in_are_alike():
    data, spare = drawer(GRID, 10, None)(40_000, np.random.default_rng(0))
    wanted = np.repeat([[1 / 12], [1 / 12], [1 / 12], [0.0]], 4, axis=1)
    np.testing.assert_allclose(shares(data, 4, 4), wanted, atol=6 * 0.5 / np.sqrt(40_000))
    assert (data.next_state != spare.next_state).any()


def test_data_sets_that_lack_a_pair_are_counted_and_drawn_again():
    good = BUS.sample(60, seed=0)
    poor = good[np.flatnonzero((good.state != 0) | (good.action != 0))]
    waiting = [poor, poor, good]
    data, _, tries = covered_dataset(
        lambda n, rng: (waiting.pop(0), good), 60, None, BUS, np.random.default_rng(0)
    )
    assert data is good and tries == 2
    with pytest.raises(CoverageError, match="sizes includes 60: of 1000 data sets"):
        covered_dataset(lambda n, rng: (poor, good), 60, None, BUS, np.random.default_rng(0))


def test_ends_that_rows_name_by_their_own_state_do_not_count_as_missing():
    """Rows of 0 and 1; the last leads to its own state and ends. State 2 never occurs."""
    state = np.repeat([0, 1], 20)
    data = Transitions(state, np.tile([0, 1], 20), np.zeros(40), state, np.arange(40) == 39)
    rng = np.random.default_rng(0)
    found, _, tries = covered_dataset(lambda n, rng: (data, data), 40, None, data, rng)
    assert found is data and tries == 0


def test_neighbours_are_the_data_twice_and_then_one_row_replaced_each():
    data, spare = BUS.sample(50, seed=0), BUS.sample(50, seed=1)
    family = neighbours(data, spare, 6, np.random.default_rng(0))
    assert len(family) == 8
    for k, each in enumerate(family):
        differs = np.zeros(50, bool)
        for name in ("state", "action", "reward", "next_state"):
            differs |= getattr(each, name) != getattr(data, name)
        assert differs.sum() <= (k >= 2)


def test_observations_have_no_table():
    wide = Transitions(np.zeros((4, 2)), [0, 1, 0, 1], np.zeros(4), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="give an approximator"):
        table_size(wide)
    nets = Networks(mlp(2, (3,), 2, seed=0), mlp(2, (3,), 2, seed=1))
    found, _, _ = covered_dataset(
        lambda n, rng: (wide, wide), 4, nets, wide, np.random.default_rng(0)
    )
    assert found is wide
