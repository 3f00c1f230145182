import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from holdfast.control.losses.cloning import denoising, mse, nll


def draw(seed: int, batch: int = 5, horizon: int = 4, action: int = 3, dtype=torch.float64):
    """Predictions, targets, and a mask by which episodes end within some chunks."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, horizon, action)
    predicted, target = torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, horizon + 1, (batch, 1), generator=generator)
    return predicted, target, torch.arange(horizon) < lengths


def call(loss, predicted, target, mask):
    return loss(predicted.sum(-1), mask) if loss is nll else loss(predicted, target, mask)


def gradient(loss, predicted, target, mask, parts=(slice(None),)):
    """Of the total divided by the count, both summed over the parts of the batch."""
    leaf = predicted.detach().clone().requires_grad_()
    terms = [call(loss, leaf[part], target[part], mask[part]) for part in parts]
    total, count = sum(t.total for t in terms), sum(t.count for t in terms)
    (total / count).backward()
    return leaf.grad, (total / count).item()


LOSSES = [nll, mse, denoising]


def test_worked_example():
    """Two chunks of two positions and two dimensions; the second ends after its first position.

    Squared errors: (1 + 9) / 2 = 5, (0 + 4) / 2 = 2 and (16 + 0) / 2 = 8, 15 in sum over three
    positions. Log-probabilities -1, -2, -4: 7.
    """
    target = torch.zeros(2, 2, 2)
    predicted = torch.tensor([[[1.0, 3.0], [0.0, -2.0]], [[4.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    for loss in (mse, denoising):
        terms = loss(predicted, target, mask)
        assert (terms.total.item(), terms.count.item()) == (15.0, 3)
        assert terms.metrics[loss.__name__].item() == 15.0
    terms = nll(torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), mask)
    assert (terms.total.item(), terms.count.item()) == (7.0, 3)
    assert terms.metrics["nll"].item() == 7.0


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_squares_are_torchs_over_the_counted_positions(seed, dtype):
    predicted, target, mask = draw(seed, dtype=dtype)
    wide = predicted.double().requires_grad_()
    expected = F.mse_loss(wide[mask], target.double()[mask])
    expected.backward()
    for loss in (mse, denoising):
        found, value = gradient(loss, predicted, target, mask)
        assert value == pytest.approx(expected.item(), rel=1e-5)
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), wide.grad, rtol=rounding, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_likelihood_is_that_of_a_gaussian_where_it_counts(seed):
    predicted, target, mask = draw(seed)
    normal = torch.distributions.Normal(predicted, 0.3)
    terms = nll(normal.log_prob(target).sum(-1), mask)
    errors = (predicted - target)[mask] / 0.3
    constant = math.log(0.3) + 0.5 * math.log(2 * math.pi)
    expected = (0.5 * errors.square() + constant).sum()
    torch.testing.assert_close(terms.total, expected)
    assert terms.count.item() == mask.sum().item()


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 5))
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(loss, seed, cut):
    predicted, target, mask = draw(seed)
    whole, value = gradient(loss, predicted, target, mask)
    parts = [slice(start, start + cut) for start in range(0, 5, cut)]
    found, again = gradient(loss, predicted, target, mask, parts)
    torch.testing.assert_close(found, whole)
    assert again == pytest.approx(value)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", [0.0, 1e30, math.nan, math.inf])
def test_the_gradient_does_not_depend_on_padding(loss, padding):
    predicted, target, mask = draw(1)
    whole, value = gradient(loss, predicted, target, mask)
    fill = torch.full((5, 2, 3), padding, dtype=torch.float64)
    longer = [torch.cat([tensor, fill], dim=1) for tensor in (predicted, target)]
    longer_mask = F.pad(mask, (0, 2), value=False)
    found, again = gradient(loss, *longer, longer_mask)
    torch.testing.assert_close(found[:, :4], whole)
    assert again == pytest.approx(value) and not found[:, 4:].any()
    # Neither on what stands beyond the end within the chunk.
    broken = [tensor.masked_fill(~mask[..., None], padding) for tensor in (predicted, target)]
    torch.testing.assert_close(gradient(loss, *broken, mask)[0], whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counted_is_zero_over_zero_with_a_zero_gradient(loss):
    predicted, target, mask = draw(2)
    leaf = predicted.requires_grad_()
    terms = call(loss, leaf, target, torch.zeros_like(mask))
    terms.total.backward()
    assert terms.total.item() == 0 and terms.count.item() == 0
    assert not leaf.grad.any()


@pytest.mark.parametrize("loss", [mse, denoising])
def test_targets_are_constants_and_metrics_are_detached(loss):
    predicted, target, mask = draw(3)
    target.requires_grad_()
    terms = loss(predicted.requires_grad_(), target, mask)
    terms.total.backward()
    assert target.grad is None and predicted.grad.any()
    assert not any(metric.requires_grad for metric in terms.metrics.values())


def test_sums_in_single_precision():
    """300 ones: in bfloat16 a running sum of ones stops at 256."""
    ones, mask = torch.ones(1, 300, dtype=torch.bfloat16), torch.ones(1, 300).bool()
    for terms in (nll(-ones, mask), mse(ones[..., None], 0 * ones[..., None], mask)):
        assert terms.total.dtype == torch.float32 and terms.total.item() == 300


def test_bad_arguments_name_themselves():
    predicted, target, mask = draw(4)
    with pytest.raises(ValueError, match=r"log_probs has shape \(5, 3\)"):
        nll(predicted[:, 0], mask)
    with pytest.raises(ValueError, match=r"mask has shape \(5, 4\) and dtype torch.float32"):
        nll(predicted.sum(-1), mask.float())
    with pytest.raises(ValueError, match="log_probs has dtype torch.int64"):
        nll(mask.long(), mask)
    with pytest.raises(ValueError, match=r"predicted has shape \(5, 3, 3\)"):
        mse(predicted[:, 1:], target, mask)
    with pytest.raises(ValueError, match=r"target has shape \(5, 4\)"):
        mse(predicted, target[..., 0], mask)
    with pytest.raises(ValueError, match="noise has dtype torch.int64"):
        denoising(predicted, target.long(), mask)
    with pytest.raises(ValueError, match=r"predicted_noise has shape \(5, 4, 0\)"):
        denoising(predicted[..., :0], target[..., :0], mask)
