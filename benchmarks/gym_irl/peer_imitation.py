"""imitation's methods. Run by its own interpreter: ``peer_imitation.py QUESTION ANSWER``."""

import json
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
from imitation.algorithms import bc
from imitation.algorithms.adversarial.airl import AIRL
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import Trajectory
from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
from imitation.util.networks import RunningNorm
from imitation.util.util import make_vec_env
from stable_baselines3 import PPO


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    state = np.array(asked["state"], np.float32)
    action = np.array(asked["action"], np.int64)
    bounds = [*asked["starts"], len(action)]
    shown = [
        Trajectory(
            obs=np.vstack([state[a:b], np.array(asked["last"][i], np.float32)[None]]),
            acts=action[a:b],
            infos=None,
            terminal=asked["terminal"][i],
        )
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    answer = {}
    for method in ("BC", "GAIL", "AIRL"):
        started = time.process_time()
        policy = fit(method, shown, asked)
        seconds = time.process_time() - started
        answer[method] = {
            "return": evaluate(policy, asked),
            "seconds": round(seconds, 1),
            "decisions tried out": 0 if method == "BC" else asked["steps"],
        }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def fit(method, shown, asked):
    seed = asked["seed"]
    random = np.random.default_rng(seed)
    # Episodes differ in length; the package would refuse that unless told.
    environment = make_vec_env(asked["task"], rng=random, n_envs=8)
    spaces = environment.observation_space, environment.action_space
    if method == "BC":
        trainer = bc.BC(
            observation_space=spaces[0],
            action_space=spaces[1],
            demonstrations=shown,
            rng=random,
        )
        trainer.train(n_epochs=max(1, 2000 * 32 // sum(len(each) for each in shown)))
        return trainer.policy
    learner = PPO("MlpPolicy", environment, n_steps=128, batch_size=64, seed=seed, device="cpu")
    net, kind = (BasicRewardNet, GAIL) if method == "GAIL" else (BasicShapedRewardNet, AIRL)
    trainer = kind(
        demonstrations=shown,
        demo_batch_size=min(256, sum(len(each) for each in shown)),
        venv=environment,
        gen_algo=learner,
        reward_net=net(*spaces, normalize_input_layer=RunningNorm),
        gen_replay_buffer_capacity=1024,
        n_disc_updates_per_round=8,
        allow_variable_horizon=True,
    )
    trainer.train(asked["steps"])
    return learner.policy


def evaluate(policy, asked):
    environment = gymnasium.make(asked["task"])
    returns = []
    for episode in range(asked["tests"]):
        observation, _ = environment.reset(seed=20_000 + 100 * asked["seed"] + episode)
        total, ended = 0.0, False
        while not ended:
            action, _ = policy.predict(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = environment.step(int(action))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


if __name__ == "__main__":
    main()
