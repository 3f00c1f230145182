import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.language.losses import (
    cispo,
    dro,
    gspo,
    kl_k3,
    pmd,
    ppo_clip,
    reinforce,
    value_loss,
)
from holdfast.language.losses.policy_gradient import dynamic_bounds, off_policy_sequences

NAN = math.nan
seeds = st.integers(0, 2**31)


def without_old(logps, old_logps, advantages, mask, **options):
    return reinforce(logps, advantages, mask, **options)


def of_values(values, old_values, returns, mask):
    if returns.shape == mask.shape[:1] != mask.shape:
        returns = returns[:, None].expand_as(mask)
    return value_loss(values, returns, old_values, mask)


# Of the same four tensors. A ratio near 1 is clipped now and then with these ranges.
LOSSES = {
    "reinforce": without_old,
    "reinforce, sequence-sum": partial(without_old, aggregation="sequence-sum"),
    "ppo_clip": ppo_clip,
    "ppo_clip, asymmetric": partial(ppo_clip, epsilon=0.3, epsilon_high=0.1, delta=1.5),
    "ppo_clip, sequence-mean": partial(ppo_clip, aggregation="sequence-mean"),
    "ppo_clip, fixed-length": partial(ppo_clip, aggregation="fixed-length", length=9),
    "ppo_clip, dynamic": partial(ppo_clip, epsilon=0.16, epsilon_high=0.2, dynamic=True),
    "ppo_clip, log-ratios": partial(ppo_clip, epsilon=2.0, log_ratio_limit=0.4),
    "gspo": partial(gspo, epsilon=0.1, epsilon_high=0.15),
    "gspo, token-mean": partial(gspo, epsilon=0.1, epsilon_high=0.15, aggregation="token-mean"),
    "cispo": partial(cispo, epsilon_high=1.3),
    "cispo, both sides": partial(cispo, epsilon_low=0.8, epsilon_high=1.28),
    "pmd": partial(pmd, tau=0.3),
    "dro": partial(dro, beta=0.3),
    "dro, sequence-mean": partial(dro, beta=0.3, aggregation="sequence-mean"),
    "value_loss": of_values,
}

RATIOS = {"ppo_clip", "gspo", "cispo", "pmd", "dro"}


def draw(
    seed: int, batch: int = 4, time: int = 6, *, per_token: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, those of the behaviour policy, advantages, and the counted tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = {"generator": generator, "dtype": torch.float64}
    old = -3 * torch.rand(batch, time, **size)
    logps = old + 0.5 * torch.randn(batch, time, **size)
    advantages = torch.randn((batch, time) if per_token else (batch,), **size)
    return logps, old, advantages, torch.rand(batch, time, **size) < 0.7


def gradient(loss, logps: Tensor, *others: Tensor) -> Tensor:
    leaf = logps.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, *others).total, leaf)
    return found


# Closed forms -------------------------------------------------------------------------------------


