"""Predicted shifts, against true shifts of a linear softmax head and the paper's einsum form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from holdfast.language.guards import RowMoments, curvature_mask
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
        self.scales = normal(VOCAB).exp() if scaled else torch.ones(VOCAB, dtype=torch.float64)
        self.logits = self.hidden @ self.weight.T
        self.norms = self.hidden.norm(dim=-1)

    def shifts(self, rate: float):
        statistics = dense_statistics(self.logits, self.actions, moments=self.scales)
        scales = self.scales[self.actions]
        return predicted_shifts(statistics, scales, self.advantages, self.norms, learning_rate=rate)

    def log_ratio(self, token: int, rate: torch.Tensor) -> torch.Tensor:
        """Of all ids, after the step on one token."""
        hidden, action = self.hidden[token], self.actions[token]
        residual = torch.eye(VOCAB, dtype=torch.float64)[action] - self.logits[token].softmax(-1)
        step = self.advantages[token] * (self.scales * residual)[:, None] * hidden
        moved = (self.weight + rate * step) @ hidden
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
    step = problem.scales[:, None] * gradient
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
    scales = torch.rand(40, generator=draw)
    logits = 0.7 * (hidden @ head.weight.T + head.bias)
    dense = dense_statistics(logits, labels, temperature=0.8, moments=scales)
    for statistics in (False, True):
        tiled = token_statistics(
            hidden,
            head,
            labels,
            temperature=0.8,
            moments=scales,
            statistics=statistics,
            tile_tokens=4,
            tile_vocab=7,
        )
        assert_close(tiled.squares, dense.squares)
        assert_close(tiled.cubes, dense.cubes)
    policy = (logits / 0.8).softmax(-1)
    expected = (scales * policy.square()).sum(-1).masked_fill(labels < 0, 0.0)
    assert_close(dense.squares, expected)
    expected = (scales.square() * policy**3).sum(-1).masked_fill(labels < 0, 0.0)
    assert_close(dense.cubes, expected)


def test_banned_ids_leave_no_trace_in_the_moments():
    logits = torch.tensor([[-float("inf"), -float("inf"), 0.0, 1.0]])
    head = Head(torch.zeros(4, 1), logits[0].clone())
    found = token_statistics(
        torch.zeros(1, 1),
        head,
        torch.tensor([3]),
        moments=torch.ones(4),
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


def test_row_moments_are_those_of_adam_over_a_row():
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5, 3))
    optimizer = torch.optim.Adam([weight], betas=(0.9, 0.99))
    moments = RowMoments(5, beta=0.99)
    assert torch.equal(moments.scales(), torch.ones(5))
    for _ in range(4):
        weight.grad = torch.randn(5, 3, generator=draw)
        optimizer.step()
        moments.update(weight.grad)
    state = optimizer.state[weight]
    corrected = state["exp_avg_sq"].mean(-1) / (1 - 0.99**4)
    assert_close(moments.scales(), 1 / (corrected.sqrt() + 1e-8))
    again = RowMoments(5, beta=0.99)
    again.load_state_dict(moments.state_dict())
    assert torch.equal(again.scales(), moments.scales())


def test_a_row_without_gradient_does_not_move_without_bound():
    moments = RowMoments(3, beta=0.9)
    moments.update(torch.tensor([[1.0], [1.0], [0.0]]))
    assert moments.scales()[2] < 10


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
