import importlib
import json
import sys

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import ipc

from holdfast.bellman.files import read_transitions
from holdfast.bellman.mdp import TabularMDP
from holdfast.errors import DataError


def log() -> pd.DataFrame:
    """Two trajectories by hand: 0 -1-> 2 -0-> 1, then cut; and 1 -1-> 0 -0-> end."""
    return pd.DataFrame(
        {
            "trajectory": ["a", "a", "a", "b", "b"],
            "time": [0, 1, 2, 5, 6],
            "state": [0, 2, 1, 1, 0],
            "action": [1, 0, 1, 1, 0],
            "reward": [0.5, -1.0, 0.25, 0.5, 2.0],
            "terminal": [0, 0, 0, 0, 1],
        }
    )


def save(frame: pd.DataFrame, folder, format: str):
    path = folder / f"log.{format}"
    if format == "npz":
        np.savez(
            path,
            **{
                name: frame[name].to_numpy(dtype=str if name == "trajectory" else None)
                for name in frame.columns
            },
        )
    elif format == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


def minari(folder, kind: str, episodes: list[dict]):
    """A data set in Minari's layout; an episode has one observation more than actions."""
    data = folder / "set" / "data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text(json.dumps({"data_format": kind}))
    if kind == "hdf5":
        with h5py.File(data / "main_data.hdf5", "w") as file:
            for number, episode in enumerate(episodes):
                for name, array in episode.items():
                    file[f"episode_{number}/{name}"] = array
        return folder / "set"
    for number, episode in enumerate(episodes):
        (data / str(number)).mkdir()
        steps = len(episode["actions"])
        (data / str(number) / "metadata.json").write_text(json.dumps({"total_steps": steps}))
        columns = {
            name: array.tolist() + ([] if name == "observations" else [array.dtype.type(0).item()])
            for name, array in episode.items()
        }
        table = pa.table(columns)
        with ipc.new_file(data / str(number) / "part-0.arrow", table.schema) as writer:
            writer.write_table(table)
    return folder / "set"


def episode(observations, actions, terminations) -> dict:
    return {
        "observations": np.array(observations),
        "actions": np.array(actions),
        "rewards": np.arange(len(actions)) / 4,
        "terminations": np.array(terminations),
    }


@pytest.mark.parametrize("format", ["csv", "csv.gz", "parquet", "npz"])
def test_next_states_are_those_of_the_following_rows(tmp_path, format):
    rows = read_transitions(save(log(), tmp_path, format), actions=2, states=3)
    assert rows.state.tolist() == [0, 2, 1, 0]  # the cut row has no next state and is dropped
    assert rows.action.tolist() == [1, 0, 1, 0]
    assert rows.reward.tolist() == [0.5, -1.0, 0.5, 2.0]
    assert rows.next_state.tolist()[:3] == [2, 1, 0]
    assert rows.terminal.tolist() == [False, False, False, True]
    assert rows.trajectory.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("format", ["csv", "parquet", "npz"])
def test_what_a_problem_draws_is_what_is_read(tmp_path, format):
    drawn = TabularMDP.random(6, 3, 0.9, seed=0).sample_trajectories(20, 15, seed=1)
    names = ("state", "action", "reward", "next_state", "terminal", "trajectory")
    path = save(pd.DataFrame({name: getattr(drawn, name) for name in names}), tmp_path, format)
    if format == "npz":
        np.savez(path, **{name: getattr(drawn, name) for name in names})
    read = read_transitions(path, actions=3)
    for name in names:
        np.testing.assert_array_equal(getattr(read, name), getattr(drawn, name))


def test_independent_rows_need_no_trajectory(tmp_path):
    drawn = TabularMDP.random(6, 3, 0.9, seed=0).sample(50, seed=1)
    names = ("state", "action", "reward", "next_state")
    path = save(pd.DataFrame({name: getattr(drawn, name) for name in names}), tmp_path, "csv")
    read = read_transitions(path, actions=3)
    np.testing.assert_array_equal(read.next_state, drawn.next_state)
    assert read.trajectory is None


@pytest.mark.parametrize("format", ["csv", "npz"])
def test_observations_are_numbered_columns_or_a_wide_array(tmp_path, format):
    wide = np.arange(10.0).reshape(5, 2) / 4
    frame = log().drop(columns="state")
    if format == "npz":
        path = tmp_path / "log.npz"
        columns = {name: frame[name].to_numpy() for name in ("time", "action", "reward")}
        np.savez(path, state=wide, trajectory=[0, 0, 0, 1, 1], **columns)
        expected = [[0.5, 0.75], [1, 1.25], [2, 2.25]]
    else:
        path = save(frame.assign(state_1=wide[:, 1], state_0=wide[:, 0]), tmp_path, format)
        expected = [[0.5, 0.75], [1, 1.25], [2, 2.25], [2, 2.25]]
    rows = read_transitions(path, actions=2)
    np.testing.assert_array_equal(rows.next_state, expected)


