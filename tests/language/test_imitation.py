"""The data's own completions among the policy's: who is exchanged, and what is learnt from whom."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from holdfast.language.data import Demonstration, Encoded
from holdfast.language.imitation import DemonstrationLoss, Hints, Members, SolveRateGate
from holdfast.language.rollouts import Rollout


def encoded(prompt, completion):
    ids = np.array([*prompt, *completion], dtype=np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))


GIVEN = [Demonstration(encoded([n], [50 + n, 60, 70, 80, 90]), f"rows:{n}") for n in range(6)]


def group(prompt, rewards):
    return [
        Rollout(
            encoded([prompt], [1, 2]),
            f"rows:{prompt}",
            True,
            reward=reward,
            rewards={"f": reward},
            signals={
                "advantages": torch.full((2,), reward - 0.5),
                "guard/advantage_filter": torch.zeros(2, dtype=torch.bool),
            },
        )
        for reward in rewards
    ]


def scored(rows):
    return [replace(row, signals={"old_logps": torch.zeros(row.counted)}) for row in rows]


ROWS = group(0, [0.0, 0.0, 0.0]) + group(1, [0.0, 1.0, 0.0]) + group(2, [1.0, 1.0, 0.0])


def test_a_group_that_solves_nothing_gives_way_to_its_demonstration():
    found = SolveRateGate(GIVEN, action="imitate", coefficient=0.3).admit(ROWS, 3, scored)
    assert found[3:] == ROWS[3:]
    given = found[0]
    assert given.demonstration and given.tokens is GIVEN[0].tokens
    assert_close(given.signals["advantages"], torch.full((5,), 0.3))
    assert not given.signals["guard/advantage_filter"].any()
    assert given.reward == 0.0  # of the completion that it took the place of
    assert [row.counted for row in found[1:3]] == [0, 0]


@pytest.mark.parametrize(("threshold", "exchanged"), [(0, 1), (1, 2), (2, 3)])
def test_the_threshold_says_how_many_may_be_solved(threshold, exchanged):
    found = SolveRateGate(GIVEN, threshold=threshold).admit(ROWS, 3, scored)
    assert sum(row.demonstration for row in found) == exchanged
    higher = SolveRateGate(GIVEN, threshold=threshold, solved_above=1.0).admit(ROWS, 3, scored)
    assert sum(row.demonstration for row in higher) == 3


@pytest.mark.parametrize("action", ["imitate", "replace", "buffer"])
def test_a_prompt_that_nobody_judged_is_not_known_to_be_unsolved(action):
    unjudged = group(3, [math.nan] * 3)
    gate = SolveRateGate(GIVEN, action=action, threshold=2)
    assert gate.admit(unjudged, 3, scored) == unjudged and not gate.buffer
    partly = group(3, [math.nan, 0.0, math.nan])
    found = gate.admit(partly, 3, scored)
    assert found[0].demonstration or gate.buffer == ["rows:3"]


def test_replacing_takes_one_place_and_leaves_the_others_without_advantage():
    found = SolveRateGate(GIVEN, action="replace").admit(ROWS, 3, scored)
    assert found[0].demonstration and [row.counted for row in found[1:3]] == [2, 2]
    assert not any(row.signals["advantages"].any() for row in found[1:3])


def test_unsolved_prompts_wait_until_they_fill_a_step():
    gate = SolveRateGate(GIVEN, action="buffer")
    assert gate.admit(ROWS, 3, scored) == ROWS
    assert gate.due(2) == []
    resumed = SolveRateGate(GIVEN, action="buffer")
    resumed.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    for one in (gate, resumed):
        one.admit(group(4, [0.0] * 3) + group(5, [0.0] * 3), 3, scored)
        assert [row.origin for row in one.due(2)] == ["rows:0", "rows:4"]
        assert one.due(2) == [] and one.buffer == ["rows:5"]


def test_members_say_nothing_of_what_the_policy_earns():
    member = replace(ROWS[4], demonstration=True)
    found = Members(GIVEN).admit([ROWS[3], member], 2, scored)
    assert found[0] is ROWS[3]
    assert math.isnan(found[1].reward) and math.isnan(found[1].rewards["f"])
    assert torch.equal(found[1].signals["advantages"], member.signals["advantages"])


def test_hints_grow_shorter_and_never_give_everything():
    hints = Hints(GIVEN, segments=5, start=1.0, end=0.0, steps=10)
    whole = GIVEN[3].tokens.input_ids[1:].tolist()
    assert hints.hint("rows:3", "a", 0) == whole[:4]  # all but the last token
    lengths = []
    for step in range(12):
        drawn = [hints.hint("rows:3", f"{step}/{n}", step) for n in range(40)]
        assert all(hint == whole[: len(hint)] for hint in drawn)
        lengths.append(np.mean([len(hint) for hint in drawn]))
    assert lengths[0] == 4 and lengths[10] == lengths[11] == 0
    assert lengths[2] > lengths[5] > lengths[8]
    assert hints.hint("rows:3", "a", 5) == hints.hint("rows:3", "a", 5)


def test_shaping_has_the_gradient_of_the_shaped_probability():
    logps = torch.tensor([[-0.1, -3.0, -9.0]], dtype=torch.float64, requires_grad=True)
    entropy, advantages = torch.ones(1, 1), torch.tensor([[1.0, -2.0, 0.5]]).double()
    losses = DemonstrationLoss(shaping=0.1)(logps, entropy, advantages)
    (found,) = torch.autograd.grad(losses.sum(), logps)
    p = logps.detach().exp()
    assert_close(found, -advantages * 0.1 * p / (p + 0.1).square())
    plain = DemonstrationLoss()(logps, entropy, advantages)
    assert_close(plain, -advantages * logps)


def test_entropy_weighs_imitation_down_and_rewarded_completions_up():
    logps = torch.tensor([[-1.0, -2.0]]).double()
    advantages = torch.tensor([[1.0, -1.0]]).double()
    entropy = torch.tensor([[0.7]]).double()
    loss = DemonstrationLoss(entropy_weights=True)
    expected = -advantages * logps - 0.5 * math.exp(-0.7) * logps
    assert_close(loss(logps, entropy, advantages), expected)
    own = loss.own_advantages(advantages, entropy)
    assert_close(own, torch.tensor([[0.1 * math.exp(0.7), -1.0]]).double())
    assert DemonstrationLoss().own_advantages(advantages, entropy) is advantages


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda: SolveRateGate(GIVEN, action="drop"), "action"),
        (lambda: SolveRateGate(GIVEN, threshold=-1), "threshold"),
        (lambda: SolveRateGate(GIVEN, coefficient=0.0), "coefficient"),
        (lambda: Members(GIVEN, 0), "members"),
        (lambda: Hints(GIVEN, segments=0), "segments"),
        (lambda: Hints(GIVEN, start=1.5), "start"),
        (lambda: DemonstrationLoss(shaping=0.0), "shaping"),
    ],
)
def test_what_cannot_be_is_refused_by_name(bad, named):
    with pytest.raises(ValueError, match=named):
        bad()
