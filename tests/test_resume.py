"""Real kills at random moments: the resumed run ends in the same parameters, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import write_recipe
from safetensors.torch import load_file

STEPS = 60
KILLS = 10


def launch(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {"HOLDFAST_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def recorded(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def comparable(run: Path) -> list[dict]:
    lines = recorded(run, "train") + recorded(run, "eval")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: adapters with dropout, averaged gaps, a cosine rate."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, **CHANGES)
    finished(launch(folder, "train", str(recipe)))
    return folder / "run"


CHANGES = {
    "policy__lora": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
    "policy__tokenizer": {"kind": "bpe", "vocab_size": 300, "files": ["sft.jsonl", "dpo.jsonl"]},
    "objectives__sft__optimum": 1.0,
    "objectives__dpo__optimum": 0.1,
    "objectives__sft__micro_batch_size": 4,
    "schedule": {
        "kind": "maxright",
        "weights": {"sft": 0.4, "dpo": 0.6},
        "evaluate_every": 4,
        "smoothing": 0.5,
    },
    "training__max_steps": STEPS,
    "training__save_steps": 4,
    "training__eval_steps": 10,
    "training__lr_scheduler_type": "cosine",
    "training__warmup_steps": 5,
}


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tmp_path, whole):
    """At least ten SIGKILLs in one run: during steps, evaluations and the writing of checkpoints.

    Each attempt is killed a few recorded steps (and a random fraction of a step) after it gets
    going, so the moments do not depend on how fast the machine is.
    """
    draw = random.Random(0)
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, **CHANGES)
    process = launch(tmp_path, "train", str(recipe))
    for kill in range(KILLS):
        target = min(5 * (kill + 1) + draw.randint(0, 3), STEPS - 2)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            steps = recorded(run, "train")
            if steps and steps[-1]["step"] >= target:
                break
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = launch(tmp_path, "resume", str(run))
    output = finished(process)
    assert "resumed at step" in output

    for name in ("policy", "optimizer"):
        here = load_file(run / "checkpoints" / f"step-{STEPS:08d}" / f"{name}.safetensors")
        there = load_file(whole / "checkpoints" / f"step-{STEPS:08d}" / f"{name}.safetensors")
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
    assert comparable(run) == comparable(whole)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(recorded(run, "event")) >= KILLS - 1


def test_a_checkpoint_cut_short_is_passed_over_and_said_so(tmp_path, whole):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, **CHANGES)
    process = launch(tmp_path, "train", str(recipe))
    while not (run / "checkpoints" / "step-00000020").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.kill()
    process.wait()
    newest, before = sorted((run / "checkpoints").glob("step-*[0-9]"))[::-1][:2]
    weights = newest / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    output = finished(launch(tmp_path, "resume", str(run)))
    assert "damaged" in output and newest.name in output.replace("\n", "")
    assert f"resumed at step {int(before.name.removeprefix('step-'))}" in output
    final = f"checkpoints/step-{STEPS:08d}/policy.safetensors"
    here, there = load_file(run / final), load_file(whole / final)
    assert all(torch.equal(here[key], there[key]) for key in here)
