"""The trainer on a linear policy, against gradients and updates taken by hand."""

import json
import math
import os
import signal

import pytest
import torch
from helpers.linear import Linear, objective, squared_error

from holdfast.errors import RunError, TrainingError
from holdfast.joint import (
    AdaptiveInterleave,
    Alright,
    Interleave,
    LossTerms,
    Maxright,
    Mix,
    Sequential,
    Stage,
    Surgery,
)
from holdfast.joint.checkpoint import Checkpoints
from holdfast.joint.combine import combine
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer


def trainer(
    schedule, *, policy=None, objectives=None, folder=None, micro=None, combiner=None, **options
):
    defaults = {"max_steps": 10, "learning_rate": 0.05, "eval_steps": 5, "save_steps": 5}
    recorder = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(folder)
    return Trainer(
        policy or Linear(),
        objectives or {n: objective(n, s, micro=micro) for n, s in (("a", 1), ("b", 2))},
        schedule,
        TrainerOptions(**defaults | options),
        combiner=combiner,
        recorder=recorder,
        checkpoints=Checkpoints(folder / "checkpoints") if folder else None,
    )


def lines(folder, kind=None):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if kind in (None, line["kind"])]


def mean_gradient(policy, rows):
    loss = squared_error(policy, rows)
    return torch.autograd.grad(loss.total / loss.count, list(policy.parameters()))


@pytest.mark.parametrize("micro", [None, 1, 3, 8])
def test_gradient_is_that_of_the_mean_however_the_batch_is_cut(micro):
    built = trainer(Mix({"a": 0.3, "b": 0.7}), micro=micro)
    twin = trainer(Mix({"a": 0.3, "b": 0.7}))
    rows = twin.objectives["a"].source.next()
    gradient, summary = built._gradient(built.objectives["a"], rows)
    torch.testing.assert_close(gradient, list(mean_gradient(twin.policy, rows)))
    expected = squared_error(twin.policy, rows)
    assert summary.loss == pytest.approx((expected.total / expected.count).item(), rel=1e-12)
    assert summary.metrics["absolute"] == pytest.approx(
        (expected.metrics["absolute"] / expected.count).item(), rel=1e-12
    )


def test_a_mixed_step_is_an_adamw_step_on_the_weighted_sum():
    built = trainer(Mix({"a": 0.3, "b": 0.7}), micro=3, max_grad_norm=None, weight_decay=0.1)
    twin = Linear()
    sources = [objective("a", 1).source, objective("b", 2).source]
    optimizer = torch.optim.AdamW(
        [
            {"params": [twin.weight], "weight_decay": 0.1},
            {"params": [twin.bias], "weight_decay": 0},
        ],
        lr=0.05,
    )
    for _ in range(4):
        built.train_step()
        parts = [mean_gradient(twin, source.next()) for source in sources]
        for parameter, a, b in zip(twin.parameters(), *parts, strict=True):
            parameter.grad = 0.3 * a + 0.7 * b
        optimizer.step()
    torch.testing.assert_close(built.policy.state_dict(), twin.state_dict())


def test_only_chosen_sources_advance():
    built = trainer(Alright({"a": 0.3, "b": 0.7}, seed=4))
    chosen = [Alright({"a": 0.3, "b": 0.7}, seed=4)]
    for _ in range(20):
        built.train_step()
    draws = [chosen[0].next(lambda name: 0.0).weights for _ in range(20)]
    rows = {n: sum(n in draw for draw in draws) * 8 for n in "ab"}
    for name, taken in rows.items():
        state = built.objectives[name].source.state_dict()
        assert state["epoch"] * 16 + state["position"] == taken


def test_gaps_are_probed_in_evaluation_mode_without_a_graph_and_only_when_due():
    seen = []

    def watched(policy, rows):
        seen.append((policy.training, torch.is_grad_enabled(), len(rows)))
        return squared_error(policy, rows)

    objectives = {n: objective(n, s) for n, s in (("a", 1), ("b", 2))}
    for each in objectives.values():
        each.loss = watched
    schedule = Maxright({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0}, evaluate_every=3)
    built = trainer(schedule, objectives=objectives)
    for _ in range(6):
        built.train_step()
    probe, train = (False, False, 4), (True, True, 8)
    assert seen == [probe, probe, train, train, train] * 2


