"""Schedules against Algorithms 2 to 4 written out by hand."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.joint import Alright, Interleave, Maxright, Mix, Sequential, Stage


def never(name: str) -> float:
    raise AssertionError(f"{name} was probed, though nothing was due")


def take(schedule, steps, probe=never):
    return [schedule.next(probe).weights for _ in range(steps)]


@given(weight=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_alright_draws_objectives_with_their_weights(weight, seed):
    draws = take(Alright({"dpo": weight, "sft": 1.0 - weight}, seed), 400)
    share = sum("dpo" in draw for draw in draws) / 400
    assert all(list(draw.values()) == [1.0] for draw in draws)
    # Bernstein's inequality: a false alarm once in 10^9 runs of this test.
    log = math.log(2e9)
    bound = math.sqrt(2 * weight * (1 - weight) * log / 400) + 2 * log / (3 * 400)
    assert abs(share - weight) <= bound


def test_alright_draws_are_independent_across_steps():
    draws = ["a" in draw for draw in take(Alright({"a": 0.5, "b": 0.5}, 3), 4000)]
    pairs = Counter(zip(draws, draws[1:], strict=False))
    assert all(abs(count / 3999 - 0.25) < 0.03 for count in pairs.values()) and len(pairs) == 4


def test_alright_handles_three_objectives():
    draws = Counter(
        name for draw in take(Alright({"a": 0.2, "b": 0.3, "c": 0.5}, 0), 5000) for name in draw
    )
    assert {name: round(count / 5000, 1) for name, count in draws.items()} == {
        "a": 0.2,
        "b": 0.3,
        "c": 0.5,
    }


def test_alright_does_not_depend_on_the_order_of_the_weights():
    one = take(Alright({"a": 0.3, "b": 0.7}, 5), 50)
    assert one == take(Alright({"b": 0.7, "a": 0.3}, 5), 50)
    assert one != take(Alright({"a": 0.3, "b": 0.7}, 6), 50)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Alright({"a": 0.4, "b": 0.6}, 1),
        lambda: Maxright({"a": 0.4, "b": 0.6}, {"a": 0.0, "b": 0.1}, 3, smoothing=0.5),
        lambda: Interleave({"a": 2, "b": 3}),
        lambda: Sequential({"a": 7, "b": 30}),
        lambda: Mix({"a": 0.4, "b": 0.6}),
    ],
)
@given(cut=st.integers(0, 20))
def test_a_restored_schedule_goes_on_where_it_stood(make, cut):
    import json

    def drive(schedule, steps, start):
        taken = []
        for step in range(start, start + steps):
            turn = schedule.next(lambda name, s=step: math.sin(s + ord(name)) + 2)
            for name in turn.weights:
                schedule.observe(name, math.cos(step) + 2)
            taken.append((turn.weights, schedule.gaps))
        return taken

    whole = make()
    expected = drive(whole, 30, 0)
    first = make()
    drive(first, cut, 0)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(second, 30 - cut, cut) == expected[cut:]


@given(
    losses=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=40),
    weight=st.floats(0.01, 0.99),
    every=st.integers(1, 7),
)
def test_maxright_is_algorithm_4_written_out(losses, weight, every):
    """Probes give the pair of step t; an update's own loss is that value plus one half."""
    optima = {"dpo": 0.2, "sft": 0.1}
    weights = {"dpo": weight, "sft": 1.0 - weight}
    schedule = Maxright(weights, optima, every)
    stale: dict[str, float] = {}
    for step, pair in enumerate(losses):
        current = dict(zip(("dpo", "sft"), pair, strict=True))
        probed = []
        turn = schedule.next(lambda name, now=current, seen=probed: seen.append(name) or now[name])
        if step % every == 0:
            stale = dict(current)
            assert sorted(probed) == ["dpo", "sft"]
        else:
            assert probed == []
        gap = {name: weights[name] * (stale[name] - optima[name]) for name in stale}
        expected = "dpo" if gap["dpo"] >= gap["sft"] else "sft"  # a tie goes to the first name
        assert turn.weights == {expected: 1.0}
        schedule.observe(expected, current[expected] + 0.5)
        stale[expected] = current[expected] + 0.5


def test_maxright_smoothing_is_an_exponential_average():
    schedule = Maxright({"a": 1.0}, {"a": 0.0}, 1, smoothing=0.75)
    schedule.next(lambda name: 4.0)
    schedule.next(lambda name: 8.0)
    assert schedule.gaps == {"a": 0.75 * 4.0 + 0.25 * 8.0}