def test_a_single_number_is_an_observation_of_one_feature(tmp_path):
    path = save(log().assign(state=[0.5, 1.5, 2.5, 0.0, 1.0]), tmp_path, "csv")
    assert read_transitions(path, actions=2).state.shape == (4, 1)


def test_columns_may_have_other_names(tmp_path):
    frame = log().rename(columns={"state": "mileage", "action": "replace", "time": "month"})
    path = save(frame, tmp_path, "csv")
    names = {"state": "mileage", "action": "replace", "time": "month"}
    assert read_transitions(path, actions=2, columns=names).state.tolist() == [0, 2, 1, 0]
    with pytest.raises(DataError, match="no column milage, which is to be state.*'mileage'"):
        read_transitions(path, actions=2, columns=names | {"state": "milage"})
    with pytest.raises(ValueError, match="'stat'.*did you mean 'state'"):
        read_transitions(path, actions=2, columns={"stat": "mileage"})


def test_rewards_of_other_actions_than_the_anchor_are_hidden(tmp_path):
    path = save(log(), tmp_path, "csv")
    rows = read_transitions(path, actions=2, anchor_action=1)
    np.testing.assert_array_equal(rows.reward, [0.5, np.nan, 0.5, np.nan])
    rows = read_transitions(path, actions=2, anchor_action=0, anchor_reward=-5)
    np.testing.assert_array_equal(rows.reward, [np.nan, -5, np.nan, -5])


def test_an_inverse_problem_needs_no_other_rewards(tmp_path):
    partly = save(log().assign(reward=[1, np.nan, 1, 1, np.nan]), tmp_path, "csv")
    rows = read_transitions(partly, actions=2, anchor_action=1)
    np.testing.assert_array_equal(rows.reward, [1, np.nan, 1, np.nan])
    none = save(log().drop(columns="reward"), tmp_path, "csv")
    rows = read_transitions(none, actions=2, anchor_action=1, anchor_reward=0.0)
    np.testing.assert_array_equal(rows.reward, [0, np.nan, 0, np.nan])


def change(column: str, row: int, value: object):
    def changed(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object})
        frame.loc[row, column] = value
        return frame

    return changed


BAD_ROWS = [
    (
        change("action", 3, 2),
        "line 5: action is 2, expected a whole number from 0 to 1, as actions is 2",
    ),
    (change("action", 3, -1), "line 5: action is -1"),
    (change("action", 3, 0.5), "line 5: action is 0.5"),
    (change("action", 3, None), r"line 5: action is empty or not a number \(NaN\)"),
    (change("action", 3, "left"), "line 5: action is 'left', not a number"),
    (change("state", 2, 3), "line 4: state is 3, expected a whole number from 0 to 2"),
    (change("state", 2, None), "line 4: state is empty"),
    (change("reward", 1, None), "line 3: reward is empty"),
    (change("reward", 1, "inf"), "line 3: reward is inf"),
    (change("terminal", 4, 2), "line 6: terminal is 2"),
    (change("terminal", 0, 1), "line 3: trajectory a goes on after a terminal row"),
    (change("time", 2, 3), "line 4: gap in trajectory a: time 3 comes after 1"),
    (change("time", 2, 1), "line 4: gap in trajectory a: time 1 comes after 1"),
    (change("time", 2, None), "line 4: time is empty"),
    (change("trajectory", 1, "b"), "line 4: trajectory a goes on here after others"),
    (change("trajectory", 1, None), "line 3: trajectory is empty"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, changed, message):
    path = save(changed(log()), tmp_path, "csv")
    with pytest.raises(DataError, match=f"log.csv, {message}"):
        read_transitions(path, actions=2, states=3)


def test_lines_are_those_of_an_editor(tmp_path):
    """Blank lines are no rows; a cell may hold a line break, and the row's last line counts."""
    path = tmp_path / "log.csv"
    lines = ["state,action,reward,next_state,note", "0,0,1,1,", "", "  ", '1,0,1,0,"a', 'b"']
    path.write_text("\n".join([*lines, "1,5,1,0,", ""]))
    with pytest.raises(DataError, match="log.csv, line 7: action is 5"):
        read_transitions(path, actions=2)


def test_rows_of_files_without_lines_count_from_zero(tmp_path):
    path = save(log().assign(action=[1, 0, 1, 7, 0]), tmp_path, "npz")
    with pytest.raises(DataError, match=r"row 3 \(the first is row 0\): action is 7"):
        read_transitions(path, actions=2)


def test_a_next_state_that_is_not_the_next_rows_state_is_a_gap(tmp_path):
    frame = log().assign(next_state=[2, 1, 0, 0, 0])
    assert len(read_transitions(save(frame, tmp_path, "csv"), actions=2)) == 5
    frame.loc[0, "next_state"] = 1
    message = "line 3: gap in trajectory a: its state is 2, but the row before leads to 1"
    with pytest.raises(DataError, match=message):
        read_transitions(save(frame, tmp_path, "csv"), actions=2)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("state", "no column state. Found: trajectory, time, action"),
        ("action", "no column action"),
        ("reward", "no column reward"),
        ("time", "no column time"),
        ("trajectory", "no column next_state, and none from which to tell it"),
    ],
)
def test_a_missing_column_is_named(tmp_path, missing, message):
    path = save(log().drop(columns=missing), tmp_path, "csv")
    with pytest.raises(DataError, match=message):
        read_transitions(path, actions=2)


