"""Weights that change as training goes: shapes, optima by brute force, and resuming."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.joint.mixing import Fade, NoiseAware, noise_aware_weight

SIZES = st.floats(0.0, 10.0)


def never(name):
    raise AssertionError("nothing is probed")


def weights(schedule, steps):
    return [schedule.next(never).weights for _ in range(steps)]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_weight_goes_from_start_to_end_and_stays_there(shape):
    fade = Fade("sft", "rl", start=0.8, end=0.2, steps=10, shape=shape)
    found = weights(fade, 13)
    shares = [turn["sft"] for turn in found]
    assert shares[0] == pytest.approx(0.8) and shares[5] == pytest.approx(0.5)
    assert shares[10:] == pytest.approx([0.2] * 3)
    assert shares == sorted(shares, reverse=True)
    assert all(turn["rl"] == pytest.approx(1 - turn["sft"]) for turn in found)
    quarter = 0.65 if shape == "linear" else 0.2 + 0.6 * (0.5 + 0.5 * math.cos(math.pi / 4))
    assert fade.weight(2) + fade.weight(3) == pytest.approx(2 * quarter, abs=0.02)


def test_a_warm_up_rises_along_a_line_and_what_weighs_nothing_is_left_out():
    fade = Fade("sft", "rl", start=1.0, end=0.0, steps=2, warmup_steps=4, shape="linear")
    found = weights(fade, 8)
    assert [turn.get("sft", 0.0) for turn in found] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.0, 0.0]
    )
    assert found[3] == {"sft": 1.0} and found[6] == {"rl": 1.0}


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.floats(0.0, 1.0))
def test_the_noise_aware_weight_is_the_minimum_of_the_expected_error(d, s, r, target):
    weight = noise_aware_weight(d, s, r, target=target)
    grid = np.linspace(0, 1, 2001)
    error = (grid - target) ** 2 * d + grid**2 * s + (1 - grid) ** 2 * r
    at = (weight - target) ** 2 * d + weight**2 * s + (1 - weight) ** 2 * r
    assert at <= error.min() + 1e-9
    if s + r > 0:
        by_noise = r / (s + r)
        assert min(by_noise, target) - 1e-9 <= weight <= max(by_noise, target) + 1e-9


def test_its_limits_are_inverse_variances_and_the_target():
    assert noise_aware_weight(0.0, 1.0, 3.0) == 0.75
    assert noise_aware_weight(1e12, 1.0, 3.0, target=0.3) == pytest.approx(0.3)
    assert noise_aware_weight(0.0, 0.0, 0.0, target=0.3) == 0.3


def noisy(seed, step, spread):
    """Gradients around fixed means, each with its own noise."""
    draw = torch.Generator().manual_seed(1000 * seed + step)
    found = {}
    for index, name in enumerate(("sft", "rl")):
        noise = torch.randn(300, generator=draw) * spread[index]
        gradient = torch.ones(300) * index + noise
        found[name] = [gradient[:100], None, gradient[100:]]
    return found


def run(schedule, steps, spread=(0.5, 2.0), start=0):
    turns = []
    for step in range(start, start + steps):
        turns.append(schedule.next(never).weights)
        schedule.watch(noisy(0, step, spread), [])
    return turns


def make(**options):
    prior = Fade("sft", "rl", start=0.5, end=0.5, steps=1)
    return NoiseAware(prior, **{"smoothing": 0.5, "every": 1, "blend": 0.0, **options})


def test_what_is_measured_are_the_noise_and_the_distance_of_the_gradients():
    schedule = make(smoothing=0.98)
    run(schedule, 150)
    estimates = schedule.estimates
    assert estimates["variance/sft"] == pytest.approx(300 * 0.25, rel=0.15)
    assert estimates["variance/rl"] == pytest.approx(300 * 4.0, rel=0.15)
    apart = estimates["distance"] - estimates["variance/sft"] - estimates["variance/rl"]
    assert apart == pytest.approx(300, rel=0.3)


def test_the_weight_moves_to_the_less_noisy_objective_by_no_more_than_the_cap():
    schedule = make(cap=0.02)
    shares = [turn["sft"] for turn in run(schedule, 40)]
    assert max(abs(a - b) for a, b in zip(shares, shares[1:], strict=False)) <= 0.02 + 1e-12
    expected = noise_aware_weight(300, 75, 1200, target=0.5)
    assert shares[-1] == pytest.approx(expected, abs=0.05)
    other = make(cap=0.02)
    assert run(other, 40, (2.0, 0.5))[-1]["sft"] < 0.3


def test_the_prior_alone_is_followed_where_all_of_the_blend_is_its():
    prior = Fade("sft", "rl", start=0.8, end=0.1, steps=20)
    schedule = NoiseAware(prior, blend=1.0, cap=1.0)
    assert [t["sft"] for t in run(schedule, 25)] == pytest.approx(
        [max(prior.weight(step), 0.05) for step in range(25)]
    )


def test_a_critic_that_one_objective_alone_trains_is_no_part_of_what_is_measured():
    plain, other = make(), make()
    for step in range(6):
        gradients = noisy(0, step, (0.5, 2.0))
        critic = 100.0 * torch.randn(7, generator=torch.Generator().manual_seed(step))
        for schedule in (plain, other):
            schedule.next(never)
        plain.watch(gradients, [])
        other.watch({"sft": [*gradients["sft"], None], "rl": [*gradients["rl"], critic]}, [])
    assert plain.estimates == other.estimates


def test_gradients_that_are_not_finite_leave_no_trace():
    schedule = make()
    run(schedule, 5)
    before = schedule.estimates
    broken = noisy(0, 6, (0.5, 2.0))
    broken["rl"][0][3] = math.nan
    schedule.watch(broken, [])
    assert schedule.estimates == before


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_schedule_goes_on_as_the_one_that_was_not_stopped(every):
    whole, stopped, resumed = (make(every=every) for _ in range(3))
    run(whole, 7), run(stopped, 7)
    state = stopped.state_dict()
    tensors = state.pop("before")
    resumed.load_state_dict({**json.loads(json.dumps(state)), "before": tensors})
    assert run(resumed, 6, start=7) == run(whole, 6, start=7)
    fade = Fade("a", "b", steps=5)
    weights(fade, 3)
    again = Fade("a", "b", steps=5)
    again.load_state_dict(fade.state_dict())
    assert weights(again, 4) == weights(fade, 4)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda: Fade("a", "a", steps=1), "first"),
        (lambda: Fade("a", "b", steps=0), "steps"),
        (lambda: Fade("a", "b", steps=1, start=1.5), "start"),
        (lambda: Fade("a", "b", steps=1, shape="step"), "shape"),
        (lambda: make(cap=0.0), "cap"),
        (lambda: make(lowest=0.9, highest=0.1), "lowest"),
        (lambda: make(target=-1.0), "target"),
    ],
)
def test_what_cannot_be_is_refused_by_name(bad, named):
    with pytest.raises(ValueError, match=named):
        bad()
