import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.language.advantages import (
    batch_baseline,
    centred,
    from_logits,
    gae,
    group_normalized,
    leave_one_out,
    preference,
    sparse,
)

REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
NAN = math.nan

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_missing(seed: int, *shape: int) -> torch.Tensor:
    """Rewards of which about a third are missing, but not the first."""
    generator = torch.Generator().manual_seed(seed + 1)
    rewards = draw(seed, *shape).masked_fill(torch.rand(shape, generator=generator) < 0.3, NAN)
    rewards.view(-1)[0] = 0.5
    return rewards


# Of sequences -------------------------------------------------------------------------------------


def test_group_worked_example():
    """Groups (1, 2, 6) and (0, 0, 3): means 3 and 1, squared deviations 4+1+9 and 1+1+4.

    With Bessel's correction the deviations are sqrt(14 / 2) and sqrt(6 / 2); that of the batch,
    of mean 2 and squares 1+0+16+4+4+1 = 26, is sqrt(26 / 5).
    """
    above = torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0])
    group = torch.tensor([7.0, 7.0, 7.0, 3.0, 3.0, 3.0]).sqrt()
    torch.testing.assert_close(group_normalized(REWARDS, 3), above / (group + 1e-4))
    torch.testing.assert_close(
        group_normalized(REWARDS, 3, scale="batch"), above / (math.sqrt(26 / 5) + 1e-4)
    )
    torch.testing.assert_close(group_normalized(REWARDS, 3, scale="none"), above)
    torch.testing.assert_close(group_normalized(REWARDS, 3, epsilon=1.0), above / (group + 1))


def test_leave_one_out_worked_example():
    """Of (1, 2, 6) the others have the means 4, 3.5 and 1.5; of (0, 0, 3) they have 1.5, 1.5, 0."""
    expected = torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(leave_one_out(REWARDS, 3), expected)


def test_batch_worked_example():
    torch.testing.assert_close(batch_baseline(REWARDS), REWARDS - 2)
    found = batch_baseline(torch.tensor([1.0, NAN, 4.0]))
    torch.testing.assert_close(found, torch.tensor([-1.5, 0.0, 1.5]))


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 5), st.sampled_from(["group", "batch", "none"]))
def test_a_missing_reward_is_as_if_it_had_never_been_asked_for(seed, groups, size, scale):
    """Against plain means and deviations of the rewards that are left."""
    rewards = some_missing(seed, groups, size)
    found = group_normalized(rewards.flatten(), size, scale=scale).view(groups, size)
    others = leave_one_out(rewards.flatten(), size).view(groups, size)
    batch = batch_baseline(rewards.flatten()).view(groups, size)
    everything = rewards[~rewards.isnan()]
    for group, row, other, plain in zip(rewards, found, others, batch, strict=True):
        there = ~group.isnan()
        left = group[there]
        for result in (row, other, plain):
            assert (result[~there] == 0).all()
        torch.testing.assert_close(plain[there], left - everything.mean())
        spread = {"group": left, "batch": everything}.get(scale)
        if len(left) < 2 or (spread is not None and len(spread) < 2):
            assert (row == 0).all()
        else:
            divisor = 1.0 if spread is None else spread.std() + 1e-4
            torch.testing.assert_close(row[there], (left - left.mean()) / divisor)
        if len(left) < 2:
            assert (other == 0).all()
        else:  # K / (K - 1) (R - mean)
            bessel = len(left) / (len(left) - 1)
            torch.testing.assert_close(other[there], bessel * (left - left.mean()))


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["group", "none"]), st.floats(0.1, 10), st.floats(-5, 5))
def test_a_shift_of_a_group_changes_nothing_and_a_scale_only_by_epsilon(seed, scale, factor, shift):
    rewards = draw(seed, 12)
    moved = torch.cat([rewards[:4] + shift, rewards[4:] * factor])
    before = group_normalized(rewards, 4, scale=scale, epsilon=1e-12)
    after = group_normalized(moved, 4, scale=scale, epsilon=1e-12)
    torch.testing.assert_close(after[:4], before[:4])
    torch.testing.assert_close(after[4:], before[4:] * (factor if scale == "none" else 1.0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_has_no_advantage(scale):
    rewards = torch.tensor([0.25, 0.25, 1.0, 0.0])
    assert group_normalized(rewards, 2, scale=scale)[:2].tolist() == [0.0, 0.0]
    assert leave_one_out(rewards, 2)[:2].tolist() == [0.0, 0.0]


def test_bad_rewards_name_themselves():
    grouped = (group_normalized, leave_one_out)
    for function in grouped:
        for size in (1, 0, -2):
            with pytest.raises(ValueError, match=f"num_generations is {size}: .* at least 2"):
                function(REWARDS, size)
        with pytest.raises(ValueError, match=r"6 rows: num_generations \(4\) must divide"):
            function(REWARDS, 4)
    for call in (*(lambda r, f=f: f(r, 2) for f in grouped), batch_baseline):
        with pytest.raises(ValueError, match="rewards has no reward: all of its 4 rows"):
            call(torch.full((4,), NAN))
        with pytest.raises(ValueError, match=r"rewards has shape \(2, 3\)"):
            call(REWARDS.view(2, 3))
        for value in (math.inf, -math.inf):
            with pytest.raises(ValueError, match="rewards has an infinite value"):
                call(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="rewards has one row"):
        batch_baseline(torch.ones(1))
    with pytest.raises(ValueError, match="scale is 'std': it must be one of group, batch, none"):
        group_normalized(REWARDS, 3, scale="std")
    for epsilon in (0.0, -1e-4, NAN, math.inf):
        with pytest.raises(ValueError, match="epsilon is"):
            group_normalized(REWARDS, 3, epsilon=epsilon)


# Of tokens ----------------------------------------------------------------------------------------


def test_gae_worked_example():
    """Discount 1/2, trace 1/2, values (1, 2, 4), a reward of 8 at the end.

    delta_3 = 8 - 4 = 4, delta_2 = 4 / 2 - 2 = 0, delta_1 = 2 / 2 - 1 = 0; so the advantages are 4,
    4 / 4 = 1 and 1 / 4, and the returns 8, 3 and 5 / 4.
    """
    advantages, returns = gae(
        torch.tensor([[0.0, 0.0, 8.0]]),
        torch.tensor([[1.0, 2.0, 4.0]]),
        discount=0.5,
        trace=0.5,
    )
    assert advantages.tolist() == [[0.25, 1.0, 4.0]]
    assert returns.tolist() == [[1.25, 3.0, 8.0]]


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(seed, time, discount, trace):
    rewards, values = draw(seed, 2, 3, time)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=values.dtype)], -1)
    deltas = rewards + discount * following - values
    decay = discount * trace
    expected = torch.stack(
        [sum(decay ** (k - t) * deltas[:, k] for k in range(t, time)) for t in range(time)], -1
    )
    advantages, returns = gae(rewards, values, discount=discount, trace=trace)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 8), st.data())
