"""The simulated bus: everyone has as many settings, and the losses are what they say."""

import numpy as np
import pytest
import torch

from benchmarks.simulated_bus import study
from benchmarks.simulated_bus.analysis import PAPER, published, slope
from benchmarks.simulated_bus.networks import inverse_loss
from holdfast.bellman.estimators.fitting import columns_of
from holdfast.bellman.simulated_bus import ANCHOR, reward_error, simulate_buses


def test_every_method_has_as_many_settings_and_cells_have_keys_of_their_own():
    assert len({len(grid) for grid in study.GRIDS.values()}) == 1
    chosen = {(c.task, c.method, c.dummies): 1 for c in study.tuning()}
    cells = [*study.tuning(), *study.evaluation(chosen)]
    assert len({cell.key for cell in cells}) == len(cells)
    assert not {c.seed for c in study.tuning()} & {c.seed for c in study.evaluation(chosen)}


def test_the_chosen_setting_has_the_least_mean_error():
    cells = {c.key: {"error": 1.0 + abs(c.setting - 2) + c.seed % 2} for c in study.tuning()}
    assert set(study.chosen_settings(cells).values()) == {2}


def test_the_correction_takes_the_spread_of_next_values_off_the_anchors():
    buses = simulate_buses(4, seed=0, periods=20, dummies=1, random_anchor=True)
    pair = study.start(buses, 1, seed=0)
    columns = columns_of(buses.observed, pair)
    with torch.no_grad():
        losses = [inverse_loss(pair, columns, ANCHOR, 3.0, each).total for each in (True, False)]
        ahead = pair.ahead(columns)
        dual = pair.dual(columns["state"], columns["action"])
    anchors = columns["action"] == ANCHOR
    spread = (ahead - dual)[anchors].square().sum()
    assert float(losses[1] - losses[0]) == pytest.approx(float(3.0 * pair.discount**2 * spread))


@pytest.mark.parametrize("random_anchor", [False, True])
@pytest.mark.parametrize("method", study.ORACLES)
def test_oracles_find_the_reward_of_many_buses(method, random_anchor):
    buses = simulate_buses(400, seed=0, random_anchor=random_anchor)
    found = study.oracle(method, buses)[buses.table.state, buses.table.action]
    assert reward_error(found, buses.reward) < 8.0


def test_networks_start_at_replacing_for_ever():
    buses = simulate_buses(2, seed=0, periods=50)
    pair = study.start(buses, 0, seed=0)
    with torch.no_grad():
        q = pair.q(torch.tensor([[1.0]], dtype=torch.float64))
    assert q.numpy() == pytest.approx(-100.0, abs=15.0)


def test_the_papers_figures_stand_at_their_places():
    assert published(study.TASKS[0], "GLADIUS", 5000, 0) == 0.12
    assert published(study.TASKS[0], "BC", study.DUMMY_SIZE, 100) == 288.8
    assert published(study.TASKS[1], "GLADIUS", 5000, 0) is None
    assert {len(row) for row in PAPER["sizes"].values()} == {len(study.SIZES)}


def test_slope_is_the_exponent():
    errors = 7.0 * np.array(study.SIZES)[None] ** -0.5 * np.ones((3, 1))
    assert slope(study.SIZES, errors) == pytest.approx([-0.5] * 3)