def test_maxright_ignores_the_loss_of_a_refused_step():
    schedule = Maxright({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 0.0}, 100)
    schedule.next(lambda name: 1.0)
    schedule.observe("a", math.nan)
    schedule.observe("a", math.inf)
    assert schedule.gaps == {"a": 0.5, "b": 0.5}


def test_sequential_takes_its_stages_in_order_and_then_ends():
    schedule = Sequential([("sft", 2), Stage({"dpo": 0.5, "sft": 0.5}, steps=1), ("dpo", 1)])
    assert take(schedule, 6) == [
        {"sft": 1.0},
        {"sft": 1.0},
        {"dpo": 0.5, "sft": 0.5},
        {"dpo": 1.0},
        {},
        {},
    ]


def test_sequential_ends_a_stage_once_its_loss_is_low_enough():
    values = iter([0.9, 0.6, 0.4])
    asked = []
    schedule = Sequential([Stage({"a": 1.0}, steps=100, loss_below=0.5, check_every=2), ("b", 1)])

    def probe(name):
        asked.append(name)
        return next(values)

    # Checked before steps 0, 2 and 4; the third check ends the stage.
    assert take(schedule, 6, probe) == [{"a": 1.0}] * 4 + [{"b": 1.0}, {}]
    assert asked == ["a", "a", "a"]


def test_mix_leaves_out_objectives_without_weight():
    assert take(Mix({"a": 1.0, "b": 0.0}), 1) == [{"a": 1.0}]


@pytest.mark.parametrize("schedule", [Mix, Alright, lambda w: Maxright(w, {"a": 0, "b": 0})])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ({"a": 1.5, "b": -0.5}, r"'a'.* 1.5.*\[0, 1\]"),
        ({"a": -0.1, "b": 1.1}, r"'a'.* -0.1"),
        ({"a": math.nan, "b": 1.0}, "nan"),
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, not 1"),
    ],
)
def test_bad_weights_are_refused(schedule, weights, message):
    with pytest.raises(ValueError, match=message):
        schedule(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optima": {"a": 0.0}}, "no value for b"),
        ({"optima": {"a": 0.0, "b": math.inf}}, "a finite number"),
        ({"evaluate_every": 0}, "at least 1"),
        ({"smoothing": 1.0}, "smoothing"),
    ],
)
def test_maxright_refuses_bad_options(change, message):
    options = {"weights": {"a": 0.5, "b": 0.5}, "optima": {"a": 0.0, "b": 0.0}} | change
    with pytest.raises(ValueError, match=message):
        Maxright(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sequential([]), "empty"),
        (lambda: Stage({"a": 1.0}), "never ends"),
        (lambda: Stage({"a": 1.0}, steps=-1), "negative"),
        (lambda: Stage({"a": 0.7}, steps=1), "sum to 0.7"),
        (lambda: Stage({"a": 1.0}, steps=1, check_every=0), "check_every"),
    ],
)
def test_stages_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_maxright_survives_losses_that_are_not_finite_from_the_start():
    schedule = Maxright({"b": 0.5, "a": 0.5}, {"a": 0.0, "b": 0.0}, 2)
    assert schedule.next(lambda name: math.nan).weights == {"a": 1.0}
    schedule.observe("a", 1.0)
    assert schedule.gaps == {"a": 0.5}


def test_maxright_never_chooses_an_objective_without_weight():
    schedule = Maxright({"sft": 1.0, "dpo": 0.0}, {"sft": 2.0, "dpo": 0.0})
    assert schedule.next({"sft": 1.0}.__getitem__).weights == {"sft": 1.0}


def test_maxright_averages_probes_alone_where_nothing_is_stale():
    schedule = Maxright({"a": 1.0}, {"a": 0.0}, 1, smoothing=0.5)
    schedule.next(lambda name: 4.0)
    schedule.observe("a", 0.0)
    schedule.next(lambda name: 4.0)
    assert schedule.gaps == {"a": 4.0}


def test_interleave_goes_round_in_its_counts():
    names = [next(iter(turn)) for turn in take(Interleave({"il": 1, "rl": 3}), 9)]
    assert names == ["il", "rl", "rl", "rl", "il", "rl", "rl", "rl", "il"]


@pytest.mark.parametrize("counts", [{}, {"a": 0}, {"a": 2, "b": -1}])
def test_interleave_refuses_counts_below_one(counts):
    with pytest.raises(ValueError, match="counts"):
        Interleave(counts)
