"""Two processes over gloo against one process on the joined batch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.prompts import on_policy_values, write_on_policy
from helpers.tiny import write_recipe
from safetensors.torch import load_file

from holdfast.control.demonstrations import record, write_demonstrations
from holdfast.control.environments import (
    EnvironmentOptions,
    make_environments,
    scripted_expert,
)

SCRIPT = Path(__file__).parent / "helpers" / "gradients.py"


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return []
    # Despite its name --multi_gpu starts processes on any device; without it, and without a GPU,
    # accelerate starts a single one.
    options = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    threads = "--num_cpu_threads_per_process 1 --main_process_port 0"
    count = f"--num_processes {processes}"
    return f"-m accelerate.commands.launch {options} {threads} {count}".split()


def launched(command: list[str], cache: Path) -> str:
    """Output of a launch."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"HOLDFAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its processes as well
        raise
    assert process.returncode == 0, errors[-3000:]
    return output


def gradients(folder: Path, recipe: Path, processes: int) -> dict[str, torch.Tensor]:
    out = folder / f"gradients-{processes}.safetensors"
    command = [sys.executable, *launcher(processes), str(SCRIPT), str(recipe), str(out)]
    launched(command, folder / f"cache-{processes}")
    return load_file(out)


def test_two_processes_share_the_generation_and_give_the_gradients_of_one(tmp_path):
    """On the policy's own completions, with a critic beside an objective that has none."""
    values = on_policy_values(kind="ppo", num_generations=2, num_iterations=2)
    values["objectives"]["lco"] = values["objectives"]["rl"] | {"kind": "lco_kl", "beta": 2.0}
    values["schedule"] = {"kind": "mix", "weights": {"rl": 0.5, "lco": 0.5}}
    # Completions are found again exactly unless a draw falls on an edge, and Adam makes one of
    # small differences: the gradients are compared, not what training makes of them.
    recipe = write_on_policy(tmp_path, values)
    one, two = gradients(tmp_path, recipe, 1), gradients(tmp_path, recipe, 2)
    assert (one.pop("world").item(), two.pop("world").item()) == (1, 2)
    assert any("value_head" in key for key in one)
    for key, expected in one.items():
        if not key.startswith("after/"):
            torch.testing.assert_close(two[key], expected, rtol=1e-3, atol=1e-5, msg=key)


def test_two_processes_share_updates_and_episodes_of_a_robot_policy(tmp_path):
    """Every process makes the same rollouts; rows of a batch and evaluation episodes are shared."""
    world = {"name": "holdfast/point-mass", "count": 4, "sparse": True}
    observed = make_environments(world["name"], 4, options=EnvironmentOptions(sparse=True))
    found = record(scripted_expert(world["name"]), observed, 3, seed=1)
    write_demonstrations(found, tmp_path / "demos.npz")
    rollouts = {"steps": 8, "batch_size": 15, "epochs": 2, "critic_warmup": 0, "episodes": 5}
    values = {
        "name": "robot",
        "policy": {"kind": "gaussian", "horizon": 4, "hidden": [16], "critic": {"hidden": [16]}},
        "objectives": {
            "il": {
                "kind": "cloning",
                "data": {"path": "demos.npz", "held_out": 1},
                "batch_size": 31,
            },
            "rl": {"kind": "control_ppo", "environment": world, **rollouts},
        },
        "schedule": {
            "kind": "interleave",
            "first": "il",
            "second": "rl",
            "ratio": 2,
            "combine": True,
        },
        "combiner": {"method": "upgrad", "scale": "match"},
        "training": {"max_steps": 8},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    one, two = gradients(tmp_path, recipe, 1), gradients(tmp_path, recipe, 2)
    assert (one.pop("world").item(), two.pop("world").item()) == (1, 2)
    assert one.keys() == two.keys() and one["rl/held_out"].tolist()[1] == 5
    for key, expected in one.items():
        atol = 1e-4 if key.startswith("after/") else 2e-5
        torch.testing.assert_close(two[key], expected, rtol=1e-3, atol=atol, msg=key)


@pytest.mark.parametrize("micro", [None, 1])
def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path, micro):
    # Odd batches and held-out rows, so that the shards are unequal; several sequences per batch,
    # so that token counts differ between ranks.
    recipe = write_recipe(
        tmp_path, objectives__sft__batch_size=5, objectives__sft__micro_batch_size=micro
    )
    one, two = gradients(tmp_path, recipe, 1), gradients(tmp_path, recipe, 2)
    assert (one.pop("world").item(), two.pop("world").item()) == (1, 2)
    assert one.keys() == two.keys() and any(key.startswith("dpo/") for key in one)
    for key, expected in one.items():
        atol = 1e-5 if key.startswith("after/") else 2e-7
        torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=atol, msg=key)


def test_two_processes_find_optima_train_and_write_one_run(tmp_path):
    """The command line end to end: only the main process writes, and all agree on every turn."""
    recipe = write_recipe(
        tmp_path,
        schedule={"kind": "maxright", "weights": {"sft": 0.5, "dpo": 0.5}, "evaluate_every": 2},
        objectives__sft__optimum="auto",
        objectives__dpo__optimum="auto",
    )
    command = [sys.executable, *launcher(2), "-m", "holdfast", "train", str(recipe)]
    output = launched(command, tmp_path / "cache")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["status"] == "finished" and described["world_size"] == 2
    assert set(described["optima"]) == {"sft", "dpo"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert output.count("report: ") == 1