def test_gap_of_an_updated_objective_is_its_training_loss():
    schedule = Maxright({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0}, evaluate_every=100)
    built = trainer(schedule)
    twin = Linear()
    source = {"a": objective("a", 1).source, "b": objective("b", 2).source}
    built.train_step()
    (name,) = [n for n in "ab" if built.objectives[n].source.state_dict()["position"] == 8]
    terms = squared_error(twin, source[name].next())
    assert schedule.gaps[name] == pytest.approx(0.5 * (terms.total / terms.count).item(), rel=1e-12)


def poisoned(at):
    """A loss that is not finite at its ``at``-th calls."""
    calls = []

    def loss(policy, rows):
        calls.append(1)
        terms = squared_error(policy, rows)
        factor = math.nan if len(calls) in at else 1.0
        return LossTerms(terms.total * factor, terms.count)

    return loss


def test_a_step_that_is_not_finite_changes_nothing_and_keeps_its_batch(tmp_path):
    objectives = {"a": objective("a", 1)}
    objectives["a"].loss = poisoned({2})
    built = trainer(Mix({"a": 1.0}), objectives=objectives, folder=tmp_path)
    built.train_step()
    before = {n: p.clone() for n, p in built.policy.state_dict().items()}
    moments = built._optimizer_plain.state_dict()["state"][0]["exp_avg"].clone()
    built.train_step()
    for name, value in built.policy.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(built._optimizer_plain.state_dict()["state"][0]["exp_avg"], moments)
    assert [line["detail"].split(";")[0] for line in lines(tmp_path, "event")] == [
        "the loss of a is nan"
    ]
    saved = json.loads((tmp_path / "refused" / "step-00000002-a.json").read_text())
    assert len(saved) == 8
    built.train_step()
    assert not torch.equal(built.policy.weight, before["weight"])


def test_a_gradient_that_is_not_finite_is_refused():
    def loss(policy, rows):
        # The value is finite, its derivative at zero is not.
        total = (policy.weight.sum() * 0).sqrt() + 1.0
        return LossTerms(total, torch.tensor(1))

    objectives = {"a": objective("a", 1)}
    objectives["a"].loss = loss
    built = trainer(Mix({"a": 1.0}), objectives=objectives)
    before = built.policy.weight.clone()
    built.train_step()
    assert torch.equal(built.policy.weight, before)


def test_training_stops_after_too_many_refusals(tmp_path):
    objectives = {"a": objective("a", 1)}
    objectives["a"].loss = poisoned(range(1, 100))
    built = trainer(
        Mix({"a": 1.0}), objectives=objectives, folder=tmp_path, max_refusals=2, max_steps=50
    )
    objectives["a"].held_out = ()
    with pytest.raises(TrainingError, match=r"step 3: 3 steps were refused.*refused.step-00000003"):
        built.train()
    assert len(lines(tmp_path, "event")) == 3


def test_clipping_bounds_the_norm_and_records_the_one_before(tmp_path):
    built = trainer(Mix({"a": 1.0}), folder=tmp_path, max_grad_norm=1e-3)
    rows = objective("a", 1).source.next()
    norm = torch.cat([g.flatten() for g in mean_gradient(Linear(), rows)]).norm()
    gradients = []
    built._optimizer_plain.register_step_pre_hook(
        lambda opt, *_: gradients.append(
            torch.cat([p.grad.flatten() for g in opt.param_groups for p in g["params"]]).norm()
        )
    )
    built.train_step()
    assert gradients[0] == pytest.approx(1e-3)
    assert lines(tmp_path, "train")[0]["grad_norm"] == pytest.approx(float(norm))


SCHEDULES = {
    "alright": lambda: Alright({"a": 0.5, "b": 0.5}, 3),
    "maxright": lambda: Maxright({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0}, 4, smoothing=0.5),
    "mix": lambda: Mix({"a": 0.5, "b": 0.5}),
    "sequential": lambda: Sequential([("a", 9), ("b", 30)]),
    "interleave": lambda: Interleave("a", "b", 3, combine=True),
    "adaptive": lambda: AdaptiveInterleave("a", "b", maximum=4, combine=True),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [5, 11, 18])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, name, stop):
    options = {"max_steps": 20, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    options["learning_rates"] = {"bias": 0.01}

    def built(folder):
        # Of the combiners it is the one that remembers something.
        combiner = Surgery("pcd", "match")
        return trainer(SCHEDULES[name](), folder=tmp_path / folder, combiner=combiner, **options)

    whole = built("whole")
    whole.train()

    first = built("cut")
    first._evaluate_once()
    while first.step < stop:
        first._advance()
    # The process dies here: what came after the last checkpoint, at step 5, 10 or 15, is lost.
    second = built("cut")
    assert second.resume() == stop - stop % 5
    second.train()

    for key, value in whole.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[key])

    def recorded(folder):
        kept = [line for line in lines(folder) if line["kind"] != "event"]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in kept]

    assert recorded(tmp_path / "whole") == recorded(tmp_path / "cut")


