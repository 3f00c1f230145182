import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from holdfast.control.losses import (
    expectile,
    idql_critic,
    idql_value,
    implicit_choice,
    implicit_weights,
    soft_update,
)
from holdfast.control.policies import untrained_copy

NAN = math.nan
seeds = st.integers(0, 2**31)
levels = st.floats(0.05, 0.95)


def normal(seed: int, *shape: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Expectiles ---------------------------------------------------------------------------------------


def test_an_expectile_weighs_both_sides():
    diff = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([0.4, 0, 3.6], dtype=torch.float64)
    torch.testing.assert_close(expectile(diff, 0.9), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(expectile(diff, 0.5), 0.5 * diff.square())


@given(seeds, levels)
def test_turned_round_an_expectile_is_that_of_the_other_level(seed, tau):
    diff = normal(seed, 9)
    torch.testing.assert_close(expectile(-diff, tau), expectile(diff, 1 - tau))


@given(seeds, levels)
def test_the_value_at_rest_is_the_expectile_of_the_data(seed, tau):
    """Where tau sum of what lies above equals (1 - tau) sum of what lies below, by bisection."""
    drawn = normal(seed, 1, 30)
    low, high = drawn.min().item(), drawn.max().item()
    for _ in range(80):
        middle = 0.5 * (low + high)
        away = drawn - middle
        if tau * away.clamp(min=0).sum() > (1 - tau) * (-away).clamp(min=0).sum():
            low = middle
        else:
            high = middle
    leaf = torch.full((30,), low, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(idql_value(leaf, drawn, tau=tau).total, leaf)
    assert slope.sum().item() == pytest.approx(0, abs=1e-9)
    assert slope.abs().max() > 0


def test_values_learn_from_the_smaller_critic():
    """Smaller Q 2 and -1, values 0 and 1: 0.8 * 4 and 0.2 * 4."""
    leaf = torch.tensor([0.0, 1.0], requires_grad=True)
    qs = torch.tensor([[2.0, 5.0], [3.0, -1.0]], requires_grad=True)
    terms = idql_value(leaf, qs, tau=0.8)
    assert terms.total.item() == pytest.approx(4.0) and terms.count.item() == 2
    assert {name: value.item() for name, value in terms.metrics.items()} == {
        "value": 1,
        "advantage": 0,
        "better_than_value": 1,
    }
    terms.total.backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([-3.2, 0.8]))
    assert qs.grad is None


# Critics ------------------------------------------------------------------------------------------


def test_critics_worked_example():
    """Targets 1 + 10/2 = 6 and, at the end of an episode, 1: squares 4, 1 and 25, 4."""
    qs = torch.tensor([[4.0, 0.0], [1.0, 3.0]], requires_grad=True)
    after = torch.tensor([10.0, NAN])
    ended = torch.tensor([False, True])
    terms = idql_critic(qs, torch.ones(2), after, ended, discount=0.5)
    assert [terms.total.item(), terms.count.item()] == [34, 2]
    assert {name: value.item() for name, value in terms.metrics.items()} == {"q": 4, "q_target": 7}
    terms.total.backward()
    assert qs.grad.tolist() == [[-4, -2], [-10, 4]]


@given(seeds, st.integers(1, 4))
def test_critics_learn_apart_and_from_constants(seed, critics):
    qs = normal(seed, critics, 6).requires_grad_()
    rewards, after = normal(seed + 1, 2, 6).requires_grad_()
    ended = normal(seed + 2, 6) > 0
    terms = idql_critic(qs, rewards, after, ended, discount=0.9)
    (slope,) = torch.autograd.grad(terms.total, qs, retain_graph=True)
    for row in range(critics):
        leaf = qs[row : row + 1].detach().requires_grad_()
        alone = idql_critic(leaf, rewards, after, ended, discount=0.9)
        (expected,) = torch.autograd.grad(alone.total, leaf)
        torch.testing.assert_close(slope[row : row + 1], expected)
    assert torch.autograd.grad(terms.total, rewards, allow_unused=True) == (None,)


# Candidates ---------------------------------------------------------------------------------------


def test_candidates_weigh_by_whether_they_beat_the_value():
    q = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]], dtype=torch.float64)
    v = torch.tensor([2.0, -0.5], dtype=torch.float64)
    expected = torch.tensor([[0.3, 0.3, 0.7], [0.7, 0.3, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(implicit_weights(q, v, 0.7), expected, rtol=1e-15, atol=0)


@given(seeds, levels)
def test_weighted_candidates_are_worth_the_value_that_expectile_regression_finds(seed, tau):
    """At the expectile V of Q, the weighted mean of Q is V: the policy implicit in that value."""
    q = normal(seed, 1, 40)
    v = q.mean(-1)
    for _ in range(200):
        weights = implicit_weights(q, v, tau)
        v = (weights * q).sum(-1) / weights.sum(-1)
    leaf = v.expand(40).clone().requires_grad_()
    (slope,) = torch.autograd.grad(idql_value(leaf, q, tau=tau).total, leaf)
    assert slope.sum().item() == pytest.approx(0, abs=1e-9)


def test_candidates_are_drawn_by_weight_or_the_best_is_taken():
    q = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20000, 4)
    v = torch.full((20000,), 2.5)
    drawn = implicit_choice(q, v, 0.7, generator=torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / 20000
    expected = torch.tensor([0.3, 0.3, 0.3, 0.7]) / 1.6
    assert (shares - expected).abs().max() < 0.015  # about four standard errors
    again = implicit_choice(q, v, 0.7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert (implicit_choice(q, v, 0.7) == 3).all()


# Targets ------------------------------------------------------------------------------------------


def networks() -> tuple[nn.Module, nn.Module]:
    found = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    followed, following = copy.deepcopy(found), copy.deepcopy(found)
    for place, part in enumerate(followed.parameters()):
        nn.init.constant_(part, place + 1.0)
    for part in following.parameters():
        nn.init.constant_(part, 0.0)
    followed[1].running_mean.fill_(7.0)
    return following, followed


def test_a_target_follows_at_its_rate():
    target, online = networks()
    for _ in range(3):
        soft_update(target, online, 0.5)
    for place, part in enumerate(target.parameters()):
        torch.testing.assert_close(part, torch.full_like(part, (place + 1) * (1 - 0.5**3)))
        assert part.grad is None
    assert (target[1].running_mean == 7).all()
    buffers = untrained_copy(networks()[0])
    soft_update(buffers, online, 0.5)
    assert torch.equal(buffers.get_buffer("0.weight"), 0.5 * online[0].weight)
    soft_update(target, online, 1.0)
    for part, other in zip(target.parameters(), online.parameters(), strict=True):
        assert torch.equal(part, other)


# Errors -------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    zeros, flags = torch.zeros(2), torch.zeros(2).bool()
    with pytest.raises(ValueError, match="tau"):
        expectile(zeros, 1.0)
    with pytest.raises(ValueError, match="target_qs"):
        idql_value(zeros, zeros)
    with pytest.raises(ValueError, match="target_qs"):
        idql_value(zeros, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="qs"):
        idql_critic(torch.zeros(0, 2), zeros, zeros, flags, discount=0.9)
    with pytest.raises(ValueError, match="terminated"):
        idql_critic(torch.zeros(2, 2), zeros, zeros, zeros, discount=0.9)
    with pytest.raises(ValueError, match="next_values"):
        idql_critic(torch.zeros(2, 2), zeros, zeros + NAN, flags, discount=0.9)
    with pytest.raises(ValueError, match="discount"):
        idql_critic(torch.zeros(2, 2), zeros, zeros, flags, discount=2.0)
    with pytest.raises(ValueError, match="v "):
        implicit_weights(torch.zeros(2, 3), torch.zeros(3), 0.7)
    with pytest.raises(ValueError, match="tau"):
        implicit_choice(torch.zeros(2, 3), zeros, 0.0)
    with pytest.raises(ValueError, match="rate"):
        soft_update(*networks(), 0.0)
    with pytest.raises(ValueError, match="parameters"):
        soft_update(nn.Linear(1, 1), nn.Linear(1, 2), 0.5)
