"""Interleaving: cycles written out, the formulas of the ratio, and cycles that adapt."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.joint import AdaptiveInterleave, Interleave
from holdfast.joint.checkpoint import reunite, separate
from holdfast.joint.schedules import Schedule, Watching, optimal_ratio


def never(name):
    raise AssertionError(f"{name} was probed")


def take(schedule, steps):
    return [schedule.next(never).weights for _ in range(steps)]


IL, RL, BOTH = {"il": 1.0}, {"rl": 1.0}, {"il": 1.0, "rl": 1.0}


@given(ratio=st.integers(1, 9), combine=st.booleans(), cycles=st.integers(1, 4))
def test_a_cycle_is_one_turn_of_the_first_and_ratio_turns_of_the_second(ratio, combine, cycles):
    schedule = Interleave("il", "rl", ratio, combine=combine)
    assert take(schedule, cycles * (ratio + 1)) == [BOTH if combine else IL, *[RL] * ratio] * cycles
    assert set(schedule.objectives) == {"il", "rl"}


def test_both_forms_are_one_cycle():
    assert take(Interleave("il", "rl", 3), 9) == take(Interleave({"il": 1, "rl": 3}), 9)


@pytest.mark.parametrize("combine", [False, True])
def test_an_infinite_ratio_is_the_second_objective_alone(combine):
    assert take(Interleave("il", "rl", math.inf, combine=combine), 20) == [RL] * 20


def test_counted_in_iterations_a_cycle_holds_whole_iterations():
    schedule = Interleave("il", "rl", 2, every="iteration", updates_per_iteration=5)
    assert take(schedule, 22) == [IL, *[RL] * 10] * 2


def test_a_shared_turn_is_one_of_the_updates_of_an_iteration():
    """Else cycles would drift through the iterations."""
    schedule = Interleave("il", "rl", 2, combine=True, every="iteration", updates_per_iteration=5)
    assert take(schedule, 20) == [BOTH, *[RL] * 9] * 2


def test_a_turn_may_be_changed_by_who_got_it():
    schedule = Interleave("il", "rl", 1)
    schedule.next(never).weights.clear()
    assert take(schedule, 2) == [RL, IL]


@given(cut=st.integers(0, 20))
def test_a_fixed_cycle_goes_on_where_it_stood(cut):
    first = Interleave("il", "rl", 4, combine=True)
    take(first, cut)
    second = Interleave("il", "rl", 4, combine=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 12) == take(first, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interleave("il", "rl", 0), "ratio is 0"),
        (lambda: Interleave("il", "rl", 2.5), "ratio is 2.5"),
        (lambda: Interleave("il", "rl", math.nan), "ratio is nan"),
        (lambda: Interleave("il", "il", 2), "both 'il'"),
        (lambda: Interleave("il", "rl"), "second and ratio"),
        (lambda: Interleave({"il": 1}, "rl", 2), "counts"),
        (lambda: Interleave({"il": 1}, combine=True), "counts"),
        (lambda: Interleave({"il": 2.5}), "is 2.5: it must be a whole number"),
        (lambda: Interleave({"il": math.nan}), "is nan: it must be a whole number"),
        (lambda: Interleave("il", "rl", "5"), "ratio is '5'"),
        (lambda: Interleave(None, "rl", 5), "first is None"),
        (
            lambda: Interleave("il", "rl", 2, every="iteration", updates_per_iteration=2.5),
            "updates_per_iteration is 2.5",
        ),
        (lambda: Interleave("il", "rl", 2, every="epoch"), "every is 'epoch'"),
        (lambda: Interleave("il", "rl", 2, every="iteration"), "updates_per_iteration"),
        (lambda: Interleave("il", "rl", 2, updates_per_iteration=3), "every is update"),
        (lambda: AdaptiveInterleave("il", "il"), "both 'il'"),
        (lambda: AdaptiveInterleave("il", "rl", maximum=0.5), "maximum is 0.5"),
        (lambda: AdaptiveInterleave("il", "rl", maximum=math.inf), "maximum is inf"),
        (lambda: AdaptiveInterleave("il", "rl", form="square"), "form is 'square'"),
        (lambda: AdaptiveInterleave("il", "rl", smoothing=1.0), "smoothing is 1.0"),
        (lambda: AdaptiveInterleave("il", "rl", c_rl=2.0), "c_rl is 2.0"),
        (lambda: AdaptiveInterleave("il", "rl", c_il=0.0), "c_il is 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The ratio ----------------------------------------------------------------------------------------

norm = st.floats(0.01, 100)
cosine = st.floats(-1, 1)
variance = st.floats(0, 10)


def test_the_root_form_on_numbers_worked_by_hand():
    """g_RL = 3, g_IL = 1, ρ = ½, v = ½: √(9 / (1.5 − 0.5)) = 3."""
    assert optimal_ratio(3.0, 1.0, 0.5, variance_term=0.5, form="root", maximum=50) == 3.0


def test_the_balance_form_on_numbers_worked_by_hand():
    """(0.5/2 · 0.8·4·2 + 0.4) / (0.5·0.75/4 · 2²) = 2 / 0.375."""
    found = optimal_ratio(
        2.0,
        4.0,
        0.8,
        variance_term=0.4,
        form="balance",
        maximum=50,
        c_il=0.5,
        c_rl=0.5,
        smoothness_il=2.0,
        smoothness_rl=4.0,
    )
    assert found == pytest.approx(2 / 0.375)


@given(rl=norm, il=norm, rho=cosine, v=variance, form=st.sampled_from(["root", "balance"]))
def test_the_ratio_lies_in_its_bounds(rl, il, rho, v, form):
    assert 1 <= optimal_ratio(rl, il, rho, variance_term=v, form=form, maximum=12) <= 12


@given(rl=norm, il=norm, one=cosine, other=cosine)
def test_only_the_balance_rises_as_the_gradients_come_to_oppose_each_other(rl, il, one, other):
    """The root does the opposite where it is defined, which is what the docstring says."""
    less, more = sorted((one, other))
    options = {"variance_term": 0.0, "maximum": 40}
    balance = [optimal_ratio(rl, il, r, form="balance", **options) for r in (less, more)]
    root = [optimal_ratio(rl, il, r, form="root", **options) for r in (less, more)]
    assert balance[0] <= balance[1]
    assert root[0] >= root[1]


@pytest.mark.parametrize(
    ("rl", "il", "rho", "v"),
    [
        (1.0, 1.0, 0.0, 0.0),
        (1.0, 1.0, -0.5, 0.1),
        (1.0, 1.0, 0.5, 0.5),
        (0.0, 1.0, 0.5, 0.0),
        (1.0, 1.0, 0.5, math.inf),
        (1e200, 1e200, 0.5, 0.0),
    ],
)
def test_the_root_falls_on_its_bound_where_the_denominator_is_no_positive_number(rl, il, rho, v):
    assert optimal_ratio(rl, il, rho, variance_term=v, maximum=7) == 7


def test_the_balance_falls_on_its_bound_without_a_gradient_of_the_second():
    options = {"form": "balance", "maximum": 7}
    assert optimal_ratio(0.0, 1.0, 0.5, variance_term=0.0, **options) == 7
    assert optimal_ratio(1.0, 1.0, 0.5, variance_term=math.inf, **options) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_rl": -1.0}, "norm_rl"),
        ({"norm_il": math.nan}, "norm_il"),
        ({"norm_il": math.inf}, "norm_il"),
        ({"rho": 1.1}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"variance_term": -1.0}, "variance_term"),
        ({"variance_term": math.nan}, "variance_term"),
        ({"maximum": 0.9}, "maximum"),
        ({"maximum": math.nan}, "maximum"),
        ({"form": "sum"}, "form"),
        ({"c_il": 0.0}, "c_il"),
        ({"c_rl": 2.0}, "c_rl"),
        ({"smoothness_il": 0.0}, "smoothness_il"),
        ({"smoothness_rl": math.inf}, "smoothness_rl"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    values = {"norm_rl": 1.0, "norm_il": 1.0, "rho": 0.5, "variance_term": 0.1, "maximum": 9.0}
    with pytest.raises(ValueError, match=message):
        optimal_ratio(**values | change)


# The adaptive cycle -------------------------------------------------------------------------------


def lengths(turns):
    """Turns of the second objective in each whole cycle."""
    starts = [i for i, turn in enumerate(turns) if "il" in turn] + [len(turns)]
    return [b - a - 1 for a, b in zip(starts[:-1], starts[1:], strict=True)][:-1]


def drive(schedule, steps, gradients, start=0, rate=0.01, theta=None):
    """Descend as the schedule says, with gradients given by a function."""
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64) if theta is None else theta
    turns = []
    for step in range(start, start + steps):
        turn = schedule.next(never).weights
        found = {name: [gradients(name, theta, step)] for name in turn}
        schedule.watch(found, [theta])
        theta = theta - rate * sum(parts[0] for parts in found.values())
        turns.append(turn)
    return turns, theta


def opposed(name, theta, step):
    """One minimum at -8, the other at +8: between them the two oppose each other."""
    return theta + 8.0 if name == "il" else 2.0 * (theta - 8.0)


def agreeing(name, theta, step):
    return theta + 8.0 if name == "il" else 2.0 * (theta + 8.0)


def test_adaptive_cycles_follow_both_forms_when_gradients_oppose_each_other_or_agree():
    """ρ = 1: the balance asks for more than one, the root for few; ρ = -1: the reverse."""
    found = {}
    for form in ("root", "balance"):
        for gradients in (opposed, agreeing):
            schedule = AdaptiveInterleave("il", "rl", form=form, maximum=9)
            turns, _ = drive(schedule, 60, gradients)
            found[form, gradients.__name__] = lengths(turns)[-1]
    assert found["root", "agreeing"] == 9 and found["balance", "agreeing"] == 1
    assert found["balance", "opposed"] > found["root", "opposed"]


def test_an_adaptive_cycle_is_the_ratio_of_its_running_averages():
    schedule = AdaptiveInterleave("il", "rl", maximum=50, smoothing=0.5, c_il=0.7, c_rl=0.3)
    drive(schedule, 25, opposed)
    schedule.left = 0
    known = schedule.estimates
    assert known["cosine"] < -0.9
    schedule.next(never)
    expected = optimal_ratio(
        known["norm/rl"],
        known["norm/il"],
        -known["cosine"],
        variance_term=2.0 * 0.7**2 * known["variance/il"] / 2.0,
        form="balance",
        maximum=50,
        c_il=0.7,
        c_rl=0.3,
        smoothness_il=1.0,
        smoothness_rl=2.0,
    )
    assert 1 < expected < 50
    assert schedule.ratio == pytest.approx(expected, rel=1e-6)
    assert schedule.left == round(expected)


def test_cycles_have_one_turn_until_two_gradients_of_each_were_seen():
    schedule = AdaptiveInterleave("il", "rl", form="root", maximum=9)
    turns, _ = drive(schedule, 40, agreeing)
    assert turns[:4] == [IL, RL, IL, RL] and set(lengths(turns)[2:]) == {9}


def test_adaptive_cycles_combine_and_count_iterations():
    schedule = AdaptiveInterleave(
        "il",
        "rl",
        form="root",
        maximum=3,
        combine=True,
        every="iteration",
        updates_per_iteration=4,
    )
    turns, _ = drive(schedule, 80, agreeing)
    assert turns[0] == BOTH and lengths(turns)[-1] == 11
    assert schedule.ratio == 3 and schedule.estimates["ratio"] == 12, "the record is in turns"


@given(cut=st.integers(0, 40), form=st.sampled_from(["root", "balance"]), combine=st.booleans())
def test_an_adaptive_cycle_goes_on_where_it_stood(cut, form, combine):
    def noisy(name, theta, step):
        generator = torch.Generator().manual_seed(step)
        return opposed(name, theta, step) + torch.randn(2, generator=generator).double()

    def make():
        return AdaptiveInterleave("il", "rl", form=form, maximum=8, combine=combine)

    whole = make()
    expected, _ = drive(whole, 60, noisy)
    first = make()
    turns, theta = drive(first, cut, noisy)
    plain, tensors = separate(first.state_dict())
    second = make()
    second.load_state_dict(reunite(json.loads(json.dumps(plain)), tensors))
    rest, _ = drive(second, 60 - cut, noisy, start=cut, theta=theta)
    assert turns + rest == expected
    assert second.estimates == whole.estimates


def test_only_adaptive_cycles_ask_for_gradients():
    assert isinstance(AdaptiveInterleave("a", "b"), Watching)
    assert not isinstance(Interleave("a", "b", 2), Watching)
    schedule: Schedule = AdaptiveInterleave("a", "b")
    assert schedule.gaps == {} and schedule.objectives == ("a", "b")
