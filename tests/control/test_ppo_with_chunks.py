"""PPO on chunks that episodes cut short, against the same episodes lived one action at a time."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.environments import EnvironmentOptions
from holdfast.control.environments.seeds import training_seed
from holdfast.control.environments.synchronous import GymnasiumEnvironment
from holdfast.control.objectives import PolicyOptimisation
from holdfast.control.policies import Critic, GaussianPolicy
from holdfast.control.rollouts import EnvironmentRollouts, RolloutOptions

COUNT, STEPS, HORIZON, LIMIT, DISCOUNT, TRACE = 3, 12, 3, 7, 0.9, 0.8


class Line(gymnasium.Env):
    """A point on a line, over beyond 0.8. It knows the time, so that no observation comes twice."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-0.3, 0.3), 0
        return self._seen(), {}

    def step(self, action):
        self.place += float(action[0])
        self.time += 1
        reward = 1.0 - self.place**2 + 0.3 * float(action[0])
        return self._seen(), reward, abs(self.place) > 0.8, False, {}

    def _seen(self):
        return np.array([self.place, self.time], dtype=np.float32)


def limited():
    return gymnasium.wrappers.TimeLimit(Line(), LIMIT)


def lived(policy, rows):
    """By place of a row: reward of its chunk, where it led, and how it ended. One list a slot.

    What is executed is taken from the rows, which are found by what was observed.
    """
    place_of = {seen.numpy().tobytes(): at for at, seen in enumerate(rows["observations"])}
    assert len(place_of) == COUNT * STEPS
    chunks = policy.actor.actions.denormalize(rows["chunk"]).clamp(-0.5, 0.5).numpy()
    found = []
    for slot in range(COUNT):
        env, episode, steps = limited(), 0, []
        seen, _ = env.reset(seed=training_seed(0, slot, 0))
        for _ in range(STEPS):
            at = place_of[seen.tobytes()]
            total, taken, terminated, truncated = 0.0, 0, False, False
            for action in chunks[at]:
                seen, reward, terminated, truncated, _ = env.step(action)
                total, taken = total + reward, taken + 1
                if terminated or truncated:
                    break
            end = "end" if terminated else "cut" if truncated else ""
            steps.append((at, total, seen.copy(), end, taken))
            if end:
                episode += 1
                seen, _ = env.reset(seed=training_seed(0, slot, episode))
        found.append(steps)
    return found


def value(policy, seen):
    with torch.no_grad():
        return policy.critic(torch.from_numpy(np.asarray(seen))[None, None]).item()


@pytest.fixture(scope="module")
def rollout():
    actor = GaussianPolicy(2, 1, horizon=HORIZON, hidden=(16,), std=0.3, seed=1)
    policy = ActorCritic(actor, Critic(2, 1, (16,), seed=3))
    make = partial(GymnasiumEnvironment, "line", COUNT, limited, seed=0)
    options = RolloutOptions(
        STEPS,
        COUNT * STEPS,
        discount=DISCOUNT,
        trace=TRACE,
        normalize_advantages=False,
        normalize_values=False,
        critic_warmup=0,
    )
    source = EnvironmentRollouts(policy, make(options=EnvironmentOptions()), options, seed=5)
    batch = source.next()
    return policy, batch, lived(policy, batch.columns)


def test_advantages_are_those_of_single_actions(rollout):
    policy, batch, found = rollout
    inside = [end for steps in found for *_, end, taken in steps if taken < HORIZON]
    assert {"end", "cut"} <= set(inside), "both must happen within a chunk"
    for steps in found:
        for first in range(STEPS):
            total, weight = 0.0, 1.0
            for at, reward, after, end, _ in steps[first:]:
                own = value(policy, batch.columns["observations"][at, 0])
                following = 0.0 if end == "end" else value(policy, after)
                total += weight * (reward + DISCOUNT * following - own)
                weight *= DISCOUNT * TRACE
                if end:
                    break
            at = steps[first][0]
            own = value(policy, batch.columns["observations"][at, 0])
            assert batch.columns["advantages"][at].item() == pytest.approx(total, abs=1e-5)
            assert batch.columns["returns"][at].item() == pytest.approx(total + own, abs=1e-5)


def test_the_loss_is_that_of_its_definition_after_a_change_of_policy(rollout):
    policy, batch, _ = rollout
    columns = batch.columns
    with torch.no_grad():
        before = Normal(policy.actor.mean(columns["observations"]), 0.3)
        old = before.log_prob(columns["chunk"]).sum((-2, -1))
        torch.testing.assert_close(old, columns["old_log_probs"], rtol=0, atol=1e-4)
        for parameter in policy.actor.parameters():
            if parameter.requires_grad:  # the deviation is fixed
                parameter.add_(0.05)
        mean = policy.actor.mean(columns["observations"])
        new = Normal(mean, 0.3).log_prob(columns["chunk"]).sum((-2, -1))
        ratio, gains = (new - columns["old_log_probs"]).exp(), columns["advantages"]
        assert ((ratio - 1).abs() > 0.2).any()
        clipped = torch.minimum(ratio * gains, ratio.clamp(0.8, 1.2) * gains)
        error = 0.5 * (policy.values(columns["observations"]) - columns["returns"]) ** 2
        expected = (-clipped + 0.7 * error).mean()
        terms = PolicyOptimisation(0.2, vf_coef=0.7)(policy, batch)
    torch.testing.assert_close(terms.total / terms.count, expected, rtol=1e-4, atol=1e-5)
