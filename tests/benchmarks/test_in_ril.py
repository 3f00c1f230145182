"""What the study of IN-RIL says of runs whose curves are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.in_ril.analysis import analyse, collapsed, gains, level, steps_to
from benchmarks.in_ril.picture import draw, panels
from benchmarks.in_ril.study import Cell, cloned
from benchmarks.in_ril.table import figure, lines, stratified
from benchmarks.in_ril.tasks import POINT_MASS, TASKS

TASK = replace(POINT_MASS, seeds=4, tuning_seeds=1, rates={"gaussian": (1e-3, 3e-3)})
TASK = replace(TASK, rates={**TASK.rates, "residual": (), "diffusion": (), "implicit": ()})


def run(*score):
    return {
        "score": list(score),
        "environment_steps": [100.0 * step for step in range(len(score))],
        "imitation": [0.2, 0.5, *[0.3] * (len(score) - 2)],
        "updates": {"il": 1, "rl": 5},
        "geometry": None,
        "seconds": 1.0,
    }


def cell(method, rate, seed, option=None):
    return Cell(TASK.name, "gaussian", method, rate, seed, option).key


@pytest.fixture(scope="module")
def cells():
    """RL alone is best at 1e-3 and collapses at 3e-3; with surgery every run ends .1 higher."""
    found = {cell("rl", 1e-3, 100): run(0.2, 0.5, 0.5, 0.5)}
    found[cell("rl", 3e-3, 100)] = run(0.2, 0.0, 0.0, 0.0)
    for seed in range(4):
        end = 0.4 + 0.1 * seed
        found[cell("rl", 1e-3, seed)] = run(0.2, end, end, end)
        found[cell("surgery", 1e-3, seed, 5)] = run(0.2, end + 0.1, end + 0.1, end + 0.1)
    found[cell("rl", 3e-3, 0)] = run(0.2, 0.0, 0.0, 0.0)
    found[cell("surgery", 3e-3, 0, 5)] = run(0.2, 0.6, 0.6, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, TASK.name, TASK)  # where learning rates are looked up
        yield found


@pytest.fixture(scope="module")
def analysed(cells):
    return analyse(cells, TASK)


def test_a_level_is_the_mean_of_the_last_three_evaluations():
    assert level(run(0.9, 0.1, 0.2, 0.6)) == pytest.approx(0.3)


def test_a_run_that_ends_below_half_of_its_best_has_collapsed():
    assert collapsed(run(0.2, 0.9, 0.4, 0.4, 0.4))
    assert not collapsed(run(0.2, 0.9, 0.5, 0.4, 0.5))


def test_steps_to_a_level_are_read_off_the_line_between_two_evaluations():
    runs = [run(0.1, 0.3, 0.7, 0.5)]
    assert steps_to(runs, 0.4) == pytest.approx(125.0)
    assert steps_to(runs, 0.05) == 0.0
    assert steps_to(runs, 0.8) is None


def test_groups_are_compared_with_rl_alone_on_the_same_seeds_at_its_own_rate(cells, analysed):
    assert analysed["learning_rates"]["gaussian"] == pytest.approx({"0.001": 0.5, "0.003": 0.0})
    groups = analysed["groups"]
    alone, both = groups["gaussian/rl"], groups["gaussian/surgery-5"]
    assert alone["final"] == pytest.approx(0.55)  # the mean of the middle two of four
    assert both["over_rl"] == pytest.approx(0.1)
    assert both["over_rl_interval"] == pytest.approx([0.1, 0.1])
    # RL alone rises .35 in its first 100 steps, with surgery .45.
    assert both["share_of_rl_steps"] == pytest.approx(0.35 / 0.45)
    assert both["imitation_highest"] == pytest.approx(0.5)
    assert gains(cells, TASK, "gaussian", "surgery", 5) == pytest.approx([0.1] * 4)
    rescued = analysed["at_highest_rate"]["groups"]
    assert rescued["gaussian/rl"]["collapse_rate"] == 1.0
    assert rescued["gaussian/surgery-5"]["over_rl"] == pytest.approx(0.6)


def test_a_table_says_from_when_on_and_whether_ever(analysed):
    first, second = lines(analysed["groups"], 2)
    assert first == "| gaussian/rl | 4 | 0.20 | 0.55 [0.40, 0.70] |  |  | 0.00 | 0.20, 0.30 |"
    assert "| 0.10 [0.10, 0.10] | 0.78 |" in second
    *_, rescued = lines(analysed["at_highest_rate"]["groups"], 2, before="task | ", after=" at 1")
    assert rescued.startswith("| task | gaussian/surgery-5 at 1 | 1 |")
    assert "from the start" in rescued


def test_gains_of_several_tasks_are_pooled_within_their_tasks():
    one, other = np.array([0.0, 0.0, 0.1, 0.1]), np.array([0.3, 0.3, 0.3, 0.3])
    found = stratified([one, other])
    assert found["gain"] == pytest.approx((0.1 + 0.1 + 0.3 + 0.3) / 4)
    # Half of all values are 0.3 in every draw: the two middle ones among them are always there.
    low, high = found["gain_interval"]
    assert low == pytest.approx(0.15) and high == pytest.approx(0.2)
    assert figure({"x": -0.5, "x_interval": [-1.0, 0.25]}, "x", 2) == "−0.50 [−1.00, 0.25]"
    assert figure({}, "x", 2) == ""


def test_a_picture_has_the_panels_with_something_to_compare(cells, analysed, tmp_path):
    found = {panel.title: curves for panel, curves in panels(cells, TASK)}
    assert list(found) == ["m", "at the highest learning rate", "held-out demonstrations"]
    (_, alone, _), (_, surgery, style) = found["m"]
    assert style["label"] == "surgery-5"
    np.testing.assert_allclose(surgery - alone, [0, 0.1, 0.1, 0.1])
    draw(cells, TASK, analysed["groups"], tmp_path)
    assert (tmp_path / f"{TASK.name}.png").stat().st_size > 0


def test_idql_explores_with_a_deviation_of_its_own():
    task = replace(TASK, replay=replace(TASK.replay, std=0.07))
    idql, dppo = (cloned(task, policy) for policy in ("implicit", "diffusion"))
    assert idql.pop("min_sampling_std") == 0.07
    assert dppo.pop("min_sampling_std") == TASK.std
    assert idql == dppo
    assert cloned(task, "residual") == cloned(task, "gaussian")
