import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.control.losses import clip_range, dppo, normalize_advantages, ppo

seeds = st.integers(0, 2**31)
CHUNK, ACTION, STEPS = 4, 3, 5


def reference_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    index: Tensor,
    *,
    epsilon: float,
    base: float,
    rate: float,
    discount: float,
    steps: int,
) -> tuple[Tensor, float, float]:
    """DPPO's loss as its authors compute it, one row after the other.

    Log-probabilities of single numbers, held in [-5, 2], are averaged over the chunk. Advantages
    are normalised over the batch before they are weighed by the denoising step.
    """
    mean, deviation = advantages.mean().item(), advantages.std().item()
    total, clipped, divergence = torch.zeros((), dtype=torch.float64), 0, 0.0
    for row in range(len(new)):
        i = index[row].item()
        log_ratio = new[row].clamp(-5, 2).mean() - old[row].clamp(-5, 2).mean()
        ratio = log_ratio.exp()
        advantage = (advantages[row].item() - mean) / (deviation + 1e-8)
        advantage *= discount ** (steps - 1 - i)
        t = i / (steps - 1)
        epsilon_i = base + (epsilon - base) * (math.exp(rate * t) - 1) / (math.exp(rate) - 1)
        total = total + torch.maximum(
            -advantage * ratio, -advantage * ratio.clamp(1 - epsilon_i, 1 + epsilon_i)
        )
        clipped += abs(ratio.item() - 1) > epsilon_i
        divergence += (ratio - 1 - log_ratio).item()
    return total / len(new), clipped / len(new), divergence / len(new)


def rows(seed: int, count: int = 40):
    """Log-densities of single numbers ``(rows, chunk, action)``, advantages, indices."""
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    # Within what the reference code holds them to; see the parameter ``dimensions``.
    old = 1.9 - 6 * torch.rand(count, CHUNK, ACTION, **size)
    new = (old + 0.03 * torch.randn(old.shape, **size)).clamp(-4.9, 1.9)
    index = torch.randint(STEPS, (count,), generator=generator)
    return new, old, 3 * torch.randn(count, **size) + 1, index


@settings(max_examples=30)
@given(seeds, st.floats(0.5, 6.0), st.floats(0.5, 1.0))
def test_the_loss_is_that_of_the_reference_code(seed, rate, discount):
    new, old, advantages, index = rows(seed)
    leaf = new.requires_grad_()
    expected, clipped, divergence = reference_loss(
        leaf,
        old,
        advantages,
        index,
        epsilon=0.01,
        base=0.001,
        rate=rate,
        discount=discount,
        steps=STEPS,
    )
    terms = dppo(
        leaf.sum((-2, -1)),
        old.sum((-2, -1)),
        normalize_advantages(advantages),
        index,
        epsilon=0.01,
        epsilon_base=0.001,
        rate=rate,
        denoising_discount=discount,
        fine_tuned_steps=STEPS,
        dimensions=CHUNK * ACTION,
    )
    torch.testing.assert_close(terms.total / terms.count, expected)
    torch.testing.assert_close(
        torch.autograd.grad(terms.total / terms.count, leaf, retain_graph=True)[0],
        torch.autograd.grad(expected, leaf)[0],
    )
    assert terms.metrics["clip_fraction"].item() / len(new) == pytest.approx(clipped)
    assert terms.metrics["approx_kl"].item() / len(new) == pytest.approx(divergence)
    assert 0 < clipped < 1


@given(seeds)
def test_a_whole_chain_is_its_rows(seed):
    """``(batch, K')`` with one advantage an action, and the same as rows in another order."""
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    old = torch.randn(6, STEPS, **size)
    new, advantages = old + 0.05 * torch.randn(6, STEPS, **size), torch.randn(6, **size)
    options = {"epsilon": 0.1, "epsilon_base": 0.01, "fine_tuned_steps": STEPS}
    index = torch.arange(STEPS)
    chains = dppo(new, old, advantages, index, **options)
    order = torch.randperm(6 * STEPS, generator=generator)

    def flat(values: Tensor) -> Tensor:
        return values.expand(6, STEPS).flatten()[order]

    found = dppo(flat(new), flat(old), flat(advantages[:, None]), flat(index), **options)
    torch.testing.assert_close(found.total, chains.total)
    torch.testing.assert_close(found.metrics, chains.metrics)
    assert found.count == chains.count == 6 * STEPS


