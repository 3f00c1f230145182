import math

import pytest
import torch

from holdfast.control.policies.networks import MLP, NoiseNetwork, sinusoidal


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(seed: int = 0, **changes) -> MLP:
    options = {"hidden": (8, 6), "activation": "tanh", "last_gain": 0.5} | changes
    return MLP(3, 2, generator=seeded(seed), **options)


def test_it_is_the_composition_of_its_layers():
    network = mlp()
    first, _, second, _, last = network
    values = torch.randn(5, 3, generator=seeded(1))
    expected = last(torch.tanh(second(torch.tanh(first(values)))))
    torch.testing.assert_close(network(values), expected)


def test_weights_are_orthogonal_with_their_gain_and_biases_zero():
    first, _, second, _, last = mlp()
    for layer, gain in ((first, 5 / 3), (second, 5 / 3), (last, 0.5)):
        weight = layer.weight.detach()
        product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), atol=1e-5, rtol=0)
        assert not layer.bias.any()


def test_a_last_gain_of_zero_starts_as_zero_and_learns():
    network = mlp(last_gain=0.0)
    values = torch.randn(5, 3, generator=seeded(1))
    assert not network(values).any()
    network(values).sum().backward()
    assert network[-1].weight.grad.any()


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = mlp(1), mlp(1), mlp(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    again = mlp(1)
    assert torch.equal(one[0].weight, same[0].weight) and torch.equal(
        one[0].weight, again[0].weight
    )
    assert not torch.equal(one[0].weight, other[0].weight)


def test_the_embedding_is_what_the_formula_says():
    found = sinusoidal(torch.tensor([0, 7]), 4)
    angles = [7.0, 7.0 / 10_000]
    expected = [*map(math.sin, angles), *map(math.cos, angles)]
    assert found[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert found[1].tolist() == pytest.approx(expected)


def test_predicted_noise_depends_on_chunk_step_and_observation():
    network = NoiseNetwork(3, 6, (16,), activation="relu", time_size=8, generator=seeded())
    features, chunk = torch.randn(4, 3, generator=seeded(1)), torch.randn(4, 6, generator=seeded(2))
    steps = torch.tensor([0, 3, 9, 19])
    base = network(features, chunk, steps)
    assert base.shape == (4, 6)
    for other in (
        network(features + 1, chunk, steps),
        network(features, chunk + 1, steps),
        network(features, chunk, steps + 1),
    ):
        assert not torch.allclose(other, base, rtol=1e-3, atol=1e-6)


def test_bad_arguments_name_themselves():
    for hidden in ((), (8, 0)):
        with pytest.raises(ValueError, match="hidden is"):
            mlp(hidden=hidden)
    with pytest.raises(
        ValueError, match="activation is 'gelu': it must be one of mish, relu, tanh"
    ):
        mlp(activation="gelu")
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"time_size is {size}"):
            NoiseNetwork(3, 6, (8,), activation="relu", time_size=size, generator=seeded())