def test_dropout_does_not_depend_on_where_a_run_was_resumed(tmp_path):
    class Dropped(Linear):
        def forward(self, inputs):
            return super().forward(torch.nn.functional.dropout(inputs, 0.5, self.training))

    whole = trainer(Mix({"a": 1.0}), policy=Dropped(), folder=tmp_path / "whole")
    whole.train()
    first = trainer(Mix({"a": 1.0}), policy=Dropped(), folder=tmp_path / "cut")
    for _ in range(5):
        first._advance()
    torch.rand(7)
    second = trainer(Mix({"a": 1.0}), policy=Dropped(), folder=tmp_path / "cut")
    second.resume()
    second.train()
    assert torch.equal(whole.policy.weight, second.policy.weight)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    first = trainer(Mix({"a": 1.0}), folder=tmp_path)
    first.fingerprint = "one"
    first.save()
    second = trainer(Mix({"a": 1.0}), folder=tmp_path)
    second.fingerprint = "another"
    with pytest.raises(RunError, match="another recipe"):
        second.resume()


def test_evaluation_is_the_mean_over_all_rows_and_leaves_no_trace():
    built = trainer(Mix({"a": 1.0}), micro=3)
    held_out = built.objectives["a"].held_out
    expected = squared_error(Linear(), held_out)
    built.policy.train()
    assert built.evaluate(built.objectives["a"], held_out).loss == pytest.approx(
        (expected.total / expected.count).item(), rel=1e-12
    )
    assert built.policy.training and built.policy.weight.grad is None


def test_evaluations_are_recorded_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    trainer(Mix({"a": 1.0}), folder=tmp_path, max_steps=12).train()
    assert [line["step"] for line in lines(tmp_path, "eval")] == [0, 5, 10, 12]


def test_early_stop_waits_for_its_patience(tmp_path):
    built = trainer(
        Mix({"a": 0.5, "b": 0.5}),
        folder=tmp_path,
        max_steps=100,
        eval_steps=1,
        learning_rate=1e-12,
        early_stopping_patience=3,
        early_stopping_threshold=1e-3,
    )
    assert built.train() == "no held-out loss improved in 3 evaluations"
    assert built.step == 3


def test_a_schedule_without_turns_ends_the_run(tmp_path):
    built = trainer(Sequential([("a", 3)]), folder=tmp_path, max_steps=50)
    assert built.train() == "the schedule has no more turns"
    assert built.step == 3
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_a_stage_ends_on_the_loss_of_its_probe_rows():
    built = trainer(Sequential([Stage({"a": 1.0}, loss_below=0.05), ("b", 1)]), max_steps=2000)
    while built.schedule.stage == 0:
        built.train_step()
    assert built.step > 1  # the step that found the stage at its end already belonged to the next
    assert built._probed["a"] <= 0.05


def test_an_interrupt_finishes_the_step_and_writes_a_checkpoint(tmp_path):
    built = trainer(Mix({"a": 1.0}), folder=tmp_path, max_steps=1000, save_steps=1000)
    original = built.train_step

    def step():
        if built.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original()

    built.train_step = step
    assert built.train() == "interrupted by SIGTERM"
    assert Checkpoints(tmp_path / "checkpoints").steps() == [7]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_schedule_naming_an_absent_objective_is_refused():
    with pytest.raises(ValueError, match="schedule names c, but the objectives are a, b"):
        trainer(Mix({"a": 0.5, "c": 0.5}))


def test_a_policy_without_trainable_parameters_is_refused():
    policy = Linear()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        trainer(Mix({"a": 1.0}), policy=policy)