def ratios(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_clipping_worked_example():
    """Ratios 1/2, 1 and 2, all with advantage 1, then all with -2; epsilon 0.2.

    Advantage 1: min(1/2, 4/5) + 1 + min(2, 6/5) = 2.7, the last is clipped. Advantage -2: the
    ratios that count are 4/5, 1 and 2, so 2 (4/5 + 1 + 2) = 7.6, and the first is clipped. A delta
    of 3/2 makes the last 3/2: 6.6.
    """
    logps = ratios([0.5, 1, 2], [0.5, 1, 2])
    known = (torch.zeros_like(logps), torch.tensor([1.0, -2.0]), torch.ones(2, 3).bool())
    terms = ppo_clip(logps, *known)
    assert terms.total.item() == pytest.approx(7.6 - 2.7)
    assert terms.count.item() == 6
    assert ppo_clip(logps, *known, delta=1.5).total.item() == pytest.approx(6.6 - 2.7)
    higher = ppo_clip(logps, *known, epsilon_high=0.5)
    assert higher.total.item() == pytest.approx(7.6 - 3)
    found = {name: value.tolist() for name, value in terms.metrics.items()}
    kl = 2 * (0.5 - math.log(0.5) - 1) + 2 * (2 - math.log(2) - 1)
    assert found == {
        "clip_ratio/low_mean": [1, 6],
        "clip_ratio/high_mean": [1, 6],
        "clip_ratio/region_mean": [2, 6],
        "ratio": [7, 6],
        "approx_kl": pytest.approx([kl, 6]),
        "negative_share": [6, 9],
    }
    slope = gradient(ppo_clip, logps, *known)
    expected = torch.tensor([[-0.5, -1, 0], [0, 2, 4]], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)
    slope = gradient(partial(ppo_clip, delta=1.5), logps, *known)
    torch.testing.assert_close(slope, expected * torch.tensor([[1, 1, 1], [1, 1, 0]]))


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1.25, 4.0))
def test_a_delta_is_a_dual_clip(seed, delta):
    """A > 0: min(r A, clip(r) A). A < 0: max of that and delta A."""
    logps, old, advantages, mask = draw(seed, per_token=True)
    ratio = (logps - old).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    dual = torch.where(advantages < 0, torch.maximum(clipped, delta * advantages), clipped)
    terms = ppo_clip(logps, old, advantages, mask, delta=delta)
    torch.testing.assert_close(terms.total, -dual[mask].sum())
    bounded = ((ratio > delta) & (advantages < 0) & mask).sum()
    assert terms.metrics["clip_ratio/delta"].tolist() == [bounded, mask.sum()]


def test_dynamic_bounds_are_wider_the_less_probable_a_token_was():
    probabilities = torch.tensor([0.9, 0.01, 1e-12], dtype=torch.float64)
    low, high = dynamic_bounds(probabilities.log(), 0.16, 0.2)
    expected = [[0.769, 0.5, 0.5], [1.187, 5.0, 10.0]]
    torch.testing.assert_close(
        torch.stack([low, high]), torch.tensor(expected).double(), rtol=1e-3, atol=0
    )
    # Where they are not at their limits, |(r - 1) r q| is epsilon.
    assert abs((low[0] - 1) * low[0] * 0.9).item() == pytest.approx(0.16)
    assert ((high[:2] - 1) * high[:2] * probabilities[:2]).tolist() == pytest.approx([0.2, 0.2])


def test_log_ratios_beyond_a_limit_have_no_gradient_whatever_the_advantage():
    logps = ratios([8.0, 8.0, 0.1])
    known = (torch.zeros_like(logps), torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 3).bool())
    free = gradient(partial(ppo_clip, epsilon=0.2), logps, *known)
    held = partial(ppo_clip, epsilon=0.2, log_ratio_limit=math.log(4))
    torch.testing.assert_close(free, torch.tensor([[0.0, 8.0, -0.1]]).double())
    assert not gradient(held, logps, *known).any()
    assert held(logps, *known).metrics["clip_ratio/log_ratio"].tolist() == [3, 3]


def test_only_sequences_of_negative_advantage_can_be_left_behind():
    """Mean log-ratios to the behaviour policy of -1/2, and -1/2 with one more token, and 0."""
    logps = torch.tensor([[-2.0, -1.0], [-2.0, -1.0], [-1.0, -1.0]])
    old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]])
    mask = torch.ones(3, 2).bool()
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    found = off_policy_sequences(logps, old, advantages, mask, threshold=0.4)
    assert found.tolist() == [[True, True], [False, False], [False, False]]
    assert not off_policy_sequences(logps, old, advantages, mask, threshold=0.6).any()
    mask[0, 0] = False  # what drifted does not count
    assert not off_policy_sequences(logps, old, advantages, mask, threshold=0.4).any()


