"""What becomes of advantages between rewards and loss, against formulas written out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from holdfast.language.advantages import group_normalized
from holdfast.language.encoding import Encoded
from holdfast.language.guards import ClipCov, KlCov, OutlierFilter, SmoothedAdvantages
from holdfast.language.rollouts import Rollout

LENGTHS = [3, 1, 4, 2]


def rollouts(rewards=(0.0, 1.0, 1.0, 0.0), lengths=LENGTHS, origin="rows:0", seed=0):
    """Two groups of two, or more, with advantages of group size 2."""
    draw = torch.Generator().manual_seed(seed)
    amounts = group_normalized(torch.tensor(rewards, dtype=torch.float64), 2)
    found = []
    for index, (reward, length, amount) in enumerate(zip(rewards, lengths, amounts, strict=True)):
        tokens = Encoded(np.arange(length + 1, dtype=np.int32), np.arange(length + 1) > 0)
        signals = {
            "advantages": torch.full((length,), float(amount)),
            "old_logps": torch.randn(length, generator=draw) - 2.0,
        }
        name = f"{origin}/{index // 2}"
        found.append(Rollout(tokens, name, True, reward=reward, signals=signals))
    return found


def joined(rows, name):
    return torch.cat([row.signals[name] for row in rows])


def with_advantages(rows, values):
    values = torch.tensor(values).split([row.counted for row in rows])
    for row, part in zip(rows, values, strict=True):
        row.signals["advantages"] = part.clone()
    return rows


def test_only_standardised_advantages_beyond_the_limit_are_set_to_0():
    values = [5.0] * 9 + [25.0]  # raw values far from 0: what counts is the distance to the mean
    found = OutlierFilter(2.5)(with_advantages(rollouts(), values), 2)
    assert joined(found, "advantages").tolist() == [5.0] * 9 + [0.0]
    assert joined(found, "guard/advantage_filter").tolist() == [False] * 9 + [True]
    kept = OutlierFilter(3.5)(with_advantages(rollouts(), values), 2)
    assert joined(kept, "advantages").tolist() == values
    assert not joined(kept, "guard/advantage_filter").any()


def test_equal_advantages_are_all_kept():
    assert not joined(OutlierFilter()(rollouts((1.0,) * 4), 2), "guard/advantage_filter").any()


def test_a_first_visit_is_not_smoothed_and_a_second_is_the_gentler_of_two_averages():
    smooth = SmoothedAdvantages()
    first = smooth(rollouts(), 2)
    assert torch.equal(joined(first, "advantages"), joined(rollouts(), "advantages"))
    assert not joined(first, "guard/smoothed").any()
    rewards = (1.0, 0.5, 0.0, 0.0)
    second = smooth(rollouts(rewards), 2)
    for group, earlier in ((slice(0, 2), [0.0, 1.0]), (slice(2, 4), [1.0, 0.0])):
        everything = np.array([*earlier, *rewards[group]])
        for row, before in zip(second[group], rollouts(rewards)[group], strict=True):
            new = float(before.signals["advantages"][0])
            total = (row.reward - everything.mean()) / (everything.std(ddof=1) + 1e-4)
            both = [(new + total) / 2, (new + total) / 2]
            expected = min(both, key=abs)
            assert_close(row.signals["advantages"], torch.full((row.counted,), float(expected)))
    third = smooth(rollouts((1.0, 0.0, 1.0, 1.0)), 2)
    everything = np.array([0.0, 1.0, 1.0, 0.5, 1.0, 0.0])
    new = float(rollouts((1.0, 0.0, 1.0, 1.0))[0].signals["advantages"][0])
    total = (1.0 - everything.mean()) / (everything.std(ddof=1) + 1e-4)
    expected = min((2 * new + total) / 3, (new + 2 * total) / 3, key=abs)
    assert_close(third[0].signals["advantages"], torch.full((3,), float(expected)))


def test_smoothing_remembers_prompts_across_a_resume_and_keeps_them_apart():
    smooth, resumed = SmoothedAdvantages(), SmoothedAdvantages()
    smooth(rollouts(), 2)
    resumed.load_state_dict(json.loads(json.dumps(smooth.state_dict())))
    again = (1.0, 0.0, 0.3, 0.2)
    both = [joined(one(rollouts(again), 2), "advantages") for one in (smooth, resumed)]
    assert torch.equal(*both)
    other = joined(smooth(rollouts(again, origin="others"), 2), "advantages")
    assert torch.equal(other, joined(rollouts(again), "advantages"))


def test_what_nobody_judged_stays_without_an_advantage():
    smooth = SmoothedAdvantages()
    for _ in range(2):
        found = smooth(rollouts((math.nan, 1.0, 0.0, 0.5)), 2)
    assert not found[0].signals["advantages"].any()
    assert all(row.signals["advantages"].isfinite().all() for row in found)


def covariance(rows):
    a, logps = joined(rows, "advantages"), joined(rows, "old_logps")
    return (a - a.mean()) * (logps - logps.mean())


def test_clip_cov_takes_its_share_of_the_tokens_between_the_bounds():
    rows = rollouts(seed=1)
    cov = covariance(rows)
    low, high = float(cov.median()), float(cov.max()) - 1e-6
    found = ClipCov(0.2, low, high, seed=3)(rows, 2)
    flags = joined(found, "guard/clip_cov")
    assert flags.sum() == 2  # of 10 tokens
    assert ((cov > low) & (cov < high))[flags].all()
    before, after = joined(rows, "advantages"), joined(found, "advantages")
    assert torch.equal(after, before.masked_fill(flags, 0.0))


def test_clip_cov_draws_anew_for_every_batch_and_the_same_after_a_resume():
    rows = rollouts((0.0, 1.0) * 20, [5] * 40, seed=2)
    filters = ClipCov(0.05, -9.0, 9.0, seed=1)
    first = joined(filters(rows, 2), "guard/clip_cov")
    resumed = ClipCov(0.05, -9.0, 9.0, seed=1)
    resumed.load_state_dict(filters.state_dict())
    second = [joined(one(rows, 2), "guard/clip_cov") for one in (filters, resumed)]
    assert torch.equal(*second) and not torch.equal(first, second[0])


def test_no_token_in_the_bounds_leaves_all_as_they_are():
    found = ClipCov(0.5, 1e6, 1e7)(rollouts(), 2)
    assert not joined(found, "guard/clip_cov").any()
    assert torch.equal(joined(found, "advantages"), joined(rollouts(), "advantages"))


def hinted(rows):
    """The same rollouts after two tokens of the data, with odd signals that must not matter."""
    found = []
    for row in rows:
        ids = np.concatenate([row.tokens.input_ids[:1], [7, 7], row.tokens.input_ids[1:]])
        tokens = Encoded(ids.astype(np.int32), np.arange(len(ids)) > 0)
        signals = {
            name: torch.cat([torch.full((2,), odd), row.signals[name]])
            for name, odd in (("advantages", 0.0), ("old_logps", -50.0))
        }
        found.append(replace(row, tokens=tokens, hint=2, signals=signals))
    return found


FILTERS = [
    lambda: OutlierFilter(1.0),
    lambda: SmoothedAdvantages(),
    lambda: ClipCov(share=0.3, lowest=-9.0, highest=9.0),
    lambda: KlCov(share=0.3),
]


@pytest.mark.parametrize("make", FILTERS)
def test_hints_have_no_part_in_what_a_filter_does(make):
    one, other = make(), make()
    for visit in range(2):
        rows = rollouts((0.0, 1.0, float(visit), 0.25), seed=visit)
        plain, given = one(rows, 2), other(hinted(rows), 2)
        assert plain[0].signals.keys() == given[0].signals.keys()
        for left, right in zip(plain, given, strict=True):
            for name, values in left.signals.items():
                assert_close(right.signals[name][2:], values)
            assert not right.signals["advantages"][:2].any()
            flags = (name for name in right.signals if name.startswith("guard/"))
            assert not any(right.signals[name][:2].any() for name in flags)


def test_kl_cov_marks_the_largest_and_changes_no_advantage():
    rows = rollouts(seed=1)
    found = KlCov(0.21)(rows, 2)
    flags = joined(found, "guard/kl_cov")
    assert set(flags.nonzero().flatten().tolist()) == set(covariance(rows).topk(3).indices.tolist())
    assert torch.equal(joined(found, "advantages"), joined(rows, "advantages"))


@pytest.mark.parametrize(
    "bad", [lambda: OutlierFilter(0.0), lambda: ClipCov(0.0), lambda: KlCov(2)]
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="limit|share"):
        bad()
