import pytest
import torch

from holdfast.language.losses import aggregate, average

VALUES = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    "aggregation, length, total, count",
    [
        ("token-mean", None, 9.0, 3),
        ("sequence-mean", None, 7.5, 2),
        ("sequence-sum", None, 9.0, 2),
        ("fixed-length", 4, 9.0, 12),
    ],
)
def test_worked_example(aggregation, length, total, count):
    """Three sequences with the tokens (1, 2), (6) and none; every 9 is ignored.

    The sum over tokens is 9, over the means of sequences 3/2 + 6 = 7.5. Three tokens count, two
    sequences have any, and three sequences stand for 4 tokens each: 12.
    """
    found = aggregate(VALUES, MASK, aggregation, length)
    assert [part.item() for part in found] == [total, count]


@pytest.mark.parametrize(
    "aggregation, length, mean",
    [
        ("token-mean", None, 2 / 3),
        ("sequence-mean", None, 3 / 4),
        ("sequence-sum", None, 3 / 4),
        ("fixed-length", 4, 3 / 6),
    ],
)
def test_an_average_stays_one_whatever_the_count_is(aggregation, length, mean):
    """Shares of correct tokens: 1/2 and 1 in the sequences, 2/3 over tokens.

    Only the fixed length counts the empty sequence, as a sequence without a correct token.
    """
    correct = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    _, count = aggregate(VALUES, MASK, aggregation, length)
    assert (average(correct, MASK, aggregation, length) / count).item() == pytest.approx(mean)


def test_what_is_ignored_may_be_anything():
    broken = VALUES.where(MASK, torch.nan).requires_grad_()
    total, _ = aggregate(broken, MASK, "sequence-mean")
    total.backward()
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert total.item() == 7.5
    assert torch.equal(broken.grad, expected)


def test_sums_in_single_precision():
    """300 ones: in bfloat16 a running sum of ones stops at 256."""
    total, _ = aggregate(torch.ones(1, 300, dtype=torch.bfloat16), torch.ones(1, 300).bool())
    assert total.dtype == torch.float32 and total.item() == 300


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match=r"values has shape \(3, 2\) and mask \(3, 3\)"):
        aggregate(VALUES[:, 1:], MASK)
    with pytest.raises(ValueError, match="mask has dtype torch.float32"):
        aggregate(VALUES, MASK.float())
    with pytest.raises(ValueError, match="aggregation is 'mean': it must be one of token-mean"):
        aggregate(VALUES, MASK, "mean")
    for length in (None, 0, -3, 2.5, True):
        with pytest.raises(ValueError, match="length is"):
            aggregate(VALUES, MASK, "fixed-length", length)
    with pytest.raises(ValueError, match="length is 5: only the aggregation fixed-length"):
        aggregate(VALUES, MASK, "token-mean", 5)
