import json

import numpy as np
import pytest

from holdfast.bellman import (
    Constant,
    CoverageError,
    SaddleProblem,
    Sgda,
    TabularMDP,
    Transitions,
    rank_influence,
    sensitivity,
)
from holdfast.bellman.sensitivity import measure_sensitivity
from holdfast.errors import DataError, TrainingError

SETTINGS = Sgda(steps=1, step=Constant(0.1), step_ratio=4.0)
GRID = TabularMDP.gridworld(2, 2, 0.6, slip=0.2)


def test_the_record_holds_every_entry_and_the_rows_by_influence():
    data = GRID.sample(150, seed=0)
    problem = SaddleProblem.tabular(data, 0.6)
    found = measure_sensitivity(problem, SETTINGS, rows=20, draws=2, sizes=0)
    record = json.loads(json.dumps(found.record(range(1000, 1150)), allow_nan=False))
    exact = rank_influence(problem, rows=20, draws=2)
    assert record["method"] == "exact" and record["quantity"] == "Q" and record["tried"] == 20
    assert len(record["entries"]) == 16 and record["curve"] is None
    entry = record["entries"][4 * 1 + 2]
    assert (entry["state"], entry["action"]) == (1, 2)
    assert (
        entry["shift"] == exact.shift[1, 2]
        and entry["interval"] == exact.interval[:, 1, 2].tolist()
    )
    first = record["influence"][0]
    row = exact.ranking[0]
    assert first["row"] == 1000 + row and first["influence"] == exact.influence[row]
    assert (first["state"], first["action"]) == (data.state[row], data.action[row])
    assert first["next_state"] == (None if data.terminal[row] else data.next_state[row])
    assert record["margin"]["step_ratio"] == 4.0 and record["margin"]["margin"] > 0


def test_the_curve_leaves_out_parts_that_lack_pairs_and_knows_ends():
    """An end has no rows, and must not count as a pair that is missing."""
    problem = SaddleProblem.tabular(GRID.sample(400, seed=0), 0.6)
    found = measure_sensitivity(problem, SETTINGS, rows=2, draws=1, sizes=4)
    assert found.curve is not None
    assert found.curve.sizes[-1] == 200 and found.curve.sizes[0] > 25
    assert found.curve.control == 0.0
    curve = found.record(range(400))["curve"]
    assert [row["n"] for row in curve["sizes"]] == list(found.curve.sizes)


def test_a_ratio_that_leaves_the_saddle_is_refused_with_one_that_does_not():
    model = TabularMDP.random(4, 2, 0.97, seed=0)
    problem = SaddleProblem.tabular(model.sample(300, seed=0), 0.97)
    common = Sgda(steps=1, step=Constant(0.1), step_ratio=1.0)
    with pytest.raises(TrainingError, match="leaves the saddle.*set step_ratio to") as refused:
        measure_sensitivity(problem, common)
    ratio = float(str(refused.value).rpartition("set step_ratio to ")[2].split()[0])
    better = Sgda(steps=1, step=Constant(0.1), step_ratio=ratio)
    measure_sensitivity(problem, better, rows=1, draws=1, sizes=0)


def test_data_in_which_nothing_can_be_replaced_are_refused():
    pairs = np.argwhere(np.ones((2, 2)))
    data = Transitions(pairs[:, 0], pairs[:, 1], np.ones(4), np.array([0, 1, 1, 0]))
    with pytest.raises(DataError, match="occurs but once"):
        measure_sensitivity(SaddleProblem.tabular(data, 0.5), SETTINGS, sizes=0)


def test_only_a_lack_of_pairs_makes_the_curve_shorter(monkeypatch):
    problem = SaddleProblem.tabular(GRID.sample(150, seed=0), 0.6)

    def lacking(*_, sizes, **__):
        raise CoverageError(f"sizes includes {sizes[0]}")

    def broken(*_, **__):
        raise ValueError("something else")

    monkeypatch.setattr(sensitivity, "measure_stability", lacking)
    found = measure_sensitivity(problem, SETTINGS, rows=1, draws=1, sizes=3)
    assert found.curve is None
    monkeypatch.setattr(sensitivity, "measure_stability", broken)
    with pytest.raises(ValueError, match="something else"):
        measure_sensitivity(problem, SETTINGS, rows=1, draws=1, sizes=3)


def test_anchors_of_states_are_in_the_record():
    model = TabularMDP.bus(3, 0.6, cost=0.5, replacement=0.6, drives_on=True)
    data = model.sample_trajectories(20, 20, seed=0)
    problem = SaddleProblem.tabular(data, 0.6, anchor_action=np.array([1, 0, 1]))
    found = measure_sensitivity(problem, SETTINGS, rows=2, draws=1, sizes=0)
    record = json.loads(json.dumps(found.record(range(len(data)))))
    assert record["anchor_action"] == [1, 0, 1] and record["quantity"] == "reward"
