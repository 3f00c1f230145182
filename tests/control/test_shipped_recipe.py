"""What the recipe ``in-ril`` starts from, and that it runs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import run as runs
from holdfast.control.acting import acting
from holdfast.control.demonstrations import read_demonstrations
from holdfast.control.environments import EnvironmentOptions, evaluate, make_environments
from holdfast.control.policies import load_policy
from holdfast.recipe import load_recipe

DATA = Path(holdfast.__file__).parent / "recipes" / "data"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("in_ril_data", DATA / "generate_in_ril.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demonstrations_are_those_of_the_generator(generator):
    made, shipped = generator.demonstrations(), read_demonstrations(DATA / generator.FILE)
    assert len(made) == len(shipped) == generator.EPISODES
    for one, other in zip(made, shipped, strict=True):
        # Processors differ in the last bits.
        np.testing.assert_allclose(one.observations, other.observations, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.actions, other.actions, rtol=0, atol=1e-5)
        assert one.success and other.success


def test_the_policy_succeeds_now_and_then(generator):
    policy = load_policy(DATA / generator.FOLDER)
    worlds = make_environments(generator.ENVIRONMENT, 64, options=EnvironmentOptions(sparse=True))
    found = evaluate(acting(policy, seed=0), worlds, 192, 0)
    assert 0.05 < found.success_rate < 0.5


def test_the_recipe_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["training.max_steps=8", "objectives.rl.environment.count=32", "objectives.rl.steps=16"]
    recipe = load_recipe("in-ril", [*small, "objectives.rl.episodes=4", f"output={tmp_path}/run"])
    run = runs.train(recipe)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert set(first["objectives"]) == {"imitation", "rl"}
