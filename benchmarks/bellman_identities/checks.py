"""Identities of the Bellman saddle, each as the largest deviation over random problems.

Every check compares the library with something computed another way: sums over all next states,
plain iteration, a linear solve, complex steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.bellman import (
    SaddleProblem,
    TabularMDP,
    Transitions,
    bellman_saddle,
    gladius,
    inverse_reward,
    td_error,
)

Array = NDArray[np.float64]
STATES, ACTIONS = 5, 3
TINY = 1e-30
"""A complex step: too small to cost digits."""


def soft(q: Array) -> Array:
    """``log sum exp`` over actions, of complex tables too."""
    return np.log(np.exp(q).sum(-1))


def problem(seed: int, discount: float, ends: bool = True) -> tuple[TabularMDP, Transitions]:
    """A model whose probabilities are multiples of 1/12, and the data that show exactly these.

    Every pair has 12 rows, so that means over the data are expectations under the model. With
    ``ends`` the last state is terminal.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(12, rng.dirichlet(np.ones(STATES)), size=(STATES, ACTIONS))
    terminal = np.zeros(STATES, bool)
    terminal[-1] = ends
    rewards = rng.normal(size=(STATES, ACTIONS))
    model = TabularMDP(counts / 12, rewards, discount, terminal=terminal)
    rows = counts[: STATES - 1 if ends else STATES]
    state, action, ahead = (
        np.repeat(index, rows.ravel()) for index in np.indices(rows.shape).reshape(3, -1)
    )
    reward = rewards[state, action]
    return model, Transitions(state, action, reward, ahead, terminal[ahead])


def tables(seed: int) -> tuple[Array, Array]:
    """Two tables that solve nothing."""
    rng = np.random.default_rng([seed, 1])
    return rng.normal(size=(STATES, ACTIONS)), rng.normal(size=(STATES, ACTIONS))


def live(model: TabularMDP) -> NDArray[np.bool_]:
    return np.repeat(~model.terminal[:, None], model.actions, 1)


def mean_loss(loss: Callable[..., Any], *values: Any, **options: Any) -> float:
    terms = loss(
        *(torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in values), **options
    )
    return float(terms.total / terms.count)


def unbiased(seed: int, discount: float) -> float:
    """Lemma 1: at the best dual the mean of the objective is the squared Bellman residual."""
    model, data = problem(seed, discount)
    q, _ = tables(seed)
    ahead = model.expected(soft(q))
    found = mean_loss(bellman_saddle, q, ahead, data, discount=discount)
    return abs(found - float(((model.backup(q) - q)[live(model)] ** 2).mean()))


def bias(seed: int, discount: float) -> float:
    """The mean squared TD error is that plus ``discount^2 Var(V(s'))``."""
    model, data = problem(seed, discount)
    q, _ = tables(seed)
    v = soft(q)
    variance = model.expected(v**2) - model.expected(v) ** 2
    expected = (model.backup(q) - q) ** 2 + discount**2 * variance
    return abs(
        mean_loss(td_error, q, data, discount=discount) - float(expected[live(model)].mean())
    )


def population(seed: int, discount: float) -> float:
    """``F(w, v) = |T w - w|^2 - discount^2 |P V_w - v|^2`` at any dual: variances cancel."""
    model, data = problem(seed, discount)
    q, zeta = tables(seed)
    lag = model.expected(soft(q)) - zeta
    expected = (model.backup(q) - q) ** 2 - discount**2 * lag**2
    found = mean_loss(bellman_saddle, q, zeta, data, discount=discount)
    return abs(found - float(expected[live(model)].mean()))


def biconjugate(seed: int, discount: float) -> float:
    """``2 h delta - h^2`` with ``h = r - Q + discount * zeta`` is the objective, row by row."""
    _, data = problem(seed, discount)
    q, zeta = tables(seed)
    worst = 0.0
    for i in range(0, len(data), 7):
        row = data[i : i + 1]
        s, a, ahead = int(row.state[0]), int(row.action[0]), int(row.next_state[0])
        h = row.reward[0] - q[s, a] + discount * zeta[s, a]
        delta = row.reward[0] - q[s, a] + discount * (0 if row.terminal[0] else soft(q[ahead]))
        found = mean_loss(bellman_saddle, q, zeta, row, discount=discount)
        worst = max(worst, abs(found - float(2 * h * delta - h**2)))
    return worst


