from functools import cache

import numpy as np
import pytest

from holdfast.bellman import (
    Harmonic,
    Networks,
    SaddleProblem,
    Sgda,
    StabilityResult,
    TabularMDP,
    Transitions,
    measure_controls,
    measure_stability,
    mlp,
)
from holdfast.bellman.stability import default_settings, fit_slope, planned

MODEL = TabularMDP.random(2, 2, 0.5, seed=0)
SIZES = (32, 64, 128, 256)
STEP = Sgda(steps=1, step=Harmonic(20.0, 40.0), step_ratio=2.0)


@cache
def measured() -> StabilityResult:
    return measure_stability(
        MODEL, sizes=SIZES, datasets=6, replaced=12, passes=6, settings=STEP, seed=0
    )


def test_stability_falls_as_the_inverse_of_the_size():
    result = measured()
    assert -1.35 < result.slope < -0.7
    assert result.interval[0] < result.slope < result.interval[1]


def test_the_exact_shift_falls_as_the_inverse_of_the_size():
    result = measured()
    assert -1.3 < result.saddle_slope < -0.75
    np.testing.assert_allclose(result.saddle_shift.mean(1) * SIZES, 2.5, rtol=0.7)


def test_a_data_set_against_itself_gives_exactly_0():
    assert measured().control == 0.0


def test_runs_are_nearer_to_each_other_than_to_their_saddle():
    """Coupled noise cancels: the reason why stability is not read off the optimisation error."""
    result = measured()
    assert (result.distance < result.optimisation_error).all()


def test_everything_is_a_function_of_the_seed():
    options = dict(sizes=(32, 64), datasets=2, replaced=2, passes=1, settings=STEP)
    first, second, third = (measure_stability(MODEL, seed=s, **options) for s in (3, 3, 4))
    np.testing.assert_array_equal(first.distance, second.distance)
    assert (first.distance != third.distance).all()


def test_without_coupling_noise_drowns_the_replaced_row():
    """The negative control: the distance no longer tells of one row, and has no slope of -1."""
    options = dict(sizes=(64, 256), datasets=3, replaced=3, passes=3, settings=STEP)
    coupled = measure_stability(MODEL, **options)
    free = measure_stability(MODEL, coupled=False, **options)
    assert free.control > 0.0
    assert (free.epsilon > 3 * coupled.epsilon).all()


def test_a_users_own_rows_and_an_anchor():
    model = TabularMDP.bus(
        3, 0.6, cost=0.5, replacement=0.6, increments=(0.6, 0.3, 0.1), drives_on=True
    )
    logged = model.sample_trajectories(30, 40, seed=0)
    result = measure_stability(
        logged,
        discount=0.6,
        sizes=(100, 400),
        datasets=3,
        replaced=4,
        passes=3,
        settings=STEP,
        anchor_action=1,
    )
    assert result.control == 0.0 and result.epsilon[1] < result.epsilon[0]
    assert np.isfinite(result.saddle_shift).all() and len(result.table()) == 2


def test_networks_are_compared_as_functions():
    rng = np.random.default_rng(0)
    state, ahead = rng.standard_normal((2, 200, 2))
    logged = Transitions(state, rng.integers(2, size=200), rng.random(200), ahead)
    nets = Networks(mlp(2, (4,), 2, seed=0), mlp(2, (4,), 2, seed=1))
    result = measure_stability(
        logged,
        discount=0.5,
        sizes=(20, 80),
        datasets=2,
        replaced=3,
        passes=2,
        settings=Sgda(steps=1, step=Harmonic(4.0, 40.0), batch_size=4),
        approximator=nets,
    )
    assert result.control == 0.0
    assert (result.function_distance.mean(1) > 0).all() and np.isnan(result.saddle_slope)


def test_the_slope_of_a_power_law_is_its_exponent():
    rng = np.random.default_rng(0)
    sizes = np.array([10, 100, 1000])
    noise = rng.lognormal(sigma=0.3, size=(3, 40))
    slope, (low, high) = fit_slope(sizes, 5.0 * sizes[:, None] ** -1.5 * noise, rng)
    assert slope == pytest.approx(-1.5, abs=0.05) and low < -1.5 < high and high - low < 0.2
    exact, interval = fit_slope(sizes, sizes[:, None] ** -0.5 * np.ones((3, 2)), rng)
    assert (exact, *interval) == pytest.approx((-0.5, -0.5, -0.5))


def test_steps_are_passes_over_the_data():
    assert planned(STEP, 100, 3.0, 10_000).steps == 300
    assert planned(Sgda(1, STEP.step, batch_size=8), 100, 4.0, 10_000).steps == 50
    assert planned(Sgda(1, STEP.step, batch_size=None), 100, 4.0, 10_000).steps == 4
    assert planned(STEP, 100, 3.0, 20).steps == 20


def test_default_steps_are_small_enough_for_single_rows():
    """The first step times the curvature of one row's loss, in either player, is at most one."""
    for discount in (0.5, 0.9):
        model = TabularMDP.random(2, 2, discount, seed=0)
        chosen = default_settings(SaddleProblem.tabular(model.sample(100, seed=0), discount))
        assert chosen.step(0) * 2 * (1 + discount) ** 2 <= 1.0
        assert chosen.step(0) * chosen.step_ratio * 2 * discount**2 <= 1.0


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (MODEL, {"sizes": (64,)}, "a slope needs two"),
        (MODEL, {"datasets": 1}, "datasets is 1"),
        (MODEL, {"sizes": (4, 8)}, "none had every pair 3 times"),
        (MODEL.sample(100, seed=0), {"discount": 0.5}, "half of them must be left"),
        (MODEL.sample(100, seed=0), {}, "discount must be given"),
    ],
)
def test_what_cannot_be_measured_is_told(source, change, message):
    with pytest.raises(ValueError, match=message):
        measure_stability(source, **({"sizes": (64, 128)} | change))


def test_negative_controls_do_not_look_like_the_measurement():
    """Section C.2 of the protocol: no coupling, noise that never dies away, one common step."""
    model = TabularMDP.random(3, 2, 0.95, seed=0)
    settings = Sgda(steps=1, step=Harmonic(40.0, 400.0), step_ratio=8.0)
    found = measure_controls(model, settings, sizes=(32, 128), datasets=2, replaced=2, passes=6)
    measured = found["measured"]
    assert measured.control == 0.0 and found["constant step"].control == 0.0
    assert (found["own order"].epsilon > 2 * measured.epsilon).all()
    assert (found["common step"].epsilon > 1.5 * measured.epsilon).all()
    assert found["own order"].control > 0.0