def test_a_gap_in_the_numbers_of_observations_is_named(tmp_path):
    path = save(log().drop(columns="state").assign(state_0=0.0, state_2=0.0), tmp_path, "csv")
    with pytest.raises(DataError, match="a column state_2, but no column state_1"):
        read_transitions(path, actions=2)


def test_an_anchor_that_is_never_observed_is_refused(tmp_path):
    path = save(log(), tmp_path, "csv")
    message = (
        r"anchor action 2 is never observed in its 5 rows \(line 2 to line 6\).*Observed: 0, 1. "
        "Take one of these as the anchor"
    )
    with pytest.raises(DataError, match=message):
        read_transitions(path, actions=3, anchor_action=2, anchor_reward=0.0)


def test_an_anchor_without_its_reward_is_named(tmp_path):
    path = save(log().assign(reward=[1, 1, 1, np.nan, 1]), tmp_path, "csv")
    with pytest.raises(DataError, match="line 5: reward is empty.*action 1 is the anchor"):
        read_transitions(path, actions=2, anchor_action=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "cannot be read"),
        ("log.csv", b"trajectory,time,state,action,reward\n", "is empty"),
        ("log.parquet", b"nothing", "cannot be read"),
        ("log.npz", b"nothing", "cannot be read"),
        ("log.txt", b"nothing", "of no known format"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_transitions(tmp_path / name, actions=2)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_transitions(tmp_path / "log.csv", actions=2)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "log.npz", state=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_transitions(tmp_path / "log.npz", actions=2)


def test_arrays_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "log.npz", state=np.zeros(3, int), action=np.zeros(2, int))
    with pytest.raises(DataError, match="differ in length: state 3, action 2"):
        read_transitions(tmp_path / "log.npz", actions=2)


@pytest.mark.parametrize("kind", ["hdf5", "arrow"])
@pytest.mark.parametrize("wide", [False, True])
def test_minari_episodes(tmp_path, kind, wide):
    """Eleven episodes: by name, episode_10 would come before episode_2."""
    numbers = [np.arange(4) + i for i in range(11)]
    seen = [np.stack([n, -n], 1) / 2 if wide else n for n in numbers]
    episodes = [episode(o, [1, 0, 1], [False, False, i == 2]) for i, o in enumerate(seen)]
    rows = read_transitions(minari(tmp_path, kind, episodes), actions=2)
    np.testing.assert_array_equal(rows.state, np.concatenate([o[:-1] for o in seen]))
    np.testing.assert_array_equal(rows.next_state, np.concatenate([o[1:] for o in seen]))
    assert rows.action.tolist() == 11 * [1, 0, 1]
    assert rows.reward.tolist() == 11 * [0, 0.25, 0.5]
    assert np.flatnonzero(rows.terminal).tolist() == [8]
    assert rows.trajectory.tolist() == np.repeat(np.arange(11), 3).tolist()


