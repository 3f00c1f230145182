import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.control.losses import ppo, with_cloning
from holdfast.joint import LossTerms


def of(values: Tensor) -> LossTerms:
    return LossTerms(values.sum(), torch.tensor(len(values)), {"mean": values.detach().sum()})


def test_the_mean_is_that_of_both():
    """Means 2 and 5, weight 0.1: 2.5."""
    reinforcement, cloning = of(torch.tensor([1.0, 2, 3])), of(torch.tensor([4.0, 5, 6]))
    terms = with_cloning(reinforcement, cloning, weight=0.1, of="teacher")
    assert terms.total.item() / terms.count.item() == pytest.approx(2.5)
    assert terms.count.item() == 3
    found = {name: value.tolist() for name, value in terms.metrics.items()}
    assert found == {"mean": 6, "cloning/teacher": [15, 3]}


@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.0, 10.0))
def test_the_gradient_does_not_depend_on_cutting(seed, size, weight):
    """Six rows of rollouts and as many demonstrations, cut together and apart."""
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(12, generator=generator, dtype=torch.float64).requires_grad_()
    gains = torch.randn(6, generator=generator, dtype=torch.float64)

    def step(start: int, end: int) -> LossTerms:
        rows, demonstrations = leaf[start:end], leaf[6 + start : 6 + end]
        reinforcement = ppo(rows, rows.detach(), gains[start:end])
        return with_cloning(reinforcement, of(-demonstrations), weight=weight, of="demonstrations")

    (whole,) = torch.autograd.grad(step(0, 6).total, leaf)
    parts = [step(start, min(start + size, 6)) for start in range(0, 6, size)]
    (found,) = torch.autograd.grad(sum(part.total for part in parts), leaf)
    torch.testing.assert_close(found, whole)
    expected = torch.cat([-gains, torch.full((6,), -weight, dtype=torch.float64)])
    torch.testing.assert_close(whole, expected)


def test_errors_name_what_is_wrong():
    one = of(torch.ones(1))
    for name, options in (
        ("weight", {"weight": -1.0}),
        ("weight", {"weight": math.nan}),
        ("of", {"of": "demos"}),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            with_cloning(one, one, **{"weight": 1.0, "of": "teacher", **options})
