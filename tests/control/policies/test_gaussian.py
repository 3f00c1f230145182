import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

from holdfast.control.policies import GaussianPolicy, Normalizer

SIZES = {"observation_size": 5, "action_size": 3, "horizon": 4, "history": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(*, noise: float = 0.1, **changes) -> GaussianPolicy:
    """With weights away from their start, and normalisers that change something."""
    made = GaussianPolicy(
        **SIZES,
        **{"hidden": (32, 32)} | changes,
        observations=Normalizer.fit(3.0 + torch.randn(50, 5, generator=seeded(1))),
        actions=Normalizer.fit(2.0 * torch.randn(50, 3, generator=seeded(2))),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=seeded(3))
    return made


def observe(batch: int, seed: int = 4) -> torch.Tensor:
    return 3.0 + torch.randn(batch, 2, 5, generator=seeded(seed))


def rows(record, part):
    return {name: values[part] for name, values in record.items()}


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_the_ratio_is_one_before_the_first_update_however_the_batch_is_cut(batch, cut, learn_std):
    """In float32 a matrix product may round differently for another number of rows.

    A mean that is off by 1e-7 moves a log-probability by up to z / std of that at each number.
    """
    made = policy(learn_std=learn_std)
    observations = observe(batch)
    record = made.act(observations, seeded(5)).record
    assert torch.equal(made.log_probs(observations, record), record["log_probs"])
    for start in range(0, batch, cut):
        part = slice(start, start + cut)
        again = made.log_probs(observations[part], rows(record, part))
        ratio = torch.exp(again - record["log_probs"][part])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-5)


def test_in_double_precision_the_ratio_is_one_to_rounding():
    made, observations = policy().double(), observe(23).double()
    record = made.act(observations, seeded(5)).record
    again = torch.cat(
        [
            made.log_probs(observations[part], rows(record, part))
            for part in (slice(0, 1), slice(1, 9), slice(9, 23))
        ]
    )
    torch.testing.assert_close(again, record["log_probs"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("learn_std", [False, True])
def test_log_probabilities_are_those_of_a_diagonal_gaussian(learn_std):
    made, observations = policy(learn_std=learn_std).double(), observe(6).double()
    record = made.act(observations, seeded(5)).record
    mean = made.mean(observations)
    expected = Independent(Normal(mean, made.head.log_std().exp().expand_as(mean)), 2)
    torch.testing.assert_close(record["log_probs"], expected.log_prob(record["chunk"]).detach())


def test_positions_of_given_actions_sum_to_the_chunk():
    made, observations = policy(), observe(6)
    decision = made.act(observations, seeded(5))
    scores = made.position_log_probs(observations, decision.actions)
    assert scores.shape == (6, 4)
    torch.testing.assert_close(scores.sum(-1), decision.record["log_probs"], rtol=1e-4, atol=1e-4)


def test_samples_have_the_stated_mean_and_deviation():
    made = policy(std=0.3)
    observations = observe(1).expand(20_000, -1, -1)
    chunk = made.act(observations, seeded(6)).record["chunk"]
    error = 0.3 / math.sqrt(20_000)
    mean = made.mean(observations[:1])[0].detach()
    assert ((chunk.mean(0) - mean).abs() < 5 * error).all()
    assert (chunk.std(0) - 0.3).abs().max() < 5 * error


def test_actions_are_in_the_units_of_the_environment():
    made, observations = policy(), observe(6)
    decision = made.act(observations, seeded(5))
    middle = (made.actions.low + made.actions.high) / 2
    half = (made.actions.high - made.actions.low) / 2
    torch.testing.assert_close(decision.actions, middle + half * decision.record["chunk"])
    assert decision.actions.shape == (6, 4, 3)


def test_a_deterministic_decision_is_the_mean_and_leaves_the_generator_alone():
    made, observations, generator = policy(), observe(6), seeded(5)
    decision = made.act(observations, generator, deterministic=True)
    torch.testing.assert_close(
        decision.actions, made.actions.denormalize(made.mean(observations)).detach()
    )
    assert torch.equal(generator.get_state(), seeded(5).get_state())
    assert decision.record == {}


def test_a_gradient_reaches_every_trained_parameter_and_equals_finite_differences():
    made, observations = policy(learn_std=True).double(), observe(3).double()
    record = made.act(observations, seeded(5)).record
    parameters = [p for p in made.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(made.log_probs(observations, record).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.any()
        flat, index = parameter.data.view(-1), int(gradient.abs().argmax())
        ends = []
        for step in (1e-6, -2e-6):
            flat[index] += step
            ends.append(made.log_probs(observations, record).sum().item())
        flat[index] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(
            gradient.view(-1)[index].item(), rel=1e-5
        )


def test_a_learnt_deviation_starts_where_asked_stays_in_its_range_and_can_return():
    made = policy(noise=0.0, learn_std=True, std=0.1, std_range=(0.05, 0.5))
    torch.testing.assert_close(made.head.log_std().exp(), torch.full((3,), 0.1))
    for drift in (-8.0, 8.0):
        made.head.raw_std.data.fill_(drift)
        std = made.head.log_std().exp()
        assert ((std >= 0.05) & (std <= 0.5)).all()
        (gradient,) = torch.autograd.grad(made.head.log_std().sum(), made.head.raw_std)
        assert gradient.all()


def test_a_fixed_deviation_is_no_parameter_of_training():
    names = [name for name, p in policy().named_parameters() if p.requires_grad]
    assert names and not any("std" in name for name in names)


@pytest.mark.parametrize("bounded", [True, False])
def test_only_a_bounded_mean_stays_in_the_range(bounded):
    made = policy(noise=1.0, bounded=bounded)
    inside = made.mean(observe(50)).abs().max().item() <= 1.0
    assert inside is bounded


def test_what_hardly_moved_in_the_demonstrations_cannot_swamp_the_rest():
    made = policy(bounded=False)  # a tanh would saturate at both
    far, further = observe(1), observe(1)
    far[..., 2], further[..., 2] = 1e3, 1e6
    assert torch.equal(made.mean(far), made.mean(further))
    assert made.mean(far).isfinite().all()


def test_construction_and_acting_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, same = policy(), policy()
    decided = first.act(observe(3), seeded(5)).actions
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(decided, same.act(observe(3), seeded(5)).actions)


def test_a_policy_keeps_its_own_copy_of_a_normaliser():
    normalizer = Normalizer.identity(5)
    made = GaussianPolicy(5, 3, observations=normalizer)
    normalizer.low.fill_(-9.0)
    assert (made.observations.low == -1.0).all()


def test_bad_arguments_name_themselves():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name} is 0"):
            GaussianPolicy(**SIZES | {name: 0})
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std is"):
            policy(std=std)
    with pytest.raises(ValueError, match="std_range"):
        policy(learn_std=True, std=0.3)
    with pytest.raises(ValueError, match="observations normalises 4 dimensions: it must have 5"):
        GaussianPolicy(5, 3, observations=Normalizer.identity(4))
    with pytest.raises(ValueError, match=r"observations has shape \(6, 5\)"):
        policy().act(observe(6)[:, 0], seeded())
    with pytest.raises(ValueError, match=r"record\['chunk'\] has shape \(6, 3\)"):
        policy().log_probs(observe(6), {"chunk": torch.zeros(6, 3)})
    with pytest.raises(ValueError, match=r"actions has shape \(6, 2, 3\)"):
        policy().position_log_probs(observe(6), torch.zeros(6, 2, 3))
