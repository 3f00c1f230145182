import pytest
import torch

from holdfast.control.policies import Critic, Normalizer, TwinQ


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_value_is_that_of_the_network_on_the_normalised_history():
    bounds = Normalizer.fit(5.0 + 3.0 * torch.randn(40, 4, generator=seeded(1)))
    critic = Critic(4, history=2, hidden=(16, 16), observations=bounds)
    observations = 5.0 + 3.0 * torch.randn(7, 2, 4, generator=seeded(2))
    values = critic(observations)
    assert values.shape == (7,)
    expected = critic.network(bounds.normalize(observations).clamp(-5, 5).view(7, 8))[:, 0]
    torch.testing.assert_close(values, expected)
    assert "observations.low" in critic.state_dict()


def test_twin_values_are_independent_and_depend_on_both_arguments():
    twin = TwinQ(4, 3, horizon=2, history=2, hidden=(16, 16))
    observations = torch.randn(7, 2, 4, generator=seeded(2))
    actions = torch.randn(7, 2, 3, generator=seeded(3))
    values = twin(observations, actions)
    assert values.shape == (2, 7)
    assert not torch.allclose(values[0], values[1])
    assert not torch.allclose(twin(observations + 1, actions), values)
    assert not torch.allclose(twin(observations, actions + 1), values)
    values[0].sum().backward()
    first, second = (list(network.parameters()) for network in twin.networks)
    assert all(p.grad.any() for p in first) and not any(p.grad.any() for p in second)


def test_the_gradient_by_an_action_is_in_the_units_of_the_environment():
    """Of a value of the normalised action ``a / 10``: a tenth of that by the normalised one."""
    wide = Normalizer(torch.tensor([-10.0]), torch.tensor([10.0]))
    raw, scaled = (TwinQ(1, 1, hidden=(16,), actions=n) for n in (None, wide))
    observations = torch.zeros(1, 1, 1)
    small, large = (torch.full((1, 1, 1), a, requires_grad=True) for a in (0.3, 3.0))
    raw(observations, small).sum().backward()
    scaled(observations, large).sum().backward()
    assert small.grad.item() != 0
    torch.testing.assert_close(large.grad, small.grad / 10)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    one, same, other = (Critic(4, hidden=(8,), seed=seed).network[0].weight for seed in (1, 1, 2))
    TwinQ(4, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="history is 0"):
        Critic(4, 0)
    with pytest.raises(ValueError, match=r"observations has shape \(7, 4\)"):
        Critic(4)(torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"actions has shape \(7, 2, 3\)"):
        TwinQ(4, 3)(torch.zeros(7, 1, 4), torch.zeros(7, 2, 3))
    with pytest.raises(ValueError, match="actions normalises 2 dimensions"):
        TwinQ(4, 3, actions=Normalizer.identity(2))
