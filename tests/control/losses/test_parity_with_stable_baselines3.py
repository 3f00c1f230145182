"""PPO against Stable-Baselines3's own code, on the same rollouts, in the same run."""

import math

import pytest
import torch

from holdfast.control.losses import (
    generalized_advantage,
    normalize_advantages,
    ppo,
    value_loss,
)

gymnasium = pytest.importorskip("gymnasium")
sb3 = pytest.importorskip("stable_baselines3")
numpy = pytest.importorskip("numpy")

from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.logger import configure  # noqa: E402

STEPS, ENVIRONMENTS, DISCOUNT, TRACE, EPSILON = 40, 3, 0.9, 0.8, 0.1


class Walk(gymnasium.Env):
    """A pushed point on a line. Episodes end out of bounds, and are cut after seven steps."""

    observation_space = gymnasium.spaces.Box(-math.inf, math.inf, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.normal(size=2).astype("float32"), 0
        return self.place, {}

    def step(self, action):
        self.place = (self.place + 0.5 * action).astype("float32")
        self.time += 1
        reward = float(1 - abs(self.place).sum())
        return self.place, reward, bool(abs(self.place).max() > 2), self.time == 7, {}


class Watch(BaseCallback):
    """What the environments returned, before Stable-Baselines3 changes it."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _on_step(self) -> bool:
        following = self.locals["new_obs"].copy()
        for place, info in enumerate(self.locals["infos"]):
            if "terminal_observation" in info:
                following[place] = info["terminal_observation"]
        cut = [info["TimeLimit.truncated"] for info in self.locals["infos"]]
        seen = (self.locals["rewards"], self.locals["dones"], cut, following)
        self.steps.append([torch.as_tensor(numpy.array(part)) for part in seen])
        return True


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """A model that has collected a rollout, what it saw, and what it made of it."""
    with torch.random.fork_rng():
        model = sb3.PPO(
            "MlpPolicy",
            sb3.common.vec_env.DummyVecEnv([Walk] * ENVIRONMENTS),
            n_steps=STEPS,
            batch_size=STEPS * ENVIRONMENTS,
            n_epochs=1,
            gamma=DISCOUNT,
            gae_lambda=TRACE,
            clip_range=EPSILON,
            vf_coef=0.5,
            max_grad_norm=math.inf,
            learning_rate=0.0,
            seed=0,
            device="cpu",
        )
        model.set_logger(configure(str(tmp_path_factory.mktemp("log")), []))
        watch = Watch()
        _, callback = model._setup_learn(STEPS * ENVIRONMENTS, watch)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS)
    # Copied, for its buffer is flattened in place when it is first read.
    buffer = model.rollout_buffer
    kept = [torch.tensor(part) for part in (buffer.values, buffer.advantages, buffer.returns)]
    return model, [torch.stack(part) for part in zip(*watch.steps, strict=True)], kept


def test_advantages_are_the_same_over_ends_and_cuts(rollout):
    """It adds the value of a final observation to the reward; here that is ``next_values``."""
    model, (rewards, ended, truncated, following), (values, *expected) = rollout
    with torch.no_grad():
        next_values = model.policy.predict_values(following.flatten(0, 1)).view(rewards.shape)
    terminated = ended & ~truncated
    assert terminated.any() and truncated.any()
    found = generalized_advantage(
        rewards.float(),
        values,
        next_values,
        terminated,
        truncated,
        discount=DISCOUNT,
        trace=TRACE,
    )
    torch.testing.assert_close(list(found), expected)


def test_losses_gradients_and_metrics_are_the_same_after_a_change_of_policy(rollout):
    model, *_ = rollout
    policy, buffer = model.policy, model.rollout_buffer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as far from the rollout as some updates would have come
        for part in policy.parameters():
            part.add_(0.03 * torch.randn(part.shape, generator=generator))
    model.train()  # with a learning rate of 0: it leaves its gradient behind
    logged = model.logger.name_to_value

    rows = next(buffer.get(None))
    values, log_probs, _ = policy.evaluate_actions(rows.observations, rows.actions)
    gains = normalize_advantages(rows.advantages)
    surrogate = ppo(log_probs, rows.old_log_prob, gains, epsilon=EPSILON)
    error = value_loss(values.flatten(), rows.returns)
    count = surrogate.count
    assert count == error.count == STEPS * ENVIRONMENTS

    def mean(total: torch.Tensor) -> float:
        return total.item() / count.item()

    assert 0.05 < mean(surrogate.metrics["clip_fraction"]) < 0.95
    for name, found in {
        "policy_gradient_loss": mean(surrogate.total),
        "value_loss": 2 * mean(error.total),  # it has no half
        "approx_kl": mean(surrogate.metrics["approx_kl"]),
        "clip_fraction": mean(surrogate.metrics["clip_fraction"]),
    }.items():
        assert found == pytest.approx(float(logged[f"train/{name}"]), rel=1e-4, abs=1e-6), name

    expected = [part.grad.clone() for part in policy.parameters()]
    policy.zero_grad()
    ((surrogate.total + 2 * 0.5 * error.total) / count).backward()
    for part, slope in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(part.grad, slope, rtol=1e-3, atol=1e-5)
