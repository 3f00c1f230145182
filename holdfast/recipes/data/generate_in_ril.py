"""Write what the recipe ``in-ril`` starts from: demonstrations, and a policy cloned from them.

``in_ril_demonstrations.npz``: episodes of the point mass's scripted expert. The same numbers come
out on every platform.

``in_ril_policy``: a Gaussian policy over chunks of four actions, cloned from them for a short time,
so that it succeeds now and then: what reinforcement learning needs under a sparse reward.

Run ``python generate_in_ril.py`` to write both beside this script. Needs ``holdfast[control]``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from holdfast.control.demonstrations import Demonstrations, record, write_demonstrations
from holdfast.control.environments import (
    EnvironmentOptions,
    make_environments,
    scripted_expert,
)
from holdfast.recipe import parse_recipe
from holdfast.run import train

HERE = Path(__file__).parent
FILE = "in_ril_demonstrations.npz"
FOLDER = "in_ril_policy"
ENVIRONMENT = "holdfast/point-mass"
EPISODES, SEED = 14, 1
CLONING = {
    "name": "clone",
    "policy": {
        "kind": "gaussian",
        "horizon": 4,
        "hidden": [64, 64],
        "activation": "relu",
        "std": 0.25,
    },
    "objectives": {
        "imitation": {"kind": "cloning", "data": {"path": FILE, "held_out": 4}, "batch_size": 128}
    },
    "schedule": {"kind": "mix", "weights": {"imitation": 1.0}},
    "training": {"max_steps": 400, "learning_rate": 1.0e-3, "eval_steps": 100, "save_steps": 400},
}


def demonstrations() -> Demonstrations:
    worlds = make_environments(ENVIRONMENT, 8, options=EnvironmentOptions(sparse=True))
    return record(scripted_expert(ENVIRONMENT), worlds, EPISODES, seed=SEED)


def main() -> None:
    write_demonstrations(demonstrations(), HERE / FILE)
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe({**CLONING, "output": f"{folder}/run"}, file=HERE / "clone.yaml")
        model = train(recipe) / "model"
        shutil.copytree(model, HERE / FOLDER, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
