import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from holdfast.joint import LossTerms
from holdfast.language.losses import lco_kl, lco_log_cosh, lco_mse, optimal_logits

LOSSES = {"kl": lco_kl, "mse": lco_mse, "log cosh": lco_log_cosh}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def definition(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """Of every token, from probabilities and hyperbolic functions."""
    if name == "kl":
        policy, optimal = (Categorical(logits=x, validate_args=False) for x in (logits, target))
        return kl_divergence(optimal, policy)
    difference = logits - target
    value = difference**2 if name == "mse" else difference.cosh().log()
    return value.mean(-1)


def draw(
    seed: int,
    shape: tuple[int, ...] = (2, 5),
    vocab: int = 7,
    *,
    counted: float = 0.7,
    size: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy (a leaf), of the target, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    logits, target = (
        (size * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    return logits.requires_grad_(), target, torch.rand(shape, generator=generator) < counted


def gradient(found: LossTerms, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(found.total, logits)
    return grad


layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from([(4,), (2, 3), (2, 1, 3), (0, 3)]),
        "vocab": st.integers(1, 9),
        "counted": st.sampled_from([0.0, 0.5, 1.1]),
        "size": st.sampled_from([0.1, 1.0, 10.0]),
    }
)


def test_a_worked_example():
    """Two tokens, vocabulary of two; target logits 0, 0, policy logits ln 3, 0 and ln 3, ln 3.

    The policy is (3/4, 1/4) and (1/2, 1/2), the target (1/2, 1/2). KL: (1/2) ln (2/3) + (1/2) ln 2
    = (1/2) ln (4/3) and 0. Squared error: (ln 3)^2 / 2 and (ln 3)^2. cosh ln 3 = (3 + 1/3) / 2 =
    5/3: log cosh (1/2) ln (5/3) and ln (5/3).
    """
    logits = math.log(3) * torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = {
        "kl": math.log(4 / 3) / 2,
        "mse": 1.5 * math.log(3) ** 2,
        "log cosh": 1.5 * math.log(5 / 3),
    }
    for name, loss in LOSSES.items():
        found = loss(logits, torch.zeros(2, 2), torch.ones(2, dtype=torch.bool))
        assert found.total.item() == pytest.approx(expected[name])
        assert found.count.item() == 2
        assert found.metrics == {}


@EVERY_LOSS
@settings(max_examples=60, deadline=None)
@given(layout=layouts)
def test_equals_the_definition_in_double_precision(name, layout):
    logits, target, mask = draw(**layout)
    found = LOSSES[name](logits, target, mask)
    expected = (definition(name, logits, target) * mask).sum()
    torch.testing.assert_close(found.total, expected)
    assert found.count.item() == mask.sum().item()
    assert found.total.dtype == torch.float64
    torch.testing.assert_close(
        gradient(found, logits), torch.autograd.grad(expected, logits)[0], rtol=1e-7, atol=1e-10
    )


@EVERY_LOSS
@settings(max_examples=30, deadline=None)
@given(layout=layouts, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_sums_in_single_precision_whatever_the_dtype(name, layout, dtype):
    logits, target, mask = draw(**layout, dtype=dtype)
    wide = logits.detach().double().requires_grad_()
    expected = (definition(name, wide, target.double()) * mask).sum()
    found = LOSSES[name](logits, target, mask)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-4)
    grad = gradient(found, logits)
    assert grad.dtype == dtype
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(expected, wide)[0], rtol=rounding, atol=1e-5
    )


@EVERY_LOSS
def test_gradients_pass_finite_differences(name):
    logits, target, mask = draw(1, (2, 3), 5)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, target, mask).total, (logits,))


@EVERY_LOSS
def test_no_gradient_flows_to_the_target(name):
    logits, target, mask = draw(2)
    target.requires_grad_()
    LOSSES[name](logits, target, mask).total.backward()
    assert target.grad is None and logits.grad is not None
    assert torch.equal(logits.grad[~mask], torch.zeros_like(logits.grad[~mask]))


@EVERY_LOSS
def test_the_optimum_is_the_target(name):
    logits, _, mask = draw(3)
    found = LOSSES[name](logits, logits.detach(), mask)
    assert found.total.item() == pytest.approx(0, abs=1e-14)
    assert gradient(found, logits).abs().max() < 1e-15


@EVERY_LOSS
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 30.0]), part=st.floats(0, 1))
def test_is_convex_in_the_logits(name, seed, size, part):
    one, target, mask = draw(seed, size=size)
    other, _, _ = draw(seed + 1, size=size)

    def value(logits: Tensor) -> float:
        return LOSSES[name](logits, target, mask).total.item()

    between = value(part * one + (1 - part) * other)
    assert between <= part * value(one) + (1 - part) * value(other) + 1e-9 * (1 + size**2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(-50, 50))
def test_constants_move_the_squared_error_but_not_the_divergence(seed, up, target_up):
    logits, target, mask = draw(seed, counted=1.1)
    moved = logits + up, target + target_up, mask
    torch.testing.assert_close(lco_kl(*moved).total, lco_kl(logits, target, mask).total)
    shift = up - target_up
    change = (shift**2 + 2 * shift * (logits - target).mean(-1)).sum()
    torch.testing.assert_close(
        lco_mse(*moved).total, lco_mse(logits, target, mask).total + change, rtol=1e-6, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 100.0, 1e4]))
