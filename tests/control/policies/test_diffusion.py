import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal

from holdfast.control.losses.cloning import denoising
from holdfast.control.policies import DiffusionPolicy, Normalizer

SIZES = {"observation_size": 5, "action_size": 3, "horizon": 4, "history": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturb(module: nn.Module, seed: int, size: float = 0.1) -> None:
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def policy(*, fine_tuning: bool = False, **changes) -> DiffusionPolicy:
    """With weights away from their start; those of the two networks differ in fine-tuning."""
    made = DiffusionPolicy(
        **SIZES,
        **{"hidden": (32, 32), "steps": 10, "fine_tuned_steps": 4} | changes,
        observations=Normalizer.fit(3.0 + torch.randn(50, 5, generator=seeded(1))),
        actions=Normalizer.fit(2.0 * torch.randn(50, 3, generator=seeded(2))),
    )
    disturb(made.network, 3)
    if fine_tuning:
        made.begin_fine_tuning()
        disturb(made.network, 4)
    return made


def observe(batch: int, seed: int = 5) -> torch.Tensor:
    return 3.0 + torch.randn(batch, 2, 5, generator=seeded(seed))


def rows(record, part):
    return {name: values[part] for name, values in record.items()}


STRIDED = {"sampler": "ddim", "sampling_steps": 5}


# The record ---------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.booleans(),
    st.sampled_from([{}, STRIDED, {"fine_tuned_steps": 10}, {"fine_tuned_steps": 1}]),
)
def test_the_ratio_is_one_before_the_first_update_however_the_batch_is_cut(
    batch, cut, fine_tuning, changes
):
    """To float32's rounding: see the same test of the Gaussian policy."""
    made, observations = policy(fine_tuning=fine_tuning, **changes), observe(batch)
    record = made.act(observations, seeded(6)).record
    assert record["chain"].shape == (batch, made.fine_tuned_steps + 1, 4, 3)
    assert record["log_probs"].shape == (batch, made.fine_tuned_steps)
    for start in range(0, batch, cut):
        part = slice(start, start + cut)
        again = made.log_probs(observations[part], rows(record, part))
        ratio = torch.exp(again - record["log_probs"][part])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-5)


@pytest.mark.parametrize("changes", [{}, STRIDED, {"min_log_prob_std": 0.4}])
def test_in_double_precision_the_ratio_is_one_to_rounding(changes):
    made, observations = policy(fine_tuning=True, **changes).double(), observe(23).double()
    record = made.act(observations, seeded(6)).record
    again = torch.cat(
        [
            made.log_probs(observations[part], rows(record, part))
            for part in (slice(0, 1), slice(1, 9), slice(9, 23))
        ]
    )
    torch.testing.assert_close(again, record["log_probs"], rtol=0, atol=1e-11)


def test_single_steps_drawn_over_rows_and_steps_have_the_log_probabilities_of_their_chain():
    made, observations = policy(fine_tuning=True).double(), observe(7).double()
    record = made.act(observations, seeded(6)).record
    row = torch.tensor([6, 0, 3, 3, 2])
    position = torch.tensor([0, 3, 1, 2, 3])
    found = made.step_log_probs(
        observations[row],
        record["chain"][row, position],
        record["chain"][row, position + 1],
        position,
    )
    torch.testing.assert_close(found, record["log_probs"][row, position])


def test_log_probabilities_are_those_of_the_steps_that_diffusers_describes():
    made, observations = policy(min_log_prob_std=0.3).double(), observe(6).double()
    record = made.act(observations, seeded(6)).record
    oracle = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    features = made.features(observations)
    for position, time in enumerate((3, 2, 1, 0)):
        before, after = record["chain"][:, position], record["chain"][:, position + 1]
        predicted = made.network(features, before.flatten(1), torch.full((6,), time))
        # The mean is what is left of a step when its noise is taken off.
        drawn = oracle.step(predicted.view_as(before), time, before, generator=seeded(7))
        std = oracle._get_variance(time).double().sqrt() if time else torch.tensor(0.0)
        mean = drawn.prev_sample - std * torch.randn(
            before.shape, generator=seeded(7), dtype=torch.float64
        )
        expected = Independent(Normal(mean, std.clamp(min=0.3)), 2).log_prob(after)
        torch.testing.assert_close(record["log_probs"][:, position], expected, rtol=1e-5, atol=1e-4)


def test_the_chain_ends_in_the_actions():
    made, observations = policy(), observe(6)
    decision = made.act(observations, seeded(6))
    torch.testing.assert_close(
        decision.actions, made.actions.denormalize(decision.record["chain"][:, -1])
    )


# Sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("changes", [{}, STRIDED])
def test_the_sampler_is_the_loop_of_diffusers_with_the_same_noise(changes, deterministic):
    made = policy(min_sampling_std=0.0, clip_noise=math.inf, **changes)
    observations = observe(6)
    found = made.act(observations, seeded(6), deterministic=deterministic).actions

    generator = seeded(6)
    chunk = torch.randn(6, 4, 3, generator=generator)
    is_ddim = "sampler" in changes
    oracle = (DDIMScheduler if is_ddim else DDPMScheduler)(
        10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    oracle.set_timesteps(made.sampling_steps)
    features = made.features(observations)
    with torch.no_grad():
        for time in oracle.timesteps:
            predicted = made.network(features, chunk.flatten(1), time.expand(6)).view_as(chunk)
            options = {"generator": generator}
            if is_ddim:
                options |= {"eta": float(not deterministic), "use_clipped_model_output": True}
            chunk = oracle.step(predicted, time, chunk, **options).prev_sample
    torch.testing.assert_close(found, made.actions.denormalize(chunk), rtol=1e-4, atol=1e-4)


class Optimal(nn.Module):
    """Predicts the noise in chunks whose numbers are drawn from ``N(mean, std^2)``, exactly.

    Of ``x = a x0 + b eps`` the expected noise is ``b (x - a mean) / (a^2 std^2 + b^2)``.
    """

    def __init__(self, made: DiffusionPolicy, mean: float, std: float) -> None:
        super().__init__()
        self.signal, self.noise, self.mean, self.std = made._signal, made._noise, mean, std

    def forward(self, features, noisy, timesteps):
        signal, noise = self.signal[timesteps, None], self.noise[timesteps, None]
        variance = (signal * self.std).square() + noise.square()
        return noise * (noisy - signal * self.mean) / variance


def closed_form(made: DiffusionPolicy, mean: float, std: float, quiet: int) -> tuple[float, float]:
    """Mean and deviation of samples under ``Optimal``, where every step is affine.

    The clean number expected from ``x`` is ``mean + gain (x - a mean)``.
    """
    centre, variance = 0.0, 1.0
    for index, time in enumerate(made._timesteps.tolist()):
        a, b = made._signal[time].item(), made._noise[time].item()
        gain = a * std**2 / (a**2 * std**2 + b**2)
        to_clean = made._to_clean[quiet, index].item()
        slope = to_clean * gain + made._to_noisy[quiet, index].item()
        centre = slope * centre + to_clean * (1 - gain * a) * mean
        variance = slope**2 * variance + made._std[quiet, index].item() ** 2
    return centre, math.sqrt(variance)


@pytest.mark.parametrize("changes", [{}, {"sampler": "ddim", "sampling_steps": 50}])
@pytest.mark.parametrize("deterministic", [False, True])
def test_with_the_best_prediction_samples_have_the_mean_and_variance_of_the_data(
    changes, deterministic
):
    """As precisely as the number of steps allows, which is known in closed form."""
    mean, std, batch = 0.4, 0.3, 10_000
    made = DiffusionPolicy(
        1,
        2,
        horizon=2,
        steps=100,
        min_sampling_std=0.0,
        clip_noise=math.inf,
        clip_sample=None,
        hidden=(4,),
        **changes,
    )
    centre, deviation = closed_form(made, mean, std, int(deterministic))
    assert centre == pytest.approx(mean, abs=0.01)
    assert deviation == pytest.approx(std, rel=0.1)
    made.average, made.network = None, Optimal(made, mean, std)
    chunks = made.act(torch.zeros(batch, 1, 1), seeded(8), deterministic=deterministic).actions
    numbers = chunks.flatten()
    error = deviation / math.sqrt(len(numbers))
    assert numbers.mean().item() == pytest.approx(centre, abs=4 * error)
    assert numbers.std().item() == pytest.approx(deviation, abs=4 * error / math.sqrt(2))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("quiet", [0, 1])
def test_more_steps_come_closer_to_the_data(sampler, quiet):
    gaps = []
    for steps in (5, 20, 80, 320):
        made = DiffusionPolicy(1, 1, steps=steps, fine_tuned_steps=1, hidden=(4,), sampler=sampler)
        centre, deviation = closed_form(made, 0.4, 0.3, quiet)
        gaps.append(abs(centre - 0.4) + abs(deviation - 0.3))
    assert all(later < 0.5 * earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert gaps[-1] < 0.01


def test_exploration_has_a_floor_and_evaluation_ends_without_noise():
    made, observations = policy(min_sampling_std=0.5), observe(2000, 9)
    record = made.act(observations, seeded(6)).record
    features, before = made.features(observations), record["chain"][:, -2]
    predicted = made.network(features, before.flatten(1), torch.zeros(2000, dtype=torch.int64))
    clean = (before - made._noise[0] * predicted.view_as(before)) / made._signal[0]
    added = (record["chain"][:, -1] - clean.clamp(-1, 1)).detach()
    assert added.std().item() == pytest.approx(0.5, rel=0.02)
    quiet = made.act(observations, seeded(6), deterministic=True)
    assert made.actions.normalize(quiet.actions).abs().max() <= 1 + 1e-5
    assert quiet.record == {}


def test_noise_is_clipped():
    made = policy(clip_noise=0.2, min_sampling_std=0.1, fine_tuned_steps=1)
    record = made.act(observe(500), seeded(6)).record
    observations, before = observe(500), record["chain"][:, 0]
    predicted = made.network(
        made.features(observations), before.flatten(1), torch.zeros(500, dtype=torch.int64)
    )
    clean = (before - made._noise[0] * predicted.view_as(before)) / made._signal[0]
    added = (record["chain"][:, 1] - clean.clamp(-1, 1)).detach()
    assert added.abs().max().item() == pytest.approx(0.1 * 0.2, rel=1e-3)


# Cloning ------------------------------------------------------------------------------------------


def test_the_denoising_loss_does_not_depend_on_how_the_batch_is_cut_or_what_is_beyond_its_end():
    made, observations = policy().double(), observe(9).double()
    actions = torch.randn(9, 4, 3, generator=seeded(10), dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 4, 1, 2, 4, 3, 4, 1, 4])[:, None]
    timesteps, noise = made.draw_noise(9, seeded(11))

    def gradient(parts, actions):
        made.zero_grad()
        for part in parts:
            predicted = made.predict_noise(
                observations[part], actions[part], timesteps[part], noise[part], mask[part]
            )
            denoising(predicted, noise[part], mask[part]).total.backward()
        return torch.cat([p.grad.flatten() for p in made.network.parameters()])

    whole = gradient([slice(None)], actions)
    assert whole.any()
    beyond = actions.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(gradient([slice(0, 2), slice(2, 9)], actions), whole)
    torch.testing.assert_close(gradient([slice(None)], beyond), whole)


def test_what_the_network_sees_is_the_forward_process_of_diffusers():
    made, observations = policy(), observe(6)
    actions = torch.randn(6, 4, 3, generator=seeded(10))
    timesteps, noise = made.draw_noise(6, seeded(11))
    oracle = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    noisy = oracle.add_noise(made.actions.normalize(actions), noise, timesteps)
    expected = made.network(made.features(observations), noisy.flatten(1), timesteps)
    found = made.predict_noise(observations, actions, timesteps, noise)
    torch.testing.assert_close(found, expected.view_as(found))


@pytest.mark.parametrize(
    ("changes", "highest"), [({}, 3), (STRIDED | {"fine_tuned_steps": 2}, 3), (STRIDED, 7)]
)
def test_steps_are_drawn_evenly_from_all_or_from_those_that_are_fine_tuned(changes, highest):
    """Of 10 steps DDPM fine-tunes 0 to 3; DDIM by twos, ``9 7 5 3 1``, ends with ``3 1``."""
    made = policy(**changes)
    for steps, top in (("all", 9), ("fine-tuned", highest)):
        timesteps, noise = made.draw_noise(4000, seeded(12), steps=steps)
        counts = torch.bincount(timesteps)
        assert len(counts) == top + 1
        expected = 4000 / (top + 1)
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
        assert noise.shape == (4000, 4, 3)
        assert noise.std().item() == pytest.approx(1.0, abs=0.02)


def test_cloning_learns_a_distribution_with_two_modes():
    """Actions are near -0.8 or 0.8, by the sign of the observation; a mean would be 0 off both."""
    generator = seeded(13)
    made = DiffusionPolicy(1, 1, hidden=(64, 64), activation="relu", steps=10, fine_tuned_steps=5)
    optimizer = torch.optim.Adam(made.network.parameters(), 3e-3)
    for _ in range(250):
        signs = torch.randint(2, (128, 1, 1), generator=generator) * 2.0 - 1.0
        # Where the observation is 0 both occur.
        seen = signs * torch.randint(2, (128, 1, 1), generator=generator)
        timesteps, noise = made.draw_noise(128, generator)
        predicted = made.predict_noise(seen, 0.8 * signs, timesteps, noise)
        terms = denoising(predicted, noise, torch.ones(128, 1, dtype=torch.bool))
        optimizer.zero_grad()
        (terms.total / terms.count).backward()
        optimizer.step()
        made.update_average()

    def act(observation):
        observations = torch.full((400, 1, 1), observation)
        return made.act(observations, seeded(14), deterministic=True).actions.flatten()

    assert (act(1.0) - 0.8).abs().mean() < 0.15 and (act(-1.0) + 0.8).abs().mean() < 0.15
    both = act(0.0)
    assert (both.abs() - 0.8).abs().mean() < 0.3  # 0.8 for a mean
    assert 0.3 < (both > 0).float().mean() < 0.7


# The average and fine-tuning ----------------------------------------------------------------------


def test_evaluation_acts_with_the_average_and_exploration_with_the_weights():
    made, observations = policy(), observe(6)
    before = made.act(observations, seeded(6), deterministic=True).actions
    made.update_average()
    disturb(made.network, 20)
    assert torch.equal(made.act(observations, seeded(6), deterministic=True).actions, before)
    record = made.act(observations, seeded(6)).record
    again = made.log_probs(observations, record)
    torch.testing.assert_close(again, record["log_probs"], rtol=0, atol=1e-4)


def test_an_average_that_saw_nothing_is_not_used():
    made, without = policy(), policy(average_decay=None)
    for each in (made, without):
        each.begin_fine_tuning()
    observations = observe(6)
    assert torch.equal(
        made.act(observations, seeded(6)).actions, without.act(observations, seeded(6)).actions
    )


def test_fine_tuning_starts_exactly_where_evaluation_was():
    made, observations = policy(), observe(6)
    made.update_average()
    disturb(made.network, 20)
    before = made.act(observations, seeded(6), deterministic=True).actions
    made.begin_fine_tuning()
    assert torch.equal(made.act(observations, seeded(6), deterministic=True).actions, before)
    assert made.average is None and made.fine_tuning
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.begin_fine_tuning()
    assert all(torch.equal(state[name], tensor) for name, tensor in made.state_dict().items())


def test_fine_tuning_trains_one_network_and_only_the_last_steps_use_it():
    made, observations = policy(), observe(6)
    made.begin_fine_tuning()
    start = made.act(observations, seeded(6)).record["chain"]
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("network.") for name in trained)
    assert any(name.startswith("frozen.") for name in made.state_dict())
    record = made.act(observations, seeded(6)).record
    made.log_probs(observations, record).sum().backward()
    assert all(p.grad is None for p in made.frozen.parameters())
    assert all(p.grad is not None for p in made.network.parameters())
    disturb(made.network, 21)
    chain = made.act(observations, seeded(6)).record["chain"]
    assert torch.equal(chain[:, 0], start[:, 0])
    assert not torch.allclose(chain[:, 1], start[:, 1])


