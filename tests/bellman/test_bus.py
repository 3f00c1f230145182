from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from holdfast.bellman.bus import (
    BusEstimate,
    bus_model,
    bus_transitions,
    linear_cost,
    nfxp,
    nfxp_shift,
)
from holdfast.bellman.estimators.nfxp import nested_fixed_point
from holdfast.errors import DataError, TrainingError

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "rust1987_bus_groups1-4.csv.gz"
needs_data = pytest.mark.skipif(not FILE.is_file(), reason="the shared data sets are not here")

PROBABILITIES = np.array([0.4, 0.55, 0.05])


@pytest.fixture(scope="module")
def buses():
    return pd.read_csv(FILE)


def simulate(seed: int, *, buses: int = 40, months: int = 60, discount: float = 0.9):
    """A bus file drawn from the model: replacement cost 6, cost slope 400, 15 bins."""
    random = np.random.default_rng(seed)
    policy = bus_model(PROBABILITIES, discount=discount, bins=15).solve([6.0, 400.0]).policy
    rows = []
    for bus in range(buses):
        state, usage = 0, float("nan")
        for month in range(months):
            replace = int(random.random() < policy[state, 1])
            rows.append((1, 100 + bus, month, state, replace, usage))
            usage = int(random.choice(3, p=PROBABILITIES))
            state = min((0 if replace else state) + usage, 14)
    return pd.DataFrame(rows, columns=["group", "bus_id", "period", "state", "replace", "usage"])


@needs_data
@pytest.mark.parametrize(
    ("groups", "replacement_cost", "cost_slope", "log_likelihood", "increments"),
    [
        ([4], 10.0750, 2.2930, -163.584, [1682, 2555, 55]),
        ([1, 2, 3], 11.7271, 4.8260, -132.389, [1162, 2662, 40]),
        ([1, 2, 3, 4], 9.7558, 2.6276, -300.250, [2844, 5217, 95]),
    ],
)
def test_rusts_table_ix(buses, groups, replacement_cost, cost_slope, log_likelihood, increments):
    chosen = buses[buses["group"].isin(groups)]
    result = nfxp(chosen, discount=0.9999, bins=90)
    assert result.replacement_cost == pytest.approx(replacement_cost, abs=5e-4)
    assert result.cost_slope == pytest.approx(cost_slope, abs=5e-4)
    assert result.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
    assert result.increments.tolist() == increments
    assert result.observations == sum(increments)


@needs_data
def test_rusts_full_log_likelihood_of_group_4(buses):
    result = nfxp(buses[buses["group"] == 4], discount=0.9999, bins=90)
    assert result.full_log_likelihood == pytest.approx(-3304.155, abs=1e-3)


@needs_data
def test_another_cost_function_on_group_4(buses):
    """ruspy's replication with ``0.01 sqrt(x)``: 11.42995702, 3.2308913 and -163.390."""
    group = buses[buses["group"] == 4]
    probabilities = nfxp(group, discount=0.9999, bins=90).probabilities
    counts = np.zeros((90, 2))
    later = group[group["period"] > 0]
    np.add.at(counts, (later["state"], later["replace"]), 1)
    model = bus_model(
        probabilities,
        discount=0.9999,
        bins=90,
        cost=lambda bins: 0.01 * np.sqrt(np.arange(bins)),
    )
    estimate = nested_fixed_point(model, counts)
    assert estimate.parameters == pytest.approx([11.42995702, 3.2308913], rel=1e-5)
    assert estimate.log_likelihood == pytest.approx(-163.390, abs=1e-3)


@needs_data
def test_gradient_at_rusts_discount_equals_finite_differences(buses):
    """At 0.9999 the values are ten thousand times the rewards: rounding is at its worst."""
    group = buses[buses["group"] == 4]
    counts = np.zeros((90, 2))
    later = group[group["period"] > 0]
    np.add.at(counts, (later["state"], later["replace"]), 1)
    model = bus_model([0.39, 0.6, 0.01], discount=0.9999, bins=90)
    theta = np.array([9.0, 2.0])
    curve = model.likelihood(theta, counts)
    for axis, width in enumerate((1e-3, 1e-3)):
        step = width * np.eye(2)[axis]
        up, down = (model.likelihood(theta + sign * step, counts) for sign in (1, -1))
        slope = (up.value - down.value) / (2 * width)
        assert curve.gradient[axis] == pytest.approx(slope, rel=1e-5)
        assert curve.hessian[axis] == pytest.approx(
            (up.gradient - down.gradient) / (2 * width), rel=1e-4
        )


