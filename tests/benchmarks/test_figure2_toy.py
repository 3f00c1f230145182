"""The toy of Figure 2: closed forms, the update rule, and where the methods end."""

import math

import numpy as np
import pytest

from benchmarks.figure2_toy.run import (
    CHOICE,
    NAMES,
    START,
    THRESHOLD,
    build,
    compute,
    descend,
)
from holdfast.joint import Alright, Mix, Sequential, Stage


def test_gradients_have_the_closed_form_of_two_answers():
    objectives = build(CHOICE)
    reference = objectives["dpo"].reference
    theta = np.array([1.7, -0.4])
    # log-odds of y over y' are θ_1 / 2; of y_w over y_l they are (θ_1 + θ_2) / 2.
    wrong = 1 / (1 + math.exp(theta[0] / 2))
    np.testing.assert_allclose(objectives["sft"].gradient(theta[None])[0], [-wrong / 2, 0.0])
    margin = (theta.sum() - reference.sum()) / 2
    disliked = 1 / (1 + math.exp(margin))
    np.testing.assert_allclose(objectives["dpo"].gradient(theta[None])[0], [-disliked / 2] * 2)


def test_reference_is_a_thousand_sft_updates_from_zero():
    first = 0.0
    for _ in range(1000):
        first -= 0.01 * (-0.5 / (1 + math.exp(first / 2)) + 0.001 * first)
    np.testing.assert_allclose(build(CHOICE)["dpo"].reference, [first, 0.0], atol=1e-12)


def test_mixed_update_is_a_gradient_step_with_weight_decay():
    objectives = build(CHOICE)
    outcome = descend(objectives, [Mix({"dpo": 0.25, "sft": 0.75})], START, 1)
    gradients = {name: objectives[name].gradient(START[None])[0] for name in NAMES}
    step = 0.25 * gradients["dpo"] + 0.75 * gradients["sft"] + 0.001 * START
    np.testing.assert_allclose(outcome.theta[0], START - 0.01 * step, atol=1e-14)
    assert outcome.updates.tolist() == [[0.25, 0.75]]


def test_ended_run_rests_while_others_go_on():
    objectives = build(CHOICE)
    short, long = Sequential({"sft": 5}), Sequential({"sft": 40})
    together = descend(objectives, [short, long], START, 100)
    alone = descend(objectives, [Sequential({"sft": 5})], START, 100)
    np.testing.assert_array_equal(together.theta[0], alone.theta[0])
    assert together.updates.tolist() == [[0, 5], [0, 40]]


def test_stage_ends_at_the_first_loss_within_the_threshold():
    objectives = build(CHOICE)
    stage = Stage({"dpo": 1.0}, steps=10_000, loss_below=THRESHOLD)
    outcome = descend(objectives, [Sequential([stage])], START, 10_000)
    made = int(outcome.updates[0, 0])
    before = descend(objectives, [Sequential({"dpo": made - 1})], START, 10_000)
    assert 0 < made < 10_000
    assert objectives["dpo"].loss(outcome.theta)[0] <= THRESHOLD
    assert objectives["dpo"].loss(before.theta)[0] > THRESHOLD


def test_each_seed_follows_its_own_coin():
    schedules = [Alright({"dpo": 0.5, "sft": 0.5}, seed) for seed in (0, 1)]
    outcome = descend(build(CHOICE), schedules, START, 200)
    assert not np.array_equal(outcome.theta[0], outcome.theta[1])
    assert outcome.updates.sum(axis=1).tolist() == [200, 200]


@pytest.mark.parametrize(
    ("method", "distance"), [("DPO→SFT", 0.050), ("SFT→DPO", 0.050), ("MAXRIGHT", 0.017)]
)
def test_final_ideal_distance_is_that_of_an_independent_implementation(method, distance):
    assert compute(CHOICE, method)["ideal_distance"][0] == pytest.approx(distance, abs=5e-4)