def test_a_gap_without_probe_rows_is_refused():
    objectives = {n: objective(n, s) for n, s in (("a", 1), ("b", 2))}
    objectives["b"].probe = ()
    schedule = Maxright({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0})
    with pytest.raises(ValueError, match="'b' has no probe rows"):
        trainer(schedule, objectives=objectives).train_step()


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (lambda: Sequential([("a", 3)]), {}),
        (
            lambda: Mix({"a": 0.5, "b": 0.5}),
            {"eval_steps": 1, "learning_rate": 1e-12, "early_stopping_patience": 2}
            | {"early_stopping_threshold": 1e-3},
        ),
    ],
)
def test_a_run_killed_after_its_last_checkpoint_ends_there_again(tmp_path, schedule, options):
    first = trainer(schedule(), folder=tmp_path, max_steps=50, **options)
    reason = first.train()
    before = lines(tmp_path)
    second = trainer(schedule(), folder=tmp_path, max_steps=50, **options)
    second.resume()
    assert (second.train(), second.step) == (reason, first.step)
    assert [line for line in lines(tmp_path) if line["kind"] != "event"] == before


def test_a_metric_with_a_count_of_its_own_is_averaged_over_that():
    """However the batch is cut; one that was counted nowhere is left out."""
    values = []
    for micro in (None, 1, 3):
        built = trainer(Mix({"a": 1.0}), micro=micro)

        def loss(policy, rows):
            terms = squared_error(policy, rows)
            large = torch.tensor([float(len(row[0])) for row in rows if len(row[0]) > 2])
            own = torch.stack([large.sum(), torch.tensor(float(len(large)))])
            return LossTerms(terms.total, terms.count, {"large": own, "absent": torch.zeros(2)})

        built.objectives["a"].loss = loss
        rows = built.objectives["a"].source.next()
        _, summary = built._gradient(built.objectives["a"], rows)
        large = [len(row[0]) for row in rows if len(row[0]) > 2]
        assert summary.metrics == {"large": sum(large) / len(large)}
        values.append(summary.metrics["large"])
    assert len(set(values)) == 1


def test_evaluation_and_gaps_may_be_of_something_else_than_the_training_loss(tmp_path):
    """As with a reward: the loss that is descended is only a surrogate of it."""
    optima = {"a": 0.0, "b": 0.0}
    schedule = Maxright({"a": 0.5, "b": 0.5}, optima, evaluate_every=100)
    built = trainer(schedule, folder=tmp_path)
    for objective_ in built.objectives.values():
        objective_.evaluate = lambda policy, rows: LossTerms(
            torch.tensor(3.0 * len(rows)), torch.tensor(len(rows))
        )
    built.objectives["a"].observed = lambda summary: None
    built.objectives["b"].observed = lambda summary: 2.0
    built._evaluate_once()
    assert {entry["loss"] for entry in lines(tmp_path, "eval")[0]["objectives"].values()} == {3.0}
    built.train_step()  # Equal gaps: the first by name, of which nothing new is seen.
    assert schedule.gaps == {"a": 1.5, "b": 1.5}
    schedule.observe("a", 1.0)
    built.train_step()
    assert schedule.gaps == {"a": 0.5, "b": 1.0}


def test_surgery_is_on_whole_mean_gradients_and_its_geometry_is_recorded(
    tmp_path,
):
    combiner = Surgery("upgrad", "match")
    built = trainer(
        Interleave("a", "b", 2, combine=True),
        folder=tmp_path,
        combiner=combiner,
        micro=3,
        max_grad_norm=None,
    )
    seen = []
    built._optimizer_plain.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in built._parameters]))
    )
    sources = {"a": objective("a", 1).source, "b": objective("b", 2).source}
    for step in range(6):
        names = "b" if step % 3 else "ab"
        flat = torch.stack(
            [
                torch.cat([g.flatten() for g in mean_gradient(built.policy, sources[n].next())])
                for n in names
            ]
        )
        built.train_step()
        line = lines(tmp_path, "train")[-1]
        if step % 3:
            torch.testing.assert_close(seen[-1], flat[0])
            assert "geometry" not in line
            continue
        norms = flat.norm(dim=1)
        scale = norms[1] / norms[0]
        expected = combine(torch.stack([scale * flat[0], flat[1]]), "upgrad")
        torch.testing.assert_close(seen[-1], expected)
        geometry = line["geometry"]
        assert geometry["norms"] == pytest.approx({"a": norms[0].item(), "b": norms[1].item()})
        cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0).item()
        assert geometry["cosines"] == pytest.approx({"a/b": cosine})
        assert geometry["scale"] == pytest.approx(scale.item())