def test_gae_steps_over_what_does_not_count(seed, time, data):
    """As if the counted tokens were all there is; what lies between them may be anything."""
    rewards, values = draw(seed, 2, 3, time)
    rows = st.lists(st.booleans(), min_size=time, max_size=time)
    mask = torch.tensor([data.draw(rows) for _ in range(3)]).view(3, time)
    rates = {"discount": 0.9, "trace": 0.7}
    advantages, returns = gae(
        rewards.where(mask, NAN), values.where(mask, math.inf), mask=mask, **rates
    )
    for row in range(3):
        kept = mask[row]
        alone = gae(rewards[row, kept][None], values[row, kept][None], **rates)
        torch.testing.assert_close(advantages[row, kept], alone[0][0])
        torch.testing.assert_close(returns[row, kept], alone[1][0])
        assert (advantages[row, ~kept] == 0).all() and (returns[row, ~kept] == 0).all()


def test_gae_without_discount_and_trace_is_what_is_still_to_come():
    rewards, values = draw(3, 2, 4, 6)
    _, returns = gae(rewards, values, discount=1.0, trace=1.0)
    torch.testing.assert_close(returns, rewards.flip(-1).cumsum(-1).flip(-1))


def test_bad_arguments_of_gae_name_themselves():
    good = torch.zeros(2, 3)
    options = {"discount": 1.0, "trace": 0.95}
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 3\) and values \(2, 2\)"):
        gae(good, good[:, 1:], **options)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\)"):
        gae(good[0], good[0], **options)
    for name in options:
        for number in (-0.1, 1.1, NAN):
            with pytest.raises(ValueError, match=f"{name} is"):
                gae(good, good, **{**options, name: number})
    for mask in (good, torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask has shape"):
            gae(good, good, mask=mask, **options)
    for value in (NAN, math.inf):
        bad = torch.tensor([[0.0, 0.0, 0.0], [0.0, value, 0.0]])
        with pytest.raises(ValueError, match="rewards has values that are not finite"):
            gae(bad, good, **options)
        with pytest.raises(ValueError, match="values has values that are not finite"):
            gae(good, bad, **options)


# Of the vocabulary --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 4), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_sparse_is_the_advantage_times_one_hot(seed, batch, time, vocab, per_sequence):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (batch, time), generator=generator)
    advantages = draw(seed, batch) if per_sequence else draw(seed, batch, time)
    amounts = advantages[:, None].expand(batch, time) if per_sequence else advantages
    expected = amounts[..., None] * torch.nn.functional.one_hot(ids, vocab)
    torch.testing.assert_close(sparse(ids, advantages, vocab), expected)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-1e3, 1e3))
