"""The plain implementations are the same computation, and the measuring measures."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.control import run, updates
from benchmarks.control.bare import train
from benchmarks.control.loops import PER_ITERATION, SETTINGS, TASK


def test_the_plain_loss_has_the_same_value_and_gradient():
    policy, batch, loss, table = updates.dppo_case(64, (32, 32))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    terms = loss(policy, batch)
    ours, plain = (
        terms.total / terms.count,
        updates.plain_dppo(policy, table, batch.columns, loss),
    )
    torch.testing.assert_close(ours, plain)
    clipped = terms.metrics["clip_fraction"] / terms.count
    assert 0.05 < clipped < 0.95, "both sides of the clip are in the comparison"
    for one, other in zip(
        torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_every_contender_is_timed_in_every_round():
    asked = []
    timed = {name: lambda name=name: asked.append(name) or 1.0 for name in ("a", "b", "c")}
    found = run.updated(timed, 3)
    assert found == {name: [1.0] * 3 for name in timed}
    rounds = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert len(rounds) == 3 + run.WARM_UP and {first for first, *_ in rounds} == set(timed)
    small = run.updated(updates.surgery_updates(4, width=8), 2)
    assert {"sum", "holdfast"} <= small.keys()
    assert all(len(each) == 2 and min(each) > 0 for each in small.values())


def test_ratios_say_how_many_times_the_other_is_outdone():
    """A loop that takes half the time makes twice the steps."""
    cells = {
        "loop": {"holdfast": [1.0, 2.0], "sb3": [2.0, 4.0], "bare": [0.5, 1.0]},
        "dppo": {"holdfast": [0.9, 0.9], "plain": [1.0, 1.0]},
    }
    found = run.summarised(cells)
    assert found["holdfast over sb3"] == {"ratio": 2.0, "interval": [2.0, 2.0]}
    assert found["holdfast over bare"]["ratio"] == 0.5 and found["bare over sb3"]["ratio"] == 4.0
    assert found["dppo"]["ratio"] == 0.9 and "holdfast over cleanrl" not in found
    assert found["steps_per_second"]["holdfast"] == round(PER_ITERATION / 1.5)


def test_the_bare_loop_trains_in_the_environment():
    """It is a contender only if it does the work: a Hopper that is rewarded for not falling."""
    pytest.importorskip("mujoco")
    done = []
    settings = {**SETTINGS, "environments": 4, "steps": 512, "learning_rate": 3e-3}
    returns = train(12, settings, TASK, lambda: done.append(True))
    assert len(done) == 12
    tenth = len(returns) // 10
    assert np.mean(returns[-tenth:]) > 2 * np.mean(returns[:tenth])
