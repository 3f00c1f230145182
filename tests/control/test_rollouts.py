"""Rollouts: what is collected, against the environment's own record; resuming; stopping."""

import copy

import pytest
import torch
from helpers.worlds import Target

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.losses import generalized_advantage
from holdfast.control.policies import Critic, DiffusionPolicy, GaussianPolicy, ResidualPolicy
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions

SMALL = (16,)
ROWS = {"gaussian": "decisions", "residual": "decisions", "diffusion": "denoising"}


def build(kind="gaussian", horizon=2):
    if kind == "diffusion":
        actor = DiffusionPolicy(
            1, 1, horizon=horizon, hidden=SMALL, steps=6, fine_tuned_steps=3, seed=1
        )
        actor.begin_fine_tuning()
    else:
        actor = GaussianPolicy(1, 1, horizon=horizon, hidden=SMALL, std=0.3, seed=1)
    if kind == "residual":
        actor = ResidualPolicy(actor, hidden=SMALL, seed=2)
    return ActorCritic(actor, Critic(1, 1, SMALL, seed=3))


def source(policy, world=None, **changes):
    options = {"steps": 6, "batch_size": 12, "epochs": 2, **changes}
    return EnvironmentRollouts(policy, world or Target(4), RolloutOptions(**options), seed=5)


@pytest.mark.parametrize("kind", ["gaussian", "residual", "diffusion"])
def test_the_ratio_is_one_before_the_first_update(kind):
    policy = build(kind)
    batch = source(policy, rows=ROWS[kind]).next()
    columns = batch.columns
    if kind == "diffusion":
        found = policy.actor.step_log_probs(
            columns["observations"], columns["before"], columns["after"], columns["position"]
        )
    else:
        found = policy.actor.log_probs(columns["observations"], columns)
    ratio = (found - columns["old_log_probs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("terminates", [False, True])
def test_advantages_are_those_of_the_episodes_that_were_lived(terminates):
    policy = build()
    world = Target(4, terminates=terminates)
    rollouts = source(
        policy, world, batch_size=24, normalize_advantages=False, normalize_values=False
    )
    twin = Target(4, terminates=terminates)
    observations, generator = twin.reset(), torch.Generator().manual_seed(5)
    values, after, rewards, ends = [], [], [], []
    with torch.no_grad():
        for _ in range(6):
            seen = torch.from_numpy(observations)
            values.append(policy.critic(seen))
            step = twin.step(policy.actor.act(seen, generator).actions.numpy())
            after.append(policy.critic(torch.from_numpy(step.final_observations)))
            rewards.append(torch.from_numpy(step.rewards))
            ends.append(torch.from_numpy(step.ended))
            observations = step.observations
    ends = torch.stack(ends)
    never = torch.zeros_like(ends)
    advantages, returns = generalized_advantage(
        torch.stack(rewards),
        torch.stack(values),
        torch.stack(after),
        ends if terminates else never,
        never if terminates else ends,
        discount=0.99,
        trace=0.95,
    )
    batch = rollouts.next()
    for name, expected in (("advantages", advantages), ("returns", returns)):
        found, wanted = batch.columns[name].sort().values, expected.flatten().sort().values
        torch.testing.assert_close(found, wanted)
    assert batch.facts["reward"][1] == 8.0 and batch.facts["episode_length"][0] == 24.0


def test_every_row_is_used_once_in_every_pass():
    rollouts = source(build(), batch_size=9)
    for _ in range(2):
        parts = [rollouts.next().columns["advantages"] for _ in range(3)]
        assert [len(part) for part in parts] == [8, 8, 8]  # not 9, 9 and 6
        rows = torch.cat(parts)
        assert len(rows) == 24 == len(rows.unique())
    assert rollouts.round == 1
    rollouts.next()
    assert rollouts.round == 2


def test_values_are_clipped_around_what_the_critic_says_now():
    """In its own units, in which the first returns are not yet normalised."""
    policy = build()
    batch = source(policy, batch_size=24).next().columns
    torch.testing.assert_close(policy.values(batch["observations"]).detach(), batch["old_values"])


def test_an_update_that_went_too_far_ends_the_use_of_its_rollouts():
    rollouts = source(build(), target_kl=0.1)
    rollouts.next()
    rollouts.observe(0.05)
    rollouts.next()
    assert rollouts.round == 1
    rollouts.observe(0.2)
    rollouts.next()
    assert rollouts.round == 2


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
@pytest.mark.parametrize("used", [0, 1, 4])
def test_a_resumed_source_goes_on_bit_for_bit(kind, used):
    policy = build(kind)
    first = source(policy, rows=ROWS[kind], scale_rewards=True)
    for _ in range(used):
        first.next()
    state = copy.deepcopy(first.state_dict())
    # Environments that never began have no state: they are what their seed makes them.
    world = Target(4, seed=99 if used else 0)
    second = source(policy, world, rows=ROWS[kind], scale_rewards=True)
    second.load_state_dict(state)
    for _ in range(14):
        other = second.next()
        for name, column in first.next().columns.items():
            assert torch.equal(other.columns[name], column)
    assert first.round == second.round > 1
    assert first.environment_steps == second.environment_steps
