"""Tripwires: when they trip, and what is left of a run after they did."""

import json
import math

import pytest
import torch
from helpers.linear import Linear, objective, squared_error
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import TrainingError
from holdfast.joint import LossTerms, Mix
from holdfast.joint.checkpoint import Checkpoints
from holdfast.joint.guards import Seen, Tripwires
from holdfast.joint.objective import Summary
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer


def seen(refused=None, grad_norm=1.0, **metrics):
    return Seen({"rl": Summary(0.0, 1.0, metrics)}, grad_norm, refused)


def trips(guard, turns):
    """The indices of the turns at which it trips; the reasons; and the state in the end."""
    state, found, reasons = guard.init(), [], []
    for index, turn in enumerate(turns):
        trip, state = guard.update(turn, json.loads(json.dumps(state)))
        if trip is not None:
            found.append(index)
            reasons.append(trip.reason)
    return found, reasons, state


# Wires --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "fine", "bad", "counts_anew"),
    [
        ({"ratio": 2.0}, {"ratio": 1.6}, {"ratio": 2.01}, True),
        ({"ratio": 2.0}, {"ratio": 2.0}, {"ratio": 2.01}, False),
        ({"kl": 0.5}, {"kl": 0.1}, {"kl": 0.6}, True),
        ({"approx_kl": 0.5}, {"approx_kl": 0.1, "kl": 9.0}, {"approx_kl": 0.6}, True),
        ({"entropy": 0.5}, {"entropy": 0.6}, {"entropy": 0.4}, True),
        ({"entropy": -1.0}, {"entropy": -0.8}, {"entropy": -1.1}, True),
        ({"entropy": -1.0}, {"entropy": -0.9}, {"entropy": -1.1}, False),
        ({"kl": 0.5}, {"kl": 0.1}, {"kl": math.nan}, True),
        ({"kl": 0.5}, {}, {"kl": math.nan}, False),
        ({"gradient_norm": 5.0}, {"grad_norm": 1.0}, {"grad_norm": 5.5}, True),
        ({"reward": 0.2, "smoothing": 0.0}, {"reward": 1.0}, {"reward": 0.7}, True),
        ({}, {}, {"refused": "the loss of rl is nan"}, True),
    ],
)
def test_a_wire_trips_after_so_many_turns_beyond_its_limit_and_then_sleeps(
    option, fine, bad, counts_anew
):
    guard = Tripwires(**option, patience=3)
    turns = [fine] * 5 + [bad] * 2 + [fine] + [bad] * 2 + [bad] * 5
    found, reasons, state = trips(guard, [seen(**turn) for turn in turns])
    # The third in a row, or the third in all where a value on the way back stops no count.
    assert found == [10 if counts_anew else 8]
    assert not guard.quiet(state)
    assert state["trips"] == 1
    assert guard.quiet(trips(guard, [seen(**fine)] * 9)[2])


def test_a_reason_says_what_was_seen_and_where():
    turns = [seen(kl=0.6)] * 3
    assert trips(Tripwires(kl=0.5), turns)[1] == ["kl of rl is 0.6, above 0.5"]
    turns = [seen(refused="the loss of rl is nan")] * 3
    assert trips(Tripwires(), turns)[1] == [
        "3 steps were refused, the last since the loss of rl is nan"
    ]


@given(
    values=st.lists(st.floats(0, 2), max_size=30),
    patience=st.integers(1, 4),
    hysteresis=st.floats(0, 0.9),
)
def test_hysteresis_is_that_of_a_brute_force_reading(values, patience, hysteresis):
    """Between the limit and the lower one nothing changes, whatever the state."""
    guard = Tripwires(kl=1.0, patience=patience, hysteresis=hysteresis, non_finite=False)
    expected, count, asleep = [], 0, False
    for index, value in enumerate(values):
        if value > 1.0 and not asleep:
            count += 1
            if count == patience:
                expected.append(index)
                count, asleep = 0, True
        elif value <= 1.0 - hysteresis:
            count, asleep = 0, False
    assert trips(guard, [seen(kl=value) for value in values])[0] == expected


def test_average_of_the_gradient_norm_is_of_calm_turns_with_the_same_objectives():
    guard = Tripwires(gradient_norm=3.0, smoothing=0.5, patience=2)
    other = Seen({"sft": Summary(0.0, 1.0, {})}, 100.0)
    _, _, state = trips(guard, [seen(grad_norm=1.0), other, seen(grad_norm=2.0), seen(grad_norm=9)])
    assert state["averages"] == {"gradient/rl": 1.5, "gradient/sft": 100.0}
    assert state["counts"] == {"gradient norm of rl over its average": 1}


