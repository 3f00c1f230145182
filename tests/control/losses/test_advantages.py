import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.control.losses import (
    generalized_advantage,
    normalize_advantages,
)

NAN = math.nan
seeds = st.integers(0, 2**31)
shares = st.floats(0.0, 1.0)


def rollout(seed: int, time: int = 9, environments: int = 3) -> tuple[Tensor, ...]:
    """Rewards, values, next values, and how episodes end, as an environment would return them."""
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    shape = (time, environments)
    rewards, values = torch.randn(shape, **size), torch.randn(shape, **size)
    terminated, truncated = torch.rand(shape, **size) < 0.2, torch.rand(shape, **size) < 0.2
    final = torch.randn(shape, **size)
    next_values = torch.cat([values[1:], final[:1]])
    next_values = torch.where(terminated | truncated, final, next_values)
    return rewards, values, next_values, terminated, truncated


def episodes(terminated: Tensor, truncated: Tensor, column: int):
    """Start, last step, and whether the last step is terminal, of every piece of an episode."""
    start = 0
    for step in range(len(terminated)):
        if terminated[step, column] or truncated[step, column] or step == len(terminated) - 1:
            yield start, step, bool(terminated[step, column])
            start = step + 1


def n_step_return(rewards, next_values, first, last, ends, discount, column):
    """What was earned from ``first`` to ``last``, and what the last observation is worth."""
    earned = sum(
        discount ** (step - first) * rewards[step, column].item() for step in range(first, last + 1)
    )
    after = 0.0 if ends else next_values[last, column].item()
    return earned + discount ** (last - first + 1) * after


def lambda_return(rewards, next_values, first, last, ends, discount, trace, column):
    """The mixture of n-step returns, by its definition."""
    total = 0.0
    for step in range(first, last):
        part = n_step_return(rewards, next_values, first, step, False, discount, column)
        total += (1 - trace) * trace ** (step - first) * part
    whole = n_step_return(rewards, next_values, first, last, ends, discount, column)
    return total + trace ** (last - first) * whole


@settings(max_examples=30)
@given(seeds, shares, shares)
def test_advantages_are_those_of_episodes_taken_one_by_one(seed, discount, trace):
    rewards, values, next_values, terminated, truncated = rollout(seed)
    advantages, returns = generalized_advantage(
        rewards, values, next_values, terminated, truncated, discount=discount, trace=trace
    )
    expected = torch.zeros_like(rewards)
    for column in range(rewards.shape[1]):
        for start, last, ends in episodes(terminated, truncated, column):
            for first in range(start, last + 1):
                expected[first, column] = lambda_return(
                    rewards, next_values, first, last, ends, discount, trace, column
                )
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, expected - values)


def test_worked_example_of_a_cut_and_of_an_end():
    """Rewards 1, 2, 3, values 10, 20, 30, worth 40 at last; discount 1/2, trace 1/2.

    Deltas if all goes on: 1 + 10 - 10 = 1, 2 + 15 - 20 = -3, 3 + 20 - 30 = -7. The advantages are
    -7, -3 - 7/4 = -19/4 and 1 - 19/16 = -3/16. Cut after the second, at an observation that is
    worth 100: its delta is 2 + 50 - 20 = 32, and the first 1 + 32/4 = 9. Ended there: 2 - 20 = -18,
    and 1 - 18/4 = -7/2.
    """
    rewards = torch.tensor([1.0, 2, 3])[:, None].expand(3, 3)
    values = torch.tensor([10.0, 20, 30])[:, None].expand(3, 3)
    next_values = torch.tensor([[20.0, 20, 20], [30, 100, 100], [40, 40, 40]])
    terminated, truncated = torch.zeros(3, 3).bool(), torch.zeros(3, 3).bool()
    truncated[1, 1] = terminated[1, 2] = True
    advantages, _ = generalized_advantage(
        rewards, values, next_values, terminated, truncated, discount=0.5, trace=0.5
    )
    expected = [[-3 / 16, 9, -3.5], [-19 / 4, 32, -18], [-7, -7, -7]]
    assert advantages.tolist() == expected


@given(seeds)
def test_what_follows_an_end_changes_nothing_before_it(seed):
    rewards, values, next_values, terminated, truncated = rollout(seed)
    terminated[4, 0], truncated[4, 1] = True, True
    terminated[4, 2] = truncated[4, 2] = True  # it ended, whatever the clock says
    options = {"discount": 0.9, "trace": 0.8}
    before, _ = generalized_advantage(
        rewards, values, next_values, terminated, truncated, **options
    )
    rewards[5:] += 7
    values[5:] -= 3
    next_values[5:] *= 2
    next_values[4, 2] += 100
    after, _ = generalized_advantage(rewards, values, next_values, terminated, truncated, **options)
    assert torch.equal(before[:5], after[:5])