def test_parameters_of_simulated_buses_are_recovered():
    errors = []
    for seed in range(10):
        result = nfxp(simulate(seed), discount=0.9, bins=15)
        found = np.array([result.replacement_cost, result.cost_slope])
        errors.append((found - [6, 400]) / result.standard_errors)
        assert abs(result.probabilities - PROBABILITIES).max() < 4 * result.transition_errors.max()
    # Twenty standard normal numbers, or nearly: the mean square lies in [0.4, 1.9] but for 1 %.
    assert 0.3 < np.mean(np.square(errors)) < 2.2


def test_covariance_is_that_of_the_joint_likelihood():
    """Brute force: choices and increments in one likelihood, its Hessian by finite differences.

    The parameters are replacement cost, slope, and the probabilities of growing by 1 and 2 bins.
    The two-stage estimate is not the joint maximum, so there the comparison would be to first order
    only; it is exact for the matrix that both build on: the joint Hessian gives H and C.
    """
    frame = simulate(3)
    result = nfxp(frame, discount=0.9, bins=15)
    later = frame[frame["period"] > 0]
    counts = np.zeros((15, 2))
    np.add.at(counts, (later["state"], later["replace"]), 1)

    def choice_likelihood(x):
        probabilities = [1 - x[2] - x[3], x[2], x[3]]
        return bus_model(probabilities, discount=0.9, bins=15).likelihood(x[:2], counts).value

    at = np.array([result.replacement_cost, result.cost_slope, *result.probabilities[1:]])
    width = np.array([1e-2, 1.0, 1e-3, 1e-3])
    hessian = np.zeros((2, 4))
    for i in range(2):
        for j in range(4):
            a, b = np.eye(4)[i] * width, np.eye(4)[j] * width
            hessian[i, j] = (
                choice_likelihood(at + a + b)
                - choice_likelihood(at + a - b)
                - choice_likelihood(at - a + b)
                + choice_likelihood(at - a - b)
            ) / (4 * width[i] * width[j])
    inverse = np.linalg.inv(-hessian[:, :2])
    shares = result.probabilities[1:]
    spread = (np.diag(shares) - np.outer(shares, shares)) / result.increments.sum()
    cross = hessian[:, 2:]
    np.testing.assert_allclose(result.covariance_given_transitions, inverse, rtol=1e-3)
    added = inverse @ cross @ spread @ cross.T @ inverse
    np.testing.assert_allclose(
        result.covariance - result.covariance_given_transitions, added, rtol=5e-3
    )
    np.testing.assert_allclose(result.standard_errors**2, np.diag(result.covariance))


def test_transitions_conserve_probability_and_stop_at_the_last_bin():
    transitions = bus_transitions(PROBABILITIES, 4)
    np.testing.assert_allclose(transitions.sum(-1), 1)
    np.testing.assert_allclose(transitions[1, 0], [0, 0.4, 0.55, 0.05])
    np.testing.assert_allclose(transitions[2, 0], [0, 0, 0.4, 0.6])
    np.testing.assert_allclose(transitions[3, 0], [0, 0, 0, 1])
    for state in range(4):
        np.testing.assert_allclose(transitions[state, 1], [0.4, 0.55, 0.05, 0])


def test_a_myopic_owner_makes_a_logistic_regression():
    """At discount 0 the log-odds of replacing are 0.001 slope x - cost: plain logit."""
    model = bus_model(PROBABILITIES, discount=0.0, bins=15)
    solution = model.solve([6.0, 400.0])
    odds = solution.log_policy[:, 1] - solution.log_policy[:, 0]
    np.testing.assert_allclose(odds, 400 * linear_cost(15) - 6)


def test_the_order_of_the_buses_does_not_matter():
    frame = simulate(5)
    turned = pd.concat([part for _, part in frame.groupby("bus_id")][::-1])
    first, second = (nfxp(f, discount=0.9, bins=15) for f in (frame, turned))
    assert isinstance(first, BusEstimate)
    assert first.replacement_cost == second.replacement_cost


