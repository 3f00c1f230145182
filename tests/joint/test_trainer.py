"""The trainer on a linear policy, against gradients and updates taken by hand."""

import json
import math
import os
import signal

import pytest
import torch
from helpers.linear import Linear, objective, squared_error

from holdfast.errors import RunError, TrainingError
from holdfast.joint import Alright, LossTerms, Maxright, Mix, Sequential, Stage
from holdfast.joint.checkpoint import Checkpoints
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer, TrainerOptions


def trainer(schedule, *, policy=None, objectives=None, folder=None, micro=None, **options):
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
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [5, 11, 18])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, name, stop):
    options = {"max_steps": 20, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    whole = trainer(SCHEDULES[name](), folder=tmp_path / "whole", **options)
    whole.train()

    first = trainer(SCHEDULES[name](), folder=tmp_path / "cut", **options)
    first._evaluate_once()
    while first.step < stop:
        first._advance()
    # The process dies here: what came after the last checkpoint, at step 5, 10 or 15, is lost.
    second = trainer(SCHEDULES[name](), folder=tmp_path / "cut", **options)
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
