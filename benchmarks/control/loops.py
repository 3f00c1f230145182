"""The whole loop of PPO on Hopper, a line of output for every iteration.

``python -m benchmarks.control.loops holdfast|sb3|bare ITERATIONS`` in a process of its own, with
the settings of :data:`SETTINGS`; CleanRL's file takes the same on its command line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "environments": 8,
    "steps": 256,
    "batch_size": 256,
    "epochs": 10,
    "hidden": 64,
    "discount": 0.99,
    "trace": 0.95,
    "learning_rate": 3e-4,
    "epsilon": 0.2,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
}
"""Two hidden tanh layers each for policy and values, a learnt deviation, AdamW or Adam."""
TASK = "Hopper-v5"
PER_ITERATION = SETTINGS["environments"] * SETTINGS["steps"]


def done() -> None:
    print("iteration", flush=True)


def holdfast(iterations: int) -> None:
    from holdfast.assemble import accelerator_for, assemble, build_trainer
    from holdfast.recipe import parse_recipe

    values = {
        "name": "loop",
        "policy": {
            "kind": "gaussian",
            "hidden": [SETTINGS["hidden"]] * 2,
            "activation": "tanh",
            "bounded": False,
            "std": 0.9,
            "learn_std": True,
            "std_range": [0.1, 1.0],
            "critic": {"hidden": [SETTINGS["hidden"]] * 2, "activation": "tanh"},
        },
        "objectives": {
            "rl": {
                "kind": "control_ppo",
                "environment": {"name": TASK, "count": SETTINGS["environments"]},
                "critic_warmup": 0,
                "episodes": 0,
                **{
                    name: SETTINGS[name]
                    for name in (
                        "steps",
                        "batch_size",
                        "epochs",
                        "discount",
                        "trace",
                        "epsilon",
                        "vf_coef",
                    )
                },
            }
        },
        "schedule": {"kind": "mix", "weights": {"rl": 1.0}},
        "training": {
            "max_steps": 10**6,
            "learning_rate": SETTINGS["learning_rate"],
            "max_grad_norm": SETTINGS["max_grad_norm"],
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe(values, file=Path(folder) / "loop.yaml")
        accelerator = accelerator_for(recipe, Path(folder))
        assembly = assemble(recipe, accelerator)
        trainer = build_trainer(
            recipe, assembly, {}, accelerator, folder=Path(folder), recorder=None
        )
        for _ in range(iterations):
            for _ in range(SETTINGS["epochs"] * PER_ITERATION // SETTINGS["batch_size"]):
                trainer.train_step()
            done()


def sb3(iterations: int) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from torch import nn

    class Told(BaseCallback):
        rollouts = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            # Once a collection begins, the iteration before it is over.
            if self.rollouts:
                done()
            self.rollouts += 1

    networks = [SETTINGS["hidden"]] * 2
    model = PPO(
        "MlpPolicy",
        make_vec_env(TASK, SETTINGS["environments"], seed=0),
        n_steps=SETTINGS["steps"],
        batch_size=SETTINGS["batch_size"],
        n_epochs=SETTINGS["epochs"],
        gamma=SETTINGS["discount"],
        gae_lambda=SETTINGS["trace"],
        clip_range=SETTINGS["epsilon"],
        vf_coef=SETTINGS["vf_coef"],
        max_grad_norm=SETTINGS["max_grad_norm"],
        learning_rate=SETTINGS["learning_rate"],
        policy_kwargs={"net_arch": {"pi": networks, "vf": networks}, "activation_fn": nn.Tanh},
        device="cpu",
    )
    model.learn(iterations * PER_ITERATION, callback=Told())
    done()


def bare(iterations: int) -> None:
    from benchmarks.control.bare import train

    train(iterations, SETTINGS, TASK, done)


CONTENDERS = {"holdfast": holdfast, "sb3": sb3, "bare": bare}
"""By name, what trains for so many iterations."""


def cleanrl_arguments(iterations: int) -> list[str]:
    """For CleanRL's ``ppo_continuous_action.py``, whose networks have these sizes."""
    given = {
        "env-id": "Hopper-v4",  # The older Gymnasium that it needs has no v5.
        "total-timesteps": iterations * PER_ITERATION,
        "num-envs": SETTINGS["environments"],
        "num-steps": SETTINGS["steps"],
        "num-minibatches": PER_ITERATION // SETTINGS["batch_size"],
        "update-epochs": SETTINGS["epochs"],
        "gamma": SETTINGS["discount"],
        "gae-lambda": SETTINGS["trace"],
        "clip-coef": SETTINGS["epsilon"],
        "vf-coef": SETTINGS["vf_coef"],
        "max-grad-norm": SETTINGS["max_grad_norm"],
        "learning-rate": SETTINGS["learning_rate"],
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [*flags, "--no-cuda", "--no-clip-vloss", "--no-anneal-lr"]


if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](int(sys.argv[2]))
