"""Readers, on files written here in exactly the forms that others write, and what they refuse."""

import json
import sys

import numpy as np
import pytest

from holdfast.control.demonstrations import (
    Demonstrations,
    Episode,
    check_name,
    read_demonstrations,
    validate,
    write_demonstrations,
)
from holdfast.control.environments import SimulatorError
from holdfast.errors import DataError

h5py = pytest.importorskip("h5py")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def episode(steps, *, seed=0, extra=1, **fields):
    ends = {"terminated": True, "truncated": False, "success": True, "seed": 40 + seed}
    return Episode(
        observations=numbers(steps + extra, 3, seed=seed),
        actions=numbers(steps, 2, seed=seed + 1),
        **{"rewards": numbers(steps, seed=seed + 2), **ends, **fields},
    )


def same(one, other):
    for field in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
    for field in ("terminated", "truncated", "success", "seed"):
        assert getattr(one, field) == getattr(other, field), field


@pytest.mark.parametrize("name", ["some.npz", "some.hdf5", "new/folder/some.h5"])
@pytest.mark.parametrize("extra", [0, 1])
def test_what_is_written_is_read_again(tmp_path, name, extra):
    written = Demonstrations(
        (
            episode(4, extra=extra),
            episode(1, seed=3, extra=extra, terminated=False, truncated=True, success=False),
            episode(6, seed=7, extra=extra, terminated=False),
        ),
        "here",
        "metaworld/push",
        {"noise": 0.5},
    )
    write_demonstrations(written, tmp_path / name)
    read = read_demonstrations(tmp_path / name)
    assert (read.environment, read.details) == ("metaworld/push", {"noise": 0.5})
    assert read.source == str(tmp_path / name)
    for one, other in zip(written, read, strict=True):
        same(one, other)


def test_what_is_not_known_stays_unknown(tmp_path):
    write_demonstrations(Demonstrations((episode(2, success=None),), "here"), tmp_path / "some.npz")
    found = read_demonstrations(tmp_path / "some.npz")
    assert found.environment is None and found.episodes[0].success is None


def test_an_archive_of_the_least_is_enough(tmp_path):
    np.savez(tmp_path / "a.npz", observations=numbers(5, 3), actions=numbers(5, 2), lengths=[2, 3])
    first, second = read_demonstrations(tmp_path / "a.npz")
    np.testing.assert_array_equal(second.observations, numbers(5, 3)[2:])
    assert first.truncated and not first.terminated and first.seed is None
    assert first.rewards is None and first.total_reward is None


@pytest.mark.parametrize("name", ["some.npz", "some.hdf5"])
def test_rewards_that_are_not_known_are_not_made_up(tmp_path, name):
    demonstrations = Demonstrations((episode(2, rewards=None),), "here")
    write_demonstrations(demonstrations, tmp_path / name)
    assert validate(read_demonstrations(tmp_path / name)).episodes[0].rewards is None


def test_one_array_is_no_archive(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, numbers(3))
    with pytest.raises(DataError, match="one array, not an archive"):
        read_demonstrations(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["some.npz", "some.hdf5"])
