"""Objectives of control: cutting, separation of networks, and tasks with a known best action."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.worlds import Target

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.demonstrations import Chunks, Demonstrations, Episode
from holdfast.control.objectives import Cloning, DemonstrationBatches, PolicyOptimisation
from holdfast.control.policies import Critic, DiffusionPolicy, GaussianPolicy, ResidualPolicy
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions
from holdfast.joint import Interleave, Mix, Objective
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.trainer import Trainer

SMALL = (32,)


def build(kind, horizon=2):
    if kind == "diffusion":
        actor = DiffusionPolicy(
            1, 1, horizon=horizon, hidden=SMALL, steps=5, fine_tuned_steps=5, seed=1
        )
    else:
        actor = GaussianPolicy(1, 1, horizon=horizon, hidden=SMALL, std=0.3, seed=1)
    if kind == "residual":
        actor = ResidualPolicy(actor, hidden=SMALL, scale=1.0, seed=2)
    return ActorCritic(actor, Critic(1, 1, SMALL, seed=3))


def demonstrations(episodes=6):
    """The action is twice the observation."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(episodes):
        seen = draw.uniform(-0.4, 0.4, (7, 1)).astype(np.float32)
        rewards = np.zeros(6, dtype=np.float32)
        found.append(Episode(seen, 2 * seen[:-1], rewards, True, False))
    return Demonstrations(tuple(found), "made up")


def source_of(kind, policy, **changes):
    options = {
        "steps": 16,
        "batch_size": 64,
        "epochs": 4,
        "critic_warmup": 0,
        "rows": "denoising" if kind == "diffusion" else "decisions",
        **changes,
    }
    return EnvironmentRollouts(policy, Target(16), RolloutOptions(**options), seed=0)


def loss_of(kind):
    if kind != "diffusion":
        return PolicyOptimisation()
    return PolicyOptimisation(0.2, fine_tuned_steps=5, epsilon_base=0.1)


def train(policy, objectives, steps, learning_rate):
    weights = {name: 1.0 / len(objectives) for name in objectives}
    options = TrainerOptions(max_steps=steps, learning_rate=learning_rate, eval_steps=steps)
    Trainer(policy, objectives, Mix(weights), options, accelerator=Accelerator(cpu=True)).train()


@pytest.mark.parametrize("kind", ["gaussian", "residual", "diffusion"])
def test_a_policy_finds_the_action_that_is_rewarded(kind):
    policy = build(kind)
    if kind == "diffusion":
        policy.actor.begin_fine_tuning()
    rollouts = source_of(kind, policy)
    seen = []

    def observed(summary):
        seen.append(summary.metrics["reward"])
        return summary.loss

    steps = 640 if kind == "diffusion" else 256
    objective = Objective("rl", loss_of(kind), rollouts, observed=observed)
    train(policy, {"rl": objective}, steps, 3e-3)
    assert np.mean(seen[-32:]) > 0.5 * np.mean(seen[:16])  # rewards are negative


@pytest.mark.parametrize("kind", ["nll", "mse", "denoising"])
def test_imitation_does_what_was_demonstrated(kind):
    policy = build("diffusion" if kind == "denoising" else "gaussian", horizon=1)
    policy.critic = None
    diffusion = policy.actor if kind == "denoising" else None
    batches = DemonstrationBatches(Chunks(demonstrations()), 32, diffusion, seed=0)

    def observed(summary):
        if diffusion is not None:
            diffusion.update_average()
        return summary.loss

    steps = 1000 if kind == "denoising" else 400
    train(policy, {"il": Objective("il", Cloning(kind), batches, observed=observed)}, steps, 3e-3)
    observations = torch.linspace(-0.35, 0.35, 15).view(-1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    acted = torch.stack(
        [policy.actor.act(observations, generator, deterministic=True).actions for _ in range(20)]
    ).mean(0)
    error = (acted.flatten() - 2 * observations.flatten()).abs().mean()
    assert error < (0.15 if kind == "denoising" else 0.05)


@pytest.mark.parametrize("kind", ["gaussian", "residual", "diffusion"])
@pytest.mark.parametrize("what", ["rl", "il"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(kind, what):
    policy = build(kind)
    if what == "rl":
        if kind == "diffusion":
            policy.actor.begin_fine_tuning()
        batch, loss = source_of(kind, policy).next(), loss_of(kind)
        batch.columns["advantages"] *= 1.7
    else:
        diffusion = policy.actor if kind == "diffusion" else None
        chunks = Chunks(demonstrations(), horizon=2)
        batch = DemonstrationBatches(chunks, 20, diffusion, seed=0).next()
        loss = Cloning("denoising" if diffusion else "mse")
    trained = [p for p in policy.parameters() if p.requires_grad]

    def gradients(parts):
        terms = [loss(policy, part) for part in parts]
        total = sum(term.total for term in terms) / sum(term.count for term in terms)
        return torch.autograd.grad(total, trained, allow_unused=True)

    for whole, cut in zip(
        gradients([batch]), gradients([batch[:3], batch[3:4], batch[4:]]), strict=True
    ):
        assert (whole is None) == (cut is None)
        if whole is not None:
            torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_no_gradient_crosses_between_a_base_and_its_residual():
    policy = build("residual")
    names = dict(policy.named_parameters())

    def touched(terms):
        policy.zero_grad(set_to_none=True)
        terms.total.backward()
        return {name for name, p in names.items() if p.grad is not None and p.grad.any()}

    rl = touched(loss_of("residual")(policy, source_of("residual", policy).next()))
    rows = DemonstrationBatches(Chunks(demonstrations(), horizon=2), 20, seed=0).next()
    il = touched(Cloning("mse")(policy, rows))
    assert rl and all(name.startswith(("actor.residual.", "critic.")) for name in rl)
    assert il and all(name.startswith("actor.base.") for name in il)


def test_a_turn_of_one_objective_moves_no_parameter_of_the_other_network():
    policy = build("residual")
    rows = DemonstrationBatches(Chunks(demonstrations(), horizon=2), 20, seed=0)
    objectives = {
        "il": Objective("il", Cloning("mse"), rows),
        "rl": Objective("rl", loss_of("residual"), source_of("residual", policy)),
    }
    # With momentum and decay: neither may move what has no gradient.
    options = TrainerOptions(max_steps=9, learning_rate=1e-2, weight_decay=0.1)
    schedule = Interleave("il", "rl", 2)
    trainer = Trainer(policy, objectives, schedule, options, accelerator=Accelerator(cpu=True))
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    for turn in range(9):
        before = {name: policy.get_parameter(name).detach().clone() for name in names}
        trainer.train_step()
        moved = {n for n in names if not torch.equal(before[n], policy.get_parameter(n))}
        of = ("actor.base.",) if turn % 3 == 0 else ("actor.residual.", "critic.")
        assert moved and all(name.startswith(of) for name in moved)


def test_while_the_critic_warms_up_the_policy_has_no_gradient():
    policy = build("gaussian")
    rollouts = source_of("gaussian", policy, critic_warmup=1, epochs=1)
    loss = loss_of("gaussian")
    for warm in (True, False):
        policy.zero_grad(set_to_none=True)
        loss(policy, rollouts.next()).total.backward()
        assert all((p.grad is None) == warm for p in policy.actor.parameters() if p.requires_grad)
        assert all(p.grad is not None for p in policy.critic.parameters())
        for _ in range(3):
            rollouts.next()
