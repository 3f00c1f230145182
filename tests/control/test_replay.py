"""Replay: what is kept and overwritten, what a batch is made of, and resuming bit for bit."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.worlds import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from holdfast.control.actor_critic import ActorCritic
from holdfast.control.demonstrations import Demonstrations, Episode
from holdfast.control.off_policy import Improvement
from holdfast.control.policies import Critic, DiffusionPolicy, GaussianPolicy, TwinQ
from holdfast.control.replay import COLUMNS, ReplayBuffer, ReplayOptions, ReplaySource
from holdfast.control.transitions import transitions
from holdfast.errors import DataError
from holdfast.joint.checkpoint import reunite, separate

SMALL = (16,)


def rows(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    return {"value": values, "pair": torch.stack([values, -values], -1), "even": values % 2 == 0}


# The buffer ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.lists(st.integers(1, 12), max_size=6))
def test_the_latest_rows_are_kept(capacity, counts):
    buffer, all_rows = ReplayBuffer(capacity), []
    for count in counts:
        new = list(range(len(all_rows), len(all_rows) + count))
        all_rows += new
        buffer.add(rows(new))
    assert len(buffer) == min(capacity, len(all_rows)) and buffer.added == len(all_rows)
    if all_rows:
        found = buffer.take(torch.arange(len(buffer)))
        assert sorted(found["value"].tolist()) == all_rows[-capacity:]
        assert torch.equal(found["pair"][:, 1], -found["value"])
        assert torch.equal(found["even"], found["value"] % 2 == 0)


@pytest.mark.parametrize("added", [0, 3, 5, 8])
def test_a_buffer_goes_on_from_its_state_on_disk(tmp_path, added):
    first, second = ReplayBuffer(5), ReplayBuffer(5)
    for number in range(added):
        first.add(rows([number]))
    plain, tensors = separate(first.state_dict())
    save_file(tensors, tmp_path / "state.safetensors")
    if added:
        assert tensors["0"].shape[0] == min(added, 5)  # what is not filled takes no room
    second.load_state_dict(reunite(plain, load_file(tmp_path / "state.safetensors")))
    for buffer in (first, second):
        buffer.add(rows([100, 101]))
    places = torch.arange(len(first))
    for name, column in first.take(places).items():
        assert torch.equal(second.take(places)[name], column)


def mapped(folder):
    """Files in a folder that this process has mapped into its memory, with or without a name."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells")
    return [line for line in maps.read_text().splitlines() if f"{folder}/" in line]


def test_rows_lie_in_files_that_nothing_is_left_of(tmp_path):
    """Not even by a kill: the files have no name."""
    buffer = ReplayBuffer(1000, tmp_path)
    buffer.add(rows([1, 2]))
    assert len(mapped(tmp_path)) == 3 and not list(tmp_path.iterdir())
    assert buffer.take(torch.tensor([1, 0]))["value"].flatten().tolist() == [2.0, 1.0]
    del buffer
    assert not mapped(tmp_path)


def test_one_column_is_overwritten_in_place():
    buffer = ReplayBuffer(4)
    buffer.add(rows([1, 2, 3]))
    buffer.put("value", torch.tensor([2, 0, 2]), torch.tensor([7.0, 8.0, 9.0]))
    found = buffer.take(torch.arange(3))
    assert found["value"].tolist() == [8.0, 2.0, 9.0]
    assert found["pair"][:, 0].tolist() == [1.0, 2.0, 3.0]


