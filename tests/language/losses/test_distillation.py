import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from holdfast.joint import LossTerms
from holdfast.language.losses import gkd, minillm_advantages


def draw(
    seed: int,
    shape: tuple[int, ...] = (2, 5),
    vocab: int = 7,
    *,
    counted: float = 0.7,
    size: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student (a leaf), of a teacher, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (size * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    return student.requires_grad_(), teacher, torch.rand(shape, generator=generator) < counted


def definition(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Of every token, from probabilities."""
    s, t = (Categorical(logits=x / temperature, validate_args=False) for x in (student, teacher))
    if beta in (0.0, 1.0):
        return kl_divergence(t, s) if beta == 0.0 else kl_divergence(s, t)
    m = Categorical((1 - beta) * s.probs + beta * t.probs, validate_args=False)
    return beta * kl_divergence(t, m) + (1 - beta) * kl_divergence(s, m)


def gradient(found: LossTerms, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(found.total, logits)
    return grad


layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from([(4,), (2, 3), (2, 1, 3), (0, 3)]),
        "vocab": st.integers(1, 9),
        "counted": st.sampled_from([0.0, 0.5, 1.1]),
        "size": st.sampled_from([0.1, 1.0, 4.0]),
    }
)
betas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
temperatures = st.sampled_from([1.0, 0.4, 3.0])


def test_a_worked_example():
    """Student (1/2, 1/2), teacher (3/4, 1/4).

    Forward KL(T || S): (3/4) ln (3/2) + (1/4) ln (1/2). Reverse: (1/2) ln (2/3) + (1/2) ln 2 =
    (1/2) ln (4/3). At beta 1/2 the middle is (5/8, 3/8): KL(T || M) = (3/4) ln (6/5) + (1/4) ln
    (2/3), KL(S || M) = (1/2) ln (4/5) + (1/2) ln (4/3), and the loss is the mean of the two.
    """
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    log = math.log
    to_middle = 0.75 * log(6 / 5) + 0.25 * log(2 / 3), 0.5 * log(4 / 5) + 0.5 * log(4 / 3)
    for beta, expected in (
        (0.0, 0.75 * log(3 / 2) + 0.25 * log(1 / 2)),
        (1.0, 0.5 * log(4 / 3)),
        (0.5, sum(to_middle) / 2),
    ):
        found = gkd(student, teacher, torch.ones(1, dtype=torch.bool), beta=beta)
        assert found.total.item() == pytest.approx(expected, abs=1e-7)
        assert found.count.item() == 1 and found.metrics == {}


@settings(max_examples=100, deadline=None)
@given(layouts, betas, temperatures)
def test_equals_the_definition_in_double_precision(layout, beta, temperature):
    student, teacher, mask = draw(**layout)
    found = gkd(student, teacher, mask, beta=beta, temperature=temperature)
    expected = (definition(student, teacher, beta, temperature) * mask).sum()
    torch.testing.assert_close(found.total, expected)
    assert found.count.item() == mask.sum().item()
    torch.testing.assert_close(
        gradient(found, student), torch.autograd.grad(expected, student)[0], rtol=1e-7, atol=1e-9
    )


@settings(max_examples=50, deadline=None)
@given(layouts, betas, temperatures, st.sampled_from([torch.float32, torch.bfloat16]))
def test_sums_in_single_precision_whatever_the_dtype(layout, beta, temperature, dtype):
    student, teacher, mask = draw(**layout, dtype=dtype)
    wide = student.detach().double().requires_grad_()
    expected = (definition(wide, teacher.double(), beta, temperature) * mask).sum()
    found = gkd(student, teacher, mask, beta=beta, temperature=temperature)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-4)
    grad = gradient(found, student)
    assert grad.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(expected, wide)[0], rtol=rounding, atol=3e-5
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_pass_finite_differences(beta):
    student, teacher, mask = draw(1, (2, 3), 5)
    assert torch.autograd.gradcheck(
        lambda z: gkd(z, teacher, mask, beta=beta, temperature=0.7).total, (student,)
    )


def test_no_gradient_flows_to_the_teacher():
    student, teacher, mask = draw(2)
    gkd(student, teacher.requires_grad_(), mask).total.backward()
    assert teacher.grad is None and student.grad is not None
    assert torch.equal(student.grad[~mask], torch.zeros_like(student.grad[~mask]))


@settings(max_examples=60, deadline=None)
@given(layouts, st.floats(0.001, 0.999))
def test_is_bounded_and_zero_only_for_equal_distributions(layout, beta):
    student, teacher, mask = draw(**{**layout, "vocab": layout["vocab"] + 1, "counted": 1.1})
    found = gkd(student, teacher, mask, beta=beta)
    # The entropy of which of the two a token came from.
    most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert 0 <= found.total <= most * found.count + 1e-12
    if mask.numel():
        assert found.total > 0
    same = gkd(student, student.detach() + 3.0, mask, beta=beta)
    torch.testing.assert_close(same.total, torch.zeros_like(same.total), rtol=0, atol=1e-12)


def test_at_one_half_is_at_most_log_two_and_symmetric():
    student, teacher, mask = draw(3, size=2.0, counted=1.1)
    found = gkd(student, teacher, mask, beta=0.5)
    torch.testing.assert_close(found.total, gkd(teacher, student, mask, beta=0.5).total)
    apart = torch.tensor([[100.0, -100.0]])
    reached = gkd(apart, -apart, torch.ones(1, dtype=torch.bool), beta=0.5).total
    assert reached.item() == pytest.approx(math.log(2))
    assert found.total < math.log(2) * found.count


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_tends_to_the_divergences_at_the_ends_after_division(end):
    student, teacher, mask = draw(4)
    limit = gkd(student, teacher, mask, beta=end)
    slope = gradient(limit, student)
    errors = []
    for small in (1e-3, 1e-5):
        beta = abs(end - small)
        found = gkd(student, teacher, mask, beta=beta)
        scaled = found.total / (beta * (1 - beta))
        change = (gradient(found, student) / (beta * (1 - beta)) - slope).abs().max()
        errors.append(max(abs(scaled - limit.total).item(), change.item()))
    assert errors[1] < errors[0] / 50 and errors[1] < 1e-3 * limit.total.item()
    # Without the division the limit is zero.
    assert gkd(student, teacher, mask, beta=abs(end - 1e-5)).total < 1e-3 * limit.total


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_equals_trl(beta, temperature):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher, mask = draw(5, (3, 6), 40, dtype=torch.float32)
    labels = torch.zeros(3, 6, dtype=torch.long).masked_fill(~mask, -100)
    expected = trl.GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=beta, temperature=temperature, reduction="sum"
    )
    found = gkd(student, teacher, mask, beta=beta, temperature=temperature)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(found, student),
        torch.autograd.grad(expected, student)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_bad_arguments_of_gkd_name_themselves():
    logits, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"beta is {beta}: it must lie in"):
            gkd(logits, logits, mask, beta=beta)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            gkd(logits, logits, mask, temperature=temperature)
    with pytest.raises(ValueError, match="mask has dtype"):
        gkd(logits, logits, mask.long())
    with pytest.raises(ValueError, match="has a vocabulary of 3, logits one of 4"):
        gkd(logits, logits[..., 1:], mask)
    with pytest.raises(ValueError, match="^logits has values that are not finite"):
        gkd(logits / 0, logits, mask)


# MiniLLM ------------------------------------------------------------------------------------------


def brute_force(teacher: Tensor, student: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    rows, time = mask.shape
    expected = torch.zeros(rows, time, dtype=torch.float64)
    for row in range(rows):
        for token in range(time):
            later = [
                (teacher[row, t] - student[row, t]).item()
                for t in range(token + 1, time)
                if mask[row, t]
            ]
            if mask[row, token] and later:
                expected[row, token] = sum(later) / (len(later) if normalize else 1)
    return expected


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 3),
    st.integers(0, 7),
    st.sampled_from([0.0, 0.5, 0.9, 1.1]),
    st.booleans(),
)
def test_minillm_equals_brute_force(seed, rows, time, counted, normalize):
    generator = torch.Generator().manual_seed(seed)
    teacher, student, coin = torch.rand(3, rows, time, generator=generator, dtype=torch.float64)
    mask = coin < counted
    expected = brute_force(-9 * teacher, -9 * student, mask, normalize)
    # Log-probabilities of what does not count may be anything.
    teacher, student = (
        (-9 * x).masked_fill(~mask, value)
        for x, value in ((teacher, math.nan), (student, -math.inf))
    )
    found = minillm_advantages(teacher, student, mask, length_normalization=normalize)
    torch.testing.assert_close(found, expected)


def test_minillm_normalises_by_default_and_is_detached():
    teacher = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    student = torch.tensor([[-4.0, -4.0, -4.0]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = minillm_advantages(teacher, student, mask)
    # Rewards 3, 2, 1.
    assert found.tolist() == [[1.5, 1.0, 0.0]] and not found.requires_grad
    summed = minillm_advantages(teacher, student, mask, length_normalization=False)
    assert summed.tolist() == [[3.0, 1.0, 0.0]]


def test_bad_arguments_of_minillm_name_themselves():
    logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for wrong in (
        (logps[0], logps, mask),
        (logps, logps[:, 1:], mask),
        (logps, logps, mask[:1]),
        (logps[0], logps[0], mask[0]),
    ):
        with pytest.raises(ValueError, match=r"must all be \(batch, time\)"):
            minillm_advantages(*wrong)
    with pytest.raises(ValueError, match="mask has dtype torch.int64, not bool"):
        minillm_advantages(logps, logps, mask.long())
