"""The pair of data sets on which sequential training forgets."""

import numpy as np
import pytest

from benchmarks.forgetting_rate import run
from benchmarks.forgetting_rate.run import (
    bound,
    build,
    descend,
    least_largest_gap,
    minimum,
    pair,
    sequential_run,
    slope,
    weighted_gaps,
    weights_of,
)
from holdfast.joint import Sequential


def generators(count):
    return [np.random.default_rng(seed) for seed in range(count)]


def test_every_stochastic_gradient_respects_the_bound_used():
    random = np.random.default_rng(0)
    theta = random.uniform(-run.RADIUS, run.RADIUS, size=(2000, 2))
    for objective in pair().values():
        row = random.integers(objective.rows, size=len(theta))
        norms = np.linalg.norm(objective.gradient(theta, row), axis=1)
        assert norms.max() <= run.GRADIENT_BOUND


@pytest.mark.parametrize("share", run.LAMBDAS)
def test_mixed_gap_is_least_at_the_mixed_optimum(share):
    best = minimum(weights_of(share))
    nearby = best + np.random.default_rng(0).normal(0, 0.1, size=(200, 2))
    floor = weighted_gaps(best, share).sum()
    assert (weighted_gaps(nearby, share).sum(axis=-1) > floor).all()


@pytest.mark.parametrize("share", run.LAMBDAS)
def test_no_point_nearby_has_a_smaller_largest_gap(share):
    meeting = least_largest_gap(share)
    dpo, sft = weighted_gaps(meeting, share)
    nearby = meeting + np.random.default_rng(0).normal(0, 0.1, size=(200, 2))
    assert dpo == pytest.approx(sft, abs=1e-9)
    assert (weighted_gaps(nearby, share).max(axis=-1) > dpo).all()


def test_iterates_are_those_of_a_plain_loop_inside_the_ball(monkeypatch):
    monkeypatch.setattr(run, "RADIUS", 0.4)
    kept = descend([Sequential({"sft": 30})], generators(1), np.zeros((1, 2)), [10, 30])
    random = np.random.default_rng(0)
    random.integers(pair()["dpo"].rows, size=30)
    rows = random.integers(pair()["sft"].rows, size=30)
    theta, weighted, total = np.zeros(2), np.zeros(2), 0.0
    for t, row in enumerate(rows, start=1):
        size = t**-0.5
        weighted, total = weighted + size * theta, total + size
        theta = theta - size * pair()["sft"].gradient(theta[None], np.array([row]))[0]
        theta = theta * min(1.0, 0.4 / np.linalg.norm(theta))
    np.testing.assert_allclose(kept["last"][-1, 0], theta, atol=1e-12)
    np.testing.assert_allclose(kept["average"][-1, 0], weighted / total, atol=1e-12)
    assert np.linalg.norm(kept["last"], axis=-1).max() <= 0.4 + 1e-12


def test_sequential_training_ends_near_the_optimum_of_its_second_stage(monkeypatch):
    monkeypatch.setattr(run, "SEEDS", [0, 1, 2])
    for order in (["dpo", "sft"], ["sft", "dpo"]):
        end = np.array(sequential_run(order, 4096)["average"])
        distance = np.linalg.norm(end - minimum({order[1]: 1.0}), axis=1)
        assert distance.max() < 0.2


def test_alright_leaves_sequential_training_behind_and_keeps_its_bound(monkeypatch):
    monkeypatch.setattr(run, "SEEDS", [0, 1, 2])
    schedules = [build("ALRIGHT", 0.5, seed) for seed in run.SEEDS]
    joint = descend(schedules, generators(3), np.zeros((3, 2)), [256, 2048])["average"]
    floor = weighted_gaps(minimum(weights_of(0.5)), 0.5).sum()
    gaps = (weighted_gaps(joint, 0.5).sum(axis=-1) - floor).mean(axis=1)
    sequential = np.array(sequential_run(["dpo", "sft"], 2048)["average"])
    assert gaps[1] < gaps[0] < bound("average", np.array([256.0]))[0]
    assert 10 * gaps[1] < weighted_gaps(sequential, 0.5).sum(axis=-1).mean() - floor


def test_slope_of_a_power_law_is_its_exponent():
    updates = np.array(run.BUDGETS, dtype=float)
    assert slope(np.stack([3 * updates**-0.5, updates**-0.5])) == pytest.approx(-0.5)