@pytest.mark.parametrize("fine_tuning", [False, True])
def test_a_state_goes_to_a_policy_of_the_same_stage(fine_tuning):
    made, other = policy(fine_tuning=fine_tuning), policy(fine_tuning=fine_tuning)
    made.update_average()
    disturb(made.network, 22)
    other.load_state_dict(made.state_dict())
    observations = observe(6)
    for deterministic in (False, True):
        assert torch.equal(
            made.act(observations, seeded(6), deterministic=deterministic).actions,
            other.act(observations, seeded(6), deterministic=deterministic).actions,
        )
    with pytest.raises(RuntimeError, match="frozen"):
        policy(fine_tuning=not fine_tuning).load_state_dict(made.state_dict())


def test_a_gradient_of_the_log_probabilities_equals_finite_differences():
    made, observations = policy(fine_tuning=True).double(), observe(3).double()
    record = made.act(observations, seeded(6)).record
    parameters = list(made.network.parameters())
    gradients = torch.autograd.grad(made.log_probs(observations, record).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat, index = parameter.data.view(-1), int(gradient.abs().argmax())
        ends = []
        for step in (1e-6, -2e-6):
            flat[index] += step
            ends.append(made.log_probs(observations, record).sum().item())
        flat[index] += 1e-6
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(gradient.view(-1)[index].item(), rel=1e-4)


def test_construction_and_acting_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    made = policy(fine_tuning=True)
    made.act(observe(3), seeded(6))
    made.draw_noise(3, seeded(6))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_arguments_name_themselves():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name} is 0"):
            DiffusionPolicy(**SIZES | {name: 0})
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"fine_tuned_steps is {count}: it must lie in"):
            policy(fine_tuned_steps=count)
    with pytest.raises(ValueError, match="min_sampling_std is -0.1"):
        policy(min_sampling_std=-0.1)
    for name in ("min_log_prob_std", "clip_noise", "clip_sample"):
        with pytest.raises(ValueError, match=f"{name} is 0.0"):
            policy(**{name: 0.0})
    with pytest.raises(ValueError, match="steps is 'some': it must be one of all, fine-tuned"):
        policy().draw_noise(3, seeded(), steps="some")
    with pytest.raises(ValueError, match=r"record\['chain'\] has shape \(6, 4, 4, 3\)"):
        policy().log_probs(observe(6), {"chain": torch.zeros(6, 4, 4, 3)})
    with pytest.raises(ValueError, match=r"observations has shape \(6, 1, 5\)"):
        policy().act(observe(6)[:, :1], seeded())
