"""The inverse problem on bus data: its exact answer is where descent-ascent would settle."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.rust_bus import material
from benchmarks.rust_bus.run import growth, resampled
from holdfast.bellman.simulated_bus import simulate_buses


@pytest.fixture(scope="module")
def buses():
    return simulate_buses(30, seed=0, random_anchor=True).table


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.999])
def test_exact_answer_is_a_saddle_that_meets_the_anchor(buses, discount):
    problem = material.inverse_problem(buses, discount)
    primal, dual = material.exact_saddle(problem)
    assert material.gradient_at(problem, primal, dual) < 1e-9 / (1 - discount)
    reward = material.recovered(problem, primal, dual)
    assert reward[:, material.ANCHOR] == pytest.approx(-5.0)
    moved = primal + 1e-3
    assert material.gradient_at(problem, moved, dual) > 1e-5


def test_features_are_uncorrelated_over_the_rows(buses):
    table = material.features(buses)
    rows = table[buses.state, buses.action]
    assert rows.T @ rows / len(rows) == pytest.approx(np.eye(rows.shape[1]), abs=1e-6)


def test_first_and_last_months_are_left_out_and_buses_not_chained():
    frame = pd.DataFrame(
        {
            "group": 1,
            "bus_id": [7, 7, 7, 7, 8, 8, 8],
            "state": [0, 1, 2, 0, 5, 6, 7],
            "replace": [0, 0, 1, 0, 0, 0, 0],
        }
    )
    data = material.transitions_of(frame, 9.0)
    assert data.state.tolist() == [1, 2, 6]
    assert data.next_state.tolist() == [2, 0, 7]
    assert data.action.tolist() == [0, 1, 0]
    assert np.isnan(data.reward[[0, 2]]).all() and data.reward[1] == -9.0


def test_slope_of_a_linear_cost_is_its_slope_whatever_its_level():
    visits = np.random.default_rng(0).integers(1, 9, size=90)
    reward = 4.0 - 0.001 * 2.5 * np.arange(90.0)
    assert material.slope_of(reward, visits) == pytest.approx(2.5)


def test_resampled_buses_are_whole(buses):
    other = resampled(buses, seed=0)
    assert len(other) == len(buses)  # all drove for as long
    assert len(np.unique(other.trajectory)) < len(np.unique(buses.trajectory))


def test_growth_is_the_exponent_over_discounts():
    from benchmarks.rust_bus.run import DISCOUNTS, METHODS

    cells = {}
    for discount in DISCOUNTS:
        horizon = 1 / (1 - discount)
        cells[f"target | {discount}"] = {"condition": horizon**2}
        for method in METHODS:
            errors = [[3.0], [horizon, 2 * horizon]]
            cells[f"{method} | {discount}"] = {"reward": errors, "value": errors}
    found = growth(cells)
    assert found["condition"] == [2.0]
    assert found["value | batches, Adam"] == pytest.approx([1.0, 1.0, 1.0])


def test_descent_starts_at_the_shares_of_all_months(buses):
    problem = material.inverse_problem(buses, 0.9)
    q = material.features(buses) @ material.start(problem)[0]
    shares = np.bincount(buses.action) / len(buses)
    assert np.exp(q) == pytest.approx(np.tile(shares, (material.BINS, 1)))
