"""Limits on norms, of what is proposed and of what is then done."""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers.softmax import Softmax, softmax_objective
from hypothesis import given
from hypothesis import strategies as st

from holdfast.joint import Mix
from holdfast.joint.guards import GradientClip, Guards, Tripwires, UpdateNormCap
from holdfast.joint.guards.proposed import ProposedGradient
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.trainer import Trainer

KINDS = [GradientClip, UpdateNormCap]


@dataclass
class Long:
    norm: float


def trainer(*guards, policy=None, **options):
    options = {"max_steps": 9, "learning_rate": 0.1, "max_grad_norm": None} | options
    return Trainer(
        policy or Softmax(hidden=5),
        {"a": softmax_objective()},
        Mix({"a": 1.0}),
        TrainerOptions(**options),
        guards=guards,
    )


def parameters(built):
    return torch.cat([p.detach().flatten() for p in built.policy.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@given(limit=st.floats(1e-6, 1e6), norm=st.floats(0, 1e12))
def test_no_more_than_the_limit_is_left_and_below_it_everything(kind, limit, norm):
    guard = kind(limit)
    verdict, _ = guard.update(Long(norm), guard.init())
    assert verdict.factor * norm <= limit * (1 + 1e-12)
    assert (verdict.factor == 1.0) == (norm <= limit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_refused(kind, limit):
    with pytest.raises(ValueError, match="limit is"):
        kind(limit)


def test_a_gradient_is_clipped_as_torch_clips_it():
    parts = [torch.randn(4, 3), None, torch.randn(5)]
    twins = [torch.nn.Parameter(part.clone()) for part in parts if part is not None]
    for twin in twins:
        twin.grad = twin.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
    proposed = ProposedGradient(parts)
    assert proposed.norm == pytest.approx(float(expected))
    record, refused = Guards([GradientClip(0.5)]).scale("gradient", proposed)
    assert refused is None
    assert record["gradient_clip"]["factor"] == pytest.approx(0.5 / float(expected))
    assert proposed.norm == pytest.approx(0.5)
    for part, twin in zip((parts[0], parts[2]), twins, strict=True):
        torch.testing.assert_close(part, twin.grad)


def test_the_update_is_as_long_as_the_cap_and_points_where_the_optimiser_went():
    free, capped = trainer(), trainer(UpdateNormCap(0.01))
    before = parameters(free)
    free.train_step()
    capped.train_step()
    full, short = parameters(free) - before, parameters(capped) - before
    assert float(full.norm()) > 0.1
    torch.testing.assert_close(short, full * (0.01 / full.norm()))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_cap_is_on_the_whole_update_weight_decay_included(weight_decay):
    built = trainer(UpdateNormCap(0.02), weight_decay=weight_decay, learning_rate=0.5)
    for _ in range(3):
        before = parameters(built)
        built.train_step()
        assert float((parameters(built) - before).norm()) == pytest.approx(0.02)


def test_a_clip_among_the_guards_takes_the_place_of_the_option():
    assert [guard.limit for guard in trainer(max_grad_norm=2.0).guards.of("gradient")] == [2.0]
    both = trainer(GradientClip(0.5), max_grad_norm=2.0).guards.of("gradient")
    assert [guard.limit for guard in both] == [0.5]


def test_two_of_a_kind_are_refused():
    with pytest.raises(ValueError, match="update_norm_cap is named twice"):
        trainer(UpdateNormCap(1.0), UpdateNormCap(2.0))


def test_a_clip_cannot_follow_a_cap_and_tripwires_may_stand_anywhere():
    clip, cap, wires = GradientClip(1.0), UpdateNormCap(1.0), Tripwires("stop")
    with pytest.raises(ValueError, match="gradient_clip acts on the gradient.*update_norm_cap"):
        Guards([cap, wires, clip])
    Guards([wires, clip, cap])


def test_an_update_that_is_not_finite_is_refused_and_leaves_the_parameters():
    built = trainer(UpdateNormCap(1.0), learning_rate=1e308)
    built._optimizer_plain.register_step_post_hook(
        lambda optimizer, *_: built.policy.outer.data.fill_(math.inf)
    )
    before = parameters(built)
    built.train_step()
    assert torch.equal(parameters(built), before)
    assert built._progress.refusals == 1