def best_dual(seed: int, discount: float) -> float:
    """The dual's gradient vanishes at ``E[V(s')]``; there ``h`` is the mean residual."""
    model, data = problem(seed, discount)
    q, _ = tables(seed)
    ahead = model.expected(soft(q))
    dual = torch.tensor(ahead, requires_grad=True)
    terms = bellman_saddle(torch.as_tensor(q), dual, data, discount=discount)
    (slope,) = torch.autograd.grad(terms.total / terms.count, dual)
    h = model.rewards - q + discount * ahead
    return max(float(slope.abs().max()), float(np.abs(h - (model.backup(q) - q)).max()))


def saddle(seed: int, discount: float) -> float:
    """The empirical saddle is soft value iteration on the empirical model, with objective 0."""
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    data = model.sample(400, seed=seed)
    counts = data.counts(STATES, ACTIONS)
    assert counts.min() > 0
    found = SaddleProblem.tabular(data, discount, states=STATES, actions=ACTIONS)
    q, zeta = found.exact()
    frequencies = np.zeros((STATES, ACTIONS, STATES))
    np.add.at(frequencies, (data.state, data.action, data.next_state), 1.0)
    frequencies /= counts[..., None]
    plain = np.zeros((STATES, ACTIONS))
    for _ in range(int(np.log(1e-15) / np.log(discount)) + 50 if discount else 2):
        plain = model.rewards + discount * frequencies @ soft(plain)
    first, second = torch.tensor(q, requires_grad=True), torch.tensor(zeta, requires_grad=True)
    terms = bellman_saddle(first, second, data, discount=discount)
    slopes = torch.autograd.grad(terms.total / terms.count, (first, second))
    return max(
        float(np.abs(q - plain).max()),
        float(np.abs(zeta - frequencies @ soft(plain)).max()),
        abs(float(terms.total.detach() / terms.count)),
        *(float(slope.abs().max()) for slope in slopes),
    )


def inverse(seed: int, discount: float) -> float:
    """From exact choices and one action's rewards, all rewards, by one linear solve."""
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    policy = model.soft_policy_iteration(1e-13).policy
    found = inverse_reward(policy, model.transitions, 0, model.rewards[:, 0], discount)
    return float(np.abs(found - model.rewards).max())


def inverse_saddle(seed: int, discount: float) -> float:
    """Where the data solve exactly, so does inverse RL's objective: its gradients vanish there."""
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    data = model.sample(600, seed=seed)
    known = np.where(data.action == 0, data.reward, np.nan)
    data = Transitions(data.state, data.action, known, data.next_state)
    q, zeta = SaddleProblem.tabular(data, discount, anchor_action=0).exact()
    first, second = torch.tensor(q, requires_grad=True), torch.tensor(zeta, requires_grad=True)
    terms = gladius(first, second, data, discount=discount, anchor_action=0)
    slopes = torch.autograd.grad(terms.total / terms.count, (first, second))
    return max(float(slope.abs().max()) for slope in slopes)


def regression(seed: int, discount: float) -> float:
    """Without a future: least squares on rewards, whose solution is the mean of each pair.

    The discount is 0, whatever is asked for.
    """
    _, data = problem(seed, 0.0, ends=False)
    rng = np.random.default_rng([seed, 2])
    data = Transitions(
        data.state, data.action, rng.normal(size=len(data)), data.next_state, data.terminal
    )
    q, zeta = tables(seed)
    squared = float(((data.reward - q[data.state, data.action]) ** 2).mean())
    solved = SaddleProblem.tabular(data, 0.0, states=STATES, actions=ACTIONS).exact()[0]
    worst = abs(mean_loss(bellman_saddle, q, zeta, data, discount=0.0) - squared)
    for s, a in np.ndindex(STATES, ACTIONS):
        mine = (data.state == s) & (data.action == a)
        worst = max(worst, abs(solved[s, a] - data.reward[mine].mean()))
    return worst


def deterministic(seed: int, discount: float) -> float:
    """Where one next state follows, the dual has nothing to remove: both objectives agree."""
    rng = np.random.default_rng(seed)
    ahead = rng.integers(STATES, size=(STATES, ACTIONS))
    kernel = np.eye(STATES)[ahead]
    model = TabularMDP(kernel, rng.normal(size=(STATES, ACTIONS)), discount)
    data = model.sample(300, seed=seed)
    q, _ = tables(seed)
    best = model.expected(soft(q))
    worst = abs(
        mean_loss(bellman_saddle, q, best, data, discount=discount)
        - mean_loss(td_error, q, data, discount=discount)
    )
    solved, _ = SaddleProblem.tabular(data, discount, states=STATES, actions=ACTIONS).exact()
    primal = torch.tensor(solved, requires_grad=True)
    terms = td_error(primal, data, discount=discount)
    (slope,) = torch.autograd.grad(terms.total / terms.count, primal)
    return max(worst, float(slope.abs().max()))


