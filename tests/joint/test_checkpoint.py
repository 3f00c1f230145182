"""Checkpoints are whole or not there; a damaged one is passed over."""

import errno
import json
import subprocess
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import CheckpointError
from holdfast.joint import checkpoint as module
from holdfast.joint.checkpoint import (
    Checkpoint,
    Checkpoints,
    pack_optimizer,
    reunite,
    separate,
    unpack_optimizer,
)


def made(step: int) -> Checkpoint:
    tensors = {"policy": {"w": torch.full((64, 64), float(step))}, "optimizer": {}}
    return Checkpoint(step, tensors, {"step": step, "nested": {"list": [1, 2.5, None]}})


def test_what_is_saved_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(made(3))
    loaded, damaged = checkpoints.load_newest()
    assert damaged == [] and loaded.step == 3 and loaded.state == made(3).state
    assert torch.equal(loaded.tensors["policy"]["w"], made(3).tensors["policy"]["w"])


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        checkpoints.save(made(step))
    assert checkpoints.steps() == [3, 10]


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert Checkpoints(tmp_path / "absent").load_newest() == (None, [])


@given(share=st.floats(0, 0.999), which=st.sampled_from(["policy.safetensors", "state.json"]))
def test_a_checkpoint_cut_short_is_detected_and_the_one_before_it_used(
    tmp_path_factory, share, which
):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    checkpoints.save(made(1))
    path = checkpoints.save(made(2)) / which
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    loaded, damaged = checkpoints.load_newest()
    assert loaded.step == 1
    assert len(damaged) == 1 and which in damaged[0] and "step-00000002" in damaged[0]


@pytest.mark.parametrize("missing", ["manifest.json", "state.json", "policy.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(tmp_path, missing):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    (checkpoints.save(made(2)) / missing).unlink()
    assert checkpoints.load_newest()[0].step == 1


def test_one_changed_byte_is_detected(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(made(1)) / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert checkpoints.load_newest()[0] is None


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    (tmp_path / "step-00000007.partial").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    checkpoints.save(made(7))
    assert checkpoints.load_newest()[0].step == 7


def test_a_failing_write_loses_nothing_earlier(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step 2.*No space left.*step 1 is intact"):
        checkpoints.save(made(2))
    monkeypatch.undo()
    assert checkpoints.load_newest()[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_earlier(small_disk):
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(made(1))
    large = Checkpoint(2, {"policy": {"w": torch.zeros(1024, 1024)}}, {})
    with pytest.raises(CheckpointError, match="step 1 is intact"):
        checkpoints.save(large)
    assert checkpoints.load_newest()[0].step == 1
    assert checkpoints.steps() == [1]


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_an_optimiser_goes_on_after_packing_as_if_nothing_had_happened():
    def fresh():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 4))
        optimizer = torch.optim.AdamW(
            [{"params": [weight], "weight_decay": 0.1}], lr=0.1, fused=True
        )
        return weight, optimizer

    def steps(weight, optimizer, count):
        for n in range(count):
            weight.grad = torch.sin(weight.detach() + n)
            optimizer.step()

    weight, optimizer = fresh()
    steps(weight, optimizer, 3)
    tensors, packed = pack_optimizer(optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    value = weight.detach().clone()
    steps(weight, optimizer, 3)
    again, other = fresh()
    with torch.no_grad():
        again.copy_(value)
    unpack_optimizer(other, tensors, packed)
    steps(again, other, 3)
    assert torch.equal(weight, again)


def test_a_checkpoint_just_written_outlives_damaged_ones_of_later_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    (checkpoints.save(made(300)) / "state.json").write_text("{")
    checkpoints.save(made(100))
    assert checkpoints.load_newest()[0].step == 100
    assert checkpoints.steps() == [100]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.just("tensor"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abc.", min_size=1, max_size=2), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_tensors_anywhere_in_a_state_are_taken_out_and_put_back(state):
    made = count(1)

    def with_tensors(value):
        if value == "tensor":
            return torch.full((2,), float(next(made)))
        if isinstance(value, dict):
            return {key: with_tensors(entry) for key, entry in value.items()}
        return [with_tensors(entry) for entry in value] if isinstance(value, list) else value

    original = {"state": with_tensors(state)}
    plain, tensors = separate(original)
    again = reunite(json.loads(json.dumps(plain)), tensors)
    assert len(tensors) == next(made) - 1

    def same(left, right):
        if isinstance(left, torch.Tensor):
            return torch.equal(left, right)
        if isinstance(left, dict):
            return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
        if isinstance(left, list):
            return len(left) == len(right) and all(map(same, left, right))
        return left == right

    assert same(original, again)
