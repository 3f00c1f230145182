"""How times of guarded steps become ratios, and that every side intervenes."""

import numpy as np
import pytest

from benchmarks.guard_overhead import material
from benchmarks.guard_overhead.material import COMPARISONS, Setting, pair, trainers
from benchmarks.guard_overhead.run import WARM_UP, compare_combiner, read, read_combiner, table

SMALL = Setting(width=16, vocab=300, layers=1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(material, "LENGTH", 4)
    monkeypatch.setattr(material, "PROMPT", 2)
    monkeypatch.setattr(material, "ROWS", 2)
    monkeypatch.setitem(material.SETTINGS, "tiny", SMALL)


def times(sides):
    draw = np.random.default_rng(0)
    drift = np.exp(draw.normal(size=20))
    return {
        side: {clock: [9.0] * WARM_UP + list(factor * drift) for clock in ("wall", "cpu")}
        for side, factor in sides.items()
    }


def test_ratios_are_of_pairs_and_leave_out_what_warms_up():
    found = read(times({"none": 1.0, "guard": 1.25}), "none")
    assert found["guard"]["wall"]["ratio"] == pytest.approx(1.25)
    assert found["guard"]["cpu"]["interval"] == pytest.approx([1.25, 1.25])


def test_a_combination_counts_on_top_of_the_backward_passes():
    found = read_combiner(times({"forward": 1.0, "backward": 2.0, "upgrad": 0.1}))["upgrad"]
    assert found["wall"]["ratio"] == pytest.approx(1.05)
    assert found["wall, forward passes included"]["ratio"] == pytest.approx(3.1 / 3.0)
    summary = {"tiny": {"two backward passes": {"upgrad": found}}}
    assert table(summary).splitlines()[-1].endswith("| 1.15 | yes |")


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_side_trains_from_the_same_weights_and_its_guard_is_at_work(small, name):
    sides = trainers(name, SMALL)
    moved = {}
    for side, trainer in sides.items():
        for _ in range(2):
            trainer.train_step()
        weight = next(iter(trainer.policy.parameters())).detach()
        moved[side] = weight.clone()
    for side in ("update-norm cap", "budget, difference", "budget, jvp"):
        if side in moved:
            assert not moved[side].equal(moved["none"])
    if name == "reinforcement":
        for side in ("kl adaptive", "kl safe"):
            loss = sides[side].objectives["reinforcement"].loss
            assert loss.penalties.kl_coefficient > 0
        for side in ("capo", "capo, adam"):
            guard = sides[side].objectives["reinforcement"].loss.curvature
            assert guard.objective_limit == 1e-2 and (guard.rows is not None) == ("adam" in side)
        assert sides["capo, adam"].objectives["reinforcement"].loss.curvature.rows.steps == 2


def test_both_objectives_of_the_combiner_reach_every_parameter(small):
    found = compare_combiner("tiny", 2)
    assert all(len(part["wall"]) == 2 for part in found.values())
    policy, objectives = pair(SMALL)
    assert set(objectives) == {"imitation", "reinforcement"} and policy.training
