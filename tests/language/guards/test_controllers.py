"""Controllers: bounds, directions, what they hear, and what they remember."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from holdfast.language.guards import (
    AdaptiveEntropy,
    AdaptiveKl,
    SafeKL,
    Surrogate,
    soft_minimum,
)

STEPS = st.lists(
    st.tuples(st.floats(0, 5), st.floats(0, 8), st.floats(-2, 2)), min_size=1, max_size=40
)


def heard(controller, steps):
    for kl, entropy, reward in steps:
        controller.observe({"kl": kl, "entropy": entropy, "reward": reward, "loss": kl})
    return controller


def test_adaptive_kl_follows_its_formula_and_is_at_rest_at_the_target():
    control = AdaptiveKl(0.2, target=0.1, gain=0.1)
    control.observe({"kl": 0.11})
    assert control.coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    control.observe({"kl": 100.0})
    assert control.coefficient == pytest.approx(0.2 * 1.01 * 1.02)  # clipped
    before = control.coefficient
    control.observe({"kl": 0.1})
    assert control.coefficient == pytest.approx(before)
    control.observe({})
    control.observe({"kl": math.nan})
    assert control.coefficient == pytest.approx(before)


def test_adaptive_entropy_acts_only_while_the_entropy_is_low():
    control = AdaptiveEntropy(0.1, target=1.0, step=0.04, lowest=0.05, highest=0.15)
    assert control.coefficient == 0.0  # nothing was heard yet
    control.observe({"entropy": 0.9})
    assert control.coefficient == pytest.approx(0.14)
    control.observe({"entropy": 0.9})
    assert control.coefficient == pytest.approx(0.15)
    control.observe({"entropy": 1.1})
    assert control.coefficient == 0.0 and control.setting == pytest.approx(0.11)
    for _ in range(9):
        control.observe({"entropy": 1.1})
    assert control.setting == pytest.approx(0.05)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_the_threshold_of_safe_stays_in_its_bounds_and_below_it_nothing_is_penalised(steps):
    control = heard(SafeKL(warmup=5, window=4), steps)
    assert 0.1 <= control.threshold <= 0.6
    assert control.gate >= 0.5
    assert (control.coefficient > 0) == (control.kl > control.threshold)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 8), st.floats(0, 8))
def test_the_penalty_of_safe_grows_with_the_kl_and_falls_with_the_entropy(kl, more, entropy, high):
    def coefficient(kl, entropy):
        return heard(SafeKL(), [(kl, entropy, 0.0)]).coefficient

    assert coefficient(kl + more, entropy) >= coefficient(kl, entropy)
    assert coefficient(kl, entropy + high) <= coefficient(kl, entropy)


def test_the_penalty_of_safe_has_the_gradient_of_the_squared_excess():
    control = heard(SafeKL(), [(2.0, 0.4, 0.0)])
    kl = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    squared = 0.1 * torch.relu(kl - control.threshold).square() * max(0.5, 2.0 / 0.5)
    (expected,) = torch.autograd.grad(squared, kl)
    (found,) = torch.autograd.grad(control.penalty(kl), kl)
    assert found > 0
    assert_close(found, expected)


def test_safe_smooths_the_kl_and_drives_its_threshold_by_the_velocity_of_the_reward():
    control = SafeKL(warmup=0)
    control.update(1.0, 1.0, 0.5)
    control.update(2.0, 1.0, 0.7)
    assert control.kl == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    first, second = -0.001, 0.05 * (0.7 - 0.5) - 0.001
    pid = 0.3 * second + 0.01 * (first + second) + 0.05 * (second - first)
    assert control.pid == pytest.approx(pid)
    assert control.threshold == pytest.approx((0.3 + pid) * 0.8)  # it stands still


@pytest.mark.parametrize(
    ("rewards", "phase"),
    [([0.1] * 2, 1.5), ([0.1] * 4 + [0.5] * 4, 1.2), ([0.1] * 8, 0.8), ([0.9] * 8, 1.0)],
)
def test_the_phase_follows_the_rewards_of_two_windows(rewards, phase):
    control = SafeKL(warmup=4, window=4)
    heard(control, [(0.0, 1.0, reward) for reward in rewards])
    assert control.phase == phase


def test_a_step_that_nobody_rewarded_or_measured_moves_safe_as_little_as_can_be():
    control = heard(SafeKL(), [(0.5, 1.0, 0.3)])
    state = control.state_dict()
    control.update(math.nan, 1.0, 0.4)
    assert control.state_dict() == state
    control.update(0.6, 1.0, None)
    assert control.rewards == [0.3] and control.steps == 2


CONTROLLERS = [
    lambda: AdaptiveKl(0.2, target=0.1),
    lambda: AdaptiveEntropy(0.1, target=1.0),
    lambda: SafeKL(warmup=3, window=4),
    lambda: Surrogate(3, 2),
]


@pytest.mark.parametrize("make", CONTROLLERS)
@settings(max_examples=10, deadline=None)
@given(first=STEPS, then=STEPS)
def test_a_controller_goes_on_after_a_resume_as_if_nothing_had_happened(make, first, then):
    whole, stopped = heard(make(), first), heard(make(), first)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.record == stopped.record
    assert heard(resumed, then).record == heard(whole, then).record


@pytest.mark.parametrize("make", CONTROLLERS[:3])
def test_a_new_controller_says_what_it_is_at(make):
    assert all(math.isfinite(value) for value in make().record.values())
    json.dumps(make().state_dict(), allow_nan=False)


def losses(surrogate, values):
    for value in values:
        surrogate.observe({"loss": value})
    return surrogate.exhausted


def test_rollouts_have_served_enough_once_a_pass_has_a_larger_loss_than_the_one_before():
    assert not losses(Surrogate(4), [3.0, 2.0, 1.0])
    rising = Surrogate(4)
    assert losses(rising, [3.0, 2.0, 2.5])
    assert rising.record == {"surrogate_increase": 0.5}
    rising.renew()
    assert not losses(rising, [9.0]) and not rising.exhausted


def test_losses_are_compared_by_whole_passes():
    by_pass = Surrogate(3, 2)
    assert not losses(by_pass, [1.0, 5.0, 0.9])
    assert not losses(by_pass, [4.9])
    assert losses(by_pass, [2.0, 4.9])
    assert by_pass.increase == pytest.approx((6.9 - 5.8) / 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=4), st.floats(0.05, 5.0))
def test_a_soft_minimum_lies_between_minimum_and_mean(values, alpha):
    heads = torch.tensor(values, dtype=torch.float64)
    found = soft_minimum(heads, alpha)
    assert heads.min() - 1e-9 <= found <= heads.mean() + 1e-9


def test_the_limits_of_a_soft_minimum_are_minimum_and_mean():
    heads = torch.tensor([[1.0, 3.0], [-2.0, 0.5]], dtype=torch.float64)
    assert_close(soft_minimum(heads, 1e-3), heads.amin(-1), atol=1e-2, rtol=0.0)
    assert_close(soft_minimum(heads, 1e4), heads.mean(-1), atol=1e-3, rtol=0.0)
    same = torch.full((4, 2), 0.7)
    assert_close(soft_minimum(same, 0.3), same[:, 0])
    assert torch.equal(soft_minimum(heads[:, :1]), heads[:, 0])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AdaptiveKl(0.0, target=1.0), "coefficient"),
        (lambda: AdaptiveKl(1.0, target=math.inf), "target"),
        (lambda: AdaptiveEntropy(2.0), "coefficient"),
        (lambda: SafeKL(base=0.05), "base"),
        (lambda: SafeKL(smoothing=1.0), "smoothing"),
        (lambda: SafeKL(window=1), "window"),
        (lambda: Surrogate(1), "passes"),
        (lambda: soft_minimum(torch.zeros(1, 2), 0.0), "alpha"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()