def test_sequence_ratio_worked_example():
    """Ratios (4, 1) and (1/8, 1, 1): geometric means 2 and 1/2, advantages 1 and -1."""
    logps = ratios([4, 1, 9], [0.125, 1, 1])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    known = (torch.zeros_like(logps), torch.tensor([1.0, -1.0]), mask)
    terms = gspo(logps, *known)
    assert terms.total.item() == pytest.approx(-(1 + 4e-4) + (1 - 3e-4))
    assert terms.count.item() == 2
    assert terms.metrics["ratio"].tolist() == pytest.approx([2.5, 2])
    assert terms.metrics["clip_ratio/low_mean"].tolist() == [1, 2]
    assert terms.metrics["clip_ratio/high_mean"].tolist() == [1, 2]
    assert terms.metrics["clip_ratio/region_mean"].tolist() == [2, 2]
    assert terms.metrics["negative_share"].tolist() == [3, 5]
    assert gspo(logps, *known, epsilon=0.6, epsilon_high=2.0).total.item() == pytest.approx(-1.5)


def test_clipped_weight_worked_example():
    """Ratios 1/2 and 8 of log-probabilities log(1/4) and log(1/2), advantages 1 and -3.

    Every token keeps its gradient -w A, with w = 1/2 and 5, or 0.8 and 1.28 in between bounds.
    """
    logps, old = ratios([0.25, 0.5]), ratios([0.5, 0.0625])
    known = (old, torch.tensor([[1.0, -3.0]]), torch.ones(1, 2).bool())
    terms = cispo(logps, *known)
    assert terms.total.item() == pytest.approx(0.5 * math.log(4) - 15 * math.log(2))
    torch.testing.assert_close(
        gradient(cispo, logps, *known), torch.tensor([[-0.5, 15.0]], dtype=torch.float64)
    )
    between = partial(cispo, epsilon_low=0.8, epsilon_high=1.28)
    torch.testing.assert_close(
        gradient(between, logps, *known), torch.tensor([[-0.8, 3.84]], dtype=torch.float64)
    )
    assert terms.metrics["cispo_clip_ratio"].tolist() == [0, 2]  # as TRL: positive advantages only
    positive = (old, torch.tensor([2.0]), torch.ones(1, 2).bool())
    assert cispo(logps, *positive).metrics["cispo_clip_ratio"].tolist() == [1, 2]


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.01, 5.0), st.booleans())
def test_mirror_descent_is_the_squared_distance_from_its_optimum(seed, tau, per_token):
    logps, old, advantages, mask = draw(seed, per_token=per_token)
    leaf = logps.requires_grad_()
    terms = pmd(leaf, old, advantages, mask, tau=tau)
    log_ratio = ((leaf - old) * mask).sum(-1)
    gains = (advantages * mask).sum(-1) if per_token else advantages
    lengths = mask.sum(-1)
    there = lengths > 0
    losses = 0.5 * tau * (gains / tau - log_ratio).square() / lengths.clamp(min=1)
    torch.testing.assert_close(terms.total, losses[there].sum())
    assert terms.count.item() == there.sum().item()
    expected = -(gains - tau * log_ratio)[:, None] * mask / lengths.clamp(min=1)[:, None]
    torch.testing.assert_close(torch.autograd.grad(terms.total, leaf)[0], expected.detach())


def test_mirror_descent_has_a_gradient_for_the_smallest_strength():
    """Its limit is the policy gradient of a sequence over its length."""
    logps, old, advantages, mask = draw(1)
    mask[:, 0] = True
    found = gradient(partial(pmd, tau=1e-30), logps, old, advantages, mask)
    torch.testing.assert_close(found, -advantages[:, None] * mask / mask.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "loss, rest", [(partial(pmd, tau=0.4), 0.1), (partial(dro, beta=0.4), 0.5)]
)
def test_relatives_of_logits_convexity_rest_at_the_tilted_policy(loss, rest):
    """Five tokens with advantage 1/5: log r = A / strength = 1/2, of all together or of each."""
    old = ratios([0.3, 0.2, 0.1, 0.4, 0.5])
    known = (old, torch.tensor([0.2], dtype=torch.float64), torch.ones(1, 5).bool())
    torch.testing.assert_close(gradient(loss, old + rest, *known), torch.zeros_like(old))
    assert gradient(loss, old + rest - 0.01, *known).max() < 0
    assert gradient(loss, old + rest + 0.01, *known).min() > 0


