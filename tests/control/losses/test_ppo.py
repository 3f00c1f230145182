import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.control.losses import ppo, value_loss

seeds = st.integers(0, 2**31)


def draw(seed: int, rows: int = 12):
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    old = -3 * torch.rand(rows, **size)
    return old + 0.4 * torch.randn(rows, **size), old, torch.randn(rows, **size)


def test_worked_example():
    """Ratios 1/2, 1 and 2, with advantage 1 and then with -2; epsilon 0.2.

    Advantage 1: 1/2 + 1 + 6/5 = 2.7. Advantage -2: the ratios that count are 4/5, 1 and 2, so 7.6.
    Four of six ratios are out of range. The k3 estimates are r - 1 - log r.
    """
    logps = torch.tensor([0.5, 1, 2, 0.5, 1, 2], dtype=torch.float64).log().requires_grad_()
    gains = torch.tensor([1.0, 1, 1, -2, -2, -2])
    terms = ppo(logps, torch.zeros(6), gains, epsilon=0.2)
    assert terms.total.item() == pytest.approx(7.6 - 2.7)
    assert terms.count.item() == 6
    kl = 2 * (0.5 - 1 - math.log(0.5) + 2 - 1 - math.log(2))
    found = {name: value.item() for name, value in terms.metrics.items()}
    assert found == {"approx_kl": pytest.approx(kl), "clip_fraction": 4, "ratio": 7}
    (slope,) = torch.autograd.grad(terms.total, logps)
    torch.testing.assert_close(slope, torch.tensor([-0.5, -1, 0, 0, 2, 4], dtype=torch.float64))


def test_the_divergence_is_from_the_old_policy():
    """One action became four times as likely: estimate 4 - 1 - log 4, not 1/4 - 1 + log 4."""
    terms = ppo(torch.tensor([math.log(4)]), torch.zeros(1), torch.ones(1))
    assert terms.metrics["approx_kl"].item() == pytest.approx(3 - math.log(4))


@given(seeds)
def test_before_the_first_update_the_ratio_is_exactly_1(seed):
    """The gradient is then the policy gradient itself, to the bit."""
    logps, _, gains = draw(seed)
    leaf = logps.requires_grad_()
    terms = ppo(leaf, leaf.detach(), gains)
    assert torch.equal(terms.total, -gains.sum())
    assert torch.equal(torch.autograd.grad(terms.total, leaf)[0], -gains)
    found = {name: value.item() for name, value in terms.metrics.items()}
    assert found == {"approx_kl": 0, "clip_fraction": 0, "ratio": 12}


@settings(max_examples=30)
@given(seeds, st.floats(0.01, 0.9))
def test_the_loss_is_never_below_the_unclipped_one(seed, epsilon):
    """It is a pessimistic bound, with equality where the ratio is in its range."""
    logps, old, gains = draw(seed)
    ratio = (logps - old).exp()
    for row in range(len(gains)):
        one = slice(row, row + 1)
        found = ppo(logps[one], old[one], gains[one], epsilon=epsilon).total.item()
        free = -(ratio * gains)[row].item()
        assert found >= free - 1e-12
        if 1 - epsilon < ratio[row] < 1 + epsilon:
            assert found == pytest.approx(free)


def test_a_gradient_is_that_of_finite_differences():
    logps, old, gains = draw(0)
    assert torch.autograd.gradcheck(
        lambda leaf: ppo(leaf, old, gains).total, logps.requires_grad_()
    )


def test_an_action_that_became_far_likelier_does_not_overflow():
    logps = torch.tensor([300.0, 300.0], requires_grad=True)
    terms = ppo(logps, torch.zeros(2), torch.tensor([1.0, -1.0]))
    (slope,) = torch.autograd.grad(terms.total, logps)
    assert terms.total.isfinite() and slope[0] == 0 and 0 < slope[1] < math.inf
    assert terms.metrics["approx_kl"].isfinite()


# Values -------------------------------------------------------------------------------------------


def test_values_worked_example():
    """Values 1 that were 0, 1, 2, 0, returns 1/2, 3, 1, 2, range 1/2.

    Held near where they were: 1/2, 1, 3/2, 1/2. Larger squares: 1/4, 4, 1/4, 9/4, of which the last
    two are from clipping. Half their sum is 27/8. Unclipped squares: 1/4, 4, 0, 1.
    """
    leaf = torch.ones(4, requires_grad=True)
    old, goals = torch.tensor([0.0, 1, 2, 0]), torch.tensor([0.5, 3, 1, 2])
    free = value_loss(leaf, goals)
    assert [free.total.item(), free.count.item()] == [21 / 8, 4]
    assert torch.autograd.grad(free.total, leaf)[0].tolist() == [0.5, -2, 0, -1]
    clipped = value_loss(leaf, goals, old_values=old, epsilon=0.5)
    assert clipped.total.item() == 27 / 8
    assert clipped.metrics["value_clip_fraction"].item() == 2
    assert torch.autograd.grad(clipped.total, leaf)[0].tolist() == [0.5, -2, 0, 0]


@given(seeds)
def test_values_that_have_not_moved_are_not_clipped(seed):
    values, _, goals = draw(seed)
    assert torch.equal(
        value_loss(values, goals, old_values=values, epsilon=0.1).total,
        value_loss(values, goals).total,
    )


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"old_log_probs": torch.zeros(3)}, "old_log_probs"),
        ({"advantages": torch.zeros(2, 1)}, "advantages"),
        ({"advantages": torch.zeros(2).long()}, "advantages"),
        ({"advantages": torch.tensor([1.0, math.nan])}, "advantages"),
        ({"mask": torch.ones(2)}, "mask"),
        ({"mask": torch.ones(3).bool()}, "mask"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
    ],
)
def test_errors_name_what_is_wrong(change, name):
    known = {key: torch.zeros(2) for key in ("log_probs", "old_log_probs", "advantages")}
    with pytest.raises(ValueError, match=f"^{name} "):
        ppo(**{**known, **change})


def test_errors_of_values_name_what_is_wrong():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(zeros, zeros, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon"):
        value_loss(zeros, zeros, old_values=zeros, epsilon=-0.1)
    with pytest.raises(ValueError, match="returns"):
        value_loss(zeros, zeros + math.inf)