def test_a_bad_step_of_minari_is_named(tmp_path):
    good = episode([0, 1, 2], [0, 1], [False, True])
    with pytest.raises(DataError, match="episode 1, step 1: action is 5"):
        bad = episode([0, 1, 2], [0, 5], [False, True])
        read_transitions(minari(tmp_path / "a", "hdf5", [good, bad]), actions=2)
    with pytest.raises(DataError, match="episode 1: 2 observations for 2 actions"):
        bad = episode([0, 1], [0, 1], [False, True])
        read_transitions(minari(tmp_path / "b", "hdf5", [good, bad]), actions=2)
    with pytest.raises(DataError, match="episode 0: actions are float64"):
        bad = episode([0, 1, 2], [0.5, 1.5], [False, True])
        read_transitions(minari(tmp_path / "c", "hdf5", [bad]), actions=2)


def test_a_folder_that_is_no_minari_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="is no Minari data set"):
        read_transitions(tmp_path, actions=2)
    data = minari(tmp_path, "hdf5", [episode([0, 1], [0], [True])]) / "data"
    (data / "metadata.json").write_text('{"data_format": "zarr"}')
    with pytest.raises(DataError, match="data_format 'zarr'"):
        read_transitions(tmp_path / "set", actions=2)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    path = save(log(), tmp_path, "csv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DataError, match=r"needs the package pandas: pip install holdfast\[bellman"):
        read_transitions(path, actions=2)
    monkeypatch.undo()
    assert importlib.import_module("pandas") is pd


def broken(kind: str) -> pd.DataFrame:
    """The log with one thing wrong in its fourth row, or everywhere."""
    frame = log().assign(trajectory=[0, 0, 0, 1, 1]).astype({"action": float})
    if kind == "missing column":
        return frame.drop(columns="action")
    place = {"outside": ("action", 7), "nan": ("reward", np.nan), "gap": ("time", 9)}
    if kind in place:
        column, value = place[kind]
        frame.loc[1 if kind == "gap" else 3, column] = value
    return frame


@pytest.mark.parametrize("format", ["csv", "parquet", "npz"])
@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("missing column", None, "no column action"),
        ("outside", 3, "action is 7, expected a whole number from 0 to 2"),
        ("nan", 3, r"reward is empty or not a number \(NaN\)"),
        ("gap", 1, "gap in trajectory 0: time 9 comes after 0"),
        ("anchor", None, "anchor action 2 is never observed"),
    ],
)
def test_every_format_names_what_is_wrong_and_the_row(tmp_path, format, kind, row, message):
    path = save(broken(kind), tmp_path, format)
    anchor = {"anchor_action": 2, "anchor_reward": 0.0} if kind == "anchor" else {}
    where = "" if row is None else f"line {row + 2}: " if format == "csv" else f"row {row} .*: "
    with pytest.raises(DataError, match=f"log.{format}.*{where}{message}"):
        read_transitions(path, actions=3, **anchor)


@pytest.mark.parametrize("kind", ["hdf5", "arrow"])
def test_a_minari_set_names_what_is_wrong_and_the_step(tmp_path, kind):
    def read(name: str, change: dict | None = None, drop: str = "", **options):
        bad = episode([0, 1, 2], [0, 1], [False, True]) | (change or {})
        bad = {key: value for key, value in bad.items() if key != drop}
        good = episode([0, 1, 2], [0, 1], [False, False])
        good = {key: value for key, value in good.items() if key != drop}
        read_transitions(minari(tmp_path / name, kind, [good, bad]), actions=3, **options)

    with pytest.raises(DataError, match="episode 1, step 1: action is 7"):
        read("outside", {"actions": np.array([0, 7])})
    with pytest.raises(DataError, match=r"episode 1, step 0: reward is empty or not a number"):
        read("nan", {"rewards": np.array([np.nan, 1.0])})
    with pytest.raises(DataError, match="episode.*0.*rewards"):
        read("missing", drop="rewards")
    with pytest.raises(DataError, match=r"episode 1: observations have the shape \(2,\)"):
        read("wide", {"observations": np.zeros((3, 2))})
    if kind == "hdf5":  # Arrow's columns are of one length
        with pytest.raises(DataError, match="episode_0 has no rewards. Found: actions, obs"):
            read("none", drop="rewards")
        with pytest.raises(DataError, match="episode 1: 1 rewards for 2 actions"):
            read("short", {"rewards": np.zeros(1)})
        with pytest.raises(DataError, match="episode 1: 2 observations for 2 actions"):
            read("gap", {"observations": np.array([0, 1])})
    with pytest.raises(DataError, match="anchor action 2 is never observed.*episode 0, step 0"):
        read("anchor", anchor_action=2)


def test_choices_need_no_rewards(tmp_path):
    path = save(log().drop(columns="reward"), tmp_path, "csv")
    rows = read_transitions(path, actions=2, rewards=False)
    assert np.isnan(rows.reward).all() and rows.action.tolist() == [1, 0, 1, 0]