def test_advantages_from_logits_are_log_probabilities(seed, shift):
    logits = 3 * draw(seed, 2, 3, 7) + shift
    advantages = from_logits(logits)
    value = (logits - shift).exp().sum(-1).log() + shift  # V = log sum exp Q
    torch.testing.assert_close(advantages, logits - value[..., None])
    torch.testing.assert_close(advantages.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_advantages_from_logits_solve_the_soft_bellman_equations():
    """A depth-two tree with known rewards: its optimal soft policy, by brute force over paths."""
    first, second = draw(0, 3), draw(1, 3, 4)
    q_second = second  # nothing follows
    q_first = first + q_second.logsumexp(-1)
    paths = (first[:, None] + second).flatten().softmax(0).view(3, 4)  # pi(path) ~ exp(return)
    torch.testing.assert_close(from_logits(q_first).exp(), paths.sum(-1))
    conditional = paths / paths.sum(-1, keepdim=True)
    torch.testing.assert_close(from_logits(q_second).exp(), conditional)


def test_preference_recovers_the_reward_a_policy_is_optimal_for():
    """pi* ~ pi_ref exp(r / beta): the advantage is r up to a constant of the position."""
    reference = draw(0, 2, 3, 5).log_softmax(-1)
    reward = draw(1, 2, 3, 5)
    tuned = (reference + reward / 0.3).log_softmax(-1)
    difference = preference(tuned, reference, beta=0.3) - reward
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference))
    centre = centred(preference(tuned, reference, beta=0.3))
    torch.testing.assert_close(centre, reward - reward.mean(-1, keepdim=True))


def test_nothing_learns_through_an_advantage():
    wide = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    narrow = wide.bfloat16()
    results = [
        group_normalized(narrow.flatten(), 2),
        leave_one_out(narrow.flatten(), 2),
        batch_baseline(narrow.flatten()),
        *gae(narrow, narrow, discount=1.0, trace=1.0),
        sparse(torch.zeros(2, 3, dtype=torch.long), narrow, 4),
        from_logits(narrow),
        preference(narrow, narrow, beta=1.0),
        centred(narrow),
    ]
    assert [(part.dtype, part.requires_grad) for part in results] == [(torch.float32, False)] * 9


def test_bad_vocabularies_name_themselves():
    ids, one = torch.tensor([[0, 3, 1]]), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"ids from 0 to 3: they must lie in \[0, 3\)"):
        sparse(ids, one, 3)
    with pytest.raises(ValueError, match=r"ids from -100 to 1"):
        sparse(torch.tensor([[0, -100, 1]]), one, 3)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        sparse(ids, one, 0)
    with pytest.raises(ValueError, match="token_ids has shape .* dtype torch.float32"):
        sparse(one, one, 4)
    for shape in ((3,), (1, 2), (1, 3, 1)):
        with pytest.raises(ValueError, match="advantages has shape"):
            sparse(ids, torch.ones(shape), 4)
    for beta in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(ValueError, match="beta is"):
            preference(one, one, beta=beta)
    with pytest.raises(ValueError, match=r"dpo_logps has shape \(1, 3\) .* same vocabulary"):
        preference(one, torch.ones(1, 4), beta=1.0)
    for value in (NAN, math.inf, -math.inf):
        bad = torch.tensor([[1.0, value, 1.0]])
        for name, call in {
            "advantages": lambda bad: sparse(ids, bad, 4),
            "logits": from_logits,
            "dpo_logps": lambda bad: preference(bad, one, beta=1.0),
            "reference_logps": lambda bad: preference(one, bad, beta=1.0),
        }.items():
            with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
                call(bad)
        with pytest.raises(ValueError, match="advantages has values that are not finite"):
            centred(bad)
    for name, call in {"logits": from_logits, "advantages": centred}.items():
        for empty in (torch.tensor(1.0), torch.ones(2, 0)):
            with pytest.raises(ValueError, match=f"{name} has shape"):
                call(empty)


def test_a_floor_holds_only_for_groups_that_are_almost_alike():
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    found = group_normalized(rewards, 4, floor=0.2).view(2, 4)
    plain = group_normalized(rewards, 4).view(2, 4)
    centred = rewards[:4] - rewards[:4].mean()
    torch.testing.assert_close(found[0], centred / (0.2 + 1e-4))
    assert torch.equal(found[1], plain[1])
    assert torch.equal(group_normalized(rewards, 4, floor=0.0).view(2, 4), plain)
    with pytest.raises(ValueError, match="floor"):
        group_normalized(rewards, 4, floor=-1.0)
    with pytest.raises(ValueError, match="floor"):
        group_normalized(rewards, 4, scale="batch", floor=0.1)
