"""IDQL, AWC, DIPO and AWR: a task with a known best action, cutting, and what each loss trains."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.worlds import Target

from holdfast.control.acting import acting
from holdfast.control.actor_critic import ActorCritic
from holdfast.control.demonstrations import Chunks, Demonstrations, Episode
from holdfast.control.objectives import PolicyOptimisation
from holdfast.control.off_policy import (
    AdvantageWeighted,
    ImplicitQ,
    ImprovedActions,
    Improvement,
)
from holdfast.control.policies import (
    Critic,
    DiffusionPolicy,
    GaussianPolicy,
    ImplicitPolicy,
    TwinQ,
    load_policy,
)
from holdfast.control.regularisation import (
    Accompanied,
    Regularisation,
    of_demonstrations,
    of_teacher,
)
from holdfast.control.replay import ReplayOptions, ReplaySource
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions
from holdfast.joint import Mix, Objective
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.trainer import Trainer

SMALL = (32,)
CLONE = {"gaussian": "mse", "diffusion": "denoising"}


def build(kind, what):
    if kind == "diffusion":
        actor = DiffusionPolicy(1, 1, horizon=2, hidden=SMALL, steps=5, fine_tuned_steps=5, seed=1)
    else:
        actor = GaussianPolicy(1, 1, horizon=2, hidden=SMALL, std=0.3, seed=1)
    critic = None if what == "dipo" else Critic(1, 1, SMALL, seed=3)
    q = None if what == "awr" else TwinQ(1, 1, horizon=2, hidden=SMALL, seed=4)
    return ActorCritic(actor, critic, q, candidates=8 if what == "idql" else None)


def loss_and_source(kind, what, policy, **changes):
    clone = CLONE[kind]
    if what == "awr":
        options = {"steps": 16, "batch_size": 64, "epochs": 4, "critic_warmup": 0, **changes}
        rollouts = RolloutOptions(**options, rows="actions")
        return AdvantageWeighted(clone, 0.5), EnvironmentRollouts(
            policy, Target(16), rollouts, seed=0
        )
    options = {"steps": 4, "updates": 16, "batch_size": 64, "capacity": 2048, **changes}
    loss = ImprovedActions(clone, 0.9) if what == "dipo" else ImplicitQ(clone, 0.9)
    if what == "awc":
        loss.temperature, loss.cap = 0.005, 20.0
    prepare = Improvement(policy, 10, 0.02) if what == "dipo" else None
    return loss, ReplaySource(policy, Target(16), ReplayOptions(**options), seed=0, prepare=prepare)


def error_of(policy):
    """Mean squared distance from the best chunk, over episodes acted in as in evaluation."""
    world, act = Target(64, seed=9), acting(policy.behaviour, seed=0)
    step = world.step(act(world.reset()))
    return -float(step.rewards.mean())


LEARNS = [
    ("gaussian", "idql"),
    ("diffusion", "idql"),
    ("gaussian", "awr"),
    ("diffusion", "awr"),
    ("gaussian", "dipo"),
    ("diffusion", "dipo"),
    ("gaussian", "awc"),
]


@pytest.mark.parametrize(("kind", "what"), LEARNS)
def test_a_policy_finds_the_action_that_is_rewarded(kind, what):
    policy = build(kind, what)
    loss, source = loss_and_source(kind, what, policy)
    before = error_of(policy)

    def observed(summary):
        if what != "awr":
            policy.follow(0.05)
        if kind == "diffusion":
            policy.actor.update_average()
        return summary.loss

    objective = Objective("rl", loss, source, observed=observed)
    steps = {"idql": 500, "awr": 600, "dipo": 400, "awc": 600}[what]
    options = TrainerOptions(
        max_steps=steps, learning_rate=3e-3, eval_steps=steps, max_grad_norm=None
    )
    trainer = Trainer(
        policy, {"rl": objective}, Mix({"rl": 1.0}), options, accelerator=Accelerator(cpu=True)
    )
    trainer.train()
    # Weighted cloning is held back by what it did before; the others look ahead, or forget.
    assert error_of(policy) < (0.5 if what == "awc" else 0.2) * before


@pytest.mark.parametrize(("kind", "what"), LEARNS)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(kind, what):
    policy = build(kind, what)
    loss, source = loss_and_source(kind, what, policy)
    batch = source.next()
    batch.columns["mask"][::3, 1:] = False  # episodes that ended within the chunk
    trained = [p for p in policy.parameters() if p.requires_grad]

    def gradients(parts):
        terms = [loss(policy, part) for part in parts]
        total = sum(term.total for term in terms) / sum(term.count for term in terms)
        return torch.autograd.grad(total, trained)

    for whole, cut in zip(
        gradients([batch]), gradients([batch[:3], batch[3:4], batch[4:]]), strict=True
    ):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["idql", "awr", "dipo"])
def test_while_the_critics_warm_up_the_policy_has_no_gradient(what):
    policy = build("gaussian", what)
    loss, source = loss_and_source(
        "gaussian", what, policy, critic_warmup=1, **({"epochs": 1} if what == "awr" else {})
    )
    for warm in (True, False):
        policy.zero_grad(set_to_none=True)
        loss(policy, source.next()).total.backward()
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                assert (parameter.grad is None) == (warm and name.startswith("actor.")), name
        for _ in range(15 if what != "awr" else 3):
            source.next()


@pytest.mark.parametrize("what", ["idql", "awr", "dipo"])
def test_actions_that_were_not_executed_are_not_cloned(what):
    policy = build("gaussian", what)
    loss, source = loss_and_source("gaussian", what, policy)
    batch = source.next()
    column = "actions" if what == "awr" else "cloned"
    batch.columns["mask"][:, 1] = False

    def gradient():
        total = loss(policy, batch).total
        actor = [p for p in policy.actor.parameters() if p.requires_grad]
        return torch.autograd.grad(total, actor)

    before = gradient()
    batch.columns[column] = batch.columns[column].clone()
    batch.columns[column][:, 1] = torch.nan
    for one, other in zip(before, gradient(), strict=True):
        assert torch.equal(one, other)


def test_weighted_cloning_clones_each_chunk_by_what_the_critics_make_of_it():
    policy = build("gaussian", "awc")
    loss, source = loss_and_source("gaussian", "awc", policy, critic_warmup=0)
    rows = source.next()
    mask = rows.columns["mask"]
    with torch.no_grad():
        q = policy.qs(rows.columns["observations"], rows.columns["actions"], target=True)
        advantages = q.min(dim=0).values - policy.values(rows.columns["observations"])
    weights = torch.exp(advantages / loss.temperature).clamp(max=loss.cap)
    assert weights.min() < 0.5 * weights.max(), "or the test would prove nothing"
    gap = policy.actor.mean(rows.columns["observations"]) - rows.columns["cloned"]
    each = (gap.square().mean(-1) * mask).sum(-1) / mask.sum(-1)
    trained = [p for p in policy.actor.parameters() if p.requires_grad]
    expected = torch.autograd.grad((weights * each).sum(), trained)
    found = torch.autograd.grad(loss(policy, rows).total, trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_target_is_not_trained_and_follows_what_is():
    policy = build("gaussian", "idql")
    assert not any(name.startswith("target_q") for name, _ in policy.named_parameters())
    assert any(name.startswith("target_q") for name in policy.state_dict())
    with torch.no_grad():
        for parameter in policy.q.parameters():
            parameter.add_(1.0)
    seen, done = torch.zeros(3, 1, 1), torch.zeros(3, 2, 1)
    start = dict(policy.target_q.named_buffers())["networks.0.0.weight"].clone()
    policy.follow(0.25)
    moved = dict(policy.target_q.named_buffers())["networks.0.0.weight"]
    torch.testing.assert_close(moved, start + 0.25)
    policy.follow(1.0)
    assert torch.equal(policy.qs(seen, done), policy.qs(seen, done, target=True))


# The choice among candidates ----------------------------------------------------------------------


def test_the_best_candidate_is_taken_and_exploring_prefers_the_better():
    policy = build("gaussian", "idql")
    implicit = policy.behaviour
    assert isinstance(implicit, ImplicitPolicy)
    observations = torch.linspace(-1, 1, 400).view(-1, 1, 1)

    def worth(deterministic):
        generator = torch.Generator().manual_seed(0)
        actions = implicit.act(observations, generator, deterministic=deterministic).actions
        return policy.qs(observations, actions).amin(0)

    generator = torch.Generator().manual_seed(0)
    repeated = observations.repeat_interleave(8, 0)
    with torch.no_grad():
        drawn = policy.actor.act(repeated, generator).actions
        qs = policy.qs(repeated, drawn).amin(0).view(-1, 8)
    assert torch.equal(worth(True), qs.amax(1))
    # The value in the middle of the candidates: the better half has 0.7 of the weight.
    policy.critic.forward = lambda seen: qs.median(1).values
    better = (worth(False) > qs.median(1).values).float().mean()
    expected = (4 * 0.7) / (4 * 0.7 + 4 * 0.3)
    assert abs(float(better) - expected) < 3 * (expected * (1 - expected) / 400) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_what_is_saved_acts_as_what_was_evaluated(kind, tmp_path):
    policy = build(kind, "idql")
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    observations = torch.linspace(-1, 1, 9).view(-1, 1, 1)
    for deterministic in (True, False):
        one, other = (
            found.act(
                observations, torch.Generator().manual_seed(2), deterministic=deterministic
            ).actions
            for found in (policy.behaviour, loaded)
        )
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="no log-probability"):
        loaded.log_probs(observations, {})


# Cloning as a term --------------------------------------------------------------------------------


def demonstrations():
    """The action is -0.8, which is not rewarded."""
    seen = np.random.default_rng(0).uniform(-0.5, 0.5, (30, 7, 1)).astype(np.float32)
    done, rewards = np.full((6, 1), -0.8, np.float32), np.zeros(6, np.float32)
    episodes = tuple(Episode(each, done, rewards, True, False) for each in seen)
    return Demonstrations(episodes, "made up")


def regularised(kind, of, weight):
    policy = build(kind, "awr")
    if kind == "diffusion":
        policy.actor.begin_fine_tuning()
    options = RolloutOptions(
        16, 64, 2, critic_warmup=0, rows="denoising" if kind == "diffusion" else "decisions"
    )
    rollouts = EnvironmentRollouts(policy, Target(16), options, seed=0)
    companion = (
        of_teacher(policy.actor)
        if of == "teacher"
        else of_demonstrations(Chunks(demonstrations(), horizon=2))
    )
    loss = PolicyOptimisation(regularisation=Regularisation(weight, of, CLONE[kind]))
    if kind == "diffusion":
        loss.fine_tuned_steps, loss.epsilon_base = 5, 0.1
    return policy, loss, Accompanied(rollouts, companion, seed=0)


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
@pytest.mark.parametrize("of", ["demonstrations", "teacher"])
def test_a_cloning_term_adds_its_own_gradient_however_a_batch_is_cut(kind, of):
    policy, loss, source = regularised(kind, of, 3.0)
    batch = source.next()
    actor = [p for p in policy.actor.parameters() if p.requires_grad]

    def gradients(parts, weight):
        loss.regularisation.weight = weight
        terms = [loss(policy, part) for part in parts]
        total = sum(term.total for term in terms) / sum(term.count for term in terms)
        return torch.autograd.grad(total, actor)

    alone, single, triple = (gradients([batch], weight) for weight in (0.0, 1.0, 3.0))
    cut = gradients([batch[:3], batch[3:4], batch[4:]], 3.0)
    beside = loss.regularisation.losses(policy.actor, batch.columns).mean()
    expected = torch.autograd.grad(beside, actor)
    for zero, one, three, parts, own in zip(alone, single, triple, cut, expected, strict=True):
        torch.testing.assert_close(one, zero + own, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(three, zero + 3 * own, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts, three, rtol=1e-4, atol=1e-6)
        assert own.any()


def test_a_teacher_stays_what_the_policy_was_and_sees_where_it_is_now():
    policy, _, source = regularised("gaussian", "teacher", 1.0)
    with torch.no_grad():
        for parameter in policy.actor.head.network.parameters():
            parameter.add_(5.0)
    columns = source.next().columns
    assert torch.equal(columns["cloned/observations"], columns["observations"])
    # Near 0 at first, with a deviation of 0.3; the policy itself is now at 1.
    assert abs(float(columns["cloned/actions"].mean())) < 0.1
    assert float(columns["chunk"].mean()) > 0.8


@pytest.mark.parametrize("weight", [0.0, 20.0])
def test_a_heavy_term_makes_a_policy_do_what_was_demonstrated(weight):
    policy, loss, source = regularised("gaussian", "demonstrations", weight)
    options = TrainerOptions(max_steps=200, learning_rate=3e-3, eval_steps=200)
    Trainer(
        policy,
        {"rl": Objective("rl", loss, source)},
        Mix({"rl": 1.0}),
        options,
        accelerator=Accelerator(cpu=True),
    ).train()
    with torch.no_grad():
        mean = float(policy.actor.mean(torch.linspace(-0.5, 0.5, 11).view(-1, 1, 1)).mean())
    assert (abs(mean + 0.8) < 0.1) == (weight > 0) and (abs(mean) < 0.4) == (weight == 0)
