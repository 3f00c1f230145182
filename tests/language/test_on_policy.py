"""Losses on rollouts, against dense logits in transformers and formulas written out."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.rollouts import (
    SMALL,
    build,
    dense,
    dense_logps,
    rollouts,
    same_gradients,
    sampled,
)
from torch.testing import assert_close

from holdfast.errors import ModelError
from holdfast.language.frozen import Frozen, hidden_states
from holdfast.language.guards import Penalties
from holdfast.language.losses import gkd, lco_kl, lco_log_cosh, lco_mse, optimal_logits
from holdfast.language.losses.policy_gradient import ppo_clip, reinforce
from holdfast.language.model import load_policy
from holdfast.language.on_policy import Distillation, Lco, PolicyGradient, log_normaliser
from holdfast.language.signals import Signals
from holdfast.language.tokenizers import build_tokenizer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reinforce_is_the_sum_of_weighted_log_probabilities(temperature):
    policy, rows = build(1), rollouts()
    loss = PolicyGradient(
        policy.pad_id,
        lambda logps, old, advantages, mask: reinforce(logps, advantages, mask),
        temperature=temperature,
    )
    terms = loss(policy, rows)
    expected = -sum(
        (dense_logps(policy, row, temperature) * row.signals["advantages"]).sum() for row in rows
    )
    same_gradients(policy, terms.total, expected)
    assert terms.count == sum(row.counted for row in rows)


def test_ratios_come_from_the_policy_that_sampled_and_penalties_from_the_reference():
    policy, before, rows = build(1), build(2), rollouts()
    signals = Signals(before, behaviour="logps", reference=Frozen(build(3)))
    rows = signals.score(rows)
    loss = PolicyGradient(
        policy.pad_id, partial(ppo_clip, epsilon=0.1), penalties=Penalties(beta=0.3)
    )
    terms = loss(policy, rows)
    expected = torch.zeros(())
    for row in rows:
        logps = dense_logps(policy, row)
        ratio = (logps - dense_logps(before, row).detach()).exp()
        amount = row.signals["advantages"]
        clipped = torch.minimum(ratio * amount, ratio.clamp(0.9, 1.1) * amount)
        away = dense_logps(build(3), row).detach() - logps
        expected = expected - clipped.sum() + 0.3 * (away.exp() - away - 1).sum()
    same_gradients(policy, terms.total, expected)


def test_a_critic_is_fitted_to_returns_beside_the_policy():
    policy = build(1)
    policy.add_value_head()
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    signals = Signals(policy, behaviour="logps", critic=(0.9, 0.8))
    rows = signals.credit(signals.score(rollouts()), 1)
    for row in rows:
        states = hidden_states(policy, [row.tokens])[0]
        values = policy.value_head(states).squeeze(-1).detach()
        assert_close(row.signals["values"], values)
        rewards = torch.zeros(row.counted)
        rewards[-1] = row.reward
        following = torch.cat([values[1:], torch.zeros(1)])
        errors = rewards + 0.9 * following - values
        advantage, expected = 0.0, []
        for error in errors.flip(0):
            advantage = float(error) + 0.9 * 0.8 * advantage
            expected.append(advantage)
        assert_close(row.signals["advantages"], torch.tensor(expected[::-1]), rtol=1e-4, atol=1e-4)
        assert_close(row.signals["returns"], row.signals["advantages"] + values)
    loss = PolicyGradient(policy.pad_id, ppo_clip, vf_coef=0.5)
    terms = loss(policy, rows)
    errors = sum(
        0.5
        * (
            policy.value_head(hidden_states(policy, [row.tokens])[0]).squeeze(-1)
            - row.signals["returns"]
        )
        .square()
        .sum()
        for row in rows
    )
    policy_part = -sum(
        (
            (dense_logps(policy, row) - row.signals["old_logps"]).exp() * row.signals["advantages"]
        ).sum()
        for row in rows
    )
    same_gradients(policy, terms.total, policy_part + 0.5 * errors)


MATCHES = {"lco_kl": lco_kl, "lco_mse": lco_mse, "lco_log_cosh": lco_log_cosh}


def matched(kind, policy, rows, targets, temperature=1.0):
    total = torch.zeros(())
    for row, target in zip(rows, targets, strict=True):
        z = dense(policy, row) / temperature
        total = total + MATCHES[kind](z, target, torch.ones(len(z), dtype=torch.bool)).total
    return total


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("kind", list(MATCHES))
def test_lco_with_sparse_advantages_matches_the_optimal_logits(kind, reused):
    policy, rows = build(1), rollouts()
    before = build(2) if reused else policy
    signals = Signals(before, behaviour="hidden" if reused else "none")
    rows = signals.score(rows)
    loss = Lco(policy.pad_id, kind, beta=0.5, temperature=0.8, behaviour_head=signals.kept_head)
    terms = loss(policy, rows)
    targets = []
    for row in rows:
        behaviour = dense(before, row).detach() / 0.8
        advantages = torch.zeros_like(behaviour)
        advantages.scatter_(1, sampled(row).unsqueeze(1), row.signals["advantages"].unsqueeze(1))
        targets.append(optimal_logits(behaviour, advantages, beta=0.5))
    same_gradients(policy, terms.total, matched(kind, policy, rows, targets, 0.8))


@pytest.mark.parametrize("centre", ["none", "mean", "logprob"])
@pytest.mark.parametrize("kind", list(MATCHES))
def test_lco_with_a_preference_tuned_model_matches_its_log_ratio(kind, centre):
    policy, tuned, reference = build(1, lora=True), Frozen(build(2)), Frozen(build(3))
    sources = {"reward": (tuned, 0.6), "reference": (reference, -0.6)}
    signals = Signals(policy, frozen={name: model for name, (model, _) in sources.items()})
    rows = signals.score(rollouts())
    loss = Lco(policy.pad_id, kind, 0.5, sparse=False, sources=sources, centre=centre)
    terms = loss(policy, rows)
    targets = []
    for row in rows:
        above, below = dense(tuned.policy, row).detach(), dense(reference.policy, row).detach()
        if centre == "logprob":
            above, below = above.log_softmax(-1), below.log_softmax(-1)
        advantages = 0.6 * (above - below)
        if centre == "mean":
            advantages = advantages - advantages.mean(-1, keepdim=True)
        targets.append(optimal_logits(dense(policy, row).detach(), advantages, beta=0.5))
    same_gradients(policy, terms.total, matched(kind, policy, rows, targets))


def test_distillation_is_the_divergence_to_the_teacher():
    policy, teacher = build(1), Frozen(build(2))
    rows = Signals(policy, frozen={"teacher": teacher}).score(rollouts())
    terms = Distillation(policy.pad_id, teacher, beta=0.3, temperature=0.9)(policy, rows)
    expected = torch.zeros(())
    for row in rows:
        mask = torch.ones(row.counted, dtype=torch.bool)
        z, t = dense(policy, row), dense(teacher.policy, row)
        expected = expected + gkd(z, t, mask, beta=0.3, temperature=0.9).total
    same_gradients(policy, terms.total, expected)


def test_minillm_samples_weigh_as_the_mixture_that_drew_them():
    policy, teacher, alpha = build(1), Frozen(build(2)), 0.2
    signals = Signals(
        policy, behaviour="logps", frozen={"teacher": teacher}, minillm=(teacher, alpha, True)
    )
    for row in signals.score(rollouts()):
        p, q = dense_logps(teacher.policy, row).exp(), dense_logps(policy, row).exp()
        assert_close(row.signals["old_logps"].exp(), alpha * p + (1 - alpha) * q)
        rewards = (p / q).log().detach()
        expected = [
            float(rewards[t + 1 :].mean()) if t + 1 < len(rewards) else 0.0
            for t in range(len(rewards))
        ]
        assert_close(row.signals["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_token_advantages_of_a_preference_tuned_model_are_its_log_ratio():
    policy, tuned, reference = build(1), Frozen(build(2)), Frozen(build(3))
    rows = Signals(policy, temperature=0.5, preference=(tuned, reference, 0.7)).score(rollouts())
    for row in rows:
        ratio = dense_logps(tuned.policy, row) - dense_logps(reference.policy, row)
        assert_close(row.signals["advantages"], 0.7 * ratio, rtol=1e-4, atol=1e-5)


def test_the_gradient_does_not_depend_on_how_a_batch_is_cut():
    policy, rows = build(1), rollouts(6)
    sources = {"reward": (Frozen(build(2)), 0.6)}
    rows = Signals(policy, behaviour="hidden", frozen={"reward": sources["reward"][0]}).score(rows)
    losses = [
        PolicyGradient(policy.pad_id, partial(ppo_clip, aggregation="sequence-mean")),
        Lco(policy.pad_id, "lco_kl", 0.5, sources=sources),
        Lco(policy.pad_id, "lco_mse", 0.5, centre="mean"),
    ]
    for loss in losses:
        whole = loss(policy, rows)
        parts = [loss(policy, rows[:1]), loss(policy, rows[1:4]), loss(policy, rows[4:])]
        assert whole.count == sum(part.count for part in parts)
        same_gradients(policy, whole.total, sum(part.total for part in parts))
        for name, metric in whole.metrics.items():
            assert_close(metric, sum(p.metrics[name] for p in parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["lco_kl", "lco_mse", "lco_log_cosh"])
def test_lco_records_of_the_policy_what_a_policy_gradient_records(kind, temperature):
    policy, rows = build(1), rollouts()
    plain = PolicyGradient(
        policy.pad_id, lambda logps, _, a, mask: reinforce(logps, a, mask), temperature=temperature
    )
    expected = plain(policy, rows).metrics
    found = Lco(policy.pad_id, kind, beta=0.5, temperature=temperature)(policy, rows).metrics
    for name in ("entropy", "sampled_probability", "negative_share", "reward"):
        assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_metrics_average_over_what_they_are_about():
    policy, rows = build(1), rollouts(4)
    rows[3] = replace(rows[3], reward=float("nan"))
    loss = PolicyGradient(policy.pad_id, ppo_clip)
    metrics = {k: (v[0] / v[1]).item() for k, v in loss(policy, rows).metrics.items() if v.ndim}
    assert metrics["reward"] == pytest.approx((0 + 1 + 2) / 3)
    assert metrics["completions/mean_length"] == pytest.approx(np.mean([r.counted for r in rows]))
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["frac_reward_zero_std"] == 0.5 and metrics["samples"] == 40
    probabilities = torch.cat([dense_logps(policy, row).exp() for row in rows])
    assert metrics["sampled_probability"] == pytest.approx(probabilities.mean().item(), rel=1e-4)
    entropy = torch.cat(
        [torch.distributions.Categorical(logits=dense(policy, r)).entropy() for r in rows]
    )
    assert metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    advantages = torch.cat([row.signals["advantages"] for row in rows])
    share = -advantages[advantages < 0].sum() / advantages.abs().sum()
    assert metrics["negative_share"] == pytest.approx(share.item())


# Frozen models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_start_of_a_policy_stays_as_it_was_when_the_policy_moves(lora):
    policy, rows = build(1, lora=lora), rollouts()
    start = Frozen.start_of(policy)
    with start.asked() as model:
        before = [dense(model, row).clone() for row in rows]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with start.asked() as model:
        assert all(torch.equal(dense(model, r), b) for r, b in zip(rows, before, strict=True))
    assert start.policy.tokenizer is policy.tokenizer
    assert (start.policy is policy) == lora  # An adapter needs no copy of its base.


def test_hidden_states_come_row_by_row_however_many_are_asked_at_once():
    policy, rows = build(1), [row.tokens for row in rollouts(7)]
    with torch.no_grad():
        alone = [hidden_states(policy, [row])[0] for row in rows]
        few = hidden_states(policy, rows, tokens_at_once=20)
    for one, two, row in zip(alone, few, rows, strict=True):
        assert one.shape == (row.counted.sum(), 32)
        assert_close(one, two)


def test_a_frozen_head_is_shared_only_where_it_is_the_same_and_not_trained():
    policy, twin, other = build(1, lora=True), Frozen(build(1, lora=True)), Frozen(build(2))
    for model in (twin, other):
        model.share_head(policy)
    assert twin.head().weight is policy.head().weight
    assert other.head().weight is not policy.head().weight
    trained = build(1)
    again = Frozen(build(1))
    again.share_head(trained)
    assert again.head().weight is not trained.head().weight


def test_a_model_with_another_vocabulary_is_refused_by_name():
    policy = build(1)
    words = build_tokenizer("bpe", texts=["so many words, so many words"] * 3, vocab_size=270)
    other = load_policy("tiny-qwen2", tokenizer=words, config=SMALL)
    with pytest.raises(ModelError, match=r"teacher models/big has another tokenizer"):
        Frozen(other).check_vocabulary(policy, "teacher models/big")
    wide = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL)
    wide.base.resize_token_embeddings(264)
    with pytest.raises(ModelError, match=r"264 rows, the policy one of 260.*padding.*truncate"):
        Frozen(wide).check_vocabulary(policy, "teacher")
    with pytest.raises(ModelError, match=r"260 rows, the policy one of 264.*those of the policy"):
        Frozen(policy).check_vocabulary(wide, "teacher", truncate=True)
    before = wide.head().weight[:260].clone()
    Frozen(wide).check_vocabulary(policy, "teacher", truncate=True)
    assert torch.equal(wide.head().weight, before)


@pytest.mark.parametrize("seed", range(3))
def test_normalisers_are_log_sum_exps(seed):
    policy, row = build(seed), rollouts(1, seed)[0]
    states = hidden_states(policy, [row.tokens])[0].detach()
    found = log_normaliser(states, policy.head(), sampled(row))
    assert_close(found, dense(policy, row).logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_the_policy_that_sampled_stays_what_it_was_while_its_output_layer_is_trained():
    """And comes back from a checkpoint; where the layer is frozen nothing is kept of it."""
    policy, rows = build(1), rollouts()
    signals = Signals(policy, behaviour="hidden")
    rows = signals.score(rows)
    loss = Lco(policy.pad_id, "lco_kl", 0.5, behaviour_head=signals.kept_head)
    again = Signals(build(3), behaviour="hidden")
    again.load_state_dict({k: v.clone() for k, v in signals.state_dict().items()})
    with torch.no_grad():
        policy.head().weight.mul_(1.3)  # a constant would change no softmax
    moved = loss(policy, rows).total
    resumed = replace(loss, behaviour_head=again.kept_head)(policy, rows).total
    assert torch.equal(moved, resumed)
    following = replace(loss, behaviour_head=type(signals.kept_head)())(policy, rows).total
    assert abs(moved - following) > 1e-3
    frozen = Signals(build(1, lora=True), behaviour="hidden")
    frozen.score(rows)
    assert frozen.state_dict() == {}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_minillm_ratios_are_one_before_the_first_update(temperature):
    policy, teacher = build(1), Frozen(build(2))
    signals = Signals(
        policy,
        temperature=temperature,
        behaviour="logps",
        frozen={"teacher": teacher},
        minillm=(teacher, 0.0, True),
    )
    rows = signals.score(rollouts())
    loss = Distillation(
        policy.pad_id, teacher, 1.0, temperature, partial(ppo_clip), sampling=temperature
    )
    ratio = loss(policy, rows).metrics["ratio"]
    assert (ratio[0] / ratio[1]).item() == pytest.approx(1.0, abs=1e-5)


def test_a_completion_that_nobody_judged_teaches_a_critic_nothing():
    policy = build(1)
    policy.add_value_head()
    signals = Signals(policy, behaviour="logps", critic=(1.0, 0.95))
    rows = [replace(row, reward=float("nan")) for row in rollouts()]
    for row in signals.credit(signals.score(rows), 1):
        assert not row.signals["advantages"].any()
        assert torch.equal(row.signals["returns"], row.signals["values"])
