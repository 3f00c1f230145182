from functools import cache

import numpy as np
import pytest

from holdfast.bellman import (
    Constant,
    Harmonic,
    Linear,
    Networks,
    SaddleProblem,
    Sgda,
    StabilityResult,
    Tables,
    TabularMDP,
    Transitions,
    measure_controls,
    measure_stability,
    mlp,
    stability,
)
from holdfast.bellman.draws import neighbours
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend
from holdfast.bellman.stability import _measure, default_settings, fit_slope, planned
from holdfast.errors import TrainingError

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


def test_by_default_runs_come_near_their_saddles_on_small_data_too():
    """Ten passes over 32 rows from 0 would end nearly there."""
    model = TabularMDP.random(2, 2, 0.8, seed=1)
    options = dict(sizes=(32, 64), datasets=2, replaced=3, max_steps=8_000)
    result = measure_stability(model, **options)
    start = np.linalg.norm(model.soft_policy_iteration().q)
    assert (result.optimisation_error < 0.1 * start).all() and result.control == 0.0
    assert result.steps == (8_000, 8_000)
    np.testing.assert_allclose(result.epsilon, result.saddle_shift.mean(1), rtol=0.5)
    short = measure_stability(model, settings=STEP, **options)
    assert short.steps == (320, 640)


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


def test_distances_are_what_runs_alone_give():
    """Each run of a family on its own, against the batch: what is reported is what it says."""
    data, spare = MODEL.sample(60, seed=0), MODEL.sample(60, seed=1)
    family = neighbours(data, spare, 6, np.random.default_rng(0))
    problem = SaddleProblem(data, 0.5, Tables(2, 2))
    settings = Sgda(steps=200, step=Harmonic(20.0, 40.0), step_ratio=2.0)
    found = _measure(problem, [family], settings, 5, True, None)
    ends = [
        descend_ascend(problem, Batch.stack([each]), settings, seed=5, groups=[0])
        for each in family
    ]
    primal, dual = (
        np.array([getattr(end, name)[0].numpy() for end in ends]) for name in ("primal", "dual")
    )
    gone = np.linalg.norm(primal - primal[0], axis=1), np.linalg.norm(dual - dual[0], axis=1)
    assert gone[1][2:].mean() > 0.05 * gone[0][2:].mean() > 0, "the dual's share shows"
    assert found[0][0] == pytest.approx((gone[0] + gone[1])[2:].mean(), abs=1e-14)
    assert found[1][0] == pytest.approx(np.abs(primal - primal[0]).max(1)[2:].mean(), abs=1e-14)
    exact = np.array([[x.ravel() for x in problem.with_transitions(d).exact()] for d in family])
    shift = np.linalg.norm(exact[2:] - exact[0], axis=2).sum(1).mean()
    assert found[2][0] == pytest.approx(shift)
    off = [np.linalg.norm(x[0] - e) for x, e in zip((primal, dual), exact[0], strict=True)]
    assert found[3][0] == pytest.approx(sum(off))
    assert found[4] == 0.0 and found[5]


def test_linear_functions_of_pairs_are_measured_as_a_table(monkeypatch):
    options = dict(sizes=(40, 80), datasets=2, replaced=2, passes=2, settings=STEP)
    table = measure_stability(MODEL, **options)
    features = Linear(np.eye(4).reshape(2, 2, 4))
    linear = measure_stability(MODEL, approximator=features, **options)
    # Tables are drawn again until every pair is there, which at these sizes they are at once.
    assert table.rejected == linear.rejected == (0, 0)
    np.testing.assert_allclose(linear.distance, table.distance, atol=1e-10)
    np.testing.assert_allclose(linear.saddle_shift, table.saddle_shift, atol=1e-6)
    np.testing.assert_allclose(linear.optimisation_error, table.optimisation_error, atol=1e-6)


def test_ends_take_part():
    model = TabularMDP.gridworld(2, 2, 0.6, slip=0.3, goal=2.0)
    result = measure_stability(
        model, sizes=(100, 400), datasets=3, replaced=4, passes=4, settings=STEP
    )
    assert result.control == 0.0 and (result.distance > 0).all()
    assert (result.saddle_shift > 0).all() and result.epsilon[1] < result.epsilon[0]
    assert (result.optimisation_error.mean(1) < 2.0).all()


