import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.control.statistics import RunningMoments, RunningScale, ValueNormalizer

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_moments_are_those_of_all_numbers_together(seed, sizes, shift):
    batches = [shift + draw(seed + place, size) for place, size in enumerate(sizes)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    together = torch.cat(batches).numpy()
    assert moments.count == len(together)
    if len(together) > 1:
        assert moments.mean == pytest.approx(np.mean(together))
        assert moments.deviation == pytest.approx(np.std(together), rel=1e-6)


def test_equal_numbers_have_not_varied_in_spite_of_rounding():
    moments = RunningMoments()
    for size in (3, 1000, 7):
        moments.update(torch.full((size,), 0.1, dtype=torch.float64))
    assert moments.deviation == 1.0
    assert RunningMoments().deviation == 1.0


# Rewards ------------------------------------------------------------------------------------------


def returns_so_far(rewards: torch.Tensor, ended: torch.Tensor, discount: float) -> np.ndarray:
    """From their definition: each step sums over the steps of its own episode up to it."""
    found = np.zeros(rewards.shape)
    for column in range(rewards.shape[1]):
        start = 0
        for step in range(len(rewards)):
            for earlier in range(start, step + 1):
                amount = rewards[earlier, column].item()
                found[step, column] += discount ** (step - earlier) * amount
            if ended[step, column]:
                start = step + 1
    return found


@given(seeds, st.floats(0.0, 1.0), st.integers(1, 8))
def test_rewards_are_divided_by_the_deviation_of_their_discounted_return(seed, discount, cut):
    """However the time steps are handed over, whole or step by step."""
    rewards, ended = draw(seed, 8, 3), draw(seed + 1, 8, 3) > 0.8
    deviation = np.std(returns_so_far(rewards, ended, discount))
    scale = RunningScale(3, discount=discount, clip=None)
    for start in range(0, 8, cut):
        scale.update(rewards[start : start + cut], ended[start : start + cut])
    torch.testing.assert_close(scale.scale(rewards), rewards / deviation)
    one_by_one = RunningScale(3, discount=discount, clip=None)
    for reward, end in zip(rewards, ended, strict=True):
        one_by_one.update(reward, end)
    torch.testing.assert_close(one_by_one.scale(rewards), rewards / deviation)


def test_a_discount_changes_the_scale():
    """A constant reward: with discount 0 its return never varies, with 1 it grows."""
    rewards, ended = torch.ones(5, 1), torch.zeros(5, 1).bool()
    for discount, expected in ((0.0, 1.0), (1.0, 1 / math.sqrt(2))):
        scale = RunningScale(1, discount=discount)
        scale.update(rewards, ended)
        assert scale.scale(torch.tensor(1.0)).item() == pytest.approx(expected)


def test_rewards_keep_their_sign_and_dtype_and_are_held_in_bounds():
    scale = RunningScale(1, discount=0.0, clip=2.0)
    ended = torch.ones(100, 1).bool()
    scale.update((torch.arange(100) == 50).float()[:, None], ended)  # deviation about 0.1
    found = scale.scale(torch.tensor([1.0, -1.0, 0.0, 0.01]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([2, -2, 0, 0.01 / math.sqrt(0.01 * 0.99)])


@given(seeds, st.integers(0, 8))
def test_a_resumed_scale_is_the_same_scale(seed, cut):
    rewards, ended = draw(seed, 8, 2), draw(seed + 1, 8, 2) > 0.5
    whole, resumed = RunningScale(2, discount=0.9), RunningScale(2, discount=0.9)
    whole.update(rewards[:cut], ended[:cut])
    resumed.load_state_dict(whole.state_dict())
    for scale in (whole, resumed):
        scale.update(rewards[cut:], ended[cut:])
    assert torch.equal(whole.scale(rewards), resumed.scale(rewards))


def test_a_saved_scale_does_not_change_with_the_one_it_came_from():
    scale = RunningScale(1, discount=0.9)
    saved = scale.state_dict()
    scale.update(torch.ones(1), torch.zeros(1).bool())
    assert saved["returns"].tolist() == [0] and saved["moments"]["count"] == 0


# Values -------------------------------------------------------------------------------------------


@given(seeds, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_normalised_returns_have_mean_0_and_deviation_1_and_come_back(seed, size, shift):
    returns = size * draw(seed, 6, 4) + shift
    normalizer = ValueNormalizer()
    normalizer.update(returns)
    found = normalizer.normalize(returns)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(normalizer.denormalize(found), returns)


def test_a_normaliser_changes_nothing_before_it_has_seen_returns():
    returns = torch.tensor([3.0, -4.0])
    normalizer = ValueNormalizer()
    normalizer.update(torch.zeros(0))
    assert torch.equal(normalizer.normalize(returns), returns)
    assert torch.equal(normalizer.denormalize(returns), returns)


def test_a_state_is_json_and_a_resumed_normaliser_the_same():
    normalizer, resumed = ValueNormalizer(), ValueNormalizer()
    normalizer.update(draw(0, 7))
    resumed.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    for each in (normalizer, resumed):
        each.update(draw(1, 5))
    assert normalizer.state_dict() == resumed.state_dict()


# Errors -------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    for name, options in (
        ("environments", {"environments": 0}),
        ("discount", {"discount": 1.5}),
        ("clip", {"clip": 0.0}),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            RunningScale(**{"environments": 1, "discount": 0.9, **options})
    scale = RunningScale(2, discount=0.9)
    flags = torch.zeros(2).bool()
    with pytest.raises(ValueError, match="rewards"):
        scale.update(torch.zeros(3), torch.zeros(3).bool())
    with pytest.raises(ValueError, match="ended"):
        scale.update(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="rewards"):
        scale.update(torch.tensor([0.0, math.nan]), flags)
    with pytest.raises(ValueError, match="state"):
        scale.load_state_dict(RunningScale(3, discount=0.9).state_dict())
    with pytest.raises(ValueError, match="values"):
        ValueNormalizer().update(torch.tensor([math.inf]))
    assert scale.moments.count == 0
