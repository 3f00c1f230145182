import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.bellman.estimators.ccp import choice_shares
from holdfast.bellman.estimators.cloning import clone
from holdfast.bellman.estimators.fitting import FitOptions, columns_of, fit_network
from holdfast.bellman.estimators.iq_learn import inverse_soft_q, iq_learn
from holdfast.bellman.mdp import TabularMDP
from holdfast.errors import TrainingError
from holdfast.joint import LossTerms

STATES, ACTIONS = 4, 3


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(STATES, ACTIONS, dtype=torch.float64))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.values[state]


def logged(seed: int = 0, trajectories: int = 40):
    problem = TabularMDP.random(STATES, ACTIONS, 0.9, seed=seed)
    return problem.sample_trajectories(trajectories, 25, seed=seed + 1)


def draw(seed: int, rows: int = 7):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, ACTIONS, generator=generator, dtype=torch.float64, requires_grad=True)
    ahead = torch.randn(rows, generator=generator, dtype=torch.float64, requires_grad=True)
    return q, torch.randint(ACTIONS, (rows,), generator=generator), ahead


def test_a_table_is_cloned_to_the_shares_of_choices():
    rows = logged()
    network = Table()
    fit = clone(network, rows, options=FitOptions(steps=1500, learning_rate=0.05))
    policy = network.values.detach().softmax(-1).numpy()
    shares = choice_shares(rows.counts(STATES, ACTIONS), pseudo_count=0)
    np.testing.assert_allclose(policy, shares, atol=0.02)
    least = -np.log(shares)[rows.state, rows.action].mean()
    assert fit.loss == pytest.approx(least, abs=1e-3)
    assert fit.held_out_loss is None


def test_the_step_is_the_best_on_transitions_held_out():
    """A wide network on 30 noisy choices overfits: later steps are worse on what is held out."""
    rows = logged(trajectories=3)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, ACTIONS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    random = np.random.default_rng(0)
    noise = random.normal(size=(len(rows), 2)).astype(np.float32)
    seen = type(rows)(noise, rows.action, rows.reward, noise)
    train, other = seen[:50], seen[50:]
    options = FitOptions(steps=400, check_every=10, learning_rate=0.02)
    fit = clone(network, train, options=options, held_out=other)
    assert fit.step < 400

    def loss_on(part):
        q = network(torch.as_tensor(part.state))
        return nn.functional.cross_entropy(q, torch.as_tensor(part.action)).item()

    assert loss_on(other) == pytest.approx(fit.held_out_loss, rel=1e-5)
    assert loss_on(train) == pytest.approx(fit.loss, rel=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.99]), st.sampled_from([0.1, 0.5, 3.0]))
def test_inverse_soft_q_is_the_published_objective(seed, discount, scale):
    """``-(r - r² / 4 scale) + (V(s) - discount V(s'))``, with its gradient in both arguments."""
    q, action, ahead = draw(seed)
    terms = inverse_soft_q(q, action, ahead, discount=discount, scale=scale)
    ours = torch.autograd.grad(terms.total, (q, ahead))
    reward = q[torch.arange(len(q)), action] - discount * ahead
    published = -(reward - reward**2 / (4 * scale)) + q.exp().sum(-1).log() - discount * ahead
    theirs = torch.autograd.grad(published.sum(), (q, ahead), retain_graph=True)
    torch.testing.assert_close(terms.total, published.sum())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert terms.count.item() == len(q)
    torch.testing.assert_close(terms.metrics["reward_squared"], reward.detach().square().sum())


def test_inverse_soft_q_does_not_depend_on_how_a_batch_is_cut():
    q, action, ahead = draw(3)
    whole = inverse_soft_q(q, action, ahead, discount=0.9)
    parts = [
        inverse_soft_q(q[i], action[i], ahead[i], discount=0.9) for i in ([0, 1, 2], [3, 4, 5, 6])
    ]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, parts[0].metrics[name] + parts[1].metrics[name])


def test_inverse_soft_q_of_one_state_without_a_future():
    """Discount 0, choices 3:1, and so much scale that rewards are free: the log-odds are ln 3.

    Rewards then weigh little but not nothing, and only their mean square counts: of all Q with
    these odds, the one with the least ``(3 q_0² + q_1²) / 4``, that is ``q_1 = -3 q_0``.
    """
    action = torch.tensor([0, 0, 0, 1])
    nothing = torch.zeros(4, dtype=torch.float64)

    def loss(q):
        return inverse_soft_q(q.expand(4, 2), action, nothing, discount=0.0, scale=1e4).total

    q = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):  # Newton's method: the loss is convex
        slope = torch.func.grad(loss)(q)
        q = q - torch.linalg.solve(torch.func.jacrev(torch.func.grad(loss))(q), slope)
    odds = np.log(3)
    np.testing.assert_allclose(q.numpy(), [odds / 4, -3 * odds / 4], atol=1e-3)


def test_iq_learn_with_free_rewards_clones():
    rows = logged()
    network = Table()
    options = FitOptions(steps=1500, learning_rate=0.05)
    iq_learn(network, rows, discount=0.9, scale=1e5, options=options)
    policy = network.values.detach().softmax(-1).numpy()
    shares = choice_shares(rows.counts(STATES, ACTIONS), pseudo_count=0)
    np.testing.assert_allclose(policy, shares, atol=0.03)


def test_iq_learn_draws_rewards_towards_zero():
    rows = logged()
    options = FitOptions(steps=800, learning_rate=0.05)
    sizes = []
    for scale in (0.01, 5.0):
        network = Table()
        iq_learn(network, rows, discount=0.5, scale=scale, options=options)
        columns = columns_of(rows, network)
        q = network(columns["state"]).gather(-1, columns["action"][:, None])[:, 0]
        ahead = network(columns["next_state"]).logsumexp(-1)
        sizes.append((q - 0.5 * ahead).square().mean().item())
    assert sizes[0] < sizes[1] / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 1.0}, "discount"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"action": torch.zeros(3, dtype=torch.long)}, "action"),
        ({"next_value": torch.zeros(3)}, "next_value has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, action, ahead = draw(0)
    arguments = {"action": action, "next_value": ahead, "discount": 0.5, "scale": 0.5} | change
    with pytest.raises(ValueError, match=message):
        inverse_soft_q(q, arguments.pop("action"), arguments.pop("next_value"), **arguments)


def test_a_loss_that_is_not_finite_stops_the_fit():
    network = Table()

    def loss(network, columns):
        return LossTerms(network.values.sum() * float("nan"), torch.tensor(1))

    with pytest.raises(TrainingError, match="loss is nan in step 1"):
        fit_network(network, loss, columns_of(logged(), network), FitOptions())


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 0}, {"check_every": 0}, {"learning_rate": 0.0}]
)
def test_bad_options_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FitOptions(**change)
