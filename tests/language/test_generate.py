"""Generation: what is drawn depends on seeds and policy alone, and is distributed as it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.language.generate import Sampling, TransformersGenerator, uniform
from holdfast.language.model import load_policy
from holdfast.language.tokenizers import build_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def policy():
    built = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=1)
    with torch.no_grad():  # Far from uniform.
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return built


def prompt(policy, text: str) -> np.ndarray:
    return np.array(policy.tokenizer(text)["input_ids"], dtype=np.int32)


def logits(policy, ids: np.ndarray) -> torch.Tensor:
    """Of the next token, from the whole sequence at once and without padding."""
    with torch.no_grad():
        row = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
        return policy.base(input_ids=row).logits[0, -1].double()


def test_a_completion_depends_on_its_seed_and_not_on_its_place_in_a_batch(policy):
    prompts = [prompt(policy, text) for text in ("12+7=", "a", "a longer prompt: ", "12+7=")]
    generate = TransformersGenerator(policy)
    sampling = Sampling(max_completion_length=6)
    together = generate(prompts, [5, 6, 7, 8], sampling)
    for index in (3, 1, 0, 2):
        (alone,) = generate([prompts[index]], [5 + index], sampling)
        np.testing.assert_array_equal(alone.ids, together[index].ids)
    small = TransformersGenerator(policy, batch_size=2)(prompts, [5, 6, 7, 8], sampling)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(small, together, strict=True))
    assert not np.array_equal(together[0].ids, together[3].ids)


def test_tokens_are_those_of_inverse_transform_on_the_whole_sequence(policy):
    """Left padding, the cache and batching change nothing: each token follows from its number."""
    prompts = [prompt(policy, text) for text in ("1+1=", "something else")]
    temperature = 0.7
    found = TransformersGenerator(policy)(
        prompts, [3, 4], Sampling(max_completion_length=5, temperature=temperature)
    )
    for ids, seed, completion in zip(prompts, (3, 4), found, strict=True):
        for position, token in enumerate(completion.ids):
            cumulative = (logits(policy, ids) / temperature).softmax(-1).cumsum(-1)
            number = uniform(np.array([seed], dtype=np.uint64), position)[0]
            assert cumulative[token] > number - 1e-6
            assert token == 0 or cumulative[token - 1] < number + 1e-6
            ids = np.append(ids, token)


def test_samples_have_the_distribution_of_the_policy(policy):
    ids, draws = prompt(policy, "x"), 4000
    expected = logits(policy, ids).softmax(-1)
    found = TransformersGenerator(policy, batch_size=4000)(
        [ids] * draws, range(draws), Sampling(max_completion_length=1)
    )
    counts = torch.bincount(torch.tensor([int(c.ids[0]) for c in found]), minlength=260)
    likely = expected > 0.01
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4.5 * spread)[likely].all() and likely.sum() >= 4


def test_truncations_leave_out_what_they_say(policy):
    ids = prompt(policy, "x")
    order = logits(policy, ids).argsort(descending=True)
    generate = TransformersGenerator(policy)
    for options, allowed in (({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"temperature": 0.0}, 1)):
        sampling = Sampling(max_completion_length=1, **options)
        found = {int(c.ids[0]) for c in generate([ids] * 60, range(60), sampling)}
        assert found <= set(order[:allowed].tolist())
        assert len(found) == allowed


def test_completions_end_with_the_end_token_or_a_stop_string_and_say_so(policy):
    tokenizer = policy.tokenizer
    sampling = Sampling(max_completion_length=30, stop_strings=("7", "3"))
    found = TransformersGenerator(policy)([prompt(policy, "ab")] * 80, range(80), sampling)
    reasons = set()
    for completion in found:
        text = tokenizer.decode(completion.ids[:-1])
        assert not set(text) & {"7", "3"} and tokenizer.eos_token_id not in completion.ids[:-1]
        last = int(completion.ids[-1])
        ended = last == tokenizer.eos_token_id or tokenizer.decode([last]) in ("7", "3")
        assert completion.completed == ended
        assert completion.completed or len(completion.ids) == 30
        reasons.add(last == tokenizer.eos_token_id if completion.completed else None)
    assert {True, False} <= reasons


def test_a_teacher_is_mixed_into_sampling_in_its_share(policy):
    teacher = load_policy("tiny-qwen2", tokenizer=policy.tokenizer, config=SMALL, seed=9)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    ids, seeds = prompt(policy, "12+30="), [11, 12, 13]
    generate = TransformersGenerator(policy, teacher=teacher, alpha=0.4)
    found = generate([ids, ids[:2], ids], seeds, Sampling(max_completion_length=4))
    for start, seed, completion in zip([ids, ids[:2], ids], seeds, found, strict=True):
        here = start
        for position, token in enumerate(completion.ids):
            mixed = 0.6 * logits(policy, here).softmax(-1) + 0.4 * logits(teacher, here).softmax(-1)
            cumulative = mixed.cumsum(-1)
            number = uniform(np.array([seed], dtype=np.uint64), position)[0]
            assert cumulative[token] > number - 1e-6
            assert token == 0 or cumulative[token - 1] < number + 1e-6
            here = np.append(here, token)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**20))
def test_numbers_lie_in_the_unit_interval_and_repeat(seed, position):
    first = uniform(np.array([seed, seed + 1], dtype=np.uint64), position)
    assert ((first >= 0) & (first < 1)).all() and first[0] != first[1]
    assert np.array_equal(first, uniform(np.array([seed, seed + 1], dtype=np.uint64), position))


def test_numbers_are_uniform_over_seeds_and_over_positions():
    by_seed = uniform(np.arange(20_000, dtype=np.uint64), 3)
    by_position = np.array([uniform(np.array([7], dtype=np.uint64), p)[0] for p in range(5_000)])
    for numbers in (by_seed, by_position):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        expected = len(numbers) / 20
        # Chi-square with 19 degrees of freedom: 43.8 is its 0.999 quantile.
        assert ((counts - expected) ** 2 / expected).sum() < 43.8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**options)


def test_generation_leaves_the_mode_of_the_policy_as_it_was(policy):
    policy.train()
    TransformersGenerator(policy)([prompt(policy, "x")], [0], Sampling(max_completion_length=1))
    assert policy.training


def test_what_a_model_came_with_changes_no_samples_but_its_end_tokens_count(policy):
    """Penalties of its generation_config would draw from another distribution than the policy's."""
    ids, sampling = [prompt(policy, "ab")] * 40, Sampling(max_completion_length=12)
    generate = TransformersGenerator(policy)
    plain = generate(ids, range(40), sampling)
    own = policy.base.generation_config
    common = int(np.bincount(np.concatenate([c.ids for c in plain])).argmax())
    try:
        own.repetition_penalty, own.eos_token_id = 5.0, [policy.tokenizer.eos_token_id, common]
        found = generate(ids, range(40), sampling)
    finally:
        own.repetition_penalty, own.eos_token_id = None, policy.tokenizer.eos_token_id
    assert policy.base.generation_config is own
    for before, after in zip(plain, found, strict=True):
        np.testing.assert_array_equal(after.ids, before.ids[: len(after.ids)])
        assert common not in after.ids[:-1]
        assert after.completed == (after.ids[-1] in (common, policy.tokenizer.eos_token_id))
    assert any(len(after.ids) < len(before.ids) for before, after in zip(plain, found, strict=True))
