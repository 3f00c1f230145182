"""Gains of a cycle of interleaved updates: identities, and descents whose gains are known."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.joint import AdaptiveInterleave, Interleave
from holdfast.joint.checkpoint import reunite, separate
from holdfast.joint.progress import (
    CycleEstimates,
    efficiency_ratio,
    optimal_ratio,
    promised_benefit,
    promised_progress,
)
from holdfast.joint.schedules import WatchedInterleave, Watching

positive = st.floats(0.01, 100)


def never(name):
    raise AssertionError(f"{name} was probed")


@given(ratio=st.floats(1, 50), progress=positive, benefit=positive)
def test_the_efficiency_is_the_formula_of_the_share_of_imitation(ratio, progress, benefit):
    share = benefit / (ratio * progress + benefit)
    expected = ratio / (1 + ratio) / (1 - share)
    assert efficiency_ratio(ratio, progress, benefit) == pytest.approx(expected)


@given(ratio=st.floats(1, 50), progress=positive, benefit=st.floats(-100, 100))
def test_a_cycle_gains_more_than_reinforcement_alone_where_imitation_outdoes_it(
    ratio, progress, benefit
):
    found = efficiency_ratio(ratio, progress, benefit)
    assert (found > 1) == (benefit > progress) or benefit == pytest.approx(progress)
    assert efficiency_ratio(ratio, progress, progress) == pytest.approx(1)
    assert efficiency_ratio(math.inf, progress, benefit) == 1


def test_there_is_no_efficiency_over_a_reinforcement_that_gains_nothing():
    assert math.isnan(efficiency_ratio(3, 0.0, 1.0)) and math.isnan(efficiency_ratio(3, -1.0, 1.0))
    with pytest.raises(ValueError, match="ratio is 0"):
        efficiency_ratio(0, 1.0, 1.0)


@given(rl=positive, il=positive, rho=st.floats(0, 1), v=st.floats(0, 10), c=st.floats(0.1, 1.9))
def test_at_the_balance_a_cycle_gains_nothing(rl, il, rho, v, c):
    """m P = -Δ is what the balance is derived from."""
    m = optimal_ratio(rl, il, rho, variance_term=v, form="balance", maximum=1e9, c_rl=c)
    if 1 < m < 1e9:
        progress = promised_progress(rl, c_rl=c)
        benefit = promised_benefit(rl, il, rho, variance_term=v)
        assert efficiency_ratio(m, progress, benefit) == pytest.approx(0, abs=1e-9)


# Along a descent ----------------------------------------------------------------------------------

CURVATURE = torch.tensor([1.0, 3.0], dtype=torch.float64)
IL_OPTIMUM = torch.tensor([-2.0, 0.5], dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)
RATES = {"il": 0.05, "rl": 0.02}


def gradient(name, theta):
    return theta - IL_OPTIMUM if name == "il" else CURVATURE * theta


def rl_loss(theta):
    return float((CURVATURE * theta.square()).sum() / 2)


def descend(schedule, steps, theta):
    """Gradient descent; the RL loss taken off by each turn, by what the turn held."""
    gains = {}
    for _ in range(steps):
        turn = schedule.next(never).weights
        found = {name: [gradient(name, theta)] for name in turn}
        schedule.watch(found, [theta])
        before = rl_loss(theta)
        theta = theta - sum(RATES[name] * parts[0] for name, parts in found.items())
        gains.setdefault(tuple(turn), []).append(before - rl_loss(theta))
    return gains, theta


def test_observed_gains_are_exact_on_a_quadratic_where_a_cycle_begins_with_both():
    schedule = WatchedInterleave("il", "rl", 2, combine=True, smoothing=0.0)
    gains, _ = descend(schedule, 9, START)
    found = schedule.estimates
    # Turns: both, rl, rl, three times; the last one is not looked back on yet.
    benefit, progress = gains["il", "rl"][-1], gains["rl",][-2]
    assert found["benefit/observed"] == pytest.approx(benefit)
    assert found["progress/observed"] == pytest.approx(progress)
    assert found["efficiency/observed"] == pytest.approx(efficiency_ratio(2, progress, benefit))
    assert found["ratio"] == 2


def test_where_turns_alternate_the_sum_is_exact_and_each_part_nearly():
    """Between the two steps no RL gradient is taken."""
    schedule = WatchedInterleave("il", "rl", 2, smoothing=0.0)
    gains, _ = descend(schedule, 8, START)
    found = schedule.estimates
    # Turns: il, rl, rl, il, rl, rl, il, rl; the last looks back on the two before it.
    benefit, progress = gains["il",][-1], gains["rl",][-2]
    assert found["benefit/observed"] + found["progress/observed"] == pytest.approx(
        benefit + progress
    )
    assert found["benefit/observed"] == pytest.approx(benefit, rel=0.1)
    assert found["progress/observed"] == pytest.approx(progress, rel=0.1)


def test_promises_are_those_of_the_averages():
    schedule = WatchedInterleave("il", "rl", 3, smoothing=0.5)
    descend(schedule, 20, START)
    found = schedule.estimates
    progress = promised_progress(found["norm/rl"], smoothness_rl=found["smoothness/rl"])
    v = found["smoothness/rl"] * found["variance/il"] / (2 * found["smoothness/il"] ** 2)
    benefit = promised_benefit(
        found["norm/rl"],
        found["norm/il"],
        -found["cosine"],
        variance_term=v,
        smoothness_il=found["smoothness/il"],
    )
    assert found["progress/promised"] == pytest.approx(progress)
    assert found["benefit/promised"] == pytest.approx(benefit)
    assert found["efficiency/promised"] == pytest.approx(efficiency_ratio(3, progress, benefit))


def test_networks_that_share_nothing_are_not_compared():
    estimates = CycleEstimates(("il", "rl"), 0.0)
    base, residual = torch.tensor([1.0]), torch.tensor([2.0])
    for turn in ("il", "rl", "rl", "il", "rl"):
        parts = [base.clone(), None] if turn == "il" else [None, residual.clone()]
        estimates.update({turn: parts}, [base, residual])
        if turn == "il":
            base = base * 0.9
        else:
            residual = residual * 0.8
    assert not any(key.startswith(("cosine", "benefit", "progress")) for key in estimates.record(2))


def test_a_critic_of_reinforcement_alone_changes_no_estimate():
    def estimated(critic_scale):
        """With ``None``: no critic. Reinforcement has no gradient on the policy at first."""
        estimates = CycleEstimates(("il", "rl"), 0.5)
        theta, critic = torch.tensor([1.0, -2.0]), torch.tensor([3.0])
        for step in range(9):
            warm = step < 3
            il = {"il": [theta - 1.0, None]}
            rl = {"rl": [None if warm else 2.0 * theta, critic_scale * critic]}
            parts = il if step % 3 == 0 else rl
            estimates.update(parts, [theta, critic])
            theta = theta - (0.0 if warm and step % 3 else 0.1) * theta
            critic = 0.9 * critic
        return estimates.record(2)

    found = estimated(1.0)
    assert found == estimated(1000.0)
    # After the warm-up alone reinforcement's gradient is that on the policy.
    assert found["smoothness/rl"] == pytest.approx(2.0, rel=1e-5)
    assert found["progress/observed"] > 0


def test_a_turn_that_is_not_finite_is_no_turn():
    schedule = WatchedInterleave("il", "rl", 2, smoothing=0.0)
    _, theta = descend(schedule, 5, START)
    before = schedule.estimates
    schedule.watch({"rl": [torch.full_like(theta, math.nan)]}, [theta])
    assert schedule.estimates == before


@given(cut=st.integers(0, 12), combine=st.booleans())
def test_estimates_go_on_where_they_stood(cut, combine):
    whole = WatchedInterleave("il", "rl", 2, combine=combine)
    descend(whole, 12, START)
    first = WatchedInterleave("il", "rl", 2, combine=combine)
    _, theta = descend(first, cut, START)
    plain, tensors = separate(first.state_dict())
    second = WatchedInterleave("il", "rl", 2, combine=combine)
    second.load_state_dict(reunite(json.loads(json.dumps(plain)), tensors))
    descend(second, 12 - cut, theta)
    assert second.estimates == whole.estimates


def test_a_run_without_estimates_goes_on_with_them():
    old = Interleave("il", "rl", 2)
    for _ in range(4):
        old.next(never)
    new = WatchedInterleave("il", "rl", 2)
    new.load_state_dict(old.state_dict())
    assert new.next(never).weights == old.next(never).weights


def test_reinforcement_alone_has_no_benefit_to_estimate():
    schedule = WatchedInterleave("il", "rl", math.inf)
    descend(schedule, 4, START)
    found = schedule.estimates
    assert found["ratio"] == math.inf and "benefit/observed" not in found
    assert found["progress/observed"] > 0


def test_adaptive_cycles_record_their_gains_as_well():
    schedule = AdaptiveInterleave("il", "rl", maximum=4)
    descend(schedule, 40, START)
    assert isinstance(schedule, Watching)
    assert {"efficiency/promised", "efficiency/observed"} <= schedule.estimates.keys()
