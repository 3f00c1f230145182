"""``holdfast demos``: records, inspects, and says in one line what a user can mend."""

import pytest
import torch
from typer.testing import CliRunner

from holdfast import cli
from holdfast.control.demonstrations import read_demonstrations
from holdfast.control.environments import SimulatorError, make_environments
from holdfast.control.policies import GaussianPolicy
from holdfast.errors import DataError, RecipeError

NAME = "holdfast/point-mass"


def call(*arguments):
    return CliRunner().invoke(
        cli.app, ["demos", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "120"}
    )


def test_what_is_recorded_can_be_inspected(tmp_path):
    file, sheet = tmp_path / "new" / "some.npz", tmp_path / "sheets" / "some.png"
    answer = call("record", NAME, file, "--episodes", 3, "--seed", 5, "--noise", 0.1)
    assert answer.exit_code == 0 and "3 episodes" in answer.output
    found = read_demonstrations(file)
    assert found.environment == NAME and found.details["noise"] == 0.1
    assert all(episode.success for episode in found)
    answer = call("inspect", file, "--sheet", sheet, "--environment", NAME)
    assert answer.exit_code == 0 and f"fit {NAME}" in answer.output and "3 of 3" in answer.output
    assert sheet.stat().st_size > 500


def test_a_controller_of_ones_own_is_recorded(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\ndef act(seen):\n    return numpy.zeros((len(seen), 3, 2), 'float32')\n"
    )
    arguments = ["--controller", tmp_path / "mine.py:act", "--keep-failures", "--time-limit", 4]
    call("record", NAME, tmp_path / "a.npz", "--episodes", 2, *arguments)
    found = read_demonstrations(tmp_path / "a.npz")
    assert [len(e) for e in found] == [4, 4] and not found.details["sparse"]


def test_a_file_is_not_replaced_unasked(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"mine")
    with pytest.raises(DataError, match="already there"):
        call("record", NAME, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"mine"
    call("record", NAME, tmp_path / "a.npz", "--episodes", 1, "--overwrite")
    assert len(read_demonstrations(tmp_path / "a.npz")) == 1


def test_a_task_without_an_expert_asks_for_a_controller(tmp_path):
    with pytest.raises(SimulatorError, match="no scripted expert for Hopper-v5"):
        call("record", "Hopper-v5", tmp_path / "a.npz")


def test_a_trained_policy_is_recorded(tmp_path):
    observations = make_environments(NAME, 1).observation_size
    policy = GaussianPolicy(observations, 2, horizon=3, history=2, hidden=(8,), seed=1)
    policy.save_pretrained(tmp_path / "policy")
    arguments = ["--policy", tmp_path / "policy", "--keep-failures", "--time-limit", 5]
    call("record", NAME, tmp_path / "a.npz", "--episodes", 2, *arguments)
    first = read_demonstrations(tmp_path / "a.npz").episodes[0]
    seen = torch.from_numpy(first.observations[:1]).repeat(1, 2, 1).view(1, 2, observations)
    expected = policy.act(seen, torch.Generator(), deterministic=True).actions[0]
    torch.testing.assert_close(torch.from_numpy(first.actions[:3]), expected)
    with pytest.raises(RecipeError, match="sees 6 numbers .* Hopper-v5 has 11 and 3"):
        call("record", "Hopper-v5", tmp_path / "b.npz", *arguments)
    with pytest.raises(RecipeError, match="not both"):
        call("record", NAME, tmp_path / "b.npz", *arguments, "--controller", "mine.py:act")