def test_derivatives_are_bounded(seed, size):
    logits, target, mask = draw(seed, size=size, counted=1.1)
    by_log_cosh = gradient(lco_log_cosh(logits, target, mask), logits)
    assert by_log_cosh.abs().max() <= 1 / 7 + 1e-15
    by_kl = gradient(lco_kl(logits, target, mask), logits)
    assert by_kl.norm(dim=-1).max() <= math.sqrt(2) + 1e-12
    torch.testing.assert_close(by_kl.sum(-1), torch.zeros(2, 5, dtype=torch.float64))


def test_bounds_of_the_derivatives_are_reached():
    mask = torch.ones(1, dtype=torch.bool)
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    by_kl = gradient(lco_kl(logits, -logits.detach(), mask), logits)
    assert by_kl.norm().item() == pytest.approx(math.sqrt(2))
    by_log_cosh = gradient(lco_log_cosh(logits, -logits.detach(), mask), logits)
    torch.testing.assert_close(by_log_cosh, torch.tensor([[0.5, -0.5]]))


@EVERY_LOSS
def test_large_differences_do_not_overflow(name):
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    found = LOSSES[name](logits, -logits.detach(), torch.ones(1, dtype=torch.bool))
    # KL: 2e4. Differences 2e4, -2e4 and 0: log cosh is 2e4 - ln 2 twice.
    expected = {"kl": 2e4, "mse": 2 / 3 * 4e8, "log cosh": 2 / 3 * (2e4 - math.log(2))}
    assert found.total.item() == pytest.approx(expected[name], rel=1e-6)
    assert gradient(found, logits).isfinite().all()


@EVERY_LOSS
def test_what_does_not_count_may_be_anything(name):
    logits, target, mask = draw(4)
    expected = LOSSES[name](logits, target, mask).total
    bad = mask.logical_not().unsqueeze(-1)
    broken = logits.detach().masked_fill(bad, math.nan).requires_grad_()
    found = LOSSES[name](broken, target.masked_fill(bad, math.inf), mask)
    torch.testing.assert_close(found.total, expected)
    assert gradient(found, broken).isfinite().all()


# The target ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 1.0, 7.0]))
def test_optimal_logits_are_the_best_policy(seed, beta):
    """No other policy has a higher expected advantage less beta times its KL from the behaviour.

    At the optimum the value is beta log E exp(A / beta).
    """
    advantages, behaviour, _ = draw(seed, (3,))
    advantages = advantages.detach()

    def value(logits: Tensor) -> Tensor:
        policy, old = logits.log_softmax(-1), behaviour.log_softmax(-1)
        return (policy.exp() * (advantages - beta * (policy - old))).sum(-1)

    best = optimal_logits(behaviour, advantages, beta=beta)
    highest = beta * (behaviour.log_softmax(-1) + advantages / beta).logsumexp(-1)
    torch.testing.assert_close(value(best), highest)
    others = draw(seed + 1, (50, 3), size=0.3)[0].detach()
    assert (value(best + others) <= highest + 1e-12).all()


def test_optimal_logits_are_detached_and_keep_the_behaviour():
    logits, advantages, _ = draw(5)
    found = optimal_logits(logits, advantages.requires_grad_(), beta=2.0)
    assert not found.requires_grad
    torch.testing.assert_close(found, (logits + advantages / 2).detach())
    assert torch.equal(optimal_logits(logits, torch.zeros_like(logits), beta=0.1), logits.detach())


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}: it must be positive and finite"):
        optimal_logits(torch.zeros(3, 4), torch.zeros(3, 4), beta=beta)


def test_bad_advantages_name_themselves():
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), not .* \(3, 4\)"):
        optimal_logits(torch.zeros(3, 4), torch.zeros(3), beta=1.0)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="advantages has values that are not finite"):
            optimal_logits(torch.zeros(3, 4), torch.full((3, 4), value), beta=1.0)


@EVERY_LOSS
def test_bad_arguments_name_themselves(name):
    loss, logits, mask = LOSSES[name], torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask has dtype torch.float32, not bool"):
        loss(logits, logits, mask.float())
    with pytest.raises(ValueError, match=r"logits has shape \(2, 4\), not \(2, 3, 'vocab'\)"):
        loss(logits[:, 0], logits, mask)
    with pytest.raises(
        ValueError, match=r"target_logits has shape \(2, 4\), not \(2, 3, 'vocab'\)"
    ):
        loss(logits, logits[:, 0], mask)
    with pytest.raises(ValueError, match="logits has shape"):
        loss(torch.zeros(()), torch.zeros(()), torch.ones((), dtype=torch.bool))
    with pytest.raises(ValueError, match="target_logits has a vocabulary of 3, logits one of 4"):
        loss(logits, logits[..., 1:], mask)
    for value in (math.nan, math.inf, -math.inf):
        broken = logits.index_fill(1, torch.tensor([1]), value)
        with pytest.raises(ValueError, match="^logits has values that are not finite"):
            loss(broken, logits, mask)
        with pytest.raises(ValueError, match="^target_logits has values that are not finite"):
            loss(logits, broken, mask)
