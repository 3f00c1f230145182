"""The log-ratio budget: invariants of its theory, and what it does to a step.

That the loss falls is not among them: within the budget a step may raise it.
"""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from helpers.linear import Linear, objective
from helpers.softmax import Softmax, cross_entropy, radii, softmax_objective
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.joint import Mix
from holdfast.joint.guards import LogRatioBudget, UpdateNormCap, binary_radius
from holdfast.joint.guards.proposed import AlongStep
from holdfast.joint.objective import Spread
from holdfast.joint.optimizer import TrainerOptions
from holdfast.joint.record import Recorder
from holdfast.joint.trainer import Trainer


def trainer(*guards, policy=None, objectives=None, folder=None, **options):
    options = {"max_steps": 9, "learning_rate": 0.5, "eval_steps": 99} | options
    objectives = objectives or {"a": softmax_objective()}
    return Trainer(
        policy or Softmax(),
        objectives,
        Mix(dict.fromkeys(objectives, 1 / len(objectives))),
        TrainerOptions(**options),
        guards=guards,
        recorder=Recorder(folder) if folder else None,
    )


def log_probabilities(policy, rows):
    with torch.no_grad():
        return policy(torch.stack([row[0] for row in rows]))[0].log_softmax(-1)


def stepped(built, name="a"):
    """Rows of the next batch, and the log-probabilities of a step before and after it."""
    source = built.objectives[name].source
    state = source.state_dict()
    rows = source.next()
    source.load_state_dict(state)
    before = log_probabilities(built.policy, rows)
    built.train_step()
    return rows, before, log_probabilities(built.policy, rows)


@dataclass
class Fixed:
    """A proposed update whose radii are given."""

    values: dict
    norm: float = 1.0
    asked: list = field(default_factory=list)

    def radii(self, derivative, spread):
        self.asked.append((derivative, spread))
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in self.values.items()}


def verdict(guard, **radii):
    return guard.update(Fixed(radii), guard.init())[0]


# The radius ---------------------------------------------------------------------------------------


def random_step(policy, seed=1, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    step = {
        name: size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in before.items()
    }
    return before, step


def radii_of(policy, before, step, derivative="jvp", spread=None):
    rows = softmax_objective().source.next()
    found = radii(AlongStep(policy, before, step, derivative), rows, spread or Spread())
    return rows, found


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_derivatives_along_a_step_are_those_of_central_differences(derivative, size):
    policy = Softmax(hidden=5)
    before, step = random_step(policy, size=size)
    inputs = torch.stack([row[0] for row in softmax_objective().source.next()])
    ((logits, rates),) = AlongStep(policy, before, step, derivative)(inputs)

    def at(share):
        moved = {name: before[name] + share * step[name] for name in before}
        return torch.func.functional_call(policy, moved, (inputs,))[0].detach()

    share = 1e-5 / size
    torch.testing.assert_close(logits, at(0.0))
    expected = (at(share) - at(-share)) / (2 * share)
    tolerance = 1e-7 if derivative == "jvp" else 1e-5
    torch.testing.assert_close(rates, expected, rtol=tolerance, atol=tolerance * size)


def test_the_policy_is_looked_at_where_it_was_before_the_step():
    policy = Softmax(hidden=5)
    before, step = random_step(policy)
    _, at_first = radii_of(policy, before, step)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.add_(step[name])
    _, afterwards = radii_of(policy, before, step)
    assert torch.equal(at_first, afterwards)


@given(factor=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]))
@settings(max_examples=20)
def test_the_radius_in_parameters_does_not_depend_on_length_or_sign_of_the_step(factor, sign):
    policy = Softmax(hidden=5)
    before, step = random_step(policy)
    scaled = {name: sign * factor * part for name, part in step.items()}
    _, one = radii_of(policy, before, step)
    _, other = radii_of(policy, before, scaled)
    torch.testing.assert_close(other * factor, one)


@given(temperature=st.floats(0.1, 10))
@settings(max_examples=20)
def test_the_radius_is_proportional_to_the_temperature(temperature):
    _, one = radii_of(policy := Softmax(hidden=5), *random_step(policy))
    _, other = radii_of(warm := Softmax(hidden=5, temperature=temperature), *random_step(warm))
    torch.testing.assert_close(other, one * temperature)


