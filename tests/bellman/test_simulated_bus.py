import numpy as np
import pytest

from holdfast.bellman.estimators.choice_model import ChoiceModel
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.bellman.simulated_bus import ANCHOR, reward_error, simulate_buses


def test_the_task_is_the_published_one():
    """Rewards, transitions and start as the paper states them."""
    buses = simulate_buses(50, seed=0)
    rows = buses.table
    assert len(rows) == 5000
    mileage, ahead = rows.state + 1, rows.next_state + 1
    first = np.arange(0, 5000, 100)
    assert (mileage[first] == 1).all()
    replaced = rows.action == ANCHOR
    assert (ahead[replaced] == 1).all()
    grown = np.unique((ahead - mileage)[~replaced & (mileage <= 16)])
    assert grown.tolist() == [1, 2, 3, 4]
    assert mileage.max() <= 20
    np.testing.assert_array_equal(buses.reward, np.where(replaced, -5.0, -mileage))
    assert buses.problem.discount == 0.95


def test_choices_are_soft_optimal():
    """In every state seen 500 times or more, the share of replacing lies within 4 sd."""
    buses = simulate_buses(500, seed=1)
    counts = buses.table.counts(20, 2)
    policy = buses.problem.soft_value_iteration(1e-12).policy
    often = counts.sum(1) >= 500
    n, p = counts.sum(1)[often], policy[often, ANCHOR]
    assert often.sum() >= 6
    assert (abs(counts[often, ANCHOR] / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


def test_only_the_anchors_rewards_are_told():
    buses = simulate_buses(5, seed=0, dummies=2)
    for rows in (buses.table, buses.observed):
        np.testing.assert_array_equal(np.isnan(rows.reward), rows.action != ANCHOR)
        assert (rows.reward[rows.action == ANCHOR] == -5).all()


def test_dummies_change_no_decision_and_are_seen_again_as_the_next_state():
    plain, noisy = (simulate_buses(5, seed=0, dummies=k) for k in (0, 3))
    np.testing.assert_array_equal(plain.table.state, noisy.table.state)
    np.testing.assert_array_equal(plain.table.action, noisy.table.action)
    assert plain.observed.state.shape == (500, 1)
    assert noisy.observed.state.shape == (500, 4)
    np.testing.assert_array_equal(noisy.observed.state[:, 0], noisy.table.state + 1)
    within = np.arange(500) % 100 < 99
    np.testing.assert_array_equal(
        noisy.observed.next_state[within], noisy.observed.state[1:][within[:-1]]
    )
    drawn = np.unique(simulate_buses(50, seed=0, dummies=2).observed.state[:, 1:])
    assert drawn.tolist() == list(range(-10, 11))


def test_a_random_anchor_leads_to_several_mileages_of_different_value():
    fixed, random = (simulate_buses(50, seed=0, random_anchor=flag) for flag in (False, True))
    for buses, expected in ((fixed, [0]), (random, [1, 2, 3, 4])):
        replaced = buses.table.action == ANCHOR
        assert np.unique(buses.table.next_state[replaced]).tolist() == expected
    v = random.problem.soft_value_iteration().v
    assert v[1:5].std() > 0.5


def test_a_split_keeps_trajectories_whole():
    train, test = simulate_buses(50, seed=0, dummies=1).split()
    assert (len(train.table), len(test.table)) == (4000, 1000)
    assert not set(train.table.trajectory) & set(test.table.trajectory)
    assert len(train.observed) == len(train.reward) == 4000
    again, held_out = train.split(0.75)
    assert (len(again.table), len(held_out.table)) == (3000, 1000)
    with pytest.raises(ValueError, match="share is 0.001"):
        train.split(0.001)


def test_the_nested_fixed_point_finds_the_rewards_of_both_tasks():
    """Features: minus the mileage when kept, minus one when replaced; truth 1 and 5."""
    for random_anchor in (False, True):
        buses = simulate_buses(250, seed=3, random_anchor=random_anchor)
        features = np.zeros((20, 2, 2))
        features[:, 0, 0] = -np.arange(1, 21)
        features[:, 1, 1] = -1
        model = ChoiceModel(features, buses.problem.transitions, 0.95)
        found = nested_fixed_point(model, buses.table.counts(20, 2))
        assert (abs(found.parameters - [1, 5]) < 4 * found.standard_errors).all()
        estimate = found.rewards[buses.table.state, buses.table.action]
        assert reward_error(estimate, buses.reward) < 4


def test_error_by_hand():
    """Off by 10 % and by 50 %: 30 % on average."""
    assert reward_error([-1.1, -1.0], [-1.0, -2.0]) == pytest.approx(30)
    with pytest.raises(ValueError, match="truth is 0"):
        reward_error([1.0], [0.0])
    with pytest.raises(ValueError, match="estimate has shape"):
        reward_error([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    "change", [{"trajectories": 0}, {"periods": 0}, {"dummies": -1}], ids=lambda c: next(iter(c))
)
def test_bad_arguments_are_named(change):
    arguments = {"trajectories": 5, "seed": 0} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        simulate_buses(arguments.pop("trajectories"), **arguments)