def test_value_worked_example():
    """Values 1, 1, 1, 1 that were 0, 1, 2, 0, returns 1/2, 3, 1, 2, range 1/2.

    Held near where they were: 1/2, 1, 3/2, 1/2. Larger squares: 1/4, 4, 1/4, 9/4, of which the last
    two are from clipping. Half their sum is 27/8. There no gradient flows.
    """
    values, old, returns = (
        torch.tensor([row]) for row in ([1.0, 1, 1, 1], [0.0, 1, 2, 0], [0.5, 3, 1, 2])
    )
    mask = torch.ones(1, 4).bool()
    terms = value_loss(values, returns, old, mask, cliprange_value=0.5)
    assert [terms.total.item(), terms.count.item()] == [27 / 8, 4]
    assert terms.metrics["val/clipfrac_avg"].item() == 2
    loss = partial(value_loss, cliprange_value=0.5)
    assert gradient(loss, values, returns, old, mask).tolist() == [[0.5, -2.0, 0.0, 0.0]]


def test_estimates_of_divergence_are_unbiased_and_never_negative():
    """Averaged over the vocabulary with the policy's own probabilities, they are the divergence."""
    generator = torch.Generator().manual_seed(0)
    size = {"generator": generator, "dtype": torch.float64}
    logps = (3 * torch.randn(5, 11, **size)).log_softmax(-1)
    reference = (3 * torch.randn(5, 11, **size)).log_softmax(-1)
    estimates = kl_k3(logps, reference)
    assert estimates.min() >= 0
    exact = (logps.exp() * (logps - reference)).sum(-1)
    torch.testing.assert_close((logps.exp() * estimates).sum(-1), exact)
    assert torch.autograd.gradcheck(
        kl_k3, (logps[:, :4].requires_grad_(), reference[:, :4].requires_grad_())
    )


@pytest.mark.parametrize("name", [n for n in LOSSES if n.split(",")[0] in RATIOS])
def test_the_observed_divergence_is_from_the_behaviour_policy(name):
    """Where the behaviour policy drew every token of a vocabulary as often as it should."""
    generator = torch.Generator().manual_seed(0)
    old, logps = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    counts = [10, 4, 3, 2, 1]
    old[0] = torch.tensor(counts, dtype=torch.float64).div(20).log()
    drawn = torch.arange(5).repeat_interleave(torch.tensor(counts))
    known = (logps[:, drawn], old[:, drawn], torch.ones(1), torch.ones(1, 20).bool())
    total, count = LOSSES[name](*known).metrics["approx_kl"].tolist()
    exact = (old.exp() * (old - logps)).sum().item()
    assert total / count == pytest.approx(exact) and exact > 0.05


def test_small_divergences_are_not_lost_to_rounding():
    difference = torch.tensor([1e-5, -1e-5, 1e-3])
    found = kl_k3(torch.zeros(3), difference)
    torch.testing.assert_close(found, difference.square() / 2, rtol=1e-3, atol=0)


# Between losses -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans(), st.sampled_from(["token-mean", "sequence-mean", "sequence-sum"]))
def test_all_are_reinforce_before_the_first_update(seed, per_token, aggregation):
    logps, _, advantages, mask = draw(seed, per_token=per_token)
    expected = gradient(partial(reinforce, aggregation=aggregation), logps, advantages, mask)
    for loss in (ppo_clip, gspo, cispo, partial(dro, beta=0.7)):
        found = gradient(partial(loss, aggregation=aggregation), logps, logps, advantages, mask)
        torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_sequence_of_one_token_has_its_ratio(seed):
    logps, old, advantages, _ = draw(seed, time=1)
    known = (old, advantages, torch.ones(4, 1).bool())
    bounds = {"epsilon": 0.2, "epsilon_high": 0.28}
    tokens, sequences = (loss(logps, *known, **bounds) for loss in (ppo_clip, gspo))
    torch.testing.assert_close(sequences.total, tokens.total)
    torch.testing.assert_close(sequences.metrics, tokens.metrics)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_a_sequence_ratio_gives_every_token_its_own_advantage(seed, per_token):
    """-s A_t grad log pi_t / |y|, or nothing where the clipped term is the smaller."""
    logps, old, advantages, mask = draw(seed, per_token=per_token)
    bounds = {"epsilon": 0.1, "epsilon_high": 0.15}
    found = gradient(partial(gspo, **bounds), logps, old, advantages, mask)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (((logps - old) * mask).sum(-1, keepdim=True) / lengths).exp()
    gains = advantages if per_token else advantages[:, None]
    free = ~((ratio > 1.15) & (gains > 0) | (ratio < 0.9) & (gains < 0))
    torch.testing.assert_close(found, -ratio * gains * free * mask / lengths)