def shaping(seed: int, discount: float) -> float:
    """Potentials: ``r + discount E[f(s')] - f`` has the values ``Q - f`` and the same choices."""
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    potential = np.random.default_rng([seed, 3]).normal(size=STATES)
    shaped = model.rewards + discount * model.expected(potential) - potential[:, None]
    other = TabularMDP(model.transitions, shaped, discount)
    first, second = model.soft_policy_iteration(1e-13), other.soft_policy_iteration(1e-13)
    return max(
        float(np.abs(first.q - potential[:, None] - second.q).max()),
        float(np.abs(first.policy - second.policy).max()),
    )


def wrong_anchor(seed: int, discount: float) -> float:
    """An anchor's reward off by ``c(s)`` moves every reward by ``g - discount E[g(s')]``.

    With ``g = (I - discount P_a0)^-1 c``; choices stay.
    """
    model = TabularMDP.random(STATES, ACTIONS, discount, seed=seed)
    policy = model.soft_policy_iteration(1e-13).policy
    off = np.random.default_rng([seed, 4]).normal(size=STATES)
    found = inverse_reward(policy, model.transitions, 0, model.rewards[:, 0] + off, discount)
    g = np.linalg.solve(np.eye(STATES) - discount * model.transitions[:, 0], off)
    expected = model.rewards + g[:, None] - discount * model.expected(g)
    return float(np.abs(found - expected).max())


# Gradients


def written_out(name: str, q: Array, zeta: Array, data: Transitions, discount: float) -> Any:
    """The mean of an objective in plain arithmetic, for complex tables."""
    v = np.where(data.terminal, 0.0, soft(q)[data.next_state])
    own, dual = q[data.state, data.action], zeta[data.state, data.action]
    reward = np.nan_to_num(data.reward)
    delta = reward + discount * v - own
    saddle_rows = delta**2 - discount**2 * (v - dual) ** 2
    if name == "saddle":
        return saddle_rows.mean()
    if name == "td":
        return (delta**2).mean()
    anchor = data.action == 0
    return (soft(q)[data.state] - own + np.where(anchor, saddle_rows, 0.0)).mean()


def dual_written_out(q: Array, zeta: Array, data: Transitions) -> Any:
    v = np.where(data.terminal, 0.0, soft(q)[data.next_state])
    return ((v - zeta[data.state, data.action]) ** 2).mean()


def losses(name: str, q: Tensor, zeta: Tensor, data: Transitions, discount: float) -> Tensor:
    if name == "td":
        terms = td_error(q, data, discount=discount)
    elif name == "saddle":
        terms = bellman_saddle(q, zeta, data, discount=discount)
    else:
        terms = gladius(q, zeta, data, discount=discount, anchor_action=0)
    return terms.total / terms.count


def gradients(name: str, seed: int, discount: float) -> float:
    """Autograd through the library against complex steps through the formula written out."""
    _, data = problem(seed, discount)
    q, zeta = tables(seed)
    first, second = torch.tensor(q, requires_grad=True), torch.tensor(zeta, requires_grad=True)
    found = torch.autograd.grad(
        losses(name, first, second, data, discount), (first, second), materialize_grads=True
    )
    worst = 0.0
    for place in np.ndindex(q.shape):
        moved = np.zeros(q.shape, complex)
        moved[place] = 1j * TINY
        down = written_out(name, q + moved, zeta + 0j, data, discount).imag / TINY
        if name == "gladius":  # Its dual is fitted apart, with the values held fixed.
            up = dual_written_out(q + 0j, zeta + moved, data).imag / TINY
        else:
            up = written_out(name, q + 0j, zeta + moved, data, discount).imag / TINY
            up = 0.0 if name == "td" else up
        worst = max(worst, abs(found[0][place].item() - down), abs(found[1][place].item() - up))
    return worst


def differences(seed: int, discount: float) -> float:
    """Autograd against fourth-order differences of the library's own values."""
    _, data = problem(seed, discount)
    q, zeta = (torch.as_tensor(table) for table in tables(seed))
    both = torch.stack([q, zeta]).requires_grad_()
    (found,) = torch.autograd.grad(losses("saddle", both[0], both[1], data, discount), both)
    step, worst = 1e-3, 0.0
    for place in np.ndindex(*both.shape):

        def value(times: float, place: tuple[int, ...] = place) -> float:
            moved = both.detach().clone()
            moved[place] += times * step
            return losses("saddle", moved[0], moved[1], data, discount).item()

        slope = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)
        worst = max(worst, abs(float(found[place]) - slope))
    return worst