def test_an_adaptive_schedule_is_told_the_geometry_and_what_it_knows_is_recorded(tmp_path):
    schedule = AdaptiveInterleave("a", "b", smoothing=0.0)
    built = trainer(schedule, folder=tmp_path)
    thetas, gradients = [], []
    source = objective("a", 1).source
    for step in range(3):
        if step != 1:  # m is 1 as yet: turns of a, b and a
            rows = source.next()
            thetas.append(torch.cat([p.detach().flatten() for p in built._parameters]))
            parts = mean_gradient(built.policy, rows)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        built.train_step()
    found = lines(tmp_path, "train")[-1]["estimates"]
    change = (gradients[1] - gradients[0]).norm().item()
    assert found["norm/a"] == pytest.approx(gradients[1].norm().item())
    assert found["variance/a"] == pytest.approx(change**2 / 2)
    assert found["smoothness/a"] == pytest.approx(change / (thetas[1] - thetas[0]).norm().item())
    assert found["ratio"] == 1.0


class TwoNetworks(torch.nn.Module):
    """A base and a residual; each objective's loss reaches one of them."""

    def __init__(self):
        super().__init__()
        self.base, self.residual = Linear(seed=1), Linear(seed=2)


def reaching(name):
    def loss(policy, rows):
        return squared_error(getattr(policy, name), rows)

    return loss


def state_of(built, name):
    """Values and optimiser state of one of the networks."""
    module = getattr(built.policy, name)
    state = built._optimizer_plain.state
    moments = [state[p].get(key) for p in module.parameters() for key in ("exp_avg", "exp_avg_sq")]
    steps = [state[p].get("step") for p in module.parameters()]
    values = [*(p.detach() for p in module.parameters()), *moments, *steps]
    return [None if value is None else value.clone() for value in values]


@pytest.mark.parametrize("first", ["base", "residual"])
def test_no_gradient_moment_or_decay_crosses_between_separate_networks(first):
    """Each network moves as if the other's turns were not there."""
    names = ["base", "residual"] if first == "base" else ["residual", "base"]
    options = {"weight_decay": 0.5, "max_grad_norm": None, "max_steps": 12}

    def build(schedule):
        objectives = {n: objective(n, i) for i, n in enumerate(("base", "residual"), 1)}
        for name, each in objectives.items():
            each.loss = reaching(name)
        return trainer(schedule, policy=TwoNetworks(), objectives=objectives, **options)

    both = build(Interleave(*names, 2))
    for step in range(9):
        moving = names[0] if step % 3 == 0 else names[1]
        still = next(n for n in names if n != moving)
        before = state_of(both, still)
        both.train_step()
        for old, new in zip(before, state_of(both, still), strict=True):
            assert old is new is None or torch.equal(old, new)
    for name, steps in zip(names, (3, 6), strict=True):
        alone = build(Mix({name: 1.0}))
        for _ in range(steps):
            alone.train_step()
        for one, other in zip(state_of(alone, name), state_of(both, name), strict=True):
            assert torch.equal(one, other)


def test_learning_rates_follow_the_longest_fitting_name_and_the_shared_schedule(tmp_path):
    """One AdamW step without decay moves every element by its learning rate, up to epsilon."""
    objectives = {"a": objective("a", 1)}
    objectives["a"].loss = lambda policy, rows: LossTerms(
        sum(p.sum() for p in policy.parameters()), torch.tensor(1)
    )
    built = trainer(
        Mix({"a": 1.0}),
        policy=TwoNetworks(),
        objectives=objectives,
        folder=tmp_path,
        max_grad_norm=None,
        learning_rate=0.25,
        learning_rates={"base": 0.5, "base.bias": 0.125},
        lr_scheduler_type="linear",
        max_steps=2,
    )
    rates = {"base.weight": 0.5, "base.bias": 0.125, "residual.weight": 0.25, "residual.bias": 0.25}
    for share in (1.0, 0.5):
        before = {name: p.detach().clone() for name, p in built._named}
        built.train_step()
        for name, parameter in built._named:
            moved = before[name] - parameter.detach()
            torch.testing.assert_close(moved, torch.full_like(moved, share * rates[name]))
        line = lines(tmp_path, "train")[-1]
        assert line["learning_rate"] == 0.25 * share
        assert line["learning_rates"] == {"base": 0.5 * share, "base.bias": 0.125 * share}


@pytest.mark.parametrize("rates", [{"bas": 1.0}, {"": 1.0}, {"base": 1.0, "base.norm": 1.0}])
def test_a_learning_rate_that_fits_no_parameter_is_refused(rates):
    with pytest.raises(ValueError, match=r"learning_rates\[.*begin with base, residual"):
        trainer(Mix({"a": 1.0}), policy=TwoNetworks(), learning_rates=rates)
