"""The closed forms of the linear-softmax objectives, against autograd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.linear_softmax import Likelihood, Preference, minimiser, turn_weights
from holdfast.joint import Maxright, Mix, Sequential

ANSWERS = np.array([[1.0, 0.5, 0.0], [0.5, 0.5, -1.0], [0.0, -0.3, 0.7], [-1.0, 0.2, 0.1]])
CHOSEN, REJECTED = [0, 1, 3], [2, 0, 1]
REFERENCE = np.array([0.3, -0.2, 0.5])
BETA = 0.4
SFT = Likelihood(ANSWERS, ANSWERS[[0, 0, 2]])
DPO = Preference(ANSWERS[CHOSEN] - ANSWERS[REJECTED], REFERENCE, BETA)

thetas = st.lists(st.floats(-5, 5), min_size=3, max_size=3).map(np.array)


def log_probabilities(theta: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(torch.tensor(ANSWERS) @ theta, dim=0)


def autograd_sft(theta: torch.Tensor) -> torch.Tensor:
    return -log_probabilities(theta)[[0, 0, 2]]


def autograd_dpo(theta: torch.Tensor) -> torch.Tensor:
    ratio = log_probabilities(theta) - log_probabilities(torch.tensor(REFERENCE))
    return -torch.nn.functional.logsigmoid(BETA * (ratio[CHOSEN] - ratio[REJECTED]))


PAIRS = pytest.mark.parametrize(
    ("objective", "rows"), [(SFT, autograd_sft), (DPO, autograd_dpo)], ids=["sft", "dpo"]
)


@PAIRS
@given(theta=thetas)
def test_loss_gradient_and_hessian_are_those_of_autograd(objective, rows, theta):
    point = torch.tensor(theta, requires_grad=True)

    def mean(p):
        return rows(p).mean()

    (gradient,) = torch.autograd.grad(mean(point), point)
    hessian = torch.autograd.functional.hessian(mean, point.detach())
    assert objective.loss(theta[None])[0] == pytest.approx(mean(point).item(), abs=1e-12)
    np.testing.assert_allclose(objective.gradient(theta[None])[0], gradient.numpy(), atol=1e-12)
    np.testing.assert_allclose(objective.hessian(theta), hessian.numpy(), atol=1e-12)


@PAIRS
@given(theta=thetas)
def test_row_gradients_average_to_the_full_gradient(objective, rows, theta):
    every = np.arange(objective.rows)
    of_rows = objective.gradient(np.tile(theta, (len(every), 1)), every)
    np.testing.assert_allclose(of_rows.mean(axis=0), objective.gradient(theta[None])[0], atol=1e-12)


@PAIRS
def test_runs_do_not_see_each_other(objective, rows):
    many = np.random.default_rng(0).normal(size=(5, 3))
    alone = [objective.gradient(theta[None])[0] for theta in many]
    np.testing.assert_allclose(objective.gradient(many), alone, atol=1e-14)


def test_most_likely_parameters_reproduce_the_shares_of_the_answers():
    answers = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    objective = Likelihood(answers, answers[[0] * 7 + [1] * 2 + [2]])
    theta = minimiser({"sft": objective}, {"sft": 1.0}, np.zeros(2))
    probabilities = np.exp(answers @ theta)
    np.testing.assert_allclose(probabilities / probabilities.sum(), [0.7, 0.2, 0.1], atol=1e-10)


def test_a_loss_without_a_minimum_is_reported():
    separable = Preference(np.array([[1.0]]), np.zeros(1), 1.0)
    with pytest.raises((ArithmeticError, np.linalg.LinAlgError)):
        minimiser({"dpo": separable}, {"dpo": 1.0}, np.zeros(1), tolerance=0.0)


def test_every_run_is_asked_with_its_own_losses_and_ended_runs_get_nothing():
    objectives = {"dpo": DPO, "sft": SFT}
    theta = np.array([[4.0, 0.0, -4.0], [4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    weights = {"dpo": 0.5, "sft": 0.5}
    optima = {"dpo": 0.0, "sft": 0.0}
    schedules = [
        Maxright(weights, optima),
        Maxright(weights, optima),
        Mix({"dpo": 0.25, "sft": 0.75}),
        Sequential({"sft": 0}),
    ]
    larger = [float(DPO.loss(theta)[run] > SFT.loss(theta)[run]) for run in (0, 1)]
    assert larger[0] != larger[1]
    expected = [[larger[0], 1 - larger[0]], [larger[1], 1 - larger[1]], [0.25, 0.75], [0.0, 0.0]]
    assert turn_weights(schedules, objectives, theta).tolist() == expected