def test_a_fall_of_the_reward_is_measured_from_its_best_average():
    guard = Tripwires(reward=0.5, smoothing=0.5, patience=1)
    rewards = [0.0, 1.0, 2.0, 2.0, 1.0, 0.0, math.nan]
    averages = [0.0, 0.5, 1.25, 1.625, 1.3125, 0.65625]
    found, _, state = trips(guard, [seen(reward=reward) for reward in rewards])
    assert found == [next(i for i, a in enumerate(averages) if max(averages[: i + 1]) - a > 0.5)]
    assert state["averages"]["reward/rl"] == averages[-1]


def test_each_objective_has_wires_of_its_own():
    guard = Tripwires(kl=1.0, patience=2)
    turn = Seen({n: Summary(0.0, 1.0, {"kl": k}) for n, k in (("a", 2.0), ("b", 0.1))}, 1.0)
    alternate = [turn, Seen({"b": turn.summaries["b"]}, 1.0)] * 2
    assert trips(guard, alternate)[:2] == ([2], ["kl of a is 2, above 1"])


def test_after_too_many_trips_the_run_stops():
    guard = Tripwires("reduce", kl=1.0, patience=1, max_trips=1)
    state = guard.init()
    done = []
    for value in (2.0, 0.0, 2.0):
        trip, state = guard.update(seen(kl=value), state)
        done.append(trip and trip.then)
    assert done == ["reduce", None, "stop"]


def test_updating_leaves_the_old_state_alone():
    guard = Tripwires(kl=1.0, reward=1.0)
    state = guard.init()
    guard.update(seen(kl=2.0, reward=1.0), state)
    assert state == guard.init()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "panic"}, "then is"),
        ({"kl": 0.0}, "kl is"),
        ({"entropy": math.nan}, "entropy is"),
        ({"patience": 0}, "patience is"),
        ({"hysteresis": 1.0}, "hysteresis is"),
        ({"rate_factor": 1.0}, "rate_factor is"),
        ({"max_trips": -1}, "max_trips is"),
        ({"non_finite": False}, "no wire is on anything"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tripwires(**options)


# Runs ---------------------------------------------------------------------------------------------


def shown(policy, rows):
    """The metric shows a collapse as a KL would."""
    terms = squared_error(policy, rows)
    return LossTerms(terms.total, terms.count, {"kl": terms.total.detach()})


def spiky(folder, guard, **options):
    each = objective("a", 1)
    each.loss = shown
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"max_steps": 24, "save_steps": 2, "eval_steps": 100, "max_grad_norm": None}
    return Trainer(
        Linear(),
        {"a": each},
        Mix({"a": 1.0}),
        TrainerOptions(learning_rate=0.3, **defaults | options),
        recorder=Recorder(folder),
        checkpoints=Checkpoints(folder / "checkpoints", keep=1),
        guards=[guard] if guard else [],
    )


def lines(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def poison(built, start):
    """From step ``start`` on, for as long as rates are what they were, the update is torn away."""
    optimizer = built._optimizer_plain

    def tear(*_):
        if built.step >= start and built._lr.base_lrs[0] > 0.1:
            built.policy.weight.data.add_(50.0)

    optimizer.register_step_post_hook(tear)
    return built


GUARD = Tripwires("roll_back", kl=1000.0, patience=3, rate_factor=0.1)


def test_a_collapse_is_rolled_back_to_the_last_good_checkpoint(tmp_path):
    built = poison(spiky(tmp_path, GUARD), 9)
    at = {}
    step = built.train_step

    def noted():
        done = step()
        at[built.step] = built.policy.weight.detach().clone()
        return done

    built.train_step = noted
    assert built.train() == "finished"
    # Torn at step 10: seen in the losses of steps 11 to 13, when the wire trips. The checkpoint of
    # step 10 holds what was torn though nothing was seen yet; after that of step 6 all went well.
    (event,) = lines(tmp_path, "event")
    assert (event["step"], event["event"]) == (13, "tripwire")
    assert "kl of a is" in event["detail"] and "back to step 6" in event["detail"]
    assert (tmp_path / "refused" / "step-00000013-a.json").is_file()
    assert event["detail"].count("step-00000013-a.json") == 1
    assert torch.equal(at[13], at[6])
    rates = [line["learning_rate"] for line in lines(tmp_path, "train")]
    assert rates == pytest.approx([0.3] * 13 + [0.03] * 11)
    steps = [line["step"] for line in lines(tmp_path, "train")]
    assert steps == list(range(1, 25))
    assert built.guards.state_dict()["tripwires"]["trips"] == 1


def test_a_run_that_is_never_beyond_a_limit_is_not_changed_by_a_bit(tmp_path):
    guard = Tripwires(kl=1e9, gradient_norm=1e9, reward=1e9)
    plain, wired = spiky(tmp_path / "plain", None), spiky(tmp_path / "wired", guard)
    for built in (plain, wired):
        assert built.train() == "finished"
    assert torch.equal(plain.policy.weight, wired.policy.weight)
    assert torch.equal(plain.policy.bias, wired.policy.bias)
    assert lines(tmp_path / "wired", "event") == []


@pytest.mark.parametrize("stop", [9, 12, 13, 15, 17])
def test_a_run_killed_around_its_rollback_ends_as_the_one_that_was_not(tmp_path, stop):
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "save_steps": 4}
    whole = poison(spiky(tmp_path / "whole", GUARD, **options), 9)
    whole.train()
    assert lines(tmp_path / "whole", "event")

    first = poison(spiky(tmp_path / "cut", GUARD, **options), 9)
    first._evaluate_once()
    first.save()
    while first.step < stop:
        first._advance()
    second = poison(spiky(tmp_path / "cut", GUARD, **options), 9)
    second.resume()
    second.train()
    assert torch.equal(whole.policy.weight, second.policy.weight)

    def recorded(folder):
        kinds = [line for kind in ("train", "eval") for line in lines(folder, kind)]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in kinds]

    assert recorded(tmp_path / "whole") == recorded(tmp_path / "cut")
    trips = [e["step"] for e in lines(tmp_path / "cut", "event") if e["event"] == "tripwire"]
    assert trips == [e["step"] for e in lines(tmp_path / "whole", "event")]


