"""Two processes over gloo against one process on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import write_recipe
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "helpers" / "gradients.py"


def gradients(folder: Path, recipe: Path, processes: int) -> dict[str, torch.Tensor]:
    out = folder / f"gradients-{processes}.safetensors"
    launcher = [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"),
        *(
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_cpu_threads_per_process",
            "1",
        ),
        *("--num_processes", str(processes), "--main_process_port", "0"),
    ]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(recipe), str(out)],
        env=os.environ
        | {"HOLDFAST_CACHE": str(folder / f"cache-{processes}"), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.parametrize("micro", [None, 1])
def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path, micro):
    # Odd batches and held-out rows, so that the shards are unequal; several sequences per batch,
    # so that token counts differ between ranks.
    recipe = write_recipe(
        tmp_path, objectives__sft__batch_size=5, objectives__sft__micro_batch_size=micro
    )
    one, two = gradients(tmp_path, recipe, 1), gradients(tmp_path, recipe, 2)
    assert one.keys() == two.keys() and any(key.startswith("dpo/") for key in one)
    for key, expected in one.items():
        atol = 1e-5 if key.startswith("after/") else 2e-7
        torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=atol, msg=key)
