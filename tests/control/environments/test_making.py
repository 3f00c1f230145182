"""Environments by name, on an installation with none of the simulators."""

import subprocess
import sys

import pytest

from holdfast.control.environments import (
    EnvironmentOptions,
    SimulatorError,
    make_environments,
    scripted_expert,
)

BARE = """
import sys
for name in ("gymnasium", "mujoco", "metaworld", "h5py", "gymnasium_robotics", "diffusers"):
    sys.modules[name] = None
import holdfast.control.watching
from holdfast.control.demonstrations import record, write_demonstrations, read_demonstrations
from holdfast.control.environments import make_environments, scripted_expert
name = "holdfast/point-mass"
found = record(scripted_expert(name), make_environments(name, 2), 2)
write_demonstrations(found, sys.argv[1])
print(len(read_demonstrations(sys.argv[1])))
"""


def test_the_point_mass_needs_no_simulator(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "two.npz")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "2"


def test_there_must_be_an_environment():
    with pytest.raises(ValueError, match="count is 0"):
        make_environments("holdfast/point-mass", 0)


def test_a_misspelt_point_mass_leads_to_the_point_mass():
    with pytest.raises(SimulatorError, match="holdfast/pointmas is no .* holdfast/point-mass"):
        make_environments("holdfast/pointmas", 1)


def test_where_there_is_no_expert_it_says_where_there_is_one():
    with pytest.raises(SimulatorError, match="no scripted expert for Hopper-v5.*metaworld"):
        scripted_expert("Hopper-v5")


@pytest.mark.parametrize("name", ["holdfast/point-mass", "Hopper-v5", "metaworld/reach"])
def test_a_keyword_that_a_task_does_not_know_is_named(name):
    options = EnvironmentOptions(keywords={"wind": 1.0})
    with pytest.raises(SimulatorError, match=f"{name} .*wind"):
        make_environments(name, 1, options=options)