def zeros_of_binary(gap, rate):
    """The zeros of ``exp(z_0 + a_0 t) + exp(z_1 + a_1 t)`` nearest to 0, from the logarithm."""
    return [complex(-gap, (2 * k + 1) * math.pi) / rate for k in (-1, 0)]


@given(gap=st.floats(-20, 20), rate=st.floats(0.01, 100))
def test_the_binary_radius_is_the_distance_of_the_nearest_zero(gap, rate):
    tensors = torch.tensor(gap, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64)
    nearest = min(map(abs, zeros_of_binary(gap, rate)))
    assert float(binary_radius(*tensors)) == pytest.approx(nearest, rel=1e-12)
    for zero in zeros_of_binary(gap, rate):
        value = 1 + torch.exp(torch.tensor(gap + rate * zero))
        assert abs(complex(value)) < 1e-6 * max(1.0, rate)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_no_zero_of_the_partition_function_lies_within_the_radius(seed):
    """The winding number of ``sum_k exp(z_k + a_k t)`` on a circle just inside is 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)
    rates = 3 * torch.randn(5, generator=generator, dtype=torch.float64)
    radius = math.pi / float(rates.max() - rates.min())
    angles = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
    circle = 0.999 * radius * torch.exp(1j * angles)
    values = torch.exp(logits + circle[:, None] * rates).sum(-1)
    turned = torch.angle(values[1:] / values[:-1]).sum()
    assert abs(float(turned)) < 1e-6


# The budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
@pytest.mark.parametrize("learning_rate", [0.1, 10.0, 1e4])
@pytest.mark.parametrize("limit", [0.05, math.pi])
def test_a_linear_policy_keeps_to_the_budget_whatever_the_rate(derivative, learning_rate, limit):
    """Where logits are linear in the parameters the bounds are exact, that of the KL included."""
    built = trainer(LogRatioBudget(limit, derivative=derivative), learning_rate=learning_rate)
    for _ in range(3):
        _, before, after = stepped(built)
        assert float((after - before).abs().max()) <= limit * (1 + 1e-6)
        divergence = (before.exp() * (before - after)).sum(-1)
        assert float(divergence.max()) <= limit**2 / 8 * (1 + 1e-6)


def test_after_scaling_the_spread_is_the_budget_exactly():
    built = trainer(LogRatioBudget(0.1), learning_rate=10.0)
    policy = built.policy
    start = policy.outer.detach().clone()
    rows, _, _ = stepped(built)
    inputs = torch.stack([row[0] for row in rows])
    moved = inputs @ (policy.outer.detach() - start)
    assert float((moved.amax(-1) - moved.amin(-1)).max()) == pytest.approx(0.1)


@pytest.mark.parametrize("derivative", ["jvp", "finite_difference"])
def test_a_budget_that_is_not_exceeded_changes_no_bit(derivative):
    free = trainer(policy=Softmax(hidden=5), learning_rate=0.01)
    budget = LogRatioBudget(50.0, derivative=derivative)
    guarded = trainer(budget, UpdateNormCap(1e6), policy=Softmax(hidden=5), learning_rate=0.01)
    for _ in range(6):
        free.train_step()
        guarded.train_step()
    for one, other in zip(free.policy.parameters(), guarded.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [built._optimizer_plain.state_dict()["state"] for built in (free, guarded)]
    for index, entries in states[0].items():
        for key, value in entries.items():
            assert torch.equal(value, states[1][index][key])


@pytest.mark.parametrize("micro", [1, 3, None])
def test_cutting_the_batch_changes_nothing(micro):
    def built(size):
        objectives = {"a": softmax_objective(micro=size)}
        return trainer(LogRatioBudget(0.1), policy=Softmax(hidden=5), objectives=objectives)

    whole, cut = built(None), built(micro)
    for _ in range(3):
        whole.train_step()
        cut.train_step()
    torch.testing.assert_close(whole.policy.state_dict(), cut.policy.state_dict())


def test_every_objective_of_the_turn_keeps_to_the_budget():
    objectives = {"a": softmax_objective("a", 0), "b": softmax_objective("b", 5)}
    built = trainer(LogRatioBudget(0.2), objectives=objectives, learning_rate=5.0)
    rows = [row for each in objectives.values() for row in each.source.rows]
    seen = []
    for _ in range(4):
        before = log_probabilities(built.policy, rows)
        states = {n: o.source.state_dict() for n, o in objectives.items()}
        batches = [o.source.next() for o in objectives.values()]
        for name, state in states.items():
            objectives[name].source.load_state_dict(state)
        own = [log_probabilities(built.policy, batch) for batch in batches]
        built.train_step()
        changes = [
            float((log_probabilities(built.policy, batch) - old).abs().max())
            for batch, old in zip(batches, own, strict=True)
        ]
        assert max(changes) <= 0.2 * (1 + 1e-6)
        seen.append(float((log_probabilities(built.policy, rows) - before).abs().max()))
    assert max(seen) > 0.15  # and the budget is used


def test_rates_that_vary_and_groups_of_parameters_are_part_of_the_update():
    policy = Softmax(hidden=5)
    built = trainer(
        LogRatioBudget(0.05),
        policy=policy,
        learning_rate=1.0,
        learning_rates={"inner": 0.3},
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    for _ in range(5):
        _, before, after = stepped(built)
        # Logits are not linear here: the bound holds to the order of the linearisation.
        assert float((after - before).abs().max()) <= 0.05 * 1.1


def test_parameters_that_are_not_trained_have_no_part_in_it():
    policy = Softmax(hidden=5)
    policy.inner.requires_grad_(False)
    inner = policy.inner.detach().clone()
    built = trainer(LogRatioBudget(0.05), policy=policy, learning_rate=1.0)
    _, before, after = stepped(built)
    assert torch.equal(policy.inner, inner)
    assert float((after - before).abs().max()) <= 0.05 * (1 + 1e-6)


def test_a_share_of_rows_may_exceed_a_budget_of_a_quantile():
    guard = LogRatioBudget(1.0, quantile=0.75)
    changes = [0.5, 1.0, 2.0, 8.0]
    found = verdict(guard, a=[math.pi / change for change in changes])
    assert found.factor == pytest.approx(0.5)  # the third of four decides
    assert found.record["over"] == 0.5
    assert verdict(LogRatioBudget(1.0), a=[math.pi / c for c in changes]).factor == 1 / 8


def test_improbable_outcomes_are_left_out_below_a_floor():
    asked = Fixed({"a": [1.0]})
    LogRatioBudget(1.0, probability_floor=0.01, binary=True).update(asked, {})
    assert asked.asked == [("jvp", Spread(0.01, True))]
    policy = Softmax()
    before, step = random_step(policy)
    _, everything = radii_of(policy, before, step)
    _, some = radii_of(policy, before, step, spread=Spread(floor=0.2))
    assert (some >= everything).all() and (some > everything).any()


def test_two_outcomes_may_have_their_exact_radius():
    def factor(binary):
        budget = LogRatioBudget(0.01, binary=binary)
        built = trainer(budget, policy=Softmax(outcomes=2), learning_rate=1.0, objectives=objective)
        start = built.policy.outer.detach().clone()
        rows, before, _ = stepped(built)
        moved = torch.stack([row[0] for row in rows]) @ (built.policy.outer.detach() - start)
        gaps = (before[:, 0] - before[:, 1]).abs()
        return moved.diff(dim=-1).abs().squeeze(-1), gaps

    objective = {"a": softmax_objective(outcomes=2)}
    plain, _ = factor(False)
    objective = {"a": softmax_objective(outcomes=2)}
    exact, gaps = factor(True)
    assert float(plain.max()) == pytest.approx(0.01)
    allowed = 0.01 * (gaps**2 + math.pi**2).sqrt() / math.pi
    assert float((exact / allowed).max()) == pytest.approx(1.0)


# Records and refusals -----------------------------------------------------------------------------


def lines(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def test_the_record_says_what_was_cut_by_how_much_and_where(tmp_path):
    built = trainer(UpdateNormCap(0.5), LogRatioBudget(0.1), folder=tmp_path, learning_rate=1.0)
    start = built.policy.outer.detach().clone()
    rows, _, _ = stepped(built)
    moved = torch.stack([row[0] for row in rows]) @ (built.policy.outer.detach() - start)
    (record,) = lines(tmp_path, "train")
    cap, budget = record["guards"]["update_norm_cap"], record["guards"]["log_ratio_budget"]
    assert cap["factor"] == pytest.approx(0.5 / record["guards"]["update_norm"])
    assert budget["change"] == pytest.approx(0.1 / budget["factor"])
    assert budget["change_after"] == pytest.approx(0.1)
    assert budget["objective"] == "a"
    assert budget["token"] == int((moved.amax(-1) - moved.amin(-1)).argmax())
    length = float((built.policy.outer.detach() - start).norm())
    assert length == pytest.approx(0.5 * budget["factor"])


def test_guards_see_what_those_before_them_left():
    """In either order the shorter of both lengths is what remains."""
    ends = []
    for order in (1, -1):
        guards = [UpdateNormCap(0.5), LogRatioBudget(0.1)][::order]
        built = trainer(*guards, learning_rate=1.0)
        built.train_step()
        ends.append(built.policy.outer.detach().clone())
    torch.testing.assert_close(*ends)


def test_an_objective_without_softmaxes_is_refused_by_name():
    with pytest.raises(ValueError, match="objective 'a' does not say what its softmaxes are"):
        trainer(LogRatioBudget(1.0), policy=Linear(), objectives={"a": objective("a", 1)})


@pytest.mark.parametrize("radius", [math.nan, 0.0])
def test_rates_that_are_not_finite_refuse_the_step(radius):
    each = softmax_objective()
    each.radii = lambda along, rows, spread: torch.full((len(rows),), radius)
    built = trainer(LogRatioBudget(1.0), objectives={"a": each})
    before = built.policy.outer.detach().clone()
    built.train_step()
    assert torch.equal(built.policy.outer, before)
    assert built._progress.refusals == 1


def test_nothing_that_moves_needs_no_budget():
    assert verdict(LogRatioBudget(1e-9), a=[math.inf, math.inf]).factor == 1.0
    assert LogRatioBudget(1e-9).update(Fixed({}, norm=0.0), {})[0].factor == 1.0
    assert verdict(LogRatioBudget(1e-9), a=[]).factor == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0.0},
        {"limit": 1.0, "quantile": 0.0},
        {"limit": 1.0, "quantile": 1.1},
        {"limit": 1.0, "probability_floor": 1.0},
        {"limit": 1.0, "derivative": "guess"},
    ],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} is"):
        LogRatioBudget(**options)


def test_dropout_is_off_where_the_budget_looks():
    class Dropped(Softmax):
        def forward(self, inputs):
            return super().forward(torch.nn.functional.dropout(inputs, 0.5, self.training))

    modes = []
    each = softmax_objective()

    def watched(along, rows, spread):
        modes.append(along.policy.training)
        return radii(along, rows, spread)

    each.radii = watched
    built = trainer(LogRatioBudget(0.1), policy=Dropped(), objectives={"a": each})
    rows = softmax_objective().source.next()
    built.policy.eval()
    before = log_probabilities(built.policy, rows)
    built.train_step()
    assert modes == [False] and built.policy.training
    built.policy.eval()
    after = log_probabilities(built.policy, rows)
    assert float((after - before).abs().max()) <= 0.1 * (1 + 1e-6)


def test_the_loss_may_rise_within_the_budget():
    """A budget is no guarantee of descent: at one radius there are steps that raise the loss."""
    rises = 0
    for seed in range(12):
        policy = Softmax(hidden=16, seed=seed)
        built = trainer(
            LogRatioBudget(math.pi),
            policy=policy,
            objectives={"a": softmax_objective(seed=seed)},
            learning_rate=10.0,
        )
        for _ in range(4):
            rows = built.objectives["a"].source.rows
            before = cross_entropy(policy, rows).total.item()
            built.train_step()
            rises += cross_entropy(policy, rows).total.item() > before
    assert rises > 0
