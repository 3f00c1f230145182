import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from holdfast.bellman import Constant, Linear, Networks, SaddleProblem, Sgda, Transitions, mlp
from holdfast.bellman.problem import Batch
from holdfast.bellman.sgda import descend_ascend


def pair() -> Networks:
    return Networks(mlp(2, (5,), 3, seed=0), mlp(2, (5,), 3, seed=1))


def observed(seed: int, n: int = 12) -> Transitions:
    rng = np.random.default_rng(seed)
    state, ahead = rng.standard_normal((2, n, 2))
    return Transitions(state, rng.integers(3, size=n), rng.random(n), ahead)


def test_flat_parameters_give_what_the_network_gives():
    first, second = mlp(2, (5,), 3, seed=0), mlp(2, (5,), 3, seed=1)
    approximator = Networks(first, second)
    primal, dual = approximator.initial()
    data = Batch.stack([observed(0), observed(1)])
    q = approximator.q(primal.expand(2, -1), data.state)
    torch.testing.assert_close(q[1], first(data.state[1]))
    zeta = approximator.zeta(dual.expand(2, -1), data.state, data.action)
    torch.testing.assert_close(zeta[0, 3], second(data.state[0, 3])[data.action[0, 3]])


class Wrapped(nn.Module):
    """The same functions in a module of another kind."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows):
        return self.inner(rows)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.GELU()])
def test_chains_and_other_modules_give_what_torch_gives(activation, biased, replicas):
    draw = torch.Generator().manual_seed(0)
    chain = nn.Sequential(nn.Linear(2, 5, bias=biased), activation, nn.Linear(5, 3)).double()
    size = sum(each.numel() for each in chain.parameters())
    flat = torch.randn(replicas, size, generator=draw, dtype=torch.float64).requires_grad_()
    state = torch.randn(replicas, 7, 2, generator=draw, dtype=torch.float64)
    wanted = []
    for own, rows in zip(flat, state, strict=True):
        parameters, start = {}, 0
        for name, each in chain.named_parameters():
            parameters[name] = own[start : start + each.numel()].view(each.shape)
            start += each.numel()
        wanted.append(functional_call(chain, parameters, (rows,)))
    wanted = torch.stack(wanted)
    (slope,) = torch.autograd.grad(wanted.square().sum(), flat)
    for module in (chain, Wrapped(chain)):
        found = Networks(module, chain).q(flat, state)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), flat)[0], slope)


def test_linear_functions_are_products_with_their_features():
    features = np.random.default_rng(0).standard_normal((4, 3, 2))
    approximator = Linear(features)
    w = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, action = torch.tensor([[0, 3], [2, 2]]), torch.tensor([[1, 0], [2, 1]])
    q = approximator.q(w, state)
    np.testing.assert_allclose(q[1, 0], features[2] @ w[1].numpy())
    np.testing.assert_allclose(
        approximator.zeta(w, state, action)[0, 1], features[3, 0] @ w[0].numpy()
    )
    with pytest.raises(ValueError, match="features has shape"):
        Linear(np.zeros((4, 3)))


def test_a_step_of_networks_is_that_of_torch_optimisers():
    data = observed(0)
    first, second = mlp(2, (5,), 3, seed=0), mlp(2, (5,), 3, seed=1)
    problem = SaddleProblem(data, 0.9, Networks(first, second))
    settings = Sgda(steps=5, step=Constant(0.05), step_ratio=3.0, batch_size=None)
    found = descend_ascend(problem, Batch.stack([data]), settings)
    parameters = [
        {"params": first.parameters(), "lr": 0.05},
        {"params": second.parameters(), "lr": 0.15, "maximize": True},
    ]
    optimiser = torch.optim.SGD(parameters)
    state, ahead = torch.as_tensor(data.state), torch.as_tensor(data.next_state)
    action, reward = torch.as_tensor(data.action), torch.as_tensor(data.reward)
    for _ in range(5):
        optimiser.zero_grad()
        value = torch.logsumexp(first(ahead), -1)
        delta = reward + 0.9 * value - first(state).gather(1, action[:, None])[:, 0]
        lag = value - second(state).gather(1, action[:, None])[:, 0]
        (delta**2 - 0.81 * lag**2).mean().backward()
        optimiser.step()
    for flat, module in ((found.primal, first), (found.dual, second)):
        wanted = torch.cat([each.detach().flatten() for each in module.parameters()])
        torch.testing.assert_close(flat[0], wanted)


def test_networks_are_a_function_of_their_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = mlp(2, (5,), 3, seed=4), mlp(2, (5,), 3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) and bool(one.abs().sum() > 0)


def test_what_replicas_would_share_is_refused():
    net = mlp(2, (5,), 3, seed=0)
    with pytest.raises(ValueError, match="zeta has buffers"):
        Networks(net, nn.Sequential(nn.BatchNorm1d(2), net))


def test_float32_is_computed_in_float64():
    data = observed(0)
    rough = Transitions(
        data.state.astype(np.float32), data.action, data.reward, data.next_state.astype(np.float32)
    )
    fine = Transitions(
        rough.state.astype(float), data.action, data.reward, rough.next_state.astype(float)
    )
    settings = Sgda(steps=3, step=Constant(0.05), batch_size=4)
    ends = []
    for rows in (rough, fine):
        problem = SaddleProblem(rows, 0.9, pair())
        ends.append(descend_ascend(problem, Batch.stack([rows]), settings).primal)
    assert ends[0].dtype == torch.float64 and torch.equal(*ends)
    single = Networks(*(mlp(2, (5,), 3, seed=0).float() for _ in range(2)))
    found = descend_ascend(SaddleProblem(rough, 0.9, single), Batch.stack([rough]), settings)
    assert found.primal.dtype == torch.float64 and bool(torch.isfinite(found.primal).all())


def test_in_float32_runs_end_where_they_end_in_float64():
    data = observed(0)
    settings = Sgda(steps=20, step=Constant(0.05), batch_size=4, optimiser="adam")
    ends = []
    for dtype in (torch.float32, torch.float64):
        nets = Networks(mlp(2, (5,), 3, seed=0), mlp(2, (5,), 3, seed=1), dtype=dtype)
        found = descend_ascend(SaddleProblem(data, 0.9, nets), Batch.stack([data]), settings)
        assert found.primal.dtype == found.dual.dtype == dtype
        ends.append(found.primal)
    torch.testing.assert_close(ends[0], ends[1].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("column", ["state", "next_state"])
def test_linear_functions_have_no_states_before_the_first(column):
    """An index of -1 would silently be the last."""
    columns = {"state": [0, 1], "action": [0, 0], "reward": [0.0, 0.0], "next_state": [1, 0]}
    columns[column] = [0, -1]
    with pytest.raises(ValueError, match=f"^{column} is -1 in row 1"):
        SaddleProblem(Transitions(**columns), 0.9, Linear(np.eye(2)[:, None]))