def test_the_good_checkpoint_outlives_those_of_a_collapse(tmp_path):
    guard = Tripwires("roll_back", kl=1000.0, patience=7, rate_factor=0.1)
    built = poison(spiky(tmp_path, guard), 9)
    built.save()
    folder = Checkpoints(tmp_path / "checkpoints")
    while built.step < 16:
        built.train_step()
        if built.step % 2 == 0:
            built.save()
    assert folder.steps() == [2, 16]
    built.train_step()
    assert "back to step 2" in lines(tmp_path, "event")[0]["detail"]
    assert folder.load(17).state["progress"]["good_step"] == 17


def test_reducing_keeps_the_parameters_and_lowers_all_rates(tmp_path):
    guard = Tripwires("reduce", kl=1000.0, patience=2, rate_factor=0.25)
    options = {"learning_rates": {"bias": 0.08}, "lr_scheduler_type": "linear", "max_steps": 20}
    built = poison(spiky(tmp_path, guard, **options), 9)
    before = built._lr.get_last_lr()
    built.train()
    assert [e["step"] for e in lines(tmp_path, "event")] == [12]
    records = lines(tmp_path, "train")
    assert before == [0.3, 0.08]
    for record in records:
        share = (1.0 - (record["step"] - 1) / 20) * (0.25 if record["step"] > 12 else 1.0)
        assert record["learning_rate"] == pytest.approx(0.3 * share)
        assert record["learning_rates"]["bias"] == pytest.approx(0.08 * share)
    second = spiky(tmp_path, guard, **options)
    second.resume()
    assert second._lr.base_lrs == built._lr.base_lrs == pytest.approx([0.075, 0.02])


def test_stopping_names_what_was_seen_and_keeps_the_checkpoints_from_before(tmp_path):
    built = poison(spiky(tmp_path, Tripwires("stop", kl=1000.0, patience=2)), 9)
    with pytest.raises(TrainingError, match=r"step 12 by a tripwire: kl of a is .*refused"):
        built.train()
    assert max(Checkpoints(tmp_path / "checkpoints").steps()) == 10
    assert "the run stops here" in lines(tmp_path, "event")[0]["detail"]


def test_losses_that_are_not_finite_are_rolled_back_before_refusals_end_the_run(tmp_path):
    """A poisoned optimiser makes every step from then on a refused one."""
    built = spiky(tmp_path, Tripwires(patience=2, rate_factor=0.1), max_refusals=2)

    def poison_parameters(*_):
        if built.step == 8:
            built.policy.weight.data.fill_(math.nan)

    built._optimizer_plain.register_step_post_hook(poison_parameters)
    assert built.train() == "finished"
    events = [(e["step"], e["event"]) for e in lines(tmp_path, "event")]
    assert events == [(10, "refused"), (11, "refused"), (11, "tripwire")]
    assert built._progress.refusals == 0
    assert bool(built.policy.weight.isfinite().all())


def test_to_roll_back_takes_checkpoints():
    with pytest.raises(ValueError, match="no checkpoints are kept"):
        Trainer(
            Linear(),
            {"a": objective("a", 1)},
            Mix({"a": 1.0}),
            TrainerOptions(max_steps=1),
            guards=[Tripwires()],
        )


def test_the_first_checkpoint_to_go_back_to_is_that_of_the_start(tmp_path):
    built = poison(spiky(tmp_path, GUARD, save_steps=100), 1)
    start = built.policy.weight.detach().clone()
    built.train()
    (event,) = lines(tmp_path, "event")
    assert "back to step 0" in event["detail"]
    assert event["step"] == 5 and not torch.equal(built.policy.weight, start)
