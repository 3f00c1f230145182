"""Guards within losses on rollouts: padding, cutting, and terms against dense logits."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.rollouts import build, dense, dense_logps, gradients, rollouts, same_gradients, sampled
from torch.testing import assert_close

from holdfast.language.frozen import Frozen, hidden_states
from holdfast.language.guards import (
    AdaptiveEntropy,
    CurvatureGuard,
    Penalties,
    SafeKL,
    curvature_mask,
    soft_minimum,
)
from holdfast.language.imitation import DemonstrationLoss
from holdfast.language.losses.policy_gradient import ppo_clip
from holdfast.language.on_policy import Lco, PolicyGradient
from holdfast.language.signals import Signals


def guard(make, policy, rows):
    """A guard that masks some of the tokens: its limit is half the mean of what is predicted."""
    loss = make(policy, CurvatureGuard(0.1, 1e9, 1e9))
    total, count = loss(policy, rows).metrics["curvature/policy_shift"].tolist()
    return CurvatureGuard(0.1, 1e9, total / count / 2)


def guarded_by(policy, found, temperature=1.0):
    return PolicyGradient(policy.pad_id, ppo_clip, temperature=temperature, curvature=found)


def expected_mask(policy, row, found, temperature=1.0):
    states = hidden_states(policy, [row.tokens])[0].float()
    return curvature_mask(
        dense(policy, row).detach() / temperature,
        sampled(row),
        row.signals["advantages"],
        states.norm(dim=-1) / temperature,
        learning_rate=found.learning_rate,
        objective_limit=found.objective_limit,
        policy_limit=found.policy_limit,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_tokens_leave_loss_and_normaliser(temperature):
    policy, rows = build(1), rollouts()
    make = partial(guarded_by, temperature=temperature)
    found = guard(make, policy, rows)
    terms = make(policy, found)(policy, rows)
    masks = [expected_mask(policy, row, found, temperature) for row in rows]
    kept, everything = sum(int(m.sum()) for m in masks), sum(len(m) for m in masks)
    assert 0 < kept < everything and terms.count == kept
    assert terms.metrics["curvature/masked"].tolist() == [everything - kept, everything]
    dropped = [
        (
            dense_logps(policy, row, temperature).detach()[~mask].exp(),
            row.signals["advantages"][~mask],
        )
        for row, mask in zip(rows, masks, strict=True)
    ]
    for name, values in zip(("probability", "advantage"), zip(*dropped, strict=True), strict=True):
        expected = torch.tensor([float(torch.cat(values).sum()), everything - kept]).double()
        assert_close(terms.metrics[f"curvature/masked_{name}"], expected, rtol=1e-4, atol=1e-5)
    total = -sum(
        ((logps - logps.detach()).exp() * row.signals["advantages"] * mask).sum()
        for row, mask in zip(rows, masks, strict=True)
        for logps in [dense_logps(policy, row, temperature)]
    )
    same_gradients(policy, terms.total, total)


def test_the_control_arm_masks_as_many_tokens_but_others():
    policy, rows = build(1), rollouts()
    found = guard(guarded_by, policy, rows)
    one = guarded_by(policy, found)(policy, rows)
    other = replace(found, random=True)
    two = guarded_by(policy, other)(policy, rows)
    assert one.count == two.count and one.total != two.total
    again = guarded_by(policy, other)(policy, rows)
    assert again.total == two.total


LOSSES = {
    "policy gradient": lambda policy, found: PolicyGradient(
        policy.pad_id,
        partial(ppo_clip, aggregation="sequence-mean"),
        penalties=Penalties(beta=0.2, entropy_coef=0.3, aggregation="sequence-mean"),
        curvature=found,
        off_policy_threshold=0.5,
        kl_cov_coef=0.4,
        demonstrations=DemonstrationLoss(shaping=0.2, entropy_weights=True),
        hint_coef=0.1,
    ),
    "lco_kl": lambda policy, found: Lco(
        policy.pad_id,
        "lco_kl",
        0.5,
        penalties=Penalties(beta=0.2, entropy_coef=0.3),
        mixed=True,
        curvature=found,
    ),
}


def mixed_rows(before):
    """Rollouts with every mark that a guard may leave, one of them a demonstration."""
    signals = Signals(before, behaviour="logps", reference=Frozen(build(3)))
    rows = signals.score(rollouts())
    draw = torch.Generator().manual_seed(0)
    for row in rows:
        row.signals["guard/kl_cov"] = torch.rand(row.counted, generator=draw) < 0.3
    rows[1] = replace(rows[1], demonstration=True)
    rows[2] = replace(rows[2], hint=1)
    return rows


@pytest.mark.parametrize("kind", LOSSES)
def test_all_guards_together_do_not_depend_on_padding_or_on_how_a_batch_is_cut(kind):
    policy = build(1)
    rows = mixed_rows(build(2))
    loss = LOSSES[kind](policy, guard(LOSSES[kind], policy, rows))
    whole = loss(policy, rows)
    parts = [loss(policy, [row]) for row in rows]
    assert sum(part.count for part in parts) == whole.count
    same_gradients(policy, whole.total, sum(part.total for part in parts))
    for name, value in whole.metrics.items():
        assert_close(sum(part.metrics[name] for part in parts), value, rtol=1e-4, atol=1e-4)
    assert 0 < whole.metrics["curvature/masked"][0] < whole.metrics["curvature/masked"][1]
    assert whole.metrics["demonstrations"].tolist() == [1, len(rows)]


@pytest.mark.parametrize("kind", ["policy gradient", "lco"])
def test_the_record_says_how_probable_the_tokens_were_that_a_guard_chose(kind):
    policy = build(1)
    rows = mixed_rows(build(2))
    loss = Lco(policy.pad_id, "lco_kl", 0.5)
    if kind == "policy gradient":
        loss = PolicyGradient(policy.pad_id, ppo_clip, off_policy_threshold=1e-6)
    metrics = loss(policy, rows).metrics
    logps = torch.cat([dense_logps(policy, row) for row in rows])
    flags = torch.cat([row.signals["guard/kl_cov"] for row in rows])
    if kind == "lco":  # It learns from no hint.
        flags[sum(row.counted for row in rows[:2])] = False
    expected = logps[flags].exp().double()
    found = metrics["guard/kl_cov/probability"].double()
    assert_close(found, torch.stack([expected.sum(), flags.sum().double()]), rtol=1e-4, atol=1e-6)
    if kind == "policy gradient":
        masked, count = metrics["off_policy_masked"].tolist()
        of = metrics["off_policy_masked/probability"]
        assert 0 < masked < count and of[1] == masked and 0 < of[0] < masked


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_entropy_bonus_has_the_gradient_of_the_entropy(aggregation):
    policy, rows = build(1), rollouts()
    shape = {"aggregation": aggregation}
    plain = PolicyGradient(policy.pad_id, partial(ppo_clip, **shape), temperature=0.8)
    bonus = replace(plain, penalties=Penalties(entropy_coef=0.4, **shape))
    difference = bonus(policy, rows).total - plain(policy, rows).total
    entropies = []
    for row in rows:
        logps = (dense(policy, row) / 0.8).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        entropies.append(entropy.sum() if aggregation == "token-mean" else entropy.mean())
    same_gradients(policy, difference, -0.4 * sum(entropies))


@pytest.mark.parametrize("kind", ["policy gradient", "lco_kl"])
def test_the_penalty_of_safe_moves_the_policy_and_is_nothing_below_its_threshold(kind):
    policy, before = build(1), build(2)
    rows = Signals(before, behaviour="logps", reference=Frozen(build(3))).score(rollouts())
    if kind == "lco_kl":
        rows = [replace(row, signals={**row.signals}) for row in rows]
        make = partial(Lco, policy.pad_id, "lco_kl", 0.5)
    else:
        make = partial(PolicyGradient, policy.pad_id, ppo_clip)
    control = SafeKL()
    plain, guarded = make()(policy, rows), make(penalties=Penalties(kl=control))
    assert torch.equal(guarded(policy, rows).total, plain.total)
    control.update(2.0, 1.0)
    assert control.coefficient > 0
    expected = torch.zeros(())
    for row in rows:
        away = dense_logps(build(3), row).detach() - dense_logps(policy, row)
        expected = expected + control.coefficient * (away.exp() - away - 1).sum()
    penalty = guarded(policy, rows).total - make()(policy, rows).total
    assert max(part.abs().max() for part in gradients(policy, penalty)) > 1e-3
    penalty = guarded(policy, rows).total - make()(policy, rows).total
    same_gradients(policy, penalty, expected)


def test_an_entropy_that_is_high_has_no_bonus():
    policy, rows = build(1), rollouts()
    control = AdaptiveEntropy(0.3, target=1e-6)
    control.observe({"entropy": 1.0})
    plain = PolicyGradient(policy.pad_id, ppo_clip)(policy, rows)
    guarded = PolicyGradient(policy.pad_id, ppo_clip, penalties=Penalties(entropy=control))
    assert torch.equal(guarded(policy, rows).total, plain.total)


def test_demonstrations_are_imitated_and_all_others_learn_from_ratios():
    policy, rows = build(1), rollouts()
    rows[1] = replace(rows[1], demonstration=True)
    loss = PolicyGradient(policy.pad_id, ppo_clip, demonstrations=DemonstrationLoss())
    expected = torch.zeros(())
    for row in rows:
        logps = dense_logps(policy, row)
        ratio = logps if row.demonstration else (logps - logps.detach()).exp()
        expected = expected - (row.signals["advantages"] * ratio).sum()
    terms = loss(policy, rows)
    same_gradients(policy, terms.total, expected)
    assert terms.count == sum(row.counted for row in rows)
    # What the policy did not draw is no part of what is shown of it.
    shown = terms.metrics["completions/mean_length"].tolist()
    assert shown == [sum(row.counted for row in rows) - rows[1].counted, len(rows) - 1]
    assert terms.metrics["entropy"][1] == terms.count - rows[1].counted


def test_hints_are_learnt_by_their_likelihood_alone():
    policy, rows = build(1), rollouts()
    longest = max(range(len(rows)), key=lambda index: rows[index].counted)
    rows[longest] = replace(rows[longest], hint=2)
    loss = PolicyGradient(policy.pad_id, ppo_clip, hint_coef=0.25)
    expected, count = torch.zeros(()), 0
    for row in rows:
        logps = dense_logps(policy, row)
        own = slice(row.hint, None)
        ratio = (logps - logps.detach()).exp()
        expected = expected - (row.signals["advantages"] * ratio)[own].sum()
        expected = expected - 0.25 * logps[: row.hint].sum()
        count += row.counted - row.hint
    terms = loss(policy, rows)
    same_gradients(policy, terms.total, expected)
    assert terms.count == count


def test_a_curvature_mask_of_lco_is_that_of_its_gradient():
    """At the policy that sampled, d KL / d z = -(1 - 1 / Z) (e_a - pi)."""
    policy, rows = build(1), rollouts()
    for row in rows:
        z = dense(policy, row).detach().double().requires_grad_()
        a, ids = row.signals["advantages"].double(), sampled(row)
        target = z.detach().clone()
        target[torch.arange(len(ids)), ids] += a / 0.5
        divergence = (target.softmax(-1) * (target.log_softmax(-1) - z.log_softmax(-1))).sum()
        (gradient,) = torch.autograd.grad(divergence, z)
        policy_of = z.detach().softmax(-1)
        chosen = policy_of[torch.arange(len(ids)), ids]
        effective = 1 - 1 / (1 + chosen * torch.expm1(a / 0.5))
        residual = torch.nn.functional.one_hot(ids, z.shape[-1]) - policy_of
        assert_close(gradient, -effective[:, None] * residual)
        row.signals["effective"] = effective.float()
    found = CurvatureGuard(0.1, 1e9, 1e9)
    shown = Lco(policy.pad_id, "lco_kl", 0.5, curvature=found)(policy, rows).metrics
    as_gradient = [replace(row, signals={"advantages": row.signals["effective"]}) for row in rows]
    like = PolicyGradient(policy.pad_id, ppo_clip, curvature=found)(policy, as_gradient).metrics
    for name in ("curvature/objective_shift", "curvature/policy_shift"):
        assert_close(shown[name], like[name], rtol=1e-3, atol=1e-9)


def test_two_heads_are_read_by_their_soft_minimum_and_grow_apart():
    policy = build(1)
    policy.add_value_head(2)
    weight = policy.value_head.weight
    assert not torch.equal(weight[0], weight[1])
    value = partial(soft_minimum, alpha=0.3)
    signals = Signals(policy, behaviour="logps", critic=(1.0, 0.9), value=value)
    rows = signals.credit(signals.score(rollouts()), 1)
    assert all(math.isfinite(float(row.signals["values"].sum())) for row in rows)
    terms = PolicyGradient(policy.pad_id, ppo_clip, vf_coef=0.5, value=value)(policy, rows)
    (found,) = torch.autograd.grad(terms.total, weight)
    assert not torch.equal(found[0], found[1])