def test_a_damaged_file_is_refused_whatever_the_library_makes_of_it(tmp_path, name):
    path = tmp_path / name
    write_demonstrations(Demonstrations((episode(40), episode(40, seed=3)), "here"), path)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole[: draw.integers(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(20):
            if damaged:
                damaged[draw.integers(len(damaged))] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            read_demonstrations(path)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


class TestRobomimic:
    """The layout of robomimic's own low-dimensional files."""

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "low_dim.hdf5"
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["total"] = 15
            data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
            # Beyond nine, names sort otherwise than numbers.
            for number, steps in ((0, 4), (2, 5), (10, 6)):
                group = data.create_group(f"demo_{number}")
                group.attrs["num_samples"] = steps
                group["actions"] = numbers(steps, 7, seed=number)
                group["states"] = numbers(steps, 32)
                reward = np.zeros(steps)
                reward[-2:] = number != 2
                group["rewards"] = reward
                group["dones"] = (np.arange(steps) >= steps - 2).astype(np.int64)
                for kind in ("obs", "next_obs"):
                    group[f"{kind}/object"] = numbers(steps, 10, seed=number)
                    group[f"{kind}/robot0_eef_pos"] = numbers(steps, 3, seed=number + 1)
                    group[f"{kind}/agentview_image"] = np.zeros((steps, 4, 4, 3), np.uint8)
            file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        return path

    def test_it_is_read_in_the_order_of_the_numbers(self, path):
        found = read_demonstrations(path)
        assert found.environment == "Lift"
        assert [len(e) for e in found] == [4, 5, 6]
        assert [(e.success, e.terminated, e.truncated) for e in found] == [
            (True, True, False),
            (False, False, True),
            (True, True, False),
        ]

    def test_vectors_stand_side_by_side_by_name_or_as_asked(self, path):
        by_name = read_demonstrations(path).episodes[2].observations
        np.testing.assert_array_equal(by_name[:6, :10], numbers(6, 10, seed=10))
        np.testing.assert_array_equal(by_name[:6, 10:], numbers(6, 3, seed=11))
        assert by_name.shape == (7, 13)  # with the last of next_obs
        asked = read_demonstrations(path, observation_keys=["robot0_eef_pos"])
        np.testing.assert_array_equal(asked.episodes[2].observations[:6], numbers(6, 3, seed=11))

    def test_a_part_that_is_not_there_is_named(self, path):
        with pytest.raises(
            DataError, match=r"demo_0, field obs/nothing: it is missing; found.*eef"
        ):
            read_demonstrations(path, observation_keys=["nothing"])

    def test_an_episode_cut_short_is_named(self, path):
        with h5py.File(path, "a") as file:
            file["data/demo_2"].attrs["num_samples"] = 9
        with pytest.raises(DataError, match="demo_2, field actions: .*9 steps, but holds 5"):
            read_demonstrations(path)

    def test_parts_of_other_lengths_are_named(self, path):
        with h5py.File(path, "a") as file:
            del file["data/demo_0/rewards"]
            file["data/demo_0/rewards"] = np.zeros(3)
        with pytest.raises(DataError, match=r"demo_0, field rewards: the shape is \(3,\)"):
            read_demonstrations(path)

    def test_what_follows_must_be_of_the_same_parts(self, path):
        with h5py.File(path, "a") as file:
            file["data/demo_2/next_obs/another"] = numbers(5, 4)
        assert read_demonstrations(path).episodes[1].observations.shape == (6, 13)
        with h5py.File(path, "a") as file:
            del file["data/demo_2/next_obs/object"]
        with pytest.raises(DataError, match="demo_2, field next_obs/object: it is missing"):
            read_demonstrations(path)

    @pytest.mark.parametrize("place", ["data", "data/demo_0"])
    def test_data_in_the_place_of_a_group_is_refused(self, path, place):
        with h5py.File(path, "a") as file:
            del file[place]
            file[place] = np.zeros(3)
        with pytest.raises(DataError, match="data"):
            read_demonstrations(path)

    def test_attributes_that_say_nothing_are_passed_over(self, path):
        with h5py.File(path, "a") as file:
            file["data"].attrs["env_args"] = "[1]"
            file["data/demo_0"].attrs["num_samples"] = "None"
            file["data/demo_0"].attrs["seed"] = "None"
        found = read_demonstrations(path)
        assert found.environment is None and found.episodes[0].seed is None

    def test_a_file_without_demonstrations_is_refused(self, tmp_path):
        with h5py.File(tmp_path / "empty.hdf5", "w") as file:
            file.create_group("data")
        with pytest.raises(DataError, match="no demonstrations"):
            read_demonstrations(tmp_path / "empty.hdf5")


class TestMinari:
    """The layout of a Minari data set of version 0.5 in HDF5 form."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "data").mkdir()
        with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as file:
            for number, steps in ((0, 3), (1, 4)):
                group = file.create_group(f"episode_{number}")
                group.attrs.update({"id": number, "total_steps": steps, "seed": 77})
                group["observations/observation"] = numbers(steps + 1, 4, seed=number)
                group["observations/desired_goal"] = numbers(steps + 1, 2, seed=number + 1)
                group["actions"] = numbers(steps, 2, seed=number)
                group["rewards"] = numbers(steps)
                group["terminations"] = np.zeros(steps, dtype=bool)
                group["truncations"] = np.arange(steps) == steps - 1
                group["infos/success"] = np.arange(steps + 1) == (2 if number else -1)
        specification = json.dumps({"id": "PointMaze_UMaze-v3", "max_episode_steps": 300})
        metadata = {"total_episodes": 2, "data_format": "hdf5", "env_spec": specification}
        (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
        return tmp_path

    def test_it_is_read(self, folder):
        found = read_demonstrations(folder)
        assert found.environment == "PointMaze_UMaze-v3"
        assert [(len(e), e.seed, e.success, e.truncated) for e in found] == [
            (3, 77, False, True),
            (4, 77, True, True),
        ]
        # Gymnasium flattens a dictionary by name: the goal comes first.
        np.testing.assert_array_equal(found.episodes[1].observations[:, :2], numbers(5, 2, seed=2))

    def test_it_flattens_as_the_environment_does(self, folder):
        gymnasium = pytest.importorskip("gymnasium")
        parts = {"observation": numbers(4), "desired_goal": numbers(2, seed=1)}
        space = gymnasium.spaces.Dict(
            {k: gymnasium.spaces.Box(-9, 9, v.shape) for k, v in parts.items()}
        )
        flat = gymnasium.spaces.flatten(space, parts)
        np.testing.assert_array_equal(flat[:2], parts["desired_goal"])

    def test_a_missing_episode_is_noticed(self, folder):
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file["episode_1"]
        with pytest.raises(DataError, match="there are 1 episodes, but it says 2"):
            read_demonstrations(folder)

    def test_steps_after_an_end_are_named(self, folder):
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            file["episode_1/terminations"][1] = True
        with pytest.raises(DataError, match="episode_1, step 1, field terminations.*2 more steps"):
            read_demonstrations(folder)

    def test_arrow_form_is_refused_by_name(self, folder):
        (folder / "data" / "main_data.hdf5").unlink()
        (folder / "data" / "metadata.json").write_text(json.dumps({"data_format": "arrow"}))
        with pytest.raises(DataError, match="arrow form"):
            read_demonstrations(folder)


class TestLeRobot:
    """The layout of a LeRobot data set of version 3."""

    @pytest.fixture
    def folder(self, tmp_path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        vector = {"dtype": "float32", "shape": [3], "names": None}
        features = {
            "observation.state": vector,
            "observation.images.top": {"dtype": "video", "shape": [96, 96, 3]},
            "action": {**vector, "shape": [2]},
            "next.reward": {"dtype": "float32", "shape": [1]},
            "next.done": {"dtype": "bool", "shape": [1]},
            "next.success": {"dtype": "bool", "shape": [1]},
            "episode_index": {"dtype": "int64", "shape": [1]},
            "frame_index": {"dtype": "int64", "shape": [1]},
        }
        info = {"codebase_version": "v3.0", "fps": 10, "total_episodes": 3, "features": features}
        (tmp_path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        (tmp_path / "data" / "chunk-000").mkdir(parents=True)
        (tmp_path / "meta" / "info.json").write_text(json.dumps(info))
        # Two episodes in the first file, one in the second.
        for file, episodes in (("000", {0: 3, 1: 4}), ("001", {2: 5})):
            rows = {key: [] for key in features if "images" not in key}
            for number, steps in episodes.items():
                rows["observation.state"] += numbers(steps, 3, seed=number).tolist()
                rows["action"] += numbers(steps, 2, seed=number).tolist()
                rows["next.reward"] += [0.0] * (steps - 1) + [1.0]
                rows["next.done"] += [False] * (steps - 1) + [True]
                rows["next.success"] += [False] * (steps - 1) + [number != 1]
                rows["episode_index"] += [number] * steps
                rows["frame_index"] += list(range(steps))
            pq.write_table(pa.table(rows), tmp_path / "data" / "chunk-000" / f"file-{file}.parquet")
        lengths = pa.table({"episode_index": [0, 1, 2], "length": [3, 4, 5]})
        pq.write_table(lengths, tmp_path / "meta/episodes/chunk-000/file-000.parquet")
        return tmp_path

    def test_it_is_read_across_files(self, folder):
        found = read_demonstrations(folder)
        assert [(len(e), e.success, e.terminated, e.truncated) for e in found] == [
            (3, True, True, False),
            (4, False, False, True),
            (5, True, True, False),
        ]
        for number, one in enumerate(found):
            np.testing.assert_array_equal(one.observations, numbers(len(one), 3, seed=number))
            np.testing.assert_array_equal(one.actions, numbers(len(one), 2, seed=number))

    def test_columns_that_are_not_needed_are_not_read(self, folder, monkeypatch):
        import pyarrow.parquet as pq

        asked, read = [], pq.read_table

        def watched(path, columns=None):
            asked.append(columns)
            return read(path, columns=columns)

        monkeypatch.setattr(pq, "read_table", watched)
        path = folder / "data/chunk-000/file-000.parquet"
        table = read(path)
        pq.write_table(table.append_column("image", [[b"bytes"] * len(table)]), path)
        assert len(read_demonstrations(folder)) == 3
        assert all("image" not in columns for columns in asked if columns is not None)
        assert sum(columns is not None for columns in asked) == 2

    def test_a_missing_file_is_noticed(self, folder):
        (folder / "data/chunk-000/file-001.parquet").unlink()
        with pytest.raises(DataError, match="there are 2 episodes in data/, but it says 3"):
            read_demonstrations(folder)

    def test_an_older_version_is_refused(self, folder):
        info = json.loads((folder / "meta/info.json").read_text())
        (folder / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
        with pytest.raises(DataError, match="this is v2.1; only v3"):
            read_demonstrations(folder)

    def test_a_missing_frame_is_named(self, folder):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "data/chunk-000/file-001.parquet"
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table.slice(0, 2), table.slice(3)]), path)
        with pytest.raises(DataError, match="episode 2, step 2, field frame_index: found frame 3"):
            read_demonstrations(folder)

    @pytest.mark.parametrize("last", [None, [0.0], [0.0, None]])
    def test_a_row_that_is_not_whole_is_named(self, folder, last):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "data/chunk-000/file-001.parquet"
        table = pq.read_table(path)
        rows = pa.array([*table.column("action").to_pylist()[:-1], last])
        table = table.set_column(table.column_names.index("action"), "action", rows)
        pq.write_table(table, path)
        with pytest.raises(DataError, match=r"file-001.*field action: rows differ in length"):
            read_demonstrations(folder)

    def test_features_in_another_form_are_refused(self, folder):
        info = json.loads((folder / "meta/info.json").read_text())
        (folder / "meta/info.json").write_text(json.dumps({**info, "features": ["action"]}))
        with pytest.raises(DataError, match="field features"):
            read_demonstrations(folder)

    def test_a_feature_that_is_not_there_is_named(self, folder):
        with pytest.raises(DataError, match=r"there is no observation\.nothing; found"):
            read_demonstrations(folder, observation_keys=["observation.nothing"])

    def test_a_damaged_file_is_named(self, folder):
        (folder / "data/chunk-000/file-001.parquet").write_bytes(b"not parquet")
        with pytest.raises(DataError, match=r"file-001\.parquet: this is not a readable Parquet"):
            read_demonstrations(folder)


def archive(**changes):
    whole = {
        "observations": numbers(5, 3),
        "actions": numbers(5, 2),
        "rewards": numbers(5),
        "lengths": np.array([2, 3]),
    }
    return {k: v for k, v in {**whole, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "field actions: it is missing"),
        ({"lengths": np.array([], dtype=int)}, "no episodes"),
        ({"lengths": np.array([5, 0])}, "episode 1, field lengths: the length is 0"),
        ({"lengths": np.array([2, 2])}, "lengths sum to 4"),
        ({"observations": numbers(6, 3)}, "field observations: there are 6.*sum to 5"),
        ({"rewards": numbers(4)}, "field rewards: there are 4"),
        ({"success": np.array([1, 1, 1])}, r"field success: the shape is \(3,\)"),
        ({"actions": np.array(["a"] * 5)}, "field actions: these are not real numbers"),
        ({"actions": numbers(5, 2) * 1j}, "field actions: these are not real numbers"),
        ({"observations": np.float32(1)}, "field observations: this is one number"),
        ({"lengths": np.array(["a", "b"])}, "field lengths: these are not whole numbers"),
        ({"lengths": np.array([2.5, 2.5])}, "field lengths: these are not whole numbers"),
        ({"lengths": np.array([np.nan, 2])}, "field lengths: these are not whole numbers"),
        ({"terminated": np.array([np.nan, 1])}, "field terminated: these are not whole numbers"),
        ({"success": np.array(["no", "no"])}, "field success: these are not whole numbers"),
        ({"seeds": np.array([np.nan, 1])}, "field seeds: these are not whole numbers"),
        ({"metadata": np.array('{"details": [1]}')}, "field metadata: its details"),
        ({"metadata": np.array("{")}, "field metadata: this is not JSON"),
    ],
)
def test_what_does_not_fit_in_an_archive_is_named(tmp_path, changes, message):
    np.savez(tmp_path / "some.npz", **archive(**changes))
    with pytest.raises(DataError, match=message) as caught:
        read_demonstrations(tmp_path / "some.npz")
    assert str(tmp_path / "some.npz") in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "some.npz", **archive(actions=np.array([{}] * 5, dtype=object)))
    with pytest.raises(DataError, match="not a readable .npz file"):
        read_demonstrations(tmp_path / "some.npz")


@pytest.mark.parametrize("name", ["some.npz", "some.hdf5"])
def test_a_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither one nor the other")
    with pytest.raises(DataError, match="not a readable"):
        read_demonstrations(tmp_path / name)


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "some.pkl").write_bytes(b"")
    for path, message in (
        (tmp_path / "some.pkl", r"'\.pkl' cannot be read"),
        (tmp_path / "nothing.npz", "no such file"),
        (tmp_path, "holds no demonstrations"),
    ):
        with pytest.raises(DataError, match=message):
            read_demonstrations(path)


def test_only_known_forms_are_written(tmp_path):
    with pytest.raises(DataError, match=r"end in \.npz or \.hdf5"):
        write_demonstrations(Demonstrations((episode(2),), "here"), tmp_path / "some.csv")
    with pytest.raises(DataError, match="no episodes to write"):
        write_demonstrations(Demonstrations((), "here"), tmp_path / "some.npz")


def test_a_form_that_cannot_be_written_here_is_refused_before_anything_is_recorded(monkeypatch):
    check_name("a.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SimulatorError, match="a.hdf5 needs h5py"):
        check_name("a.hdf5")