# Gradients ----------------------------------------------------------------------------------------

# The value of the others is not what their gradient is of: weights in it are constants.
EXACT = [name for name in LOSSES if not name.startswith("cispo")]


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_finite_differences(name):
    for seed in range(3):
        logps, *others = draw(seed)
        assert torch.autograd.gradcheck(
            lambda leaf, others=others: LOSSES[name](leaf, *others).total, logps.requires_grad_()
        )


@pytest.mark.parametrize("name", LOSSES)
def test_constants_have_no_gradient_and_metrics_no_graph(name):
    logps, old, advantages, mask = draw(1, per_token=True)
    leaves = [part.requires_grad_() for part in (logps, old, advantages)]
    terms = LOSSES[name](*leaves, mask)
    terms.total.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None and leaves[2].grad is None
    assert terms.metrics and not any(value.requires_grad for value in terms.metrics.values())


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seeds, st.booleans(), st.integers(0, 3), st.integers(1, 4))
def test_padding_and_cutting_change_nothing(name, seed, per_token, padding, size):
    """Whatever lies at positions that do not count, however the batch is cut."""
    loss = LOSSES[name]
    logps, old, advantages, mask = draw(seed, per_token=per_token)
    mask[1] = False

    def pad(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (padding, 1), value=NAN)

    def rough(values: Tensor) -> Tensor:
        return pad(values.where(mask, NAN)) if values.ndim == 2 else values

    whole = loss(leaf := logps.clone().requires_grad_(), old, advantages, mask)
    (slope,) = torch.autograd.grad(whole.total, leaf)
    wide = torch.nn.functional.pad(mask, (padding, 1))
    padded = [rough(part) for part in (logps, old, advantages)]
    leaf = padded[0].requires_grad_()
    parts = [
        loss(leaf[rows], padded[1][rows], padded[2][rows], wide[rows])
        for rows in (slice(start, start + size) for start in range(0, 4, size))
    ]
    (found,) = torch.autograd.grad(sum(part.total for part in parts), leaf)
    torch.testing.assert_close(found[:, padding:-1], slope)
    assert (found[~wide] == 0).all()
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.count for part in parts) == whole.count
    for key, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[key] for part in parts), value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_counted_token_is_nothing(name):
    logps, old, advantages, mask = draw(1)
    leaf = logps.requires_grad_()
    terms = LOSSES[name](leaf, old, advantages, torch.zeros_like(mask))
    terms.total.backward()
    assert terms.total.item() == 0
    assert terms.count.item() == (4 * 9 if "fixed" in name else 0)
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_single(name):
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(20, 300, generator=generator).bfloat16()
    logps = old + 0.1 * torch.randn(20, 300, generator=generator).bfloat16()
    advantages = torch.randn(20, generator=generator)
    mask = torch.rand(20, 300, generator=generator) < 0.9
    terms = LOSSES[name](logps, old, advantages, mask)
    assert terms.total.dtype == torch.float32
    exact = LOSSES[name](logps.double(), old.double(), advantages.double(), mask)
    torch.testing.assert_close(terms.total.double(), exact.total, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [25.0, 300.0, 1e5])
def test_a_ratio_beyond_all_measure_keeps_the_loss_and_its_gradient_finite(name, gap):
    """The gradient has the sign that the formula has, in single precision too."""
    logps = torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0 - gap]], requires_grad=True)
    old = torch.tensor([[-1.0 - gap], [-1.0 - gap], [-1.0 - gap], [-1.0]])
    advantages = torch.tensor([1.0, 0.0, -1.0, 1.0])
    terms = LOSSES[name](logps, old, advantages, torch.ones(4, 1).bool())
    terms.total.backward()
    assert torch.isfinite(terms.total) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(value).all() for value in terms.metrics.values())
    if name.startswith(("ppo", "gspo")):
        assert logps.grad[0].item() == 0 and logps.grad[1].item() == 0
        bounded = "asymmetric" in name or "log-ratios" in name  # by its delta, or its limit
        assert logps.grad[2].item() > 0 or bounded