@given(seeds, st.integers(1, 7))
def test_before_the_first_update_a_step_has_its_discounted_policy_gradient(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    leaf = torch.randn(3, steps, **size).requires_grad_()
    advantages = torch.randn(3, **size)
    terms = dppo(
        leaf,
        leaf.detach(),
        advantages,
        torch.arange(steps),
        denoising_discount=0.5,
        fine_tuned_steps=steps,
    )
    (slope,) = torch.autograd.grad(terms.total, leaf)
    weights = torch.tensor([0.5 ** (steps - 1 - i) for i in range(steps)], dtype=torch.float64)
    assert torch.equal(slope, -advantages[:, None] * weights)
    assert terms.metrics["ratio"] == terms.count and terms.metrics["approx_kl"] == 0


@given(seeds)
def test_one_fine_tuned_step_is_proximal_policy_optimisation(seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(8, generator=generator)
    new, advantages = old + 0.3 * torch.randn(8, generator=generator), old.sin()
    found = dppo(
        new,
        old,
        advantages,
        torch.zeros(8, dtype=torch.long),
        epsilon=0.2,
        epsilon_base=0.01,
        denoising_discount=0.3,
        fine_tuned_steps=1,
    )
    expected = ppo(new, old, advantages, epsilon=0.2)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.metrics, expected.metrics)


@given(st.integers(2, 20), st.floats(1e-3, 1e3), st.floats(1e-4, 0.01), st.floats(0.01, 0.3))
def test_the_range_widens_from_its_base(steps, rate, base, epsilon):
    found = clip_range(
        torch.arange(steps), epsilon=epsilon, epsilon_base=base, rate=rate, fine_tuned_steps=steps
    )
    assert found[0].item() == pytest.approx(base)
    assert found[-1].item() == pytest.approx(epsilon)
    assert (found.diff() >= -1e-15).all()


def test_range_worked_example():
    """Five steps and a rate of 4 log 2: exp(rate t) is 1, 2, 4, 8, 16; shares 0, 1, 3, 7, 15."""
    found = clip_range(
        torch.tensor([4, 0, 1, 2, 3]),
        epsilon=0.16,
        epsilon_base=0.01,
        rate=4 * math.log(2),
        fine_tuned_steps=5,
    )
    torch.testing.assert_close(
        found, torch.tensor([0.16, 0.01, 0.02, 0.04, 0.08], dtype=torch.float64)
    )


def test_a_row_that_does_not_count_may_hold_anything():
    mask = torch.tensor([True, False])
    nan = torch.tensor([0.1, math.nan], requires_grad=True)
    terms = dppo(nan, nan.detach(), nan.detach(), torch.tensor([2, -7]), mask, fine_tuned_steps=3)
    assert terms.count == 1 and terms.total.isfinite()
    assert torch.autograd.grad(terms.total, nan)[0][1] == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"denoising_index": torch.tensor([0, 3])}, "denoising_index"),
        ({"denoising_index": torch.tensor([-1, 0])}, "denoising_index"),
        ({"denoising_index": torch.tensor([0.0, 1.0])}, "denoising_index"),
        ({"denoising_index": torch.tensor([0, 1, 2])}, "denoising_index"),
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"advantages": torch.tensor([math.inf, 0.0])}, "advantages"),
        ({"fine_tuned_steps": 0}, "fine_tuned_steps"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon_base": -0.1}, "epsilon_base"),
        ({"rate": 0.0}, "rate"),
        ({"denoising_discount": 1.1}, "denoising_discount"),
        ({"dimensions": 0}, "dimensions"),
        ({"mask": torch.ones(1).bool()}, "mask"),
    ],
)
def test_errors_name_what_is_wrong(change, name):
    known = {key: torch.zeros(2) for key in ("log_probs", "old_log_probs", "advantages")}
    index = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=f"^{name} "):
        dppo(**{**known, "denoising_index": index, "fine_tuned_steps": 3, **change})