def test_runs_that_diverge_have_no_slope():
    wild = Sgda(steps=1, step=Constant(5.0), step_ratio=2.0)
    options = dict(sizes=(32, 64), datasets=2, replaced=2, passes=6, settings=wild)
    with pytest.raises(TrainingError, match="runs on 32 rows diverged within 192 steps.*settings"):
        measure_stability(MODEL, **options)
    with np.errstate(all="ignore"):
        found = measure_stability(MODEL, may_diverge=True, **options)
    assert not found.epsilon[0] < 1e9


def test_a_problem_stands_for_its_rows_and_numbers():
    rows = MODEL.sample_trajectories(40, 10, seed=0)
    problem = SaddleProblem.tabular(rows, 0.4, anchor_action=1, weight=2.0)
    options = dict(sizes=(50, 100), datasets=2, replaced=2, passes=1, settings=STEP)
    plain = measure_stability(rows, discount=0.4, anchor_action=1, weight=2.0, **options)
    np.testing.assert_array_equal(measure_stability(problem, **options).distance, plain.distance)


def test_a_ratio_that_leaves_the_saddle_is_refused():
    """Too slowly for any number to show it: runs stay small and end far from their saddles."""
    model = TabularMDP.random(3, 2, 0.95, seed=1)
    common = Sgda(steps=1, step=Harmonic(40.0, 75.0), step_ratio=1.0)
    options = dict(sizes=(64, 128), datasets=2, replaced=2, settings=common)
    with pytest.raises(TrainingError, match="leaves the saddle.*set step_ratio to 1.25 or more"):
        measure_stability(model, **options)
    found = measure_stability(model, may_diverge=True, **options)
    assert (found.optimisation_error > 100).all() and (found.distance < 1e9).all()


def test_data_sets_drawn_again_are_counted(monkeypatch):
    def seldom(draw, n, approximator, source, rng):
        return (*draw(n, rng), 3)

    monkeypatch.setattr(stability, "covered_dataset", seldom)
    found = measure_stability(
        MODEL, sizes=(64, 128), datasets=2, replaced=1, passes=0.1, settings=STEP
    )
    assert found.rejected == (6, 6) and found.table()[0]["rejected"] == 6


def test_the_weight_of_the_anchor_reaches_the_runs():
    model = TabularMDP.bus(
        3, 0.6, cost=0.5, replacement=0.6, increments=(0.6, 0.3, 0.1), drives_on=True
    )
    options = dict(
        sizes=(100, 200), datasets=2, replaced=2, passes=1, settings=STEP, anchor_action=1
    )
    plain, heavy = (measure_stability(model, weight=w, **options) for w in (1.0, 2.0))
    np.testing.assert_allclose(plain.saddle_shift, heavy.saddle_shift)
    assert (plain.distance != heavy.distance).all()


def test_intervals_of_few_data_sets_hold_the_slope_as_often_as_they_say():
    """Simulated power laws: a plain bootstrap of four data sets held it in 85 %."""
    rng = np.random.default_rng(0)
    sizes = np.array([64, 128, 256, 512])
    held = 0
    for _ in range(300):
        values = np.exp(0.4 * rng.standard_normal((4, 4))) / sizes[:, None]
        _, (low, high) = fit_slope(sizes, values, rng, draws=300)
        held += low <= -1.0 <= high
    assert 0.92 * 300 <= held <= 0.99 * 300


def test_networks_and_observations_are_told_what_to_give():
    rng = np.random.default_rng(0)
    state, ahead = rng.standard_normal((2, 200, 2))
    logged = Transitions(state, rng.integers(2, size=200), rng.random(200), ahead)
    nets = Networks(mlp(2, (4,), 2, seed=0), mlp(2, (4,), 2, seed=1))
    with pytest.raises(ValueError, match=r"settings must be given for networks.*Sgda\("):
        measure_stability(logged, discount=0.5, sizes=(20, 40), approximator=nets)
    with pytest.raises(ValueError, match="give an approximator"):
        measure_stability(logged, discount=0.5, sizes=(20, 40))