def test_bus_ids_need_be_unique_within_a_group_only():
    frame = simulate(5)
    twin = frame.assign(group=2)
    result = nfxp(pd.concat([frame, twin]), discount=0.9, bins=15)
    assert result.observations == 2 * nfxp(frame, discount=0.9, bins=15).observations


def spoil(column: str, row: int, value: object):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object})
        frame.iloc[row, frame.columns.get_loc(column)] = value
        return frame

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["usage", "state"]), "no column state, usage"),
        (lambda f: f.iloc[:0], "no rows"),
        (spoil("state", 7, float("nan")), "row 7: state is nan"),
        (spoil("usage", 61, float("nan")), "row 61: usage is nan"),
        (spoil("bus_id", 7, None), "row 7: bus_id is empty"),
        (spoil("state", 7, "new"), "row 7: state is 'new', not a number"),
        (spoil("state", 7, 2.5), "row 7: state is 2.5, not a whole number"),
        (spoil("state", 7, 15), "row 7: state is 15, expected a bin from 0 to 14"),
        (spoil("state", 7, -1), "row 7: state is -1"),
        (spoil("replace", 9, 2), r"row 9: replace is 2, expected 0 \(keep\) or 1 \(replace\)"),
        (spoil("usage", 9, -1), "row 9: usage is -1"),
        (lambda f: f.drop(index=30), "row 30: gap in the trajectory of bus 100: period 31 comes"),
        (lambda f: pd.concat([f.iloc[:30], f.iloc[60:], f.iloc[30:60]]), "row 2370: bus 100 goes"),
        (lambda f: f.sample(frac=1, random_state=0), "Sort the rows by bus and period"),
        (lambda f: f[f["period"] == 0], "one month only"),
        (lambda f: f.assign(replace=1), "column replace is never 0 in rows 0 to 2399"),
    ],
)
def test_a_bad_row_is_named(change, message):
    with pytest.raises(DataError, match=message):
        nfxp(change(simulate(5)), discount=0.9, bins=15)


def test_a_state_that_does_not_follow_is_named():
    frame = simulate(5)
    row = int(np.flatnonzero((frame["period"] > 0) & (frame["replace"].shift() == 0))[0])
    frame.loc[row, "state"] += 3
    with pytest.raises(DataError, match=f"row {row}: bus 100 is in state"):
        nfxp(frame, discount=0.9, bins=15)


def test_an_engine_that_is_never_replaced_is_refused():
    frame = simulate(5)
    frame["replace"] = 0
    frame["state"] = frame["usage"].fillna(0).groupby(frame["bus_id"]).cumsum().clip(upper=14)
    with pytest.raises(DataError, match="column replace is never 1"):
        nfxp(frame, discount=0.9, bins=15)


@pytest.mark.parametrize("discount", [-0.1, 1.0, float("nan")])
def test_a_discount_outside_its_range_is_refused(discount):
    with pytest.raises(ValueError, match="discount"):
        nfxp(simulate(5), discount=discount, bins=15)


@pytest.mark.parametrize("bins", [1, 2.5, True])
def test_bins_must_be_a_number_of_bins(bins):
    with pytest.raises(ValueError, match="bins"):
        nfxp(simulate(5), discount=0.9, bins=bins)


def test_buses_in_one_state_cannot_tell_cost_from_slope():
    frame = pd.DataFrame(
        {
            "bus_id": np.repeat(np.arange(20), 4),
            "period": np.tile(np.arange(4), 20),
            "state": 0,
            "replace": np.tile([0, 1, 0, 0], 20),
            "usage": 0,
        }
    )
    with pytest.raises(TrainingError, match="do not determine"):
        nfxp(frame, discount=0.9, bins=15)


def test_the_shift_of_a_bus_files_parameters_is_small_beside_their_errors():
    frame = simulate(3)
    found = nfxp_shift(frame, discount=0.9, bins=15, draws=2)
    base = nfxp(frame, discount=0.9, bins=15)
    np.testing.assert_allclose(found.estimate.parameters, [base.replacement_cost, base.cost_slope])
    assert (found.shift > 0).all() and (found.shift < base.standard_errors).all()
    assert (found.interval[0] <= 0).all() and (found.interval[1] >= 0).all()
    state, action = found.ranking()[0]
    rows = frame[frame.period > 0]
    assert ((rows["state"] == state) & (rows["replace"] == action)).any()
