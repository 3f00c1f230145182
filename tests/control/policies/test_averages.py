import pytest
import torch
from torch import nn

from holdfast.control.policies import ExponentialAverage


def network(value: float) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, 2, 1)
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, -value)
    return layer


def test_it_is_the_weighted_sum_of_what_it_saw():
    """With ``d_n = min(decay, n / (n + 10))`` the n-th value weighs ``(1 - d_n) prod d_m``."""
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0] * 4
    average = ExponentialAverage(network(1000.0), 0.7)
    for value in values:
        average.update(network(value))
    decays = [min(0.7, n / (n + 10)) for n in range(len(values))]
    expected, weight = 0.0, 1.0
    for value, decay in zip(reversed(values), reversed(decays), strict=True):
        expected += weight * (1 - decay) * value
        weight *= decay
    assert weight == 0.0  # nothing is left of the initial 1000
    assert average.network.weight[0].tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert average.network.bias.item() == pytest.approx(-expected, rel=1e-5)


def test_the_state_continues_where_it_was():
    straight, broken = ExponentialAverage(network(0.0), 0.9), ExponentialAverage(network(0.0), 0.9)
    for value in range(15):
        straight.update(network(value))
        broken.update(network(value))
    resumed = ExponentialAverage(network(7.0), 0.9)
    resumed.load_state_dict(broken.state_dict())
    for value in range(15, 20):
        straight.update(network(value))
        resumed.update(network(value))
    assert torch.equal(straight.network.weight, resumed.network.weight)
    assert int(resumed.updates) == 20


def test_nothing_of_it_is_trained_and_the_network_is_not_touched():
    source = network(2.0)
    average = ExponentialAverage(source, 0.5)
    average.update(source)
    # Buffers, since checkpoints leave frozen parameters out.
    assert not list(average.parameters())
    assert average.network.state_dict().keys() == source.state_dict().keys()
    assert source.weight.requires_grad and (source.weight == 2.0).all()
    assert average.network.weight.data_ptr() != source.weight.data_ptr()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay is"):
        ExponentialAverage(network(0.0), decay)
