import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.language.head import Head, token_statistics
from holdfast.language.losses import nll, nll_from_statistics, sequence_logps

IGNORED = -100


def draw(seed: int, batch: int = 3, time: int = 5, vocab: int = 7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, vocab, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab, (batch, time), generator=generator)
    labels[torch.rand(batch, time, generator=generator) < 0.3] = IGNORED
    labels[:, 0] = 0  # every sequence counts
    return logits.requires_grad_(), labels


def test_worked_example():
    """Two sequences over three ids; p(label) is 1/4 and 1/2 in the first, 1/8 in the second.

    Each log-probability is that of logits (0, 0, ln 2) or (0, 0, ln 6): softmax (1, 1, 2) / 4 and
    (1, 1, 6) / 8. The losses of the tokens are ln 4, ln 2 and ln 8: 6 ln 2 in sum, and
    (2 + 1) / 2 ln 2 + 3 ln 2 = 4.5 ln 2 as a sum of means. Only the token with 1/2 is predicted.
    """
    first, second = [0.0, 0.0, math.log(2)], [0.0, 0.0, math.log(6)]
    logits = torch.tensor([[first, first], [second, first]])
    labels = torch.tensor([[0, 2], [1, IGNORED]])
    for aggregation, length, total, count, accuracy in (
        ("token-mean", None, 6 * math.log(2), 3, 1.0),
        ("sequence-mean", None, 4.5 * math.log(2), 2, 0.5),
        ("sequence-sum", None, 6 * math.log(2), 2, 0.5),
        ("fixed-length", 10, 6 * math.log(2), 20, 5.0),
    ):
        terms = nll(logits, labels, aggregation=aggregation, length=length)
        assert terms.total.item() == pytest.approx(total)
        assert terms.count.item() == count
        assert terms.metrics["mean_token_accuracy"].item() == pytest.approx(accuracy)
    entropy = 1.5 * math.log(2)  # of (1, 1, 2) / 4; of (1, 1, 6) / 8 it is
    other = math.log(8) - 6 / 8 * math.log(6)
    assert nll(logits, labels).metrics["entropy"].item() == pytest.approx(2 * entropy + other)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_token_mean_equals_cross_entropy(seed, dtype):
    logits, labels = draw(seed, dtype=dtype)
    wide = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten())
    expected.backward()
    terms = nll(logits, labels)
    (terms.total / terms.count).backward()
    assert terms.count.item() == (labels != IGNORED).sum().item()
    torch.testing.assert_close((terms.total / terms.count).double(), expected, rtol=1e-5, atol=1e-6)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=rounding, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0, 3, IGNORED]))
def test_the_ignored_label_is_a_choice(seed, ignored):
    logits, labels = draw(seed)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.clamp(min=0).flatten(), ignore_index=ignored, reduction="sum"
    )
    terms = nll(logits, labels.clamp(min=0), ignore_index=ignored)
    torch.testing.assert_close(terms.total, expected)
    assert terms.count.item() == (labels.clamp(min=0) != ignored).sum().item()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_means_of_sequences_equal_a_loop_over_sequences(seed):
    logits, labels = draw(seed)
    each = [
        torch.nn.functional.cross_entropy(row, ids) for row, ids in zip(logits, labels, strict=True)
    ]
    terms = nll(logits, labels, aggregation="sequence-mean")
    torch.testing.assert_close(terms.total / terms.count, torch.stack(each).mean())


def test_metrics_equal_a_loop_over_tokens():
    logits, labels = draw(1)
    flat = logits.detach().flatten(0, 1)
    kept = [(row, id) for row, id in zip(flat, labels.flatten(), strict=True)]
    kept = [(row.softmax(-1), id) for row, id in kept if id != IGNORED]
    correct = sum(int(row.argmax() == id) for row, id in kept)
    entropy = sum(float(-(row * row.log()).sum()) for row, _ in kept)
    metrics = nll(logits, labels).metrics
    assert metrics["mean_token_accuracy"].item() == correct
    assert metrics["entropy"].item() == pytest.approx(entropy)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_tiled_path_is_the_same_loss(statistics, aggregation):
    hidden, labels = draw(2, vocab=4)
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = nll(hidden @ weight.T, labels, aggregation=aggregation)
    scored = token_statistics(
        hidden, Head(weight), labels, statistics=statistics, tile_tokens=4, tile_vocab=3
    )
    terms = nll_from_statistics(scored, aggregation=aggregation)
    torch.testing.assert_close(terms.total, expected.total)
    torch.testing.assert_close(terms.count, expected.count)
    if statistics:
        torch.testing.assert_close(terms.metrics, expected.metrics)
    else:
        assert terms.metrics == {}


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum"])
def test_nothing_counted_is_zero_over_zero_with_a_zero_gradient(aggregation):
    logits, labels = draw(4)
    terms = nll(logits, torch.full_like(labels, IGNORED), aggregation=aggregation)
    terms.total.backward()
    assert terms.total.item() == 0 and terms.count.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_log_probabilities_of_sequences_are_sums_or_means_over_tokens():
    hidden, labels = draw(5, vocab=4)
    labels[0, 1:] = IGNORED
    labels = torch.cat([labels, torch.full((1, 5), IGNORED)])
    hidden = torch.cat([hidden, hidden[:1]])
    scored = token_statistics(hidden, Head(hidden.new_ones(7, 4).cumsum(0)), labels)
    counted = zip(scored.logps, labels != IGNORED, strict=True)
    sums = torch.stack([row[mask].sum() for row, mask in counted])
    lengths = (labels != IGNORED).sum(-1)
    torch.testing.assert_close(sequence_logps(scored), sums)
    torch.testing.assert_close(sequence_logps(scored, mean=True)[:3], (sums / lengths)[:3])
    assert sequence_logps(scored)[3] == 0 and sequence_logps(scored, mean=True)[3] == 0


def test_bad_arguments_name_themselves():
    logits, labels = draw(6)
    with pytest.raises(ValueError, match="logits has shape"):
        nll(logits[:, 1:], labels)
    with pytest.raises(ValueError, match="labels has ids"):
        nll(logits, labels + 7)
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        nll(logits, labels, aggregation="mean")
    with pytest.raises(ValueError, match="length is None"):
        nll(logits, labels, aggregation="fixed-length")


@pytest.mark.parametrize("weighting", ["dft", "chord"])
def test_a_weighting_is_a_constant_of_the_probability(weighting):
    logits, labels = draw(0)
    mask = labels != IGNORED
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[mask]
    weights = logps.detach().exp()
    if weighting == "chord":
        weights = weights * (1 - weights)
    terms = nll(logits, labels, weighting=weighting)
    expected = -(weights * logps).sum()
    torch.testing.assert_close(terms.total, expected)
    assert terms.count == mask.sum()
    (one,), (other,) = (torch.autograd.grad(x, logits) for x in (terms.total, expected))
    torch.testing.assert_close(one, other)
    plain = nll(logits, labels)
    torch.testing.assert_close(terms.metrics, plain.metrics)
    with pytest.raises(ValueError, match="weighting"):
        nll(logits, labels, weighting="none")