def test_a_divergence_beyond_all_measure_pulls_the_right_way():
    logps = torch.tensor([-30.0, -1e5], requires_grad=True)
    estimates = kl_k3(logps, torch.zeros(2))
    estimates.sum().backward()
    assert torch.isfinite(estimates).all() and estimates[1] > estimates[0] > math.exp(20)
    assert (logps.grad <= -math.exp(19)).all(), "a likelier token is a smaller divergence"


def test_an_impossible_token_has_the_ratio_zero():
    logps = torch.tensor([[-math.inf, -1.0]])
    terms = ppo_clip(logps, torch.full((1, 2), -1.0), torch.ones(1), torch.ones(1, 2).bool())
    assert terms.total.item() == -1.0


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_bad_tensors_name_themselves(name):
    loss = LOSSES[name]
    logps, old, advantages, mask = draw(1, per_token=True)
    first, second, third = "logps", "old_logps", "advantages"
    if name == "value_loss":
        first, second, third = "values", "old_values", "returns"
    with pytest.raises(ValueError, match=f"{first} has shape \\(4, 5\\)"):
        loss(logps[:, 1:], old, advantages, mask)
    with pytest.raises(ValueError, match=f"{first} has dtype torch.int64"):
        loss(logps.long(), old, advantages, mask)
    if not name.startswith("reinforce"):
        with pytest.raises(ValueError, match=f"{second} has shape \\(3, 6\\)"):
            loss(logps, old[1:], advantages, mask)
    with pytest.raises(ValueError, match=f"{third} has shape \\(4, 5\\)"):
        loss(logps, old, advantages[:, 1:], mask)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 6\) and dtype torch.float64"):
        loss(logps, old, advantages, mask.double())
    with pytest.raises(ValueError, match=r"mask has shape \(24,\)"):
        loss(logps.flatten(), old.flatten(), advantages.flatten(), mask.flatten())
    mask[2, 3] = True
    for value in (NAN, math.inf):
        advantages[2, 3] = value
        with pytest.raises(ValueError, match=f"{third} has values that are not finite"):
            loss(logps, old, advantages, mask)


def test_a_wrong_number_of_advantages_is_not_broadcast():
    logps, old, _, mask = draw(1)
    for shape in ((6,), (1,), (4, 1), ()):
        with pytest.raises(ValueError, match="advantages has shape"):
            ppo_clip(logps, old, torch.ones(shape), mask)


@pytest.mark.parametrize("number", [0.0, -0.1, NAN, math.inf])
def test_bad_numbers_name_themselves(number):
    known = draw(1)
    for loss, name in (
        (ppo_clip, "epsilon"),
        (ppo_clip, "epsilon_high"),
        (gspo, "epsilon"),
        (gspo, "epsilon_high"),
        (cispo, "epsilon_high"),
        (cispo, "epsilon_low"),
        (pmd, "tau"),
        (dro, "beta"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            loss(*known, **{name: number})
    logps, old, _, mask = known
    with pytest.raises(ValueError, match="cliprange_value is"):
        value_loss(logps, old, old, mask, cliprange_value=number)


def test_bounds_that_cross_name_themselves():
    with pytest.raises(ValueError, match=r"epsilon_low is 6.0: it must lie in \(0, 5.0\)"):
        cispo(*draw(1), epsilon_low=6.0)
    for delta in (1.1, 1.28, NAN, math.inf):
        with pytest.raises(ValueError, match=r"delta is .* above 1 \+ epsilon_high = 1.28"):
            ppo_clip(*draw(1), epsilon_high=0.28, delta=delta)
    with pytest.raises(ValueError, match="logps has shape"):
        kl_k3(torch.zeros(2), torch.zeros(1))
