"""Rollouts as a source: groups, passes, resampling, and a state that goes on where it stopped."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from holdfast.errors import TrainingError
from holdfast.joint.checkpoint import reunite, separate
from holdfast.language.data import Encoded, Prompt
from holdfast.language.generate import Completion, Sampling
from holdfast.language.rewards import Rewards
from holdfast.language.rollouts import RolloutOptions, Rollouts

SAMPLING = Sampling(max_completion_length=4)


class Scripted:
    """A generator of known completions: one to three tokens that follow from the seed."""

    def __init__(self, completed: bool = True) -> None:
        self.calls = 0
        self.completed = completed

    def __call__(self, prompts, seeds, sampling):
        self.calls += 1
        return [
            Completion(np.array([seed % 7] * (1 + seed % 3), dtype=np.int32), self.completed)
            for seed in seeds
        ]


class Marked:
    """Gives every counted token a signal, so that rows can be told apart."""

    def score(self, rollouts):
        return [_with(row, mark=torch.arange(row.counted, dtype=torch.float32)) for row in rollouts]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}

    def credit(self, rollouts, num_generations):
        self.seen = list(rollouts)
        return [_with(row, advantages=torch.full((row.counted,), row.reward)) for row in rollouts]


def _with(row, **signals):
    from dataclasses import replace

    return replace(row, signals={**row.signals, **signals})


def prompts(count: int = 12) -> list[Prompt]:
    return [
        Prompt(np.array([n, n], dtype=np.int32), f"prompt {n}", {"answer": str(n)}, f"rows:{n}")
        for n in range(count)
    ]


def by_token(prompts, completions, completion_ids, answer, **_):
    return [float(ids[0]) for ids in completion_ids]


def build(reward=by_token, *, completed=True, annotate=None, seed=0, **options):
    defaults = {"batch_size": 8, "num_generations": 4}
    return Rollouts(
        prompts(),
        Scripted(completed),
        SAMPLING,
        Rewards({"reward": reward}, {"reward": 1.0}),
        annotate or Marked(),
        RolloutOptions(**defaults | options),
        decode=lambda ids: " ".join(map(str, ids)),
        seed=seed,
    )


def key(row):
    return (row.origin, tuple(row.tokens.input_ids.tolist()), row.reward, row.samples)


def test_a_batch_holds_whole_groups_of_completions_of_distinct_prompts():
    source = build()
    batch = source.next()
    assert list(Counter(row.origin for row in batch).values()) == [4, 4]
    for row in batch:
        prompt = row.tokens.input_ids[~row.tokens.counted]
        assert f"rows:{prompt[0]}" == row.origin and row.counted == len(row.signals["advantages"])
        assert row.reward == row.tokens.input_ids[row.tokens.counted][0]
    for origin in {row.origin for row in batch}:
        rewards = [row.reward for row in batch if row.origin == origin]
        spread = [row.group_std for row in batch if row.origin == origin]
        np.testing.assert_allclose(spread, np.std(rewards, ddof=1))
    assert source.samples == 8 and batch[0].samples == 8


def test_every_rollout_is_used_once_a_pass_and_the_passes_are_as_many_as_asked_for():
    source = build(steps_per_generation=3, num_iterations=2)
    batches = [source.next() for _ in range(6)]
    assert source.generator.calls == 1
    for part in (batches[:3], batches[3:]):
        found = sorted(key(row) for batch in part for row in batch)
        assert len(found) == 24 and len(set(map(id, (r for b in part for r in b)))) == 24
    orders = [[key(row) for batch in part for row in batch] for part in (batches[:3], batches[3:])]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    source.next()
    assert source.generator.calls == 2


@pytest.mark.parametrize("before", range(9))
def test_a_source_goes_on_where_its_state_was_taken_even_in_the_middle_of_rollouts(before):
    whole = build(steps_per_generation=2, num_iterations=2)
    expected = [[key(row) for row in whole.next()] for _ in range(9 + 4)]
    first = build(steps_per_generation=2, num_iterations=2)
    for _ in range(before):
        first.next()
    plain, tensors = separate(first.state_dict())
    state = reunite(json.loads(json.dumps(plain)), tensors)
    again = build(steps_per_generation=2, num_iterations=2)
    again.load_state_dict(state)
    found = [again.next() for _ in range(13 - before)]
    assert [[key(row) for row in batch] for batch in found] == expected[before:]
    for row in found[0]:
        assert torch.equal(row.signals["mark"], torch.arange(row.counted, dtype=torch.float32))


def test_a_seed_decides_which_completions_there_are():
    assert [key(r) for r in build(seed=1).next()] == [key(r) for r in build(seed=1).next()]
    assert [key(r) for r in build(seed=1).next()] != [key(r) for r in build(seed=2).next()]


def equal_for_some(prompts, completions, completion_ids, answer, **_):
    """Groups of prompts with an even answer get one reward; the others differ within a group."""
    return [1.0 if int(a) % 2 == 0 else float(n % 2) for n, a in enumerate(answer)]


def test_dynamic_sampling_replaces_groups_of_equal_rewards_and_counts_what_it_drew():
    source = build(equal_for_some, dynamic_sampling=True, max_resampling=20)
    for _ in range(4):
        before = source.samples
        batch = source.next()
        assert len(batch) == 8 and all(row.group_std > 0 for row in batch)
        assert all(row.samples == source.samples for row in batch)
        assert (source.samples - before) % 8 == 0
    assert source.samples > 4 * 8


def test_dynamic_sampling_gives_up_after_its_limit_and_takes_what_there_is():
    source = build(lambda prompts, **_: [1.0] * len(prompts), dynamic_sampling=True)
    batch = source.next()
    assert len(batch) == 8 and source.samples == 8 * (1 + source.options.max_resampling)


def test_truncated_completions_count_for_nothing_and_a_batch_of_them_is_an_error():
    with pytest.raises(TrainingError, match="max_completion_length 4"):
        build(completed=False, mask_truncated_completions=True).next()
    assert all(row.counted for row in build(completed=False).next())


def test_work_that_is_shared_among_processes_comes_back_in_order():
    def shared(work, items):
        parts = [work(items[rank::3]) for rank in range(3)]
        return [parts[index % 3][index // 3] for index in range(len(items))]

    alone, together = build(batch_size=16), build(batch_size=16)
    together._share = shared
    assert [key(row) for row in alone.next()] == [key(row) for row in together.next()]


@pytest.mark.parametrize("options", [{"batch_size": 6}, {"num_generations": 5}])
def test_num_generations_that_does_not_divide_the_batch_is_refused(options):
    with pytest.raises(ValueError, match="does not divide"):
        build(**options)


def test_conversations_are_answered_by_the_assistant():
    seen = []

    def reward(prompts, completions, completion_ids, **_):
        seen.extend(completions)
        return [0.0] * len(prompts)

    source = build(reward)
    for row in source._prompts.rows:
        object.__setattr__(row, "content", [{"role": "user", "content": "hello"}])
    source.next()
    assert all(len(answer) == 1 and answer[0]["role"] == "assistant" for answer in seen)


def test_rows_are_saved_as_plain_values():
    row = build().next()[0]
    saved = json.loads(json.dumps(row.to_json()))
    assert saved["reward"] == row.reward and isinstance(row.tokens, Encoded)
    assert saved["tokens"]["input_ids"] == row.tokens.input_ids.tolist()


def test_all_rewards_none_is_an_error_that_names_the_functions():
    with pytest.raises(TrainingError, match=r"every reward of a batch of 8 .*functions: reward"):
        build(lambda prompts, **_: [None] * len(prompts)).next()
    some = build(lambda prompts, **_: [None] * (len(prompts) - 1) + [1.0]).next()
    assert sum(np.isfinite(row.reward) for row in some) == 1


def test_equal_rewards_have_no_spread_whatever_rounding_says():
    batch = build(lambda prompts, **_: [0.1] * len(prompts), num_generations=8).next()
    assert all(row.group_std == 0.0 for row in batch)
    alone = build(num_generations=1).next()
    assert all(np.isnan(row.group_std) for row in alone)
