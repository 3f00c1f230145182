"""Predicted shifts, against true shifts of a linear softmax head and the paper's einsum form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from holdfast.language.guards import CurvatureGuard, RowMoments, curvature, curvature_mask
from holdfast.language.guards.curvature import predicted_shifts, within
from holdfast.language.head import Head, dense_statistics, token_statistics

TOKENS, VOCAB, WIDTH = 6, 9, 4
SEEDS = st.integers(0, 2**31 - 1)


class Problem:
    """Tokens of a linear softmax head, in double precision."""

    def __init__(self, seed: int, scaled: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.weight, self.hidden = normal(VOCAB, WIDTH), normal(TOKENS, WIDTH)
        self.advantages = normal(TOKENS)
        self.actions = torch.randint(VOCAB, (TOKENS,), generator=draw)
        self.rows = None
        if scaled:
            self.rows = RowMoments(VOCAB, WIDTH)
            for _ in range(3):
                self.rows.update(normal(VOCAB, WIDTH) * normal(VOCAB, 1))
        self.logits = self.hidden @ self.weight.T
        self.norms = self.hidden.norm(dim=-1)

    def shifts(self, rate: float):
        known = (self.advantages, self.norms)
        if self.rows is not None:
            return self.rows.shifts(self.logits, self.actions, *known, learning_rate=rate)
        statistics = dense_statistics(self.logits, self.actions, moments=True)
        return predicted_shifts(statistics, *known, learning_rate=rate)

    def step(self, token: int) -> torch.Tensor:
        """The direction ``(vocab, width)`` of the step on one token, per unit of learning rate."""
        residual = -self.logits[token].softmax(-1)
        residual[self.actions[token]] += 1
        gradient = self.advantages[token] * residual[:, None] * self.hidden[token]
        if self.rows is None:
            return gradient
        # Adam, after this gradient has gone into moments that are means over a row.
        second = 0.999 * self.rows.average.double() + 0.001 * gradient.square().mean(-1)
        root = (second / (1 - 0.999**4)).sqrt() + 1e-8
        return gradient * (0.1 / (1 - 0.9**4)) / root[:, None]

    def log_ratio(self, token: int, rate: torch.Tensor) -> torch.Tensor:
        """Of all ids, after the step on one token."""
        moved = (self.weight + rate * self.step(token)) @ self.hidden[token]
        return moved.log_softmax(-1) - self.logits[token].log_softmax(-1)


@pytest.mark.parametrize("scaled", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_the_predicted_shift_has_the_first_two_derivatives_of_the_true_one(scaled, seed):
    problem, rate = Problem(seed, scaled), 1e-3
    predicted = problem.shifts(rate)
    for token, action in enumerate(problem.actions):

        def surrogate(x, token=token, action=action):
            return problem.advantages[token] * problem.log_ratio(token, x)[action].exp()

        rates = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(surrogate(rates), rates, create_graph=True)
        (bend,) = torch.autograd.grad(slope, rates)
        expected = rate * slope + 0.5 * rate**2 * bend
        assert_close(predicted.objective[token], expected.detach(), rtol=1e-8, atol=1e-14)
        # The same from the outside: differences of the true objective leave the third order.
        small = 1e-4
        up, here, down = (surrogate(torch.tensor(x)) for x in (small, 0.0, -small))
        assert_close((up - down) / (2 * small), slope.detach(), rtol=1e-4, atol=1e-6)
        assert_close((up - 2 * here + down) / small**2, bend.detach(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_policy_shift_is_half_the_squared_change_of_the_log_probability(scaled):
    problem, rate = Problem(3, scaled), 1e-6
    predicted = problem.shifts(rate).policy
    for token, action in enumerate(problem.actions):
        true = problem.log_ratio(token, torch.tensor(rate))[action]
        assert_close(predicted[token], 0.5 * true.square(), rtol=1e-3, atol=1e-20)


def test_its_mean_over_actions_is_the_divergence_of_the_policies():
    problem = Problem(5)
    rate, token = 1e-4, 0
    # One step, whatever the action that is scored: the shift of an action along it.
    step_of = problem.log_ratio(token, torch.tensor(rate, dtype=torch.float64))
    policy = problem.logits[token].softmax(-1)
    divergence = -(policy * step_of).sum()
    mean = (policy * 0.5 * step_of.square()).sum()
    assert_close(mean, divergence, rtol=1e-2, atol=0.0)
    own = problem.shifts(rate).policy[token]
    assert_close(own, 0.5 * step_of[problem.actions[token]].square(), rtol=1e-2, atol=0.0)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, scaled=st.booleans())
def test_the_closed_form_is_that_of_whole_gradients(seed, scaled):
    problem, rate = Problem(seed, scaled), 0.3
    policy = problem.logits.softmax(-1)
    v = torch.eye(VOCAB, dtype=torch.float64)[problem.actions] - policy
    gradient = torch.einsum("t,tv,tw->tvw", problem.advantages, v, problem.hidden)
    step = torch.stack([problem.step(token) for token in range(TOKENS)])
    u = torch.einsum("tvw,tw->tv", step, problem.hidden)
    along = (v * u).sum(-1)
    fisher = (policy * u.square()).sum(-1) - (policy * u).sum(-1).square()
    bend = problem.advantages * (along.square() - fisher)
    predicted = problem.shifts(rate)
    first = rate * (gradient * step).sum((1, 2))
    assert_close(predicted.objective, first + 0.5 * rate**2 * bend)
    assert_close(predicted.policy, 0.5 * rate**2 * along.square())


def test_tiles_of_the_head_see_the_same_shifts_as_logits():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=draw)
    head = Head(torch.randn(40, 8, generator=draw), torch.randn(40, generator=draw), 0.7)
    labels = torch.randint(40, (3, 5), generator=draw)
    labels[0, 2:] = -100
    logits = 0.7 * (hidden @ head.weight.T + head.bias)
    dense = dense_statistics(logits, labels, temperature=0.8, moments=True)
    for statistics in (False, True):
        tiled = token_statistics(
            hidden,
            head,
            labels,
            temperature=0.8,
            moments=True,
            statistics=statistics,
            tile_tokens=4,
            tile_vocab=7,
        )
        assert_close(tiled.squares, dense.squares)
        assert_close(tiled.cubes, dense.cubes)
    policy = (logits / 0.8).softmax(-1)
    expected = policy.square().sum(-1).masked_fill(labels < 0, 0.0)
    assert_close(dense.squares, expected)
    expected = (policy**3).sum(-1).masked_fill(labels < 0, 0.0)
    assert_close(dense.cubes, expected)


@pytest.mark.parametrize("cached", [1, 20, 2**18])
def test_moments_do_not_depend_on_how_many_rows_are_summed_at_once(cached, monkeypatch):
    monkeypatch.setattr("holdfast.language.head.statistics._CACHED", cached)
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = dense_statistics(logits, torch.arange(7), moments=True)
    softmax = logits.softmax(-1)
    assert_close(found.squares, softmax.square().sum(-1))
    assert_close(found.cubes, softmax.pow(3).sum(-1))


def test_banned_ids_leave_no_trace_in_the_moments():
    logits = torch.tensor([[-float("inf"), -float("inf"), 0.0, 1.0]])
    head = Head(torch.zeros(4, 1), logits[0].clone())
    found = token_statistics(
        torch.zeros(1, 1),
        head,
        torch.tensor([3]),
        moments=True,
        tile_tokens=1,
        tile_vocab=2,
    )
    assert_close(found.squares, logits.softmax(-1).square().sum(-1))


LIMITS = {"objective_limit": 1e-2, "policy_limit": 1e-4}


def test_a_vanishing_step_masks_nothing_and_a_large_one_everything():
    problem = Problem(1)
    given = (problem.logits, problem.actions, problem.advantages, problem.norms)
    assert curvature_mask(*given, learning_rate=0.0, **LIMITS).all()
    assert curvature_mask(*given, learning_rate=1e-9, **LIMITS).all()
    assert not curvature_mask(*given, learning_rate=1e3, **LIMITS).any()


@pytest.mark.parametrize("which", ["advantages", "norms"])
def test_the_outlier_alone_is_masked(which):
    problem = Problem(2)
    getattr(problem, which)[4] *= 1e4
    mask = curvature_mask(
        problem.logits,
        problem.actions,
        problem.advantages,
        problem.norms,
        learning_rate=1e-4,
        **LIMITS,
    )
    assert mask.tolist() == [token != 4 for token in range(TOKENS)]


def test_ids_may_be_renamed_and_the_order_of_tokens_does_not_matter():
    problem = Problem(7)
    names = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    order = torch.arange(TOKENS).flip(0)
    mask = curvature_mask(
        problem.logits,
        problem.actions,
        problem.advantages,
        problem.norms,
        learning_rate=0.02,
        **LIMITS,
    )
    assert 0 < mask.sum() < TOKENS
    renamed = curvature_mask(
        problem.logits[order][:, names],
        names.argsort()[problem.actions][order],
        problem.advantages[order],
        problem.norms[order],
        learning_rate=0.02,
        **LIMITS,
    )
    assert torch.equal(renamed, mask[order])


def test_a_floor_asks_for_an_improvement_and_nan_is_within_nothing():
    problem = Problem(4)
    shifts = problem.shifts(1e-3)
    kept = within(shifts, 1.0, 1.0, objective_floor=float(shifts.objective.median()))
    assert torch.equal(kept, shifts.objective > shifts.objective.median())
    problem.advantages[0] = float("nan")
    assert not within(problem.shifts(1e-3), 1.0, 1.0)[0]


def test_row_moments_are_those_of_adam_where_a_row_has_one_element():
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5, 1))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.0, 0.99))
    moments = RowMoments(5, 1, (0.0, 0.99))
    for _ in range(4):
        weight.grad = torch.randn(5, 1, generator=draw)
        before = weight.detach().clone()
        expected = -weight.grad * moments.scales(weight.grad.square().T).T
        optimizer.step()
        assert_close(weight.detach() - before, expected)
        moments.update(weight.grad)
    again = RowMoments(5, 1, (0.0, 0.99))
    again.load_state_dict(moments.state_dict())
    assert torch.equal(again.scales(torch.ones(5)), moments.scales(torch.ones(5)))


def test_rows_that_were_never_moved_do_not_move_without_bound():
    """Adam's first step is of the size of the learning rate, whatever the gradient is."""
    problem = Problem(1)
    problem.rows = RowMoments(VOCAB, WIDTH)
    for scale in (1e-3, 1e3):
        problem.advantages = scale * torch.ones(TOKENS, dtype=torch.float64)
        sizes = [problem.rows.scales((g := problem.step(0)).square().mean(-1)), g]
        assert all(part.isfinite().all() for part in sizes)
        step = problem.shifts(1e-3)
        assert step.policy.max() < (1e-3 * WIDTH * 10) ** 2 * problem.norms.max() ** 2


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_step_of_adam_in_tiles_is_that_of_all_logits(size, monkeypatch):
    monkeypatch.setattr(curvature, "_ELEMENTS", size * VOCAB)
    problem = Problem(3, scaled=True)
    head = Head(problem.weight)
    labels = problem.actions.clone()
    labels[2] = -100
    statistics = token_statistics(problem.hidden, head, labels, moments=True)
    found = CurvatureGuard(0.05, 1e9, 1e9, rows=problem.rows)
    known = (problem.advantages, problem.hidden, head, labels, 1.0)
    mask, metrics = found(statistics, *known)
    expected = problem.shifts(0.05)
    counted = labels >= 0
    assert torch.equal(mask, counted)
    assert_close(
        metrics["curvature/policy_shift"][0], expected.policy[counted].sum(), rtol=1e-5, atol=0
    )
    sizes = expected.objective[counted].abs().sum()
    assert_close(metrics["curvature/objective_shift"][0], sizes, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"objective_limit": 0.0}, "objective_limit"),
        ({"policy_limit": float("nan")}, "policy_limit"),
        ({"objective_floor": 1.0}, "objective_floor"),
    ],
)
def test_bad_limits_are_refused_by_name(change, named):
    problem = Problem(0)
    given = (problem.logits, problem.actions, problem.advantages, problem.norms)
    with pytest.raises(ValueError, match=named):
        curvature_mask(*given, **{"learning_rate": 0.1, **LIMITS, **change})
    with pytest.raises(ValueError, match="hidden_norms"):
        curvature_mask(*given[:3], given[3][1:], learning_rate=0.1, **LIMITS)
