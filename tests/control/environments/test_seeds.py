"""Which episode is next: endless rows of seeds, or a list that runs out."""

import json

import pytest

from holdfast.control.environments.seeds import PARKED, SeedSchedule


def test_every_environment_has_a_row_of_its_own():
    many, one = SeedSchedule(3, 4), SeedSchedule(3, 2)
    for slot in (0, 1, 1, 0, 1):
        assert many.next(slot) == one.next(slot)
    assert len({many.next(0) for _ in range(50)} | {many.next(1) for _ in range(50)}) == 100


def test_a_list_is_taken_in_turn_and_then_environments_are_parked():
    schedule = SeedSchedule([5, 6, 7], 2)
    assert [schedule.next(slot) for slot in (0, 1, 1, 0, 1)] == [5, 6, 7, PARKED, PARKED]
    assert schedule.episodes.tolist() == [0, 2]


@pytest.mark.parametrize("seed", [9, [4, 5, 6, 7]])
def test_a_loaded_schedule_goes_on_where_it_was(seed):
    schedule = SeedSchedule(seed, 2)
    for slot in (0, 1, 0):
        schedule.next(slot)
    loaded = SeedSchedule(0, 2)
    loaded.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert loaded.seeds.tolist() == schedule.seeds.tolist()
    assert [loaded.next(1) for _ in range(3)] == [schedule.next(1) for _ in range(3)]


def test_a_state_of_other_environments_is_refused():
    with pytest.raises(ValueError, match="2 environments, but there are 3"):
        SeedSchedule(0, 3).load_state_dict(SeedSchedule(0, 2).state_dict())


@pytest.mark.parametrize("seed", [-1, [3, -2]])
def test_negative_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="negative"):
        SeedSchedule(seed, 1)