def test_the_value_of_a_terminal_observation_is_not_looked_at():
    rewards, values, next_values, terminated, truncated = rollout(3)
    options = {"discount": 0.9, "trace": 0.8}
    expected = generalized_advantage(rewards, values, next_values, terminated, truncated, **options)
    next_values = next_values.masked_fill(terminated, NAN)
    found = generalized_advantage(rewards, values, next_values, terminated, truncated, **options)
    assert terminated.any() and torch.equal(expected[0], found[0])


@given(seeds)
def test_perfect_values_leave_no_advantage(seed):
    """Values that are the returns, so that every delta is 0 whatever the trace."""
    rewards, _, _, terminated, truncated = rollout(seed)
    worth, discount = 5.0, 0.9
    values, following = torch.zeros_like(rewards), torch.full((3,), worth, dtype=torch.float64)
    next_values = torch.zeros_like(rewards)
    for step in reversed(range(len(rewards))):
        next_values[step] = torch.where(truncated[step], worth, following)
        after = next_values[step].masked_fill(terminated[step], 0.0)
        following = values[step] = rewards[step] + discount * after
    advantages, returns = generalized_advantage(
        rewards, values, next_values, terminated, truncated, discount=discount, trace=0.95
    )
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(returns, values)


def test_precision_and_graph_of_advantages():
    parts = rollout(0)
    options = {"discount": 0.9, "trace": 0.8}
    exact, _ = generalized_advantage(*parts, **options)
    single = [part.float().requires_grad_() for part in parts[:3]]
    found, returns = generalized_advantage(*single, *parts[3:], **options)
    assert found.dtype == torch.float32 and not found.requires_grad and not returns.requires_grad
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)
    mixed, _ = generalized_advantage(parts[0].float().double(), *parts[1:], **options)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(
        generalized_advantage(parts[0].float(), *parts[1:], **options)[0], mixed
    )
    flags = [flag.float() for flag in parts[3:]]
    assert torch.equal(generalized_advantage(*parts[:3], *flags, **options)[0], exact)


def test_any_shape_with_time_first():
    parts = rollout(1)
    options = {"discount": 0.9, "trace": 0.8}
    whole, _ = generalized_advantage(*parts, **options)
    one, _ = generalized_advantage(*(part[:, 0] for part in parts), **options)
    assert torch.equal(one, whole[:, 0])
    none, _ = generalized_advantage(*(part[:0] for part in parts), **options)
    assert none.shape == (0, 3)


# Of a batch ---------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 40), st.floats(1e-6, 1e6), st.floats(-10, 10))
def test_normalised_advantages_have_mean_0_and_deviation_1(seed, count, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator, dtype=torch.float64)
    found = normalize_advantages(scale * (drawn + shift), epsilon=0.0)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std().item() == pytest.approx(1)
    torch.testing.assert_close(found, (drawn - drawn.mean()) / drawn.std(), rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_change_nothing():
    drawn = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    found = normalize_advantages(drawn.where(mask, NAN), mask)
    assert torch.equal(found[mask], normalize_advantages(drawn[mask]))
    assert (found[~mask] == 0).all()


def test_equal_advantages_are_0_in_spite_of_rounding():
    found = normalize_advantages(torch.full((1000,), 0.1))
    assert found.abs().max() < 1e-6


def test_too_few_rows_to_normalise_are_left_alone():
    assert normalize_advantages(torch.tensor([3.0])).tolist() == [3.0]
    mask = torch.tensor([False, True, False])
    assert normalize_advantages(torch.tensor([1.0, 3, 5]), mask).tolist() == [0, 3, 0]
    assert normalize_advantages(torch.zeros(0)).shape == (0,)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"values": torch.zeros(9, 2)}, "values"),
        ({"next_values": torch.zeros(9)}, "next_values"),
        ({"terminated": torch.zeros(3, 3).bool()}, "terminated"),
        ({"truncated": torch.full((9, 3), 0.5)}, "truncated"),
        ({"rewards": torch.full((9, 3), math.inf)}, "rewards"),
        ({"next_values": torch.full((9, 3), NAN)}, "next_values"),
        ({"discount": 1.1}, "discount"),
        ({"trace": -0.1}, "trace"),
        ({"rewards": torch.tensor(1.0)}, "rewards"),
    ],
)
def test_errors_name_what_is_wrong(change, name):
    names = ("rewards", "values", "next_values", "terminated", "truncated")
    known = dict(zip(names, rollout(0), strict=True))
    with pytest.raises(ValueError, match=f"^{name}"):
        generalized_advantage(**{**known, "discount": 0.9, "trace": 0.9, **change})


def test_errors_of_a_batch_name_what_is_wrong():
    with pytest.raises(ValueError, match="mask"):
        normalize_advantages(torch.zeros(2), torch.ones(3).bool())
    with pytest.raises(ValueError, match="advantages"):
        normalize_advantages(torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match="epsilon"):
        normalize_advantages(torch.zeros(2), epsilon=-1.0)