def test_bad_rows_and_states_are_refused():
    with pytest.raises(ValueError, match="capacity is 0"):
        ReplayBuffer(0)
    buffer = ReplayBuffer(4)
    buffer.add(rows([1, 2, 3]))
    with pytest.raises(ValueError, match="'pair'"):
        buffer.add({**rows([1]), "pair": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="'value'"):
        buffer.add({"pair": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="3 rows of 3"):
        ReplayBuffer(2).load_state_dict(buffer.state_dict())


# Demonstrations -----------------------------------------------------------------------------------


def episode(steps, *, terminated=True, last=True, start=0.0):
    seen = start + np.arange(steps + last, dtype=np.float32)[:, None]
    actions = seen[:steps] + 0.5
    return Episode(seen, actions, 2.0 ** np.arange(steps, dtype=np.float32), terminated, False)


@pytest.mark.parametrize("terminated", [False, True])
def test_a_demonstration_becomes_the_transitions_that_were_lived(terminated):
    found = transitions(
        Demonstrations((episode(5, terminated=terminated), episode(2, start=50.0)), "made up"),
        history=2,
        horizon=3,
    )
    assert found["rewards"].tolist() == [7.0, 14.0, 28.0, 24.0, 16.0, 3.0, 2.0]
    after = found["final_observations"].flatten(1).tolist()
    assert after == [[2, 3], [3, 4], [4, 5], [4, 5], [4, 5], [51, 52], [51, 52]]
    ends = [False, False, True, True, True]
    assert found["terminated"].tolist() == [e and terminated for e in ends] + [True, True]
    assert found["mask"].sum(1).tolist() == [3, 3, 3, 2, 1, 2, 1]
    assert found["observations"][0].flatten().tolist() == [0.0, 0.0]
    assert found["actions"][1].flatten().tolist() == [1.5, 2.5, 3.5]


def test_what_led_to_an_observation_that_was_not_kept_is_left_out():
    def count(terminated):
        one = Demonstrations((episode(5, terminated=terminated, last=False),), "made up")
        return len(transitions(one, history=1, horizon=3)["rewards"])

    assert count(False) == 2 and count(True) == 5
    one = Demonstrations((episode(2, last=False, terminated=False),), "made up")
    with pytest.raises(DataError, match="made up: no step leads to an observation that was kept"):
        transitions(one, history=1, horizon=3)


# The source ---------------------------------------------------------------------------------------


def build(kind="gaussian", *, candidates=4):
    if kind == "diffusion":
        actor = DiffusionPolicy(1, 1, horizon=2, hidden=SMALL, steps=4, fine_tuned_steps=2, seed=1)
    else:
        actor = GaussianPolicy(1, 1, horizon=2, hidden=SMALL, std=0.3, seed=1)
    q = TwinQ(1, 1, horizon=2, hidden=SMALL, seed=4)
    return ActorCritic(actor, Critic(1, 1, SMALL, seed=3), q, candidates=candidates)


DEMONSTRATED = transitions(
    Demonstrations((episode(6, start=100.0),), "made up"), history=1, horizon=2
)


def source(policy, world=None, *, prepare=None, demonstrations=None, **changes):
    options = {"steps": 3, "updates": 2, "batch_size": 8, "capacity": 20, **changes}
    return ReplaySource(
        policy,
        world or Target(4),
        ReplayOptions(**options),
        seed=5,
        demonstrations=demonstrations,
        prepare=prepare,
    )


def test_transitions_are_those_of_the_environment():
    class Recording(Target):
        def step(self, chunks):
            lived = super().step(chunks)
            self.lived.append((np.clip(chunks, -1, 1), lived))
            return lived

    world = Recording(4, terminates=True)
    world.lived = []
    replay = source(build(), world, batch_size=500)
    batch = replay.next().columns
    assert len(world.lived) == 3
    known = {
        tuple(chunks[slot].ravel().tolist()): (
            lived.rewards[slot],
            lived.final_observations[slot].item(),
            lived.terminated[slot],
        )
        for chunks, lived in world.lived
        for slot in range(4)
    }
    assert len({tuple(a.flatten().tolist()) for a in batch["actions"]}) == 12 == len(replay.buffer)
    for index in range(500):
        reward, after, ended = known[tuple(batch["actions"][index].flatten().tolist())]
        assert batch["rewards"][index] == reward and batch["terminated"][index] == bool(ended)
        # The target does not move within an episode, and the next one's is not looked at.
        assert batch["final_observations"][index].item() == after
        assert batch["observations"][index].item() == after
    assert batch["mask"].all() and torch.equal(batch["cloned"], batch["actions"])


def test_as_many_updates_as_asked_for_follow_what_is_collected():
    replay = source(build(), updates=3, critic_warmup=2)
    rounds, warm, steps = [], [], []
    for _ in range(9):
        facts = replay.next().facts
        rounds.append(replay.round)
        warm.append(facts["critic_only"][0])
        steps.append(facts["environment_steps"][0])
    assert rounds == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert warm == [1.0] * 6 + [0.0] * 3
    assert steps == [24.0] * 3 + [48.0] * 3 + [72.0] * 3
    assert len(replay.buffer) == 20


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_of_every_batch_is_demonstrated(share):
    replay = source(build(), demonstrations=DEMONSTRATED, demonstration_share=share)
    for _ in range(5):
        batch = replay.next().columns
        assert set(COLUMNS) | {"cloned"} == set(batch)
        assert int((batch["observations"] >= 100).sum()) == 8 * share
    assert not bool((replay.buffer.take(torch.arange(20))["observations"] >= 100).any())


def test_rewards_are_scaled_once_wherever_they_come_from():
    options = {"demonstrations": DEMONSTRATED, "demonstration_share": 0.5}
    plain, scaled = source(build(), **options), source(build(), **options, reward_scale=0.1)
    for _ in range(4):
        expected = 0.1 * plain.next().columns["rewards"]
        torch.testing.assert_close(scaled.next().columns["rewards"], expected)


def test_improved_actions_are_written_back_and_the_critic_keeps_the_true_ones():
    policy = build(candidates=None)
    improvement = Improvement(policy, steps=2, rate=0.05)
    options = {"demonstrations": DEMONSTRATED, "demonstration_share": 0.5}
    replay = source(policy, prepare=improvement, updates=4, **options)
    batch = replay.next().columns
    moved = (batch["cloned"] - batch["actions"])[:4].abs().flatten(1).amax(1)
    assert (moved > 0.01).all()
    assert torch.equal(batch["cloned"][4:], batch["actions"][4:])  # demonstrations stay
    assert bool((batch["cloned"].abs()[:4] <= 1).all())
    with torch.no_grad():
        before = policy.qs(batch["observations"], batch["actions"]).amin(0)[:4]
        after = policy.qs(batch["observations"], batch["cloned"]).amin(0)[:4]
    assert (after > before).all()
    stored = replay.buffer.take(torch.arange(len(replay.buffer)))
    changed = (stored["cloned"] != stored["actions"]).flatten(1).any(1)
    assert int(changed.sum()) == len(batch["actions"][:4].flatten(1).unique(dim=0))
    assert torch.equal(stored["actions"], stored["actions"].clamp(-1, 1))


def test_a_critic_that_learns_nothing_yet_improves_nothing():
    policy = build(candidates=None)
    improvement = Improvement(policy, steps=2, rate=0.05)
    replay = source(policy, prepare=improvement, updates=4, critic_warmup=1)
    for round_ in (1, 2):
        batches = [replay.next().columns for _ in range(4)]
        assert replay.round == round_
        moved = [bool((batch["cloned"] != batch["actions"]).any()) for batch in batches]
        assert moved == [round_ == 2] * 4


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
@pytest.mark.parametrize("improves", [False, True])
@pytest.mark.parametrize("used", [0, 1, 7])
def test_a_resumed_source_goes_on_bit_for_bit(kind, improves, used):
    policy = build(kind, candidates=None if improves else 4)
    options = {
        "prepare": Improvement(policy, steps=2, rate=0.05) if improves else None,
        "demonstrations": DEMONSTRATED,
        "demonstration_share": 0.25,
    }
    first = source(policy, **options)
    for _ in range(used):
        first.next()
    state = copy.deepcopy(first.state_dict())
    second = source(policy, Target(4, seed=99 if used else 0), **options)
    second.load_state_dict(state)
    for _ in range(7):
        one, other = first.next(), second.next()
        assert one.facts == other.facts
        for name, column in one.columns.items():
            assert torch.equal(other.columns[name], column), name
    assert first.round == second.round > 1


def test_a_share_of_demonstrations_needs_some():
    with pytest.raises(ValueError, match="there are no demonstrations"):
        source(build(), demonstration_share=0.5)


def test_the_folder_of_the_files_may_be_chosen(tmp_path: Path):
    replay = ReplaySource(build(), Target(4), ReplayOptions(1, 1, 4, 9), seed=0, folder=tmp_path)
    replay.next()
    assert mapped(tmp_path)
